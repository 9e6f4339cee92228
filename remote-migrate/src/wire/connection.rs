//! One stream, its session and the bytes between them. All waiting of a connection is here.
//!
//! Decides nothing: a message goes to the [`Session`], and what that has to say goes out. Memory is
//! bounded by one frame each way and [`OUT_LIMIT`], whatever the other side sends or does not read.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{Buf as _, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::{Instant, sleep_until, timeout},
};

use super::{
    error::WireError,
    frame::{self, Decoder},
    message::{Fault, Message},
    session::{Event, Now, Role, Session, SessionError, Terms},
};
use crate::phase::Reason;

/// Bytes read at once.
const PIECE: usize = 8 * 1024;

/// With more than this waiting to be sent, nothing more is read: a peer that asks must also listen.
const OUT_LIMIT: usize = 64 * 1024;

/// How long a peer is given to read a last word. A socket closed with bytes unread would take it back.
const FAREWELL: Duration = Duration::from_secs(1);

pub(super) struct Connection<S> {
    stream: S,
    session: Session,
    decoder: Decoder,
    out: BytesMut,
    flushed: bool,
    /// Bytes ever put into `out`, and of those the ones the stream took.
    queued: u64,
    taken: u64,
    /// Nothing can be sent any more; what came before may say why.
    broken: Option<io::Error>,
    began: Instant,
}

/// A place in the outgoing bytes.
#[derive(Clone, Copy)]
pub(super) struct Mark(u64);

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn new(stream: S, role: Role, terms: Terms) -> Self {
        let began = Instant::now();
        Self {
            stream,
            session: Session::new(role, terms, now(began)),
            decoder: Decoder::new(),
            out: BytesMut::new(),
            flushed: true,
            queued: 0,
            taken: 0,
            broken: None,
            began,
        }
    }

    pub(super) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Puts all that the session has to say behind what is on its way; the end of it.
    pub(super) fn pack(&mut self) -> Result<Mark, WireError> {
        while let Some(message) = self.session.outgoing() {
            self.put(&message)?;
        }
        Ok(Mark(self.queued))
    }

    /// Whether the stream never took the byte before `mark`. The frame that ends there was never whole for
    /// the other side then, and never will be.
    pub(super) fn held_back(&self, mark: Mark) -> bool {
        self.taken < mark.0
    }

    /// Sends and receives until something is to be told. May be dropped at any time and called again.
    pub(super) async fn event(&mut self) -> Result<Event, WireError> {
        loop {
            while let Some(frame) = self.decoder.next_frame()? {
                let message = serde_json::from_slice(&frame)
                    .map_err(|error| SessionError::Malformed(Reason::of(&error)))?;
                if let Some(event) = self.session.message(message, now(self.began))? {
                    return Ok(event);
                }
            }
            // Only now: what has come is heard, however late this task got to read it.
            self.session
                .tick(now(self.began), self.decoder.unfinished())?;
            self.pack()?;
            let wake = sleep_until(self.began + self.session.wake().min(FAR));
            tokio::select! {
                biased;
                moved = poll_fn(|context| self.poll_move(context)) => moved?,
                () = wake => {}
            }
        }
    }

    /// Tells the other side why, if there is anything to tell, and gives it a moment to read that.
    ///
    /// What was held back so far stays so: nothing follows half a frame, and nothing is sent any more
    /// that its sender believes unsent.
    pub(super) async fn hang_up(mut self, fault: Option<Fault>) {
        let Some(fault) = fault.filter(|_| self.out.is_empty() && self.broken.is_none()) else {
            return;
        };
        let farewell = async {
            self.put(&Message::Fault(fault)).ok()?;
            self.stream.write_all(&self.out).await.ok()?;
            self.stream.shutdown().await.ok()?;
            let mut left = frame::LIMIT;
            let mut piece = [0; PIECE];
            while left > 0 {
                match self.stream.read(&mut piece).await {
                    Ok(0) | Err(_) => break,
                    Ok(length) => left = left.saturating_sub(length),
                }
            }
            Some(())
        };
        // It is a courtesy: whether the peer took it changes nothing here.
        let _ = timeout(FAREWELL, farewell).await;
    }

    fn put(&mut self, message: &Message) -> Result<(), WireError> {
        let payload = serde_json::to_vec(message).expect("messages are maps with text for keys");
        let before = self.out.len();
        frame::encode(&payload, &mut self.out)?;
        self.queued += (self.out.len() - before) as u64;
        Ok(())
    }

    /// Ready once anything was sent or has come.
    fn poll_move(&mut self, context: &mut Context<'_>) -> Poll<Result<(), WireError>> {
        let sent = self.poll_send(context).is_ready();
        if self.out.len() >= OUT_LIMIT {
            return if sent {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            };
        }
        match self.poll_receive(context) {
            Poll::Pending if sent => Poll::Ready(Ok(())),
            other => other,
        }
    }

    /// Ready if the stream took something, or takes nothing any more.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.broken.is_some() {
            return Poll::Pending;
        }
        let mut stream = Pin::new(&mut self.stream);
        let done = if self.out.is_empty() {
            if self.flushed {
                return Poll::Pending;
            }
            ready!(stream.poll_flush(context)).map(|()| self.flushed = true)
        } else {
            match ready!(stream.as_mut().poll_write(context, &self.out)) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => {
                    self.out.advance(length);
                    self.taken += length as u64;
                    self.flushed = false;
                    Ok(())
                }
                Err(error) => Err(error),
            }
        };
        if let Err(error) = done {
            self.broken = Some(error);
            self.out.clear();
        }
        Poll::Ready(())
    }

    fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<(), WireError>> {
        let mut piece = [0; PIECE];
        let mut buffer = ReadBuf::new(&mut piece);
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer));
        Poll::Ready(match (read, buffer.filled()) {
            (Ok(()), []) => Err(match self.broken.take() {
                Some(error) => WireError::io("send to")(error),
                None => WireError::Closed,
            }),
            (Ok(()), filled) => {
                self.decoder.space().extend_from_slice(filled);
                Ok(())
            }
            (Err(error), _) => Err(WireError::io("hear")(error)),
        })
    }
}

/// Thirty years: later than any timer, sooner than the end of an `Instant`.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

fn now(began: Instant) -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = wall.map_or(0, |since| {
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    });
    Now {
        elapsed: began.elapsed(),
        wall: nanos,
    }
}
