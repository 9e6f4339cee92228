//! [`WirePeer`]: the asking end over a stream that can be dialled again.
//!
//! A task owns the connection, so that it beats while nobody asks. Whoever gives a request up closes the
//! connection with it: no answer is ever taken for that of another request, and no half frame is followed
//! by another. What a lost connection means for the guest is decided elsewhere, from
//! [`PeerError::effect`](crate::PeerError::effect) alone.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

use super::{
    Options,
    clock::ClockOffset,
    connection::{Connection, Mark},
    dial::{Dial, Stream},
    error::WireError,
    identity::PeerIdentity,
    link::Link,
    session::{Event, Role, SessionError},
};
use crate::{
    message::{Answer, Request, Underway},
    peer::{Peer, PeerError},
    phase::Reason,
};

/// A daemon that is asked over a wire. A clone asks over the same connection.
///
/// Nothing is dialled before the first request, and a connection that turns out dead before the whole
/// request has left is dialled once more within its deadline.
#[derive(Clone)]
pub struct WirePeer {
    inner: Arc<Inner>,
}

struct Inner {
    dial: Box<dyn Dial>,
    options: Options,
    link: Link,
    /// The connection, while no request is on it.
    idle: Mutex<Option<Handle>>,
    /// What the other side is told in passing.
    underway: watch::Sender<Option<Underway>>,
}

/// The task that owns a connection. It hangs up when this is dropped.
struct Handle(mpsc::Sender<Ask>);

struct Ask {
    request: Request,
    deadline: Instant,
    reply: oneshot::Sender<Result<Answer, Failure>>,
}

struct Failure {
    error: WireError,
    /// The whole request may have left.
    sent: bool,
}

impl WirePeer {
    /// The daemon that `dial` reaches, if `options` allow who is there.
    #[must_use]
    pub fn new(dial: impl Dial + 'static, options: Options) -> Self {
        Self {
            inner: Arc::new(Inner {
                dial: Box::new(dial),
                options,
                link: Link::new(),
                idle: Mutex::new(None),
                underway: watch::Sender::new(None),
            }),
        }
    }

    /// How the connection stands, and how far the other side's clock is.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.inner.link
    }
}

#[async_trait]
impl Peer for WirePeer {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let idle = timeout_at(deadline, self.inner.idle.lock()).await;
        let mut idle = idle.map_err(|_| PeerError::not_sent(WireError::Busy))?;
        if let Some(handle) = idle.take() {
            match handle.ask(request.clone(), deadline).await {
                // Another connection would settle on the same features.
                Err(failure) if failure.is_untold() => {
                    *idle = Some(handle);
                    return Err(failure.into());
                }
                // It died while nobody asked.
                Err(Failure { sent: false, .. }) if Instant::now() < deadline => {}
                Err(failure) => return Err(failure.into()),
                Ok(answer) => {
                    *idle = Some(handle);
                    return Ok(answer);
                }
            }
        }
        let connecting = self.inner.connect(deadline);
        let handle = connecting.await.map_err(PeerError::not_sent)?;
        let answer = handle.ask(request, deadline).await?;
        *idle = Some(handle);
        Ok(answer)
    }

    fn clock(&self) -> Option<ClockOffset> {
        self.inner.link.clock()
    }

    fn tell(&self, underway: Underway) {
        self.inner.underway.send_replace(Some(underway));
    }
}

impl Failure {
    fn is_untold(&self) -> bool {
        matches!(self.error, WireError::Session(SessionError::Untold))
    }
}

impl From<Failure> for PeerError {
    fn from(Failure { error, sent }: Failure) -> Self {
        match error {
            WireError::Session(error @ SessionError::Untold) => Self::untold(error),
            error if sent => Self::no_answer(error),
            error => Self::not_sent(error),
        }
    }
}

impl Inner {
    async fn connect(&self, deadline: Instant) -> Result<Handle, WireError> {
        let began = Instant::now();
        let limit = deadline.min(began + self.options.connect);
        let late = |_| WireError::Late {
            after: began.elapsed(),
        };
        let dialling = timeout_at(limit, self.dial.dial(limit));
        let dialled =
            dialling
                .await
                .map_err(late)?
                .map_err(|cause| match cause.downcast::<WireError>() {
                    Ok(known) => *known,
                    Err(cause) => WireError::Dial(cause),
                })?;
        self.options.allow.check(&dialled.identity)?;
        let terms = self.options.terms();
        let mut connection = Connection::new(dialled.stream, Role::Asks, terms);
        let greeting = async {
            while connection.event().await? != Event::Open {}
            Ok::<_, WireError>(())
        };
        match timeout_at(limit, greeting).await.map_err(late)? {
            Ok(()) => {}
            Err(error) => {
                // On its own time: the deadline of the request may be near.
                tokio::spawn(connection.hang_up(error.fault()));
                return Err(error);
            }
        }
        let (asks, inbox) = mpsc::channel(1);
        let underway = self.underway.subscribe();
        let link = self.link.clone();
        tokio::spawn(keep(connection, inbox, underway, link, dialled.identity));
        Ok(Handle(asks))
    }
}

impl Handle {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, Failure> {
        let unsent = |error| Failure { error, sent: false };
        let (reply, answer) = oneshot::channel();
        let ask = Ask {
            request,
            deadline,
            reply,
        };
        self.0
            .try_send(ask)
            .map_err(|_| unsent(WireError::Closed))?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(answer)) => answer,
            // Its task is gone with the request in its hands.
            Ok(Err(_)) => Err(Failure {
                error: WireError::Closed,
                sent: true,
            }),
            Err(_) => Err(Failure {
                error: WireError::NoAnswer,
                sent: true,
            }),
        }
    }
}

/// A request on its way: who waits, and where in the outgoing bytes it ends.
struct Waiting {
    reply: oneshot::Sender<Result<Answer, Failure>>,
    end: Mark,
}

/// Keeps a connection until its owner or a request is given up, or it breaks.
async fn keep(
    mut connection: Connection<Box<dyn Stream>>,
    mut inbox: mpsc::Receiver<Ask>,
    mut underway: watch::Receiver<Option<Underway>>,
    link: Link,
    identity: PeerIdentity,
) {
    let number = link.opened(&identity, connection.session().agreed());
    let mut waiting: Option<Waiting> = None;
    let error = loop {
        let idle = waiting.is_none();
        let given_up = async {
            match &mut waiting {
                Some(waiting) => waiting.reply.closed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = connection.event() => match event {
                Ok(Event::Answer(answer)) => {
                    if let Some(waiting) = waiting.take() {
                        // Nobody waits any more: then the inbox is closed as well.
                        let _ = waiting.reply.send(Ok(answer));
                    }
                }
                Ok(Event::Beat) => link.measured(connection.session().clock()),
                Ok(Event::Open | Event::Request { .. } | Event::Underway(_)) => {}
                Err(error) => break error,
            },
            () = given_up => return link.closed(number, None),
            Ok(()) = underway.changed() => {
                let last = *underway.borrow_and_update();
                if let Some(underway) = last {
                    connection.session().tell(underway);
                }
            }
            ask = inbox.recv(), if idle => {
                let Some(ask) = ask else { return link.closed(number, None) };
                match post(&mut connection, ask) {
                    Ok(posted) => waiting = Some(posted),
                    // It was never put on the stream, which is as good as before.
                    Err((reply, error)) => {
                        let _ = reply.send(Err(Failure { error, sent: false }));
                    }
                }
            }
        }
    };
    tracing::warn!(peer = %identity, why = %Reason::of(&error), "connection to migration peer lost");
    link.closed(number, Some(Reason::of(&error)));
    let fault = error.fault();
    if let Some(Waiting { reply, end }) = waiting {
        let sent = !connection.held_back(end);
        let _ = reply.send(Err(Failure { error, sent }));
    }
    // A request that came just now was never looked at.
    inbox.close();
    while let Ok(ask) = inbox.try_recv() {
        let (error, sent) = (WireError::Closed, false);
        let _ = ask.reply.send(Err(Failure { error, sent }));
    }
    connection.hang_up(fault).await;
}

type Unposted = (oneshot::Sender<Result<Answer, Failure>>, WireError);

fn post(
    connection: &mut Connection<Box<dyn Stream>>,
    Ask {
        request,
        deadline,
        reply,
    }: Ask,
) -> Result<Waiting, Unposted> {
    let within = deadline.saturating_duration_since(Instant::now());
    let posted = match connection.session().ask(request, within) {
        Ok(()) => connection.pack(),
        Err(error) => Err(error.into()),
    };
    match posted {
        Ok(end) => Ok(Waiting { reply, end }),
        Err(error) => Err((reply, error)),
    }
}
