//! [`serve_connection`]: the answering end of one stream.
//!
//! One request at a time; while it is served, beats go on. How many connections there are is up to whoever
//! accepts them: each costs one frame each way at most.

use std::{future::Future, pin::Pin};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout_at},
};

use super::{
    Options,
    connection::Connection,
    error::WireError,
    identity::PeerIdentity,
    link::Link,
    session::{Event, Role},
};
use crate::{
    message::{Answer, Reply, Request},
    peer::Service,
    phase::Reason,
};

/// Serves what comes over `stream` until the other side hangs up.
///
/// `identity` is who the caller knows to be there; if `options` do not allow it, it is told so and nothing
/// of what it sends is looked at. `link` shows the connection, and the other side's clock.
///
/// # Errors
///
/// [`WireError::Refused`]: it may not connect. Else why the connection broke; a request that was under way
/// goes on, and its answer is there when it is asked again.
///
/// # Cancel safety
///
/// Dropping the future closes the connection, which tears nothing: see [`Service::serve`].
pub async fn serve_connection<S>(
    stream: S,
    identity: &PeerIdentity,
    service: &dyn Service,
    options: &Options,
    link: &Link,
) -> Result<(), WireError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let mut connection = Connection::new(stream, Role::Answers, options.terms());
    let allowed = options.allow.check(identity).map_err(WireError::from);
    let served = match allowed {
        Ok(()) => serve(&mut connection, identity, service, options, link).await,
        Err(refused) => Err(refused),
    };
    let Err(error) = served else { return Ok(()) };
    tracing::warn!(peer = %identity, why = %Reason::of(&error), "connection of migration peer lost");
    connection.hang_up(error.fault()).await;
    Err(error)
}

type Serving<'a> = Pin<Box<dyn Future<Output = Answer> + Send + 'a>>;

async fn serve<S>(
    connection: &mut Connection<S>,
    identity: &PeerIdentity,
    service: &dyn Service,
    options: &Options,
    link: &Link,
) -> Result<(), WireError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let mut open = Open {
        link,
        number: 0,
        lost: None,
    };
    let mut serving: Option<Serving<'_>> = None;
    let error = loop {
        let answer = async {
            match &mut serving {
                Some(serving) => serving.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = connection.event() => match event {
                Ok(Event::Open) => {
                    open.number = link.opened(identity, connection.session().agreed());
                }
                Ok(Event::Request { within, request }) => {
                    let deadline = Instant::now() + within.min(options.longest);
                    serving = Some(Box::pin(by_deadline(service, request, deadline)));
                }
                Ok(Event::Beat) => link.measured(connection.session().clock()),
                Ok(Event::Underway(underway)) => service.hear(underway),
                Ok(Event::Answer(_)) => {}
                Err(error) => break error,
            },
            answer = answer => {
                serving = None;
                connection.session().answer(answer)?;
            }
        }
    };
    match error {
        WireError::Closed if serving.is_none() => Ok(()),
        error => {
            open.lost = Some(Reason::of(&error));
            Err(error)
        }
    }
}

/// Serves a request, and answers in place of a service that does not.
async fn by_deadline(service: &dyn Service, request: Request, deadline: Instant) -> Answer {
    let (migration, epoch) = (request.migration, request.epoch);
    match timeout_at(deadline, service.serve(request, deadline)).await {
        Ok(answer) => answer,
        Err(_) => Answer {
            migration,
            epoch,
            reply: Reply::Busy(Reason::new("not served by its deadline")),
            trouble: None,
            resumed: None,
        },
    }
}

/// Shows that the connection is over, also when serving it is dropped.
struct Open<'a> {
    link: &'a Link,
    number: u64,
    lost: Option<Reason>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.link.closed(self.number, self.lost.take());
    }
}
