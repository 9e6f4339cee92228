//! The only place that reads and writes an agent's stream.
//!
//! It carries out what [`Protocol`](crate::protocol::Protocol) decides and knows no command by name. One
//! call is under way at a time; who comes next is the handle's affair. It never waits for anything
//! but its own `select`, so a call is answered by its deadline whatever the guest does.

use std::future::pending;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::agent::{Options, Reply, Request};
use crate::error::{Closed, Effect, Error};
use crate::protocol::{Phase, Proof, Protocol, Signal, Step};

/// One read. Small, since a thousand idle connections hold one each.
const READ: usize = 4 * 1024;

/// What a handle wants. One queue for both, so that a signal noted before a call stays before it.
#[derive(Debug)]
pub(crate) enum Input {
    Call(Call),
    Signal(Signal),
}

#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) request: Request,
    pub(crate) answer: oneshot::Sender<Result<Reply, Error>>,
}

/// Serves a stream until it ends or the last handle is gone; says why it ended.
pub(crate) async fn serve(
    stream: impl AsyncRead + AsyncWrite,
    options: Options,
    inbox: &mut mpsc::UnboundedReceiver<Input>,
) -> Closed {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut chunk = vec![0; READ].into_boxed_slice();
    let mut session = Session::new(options);
    let why = loop {
        let limit = session.limit();
        // In this order: a guest that floods us can delay neither a deadline nor a call, and what
        // it sent before a command is read before that command goes out.
        tokio::select! {
            biased;
            () = sleep_until(limit.unwrap_or_else(Instant::now)), if limit.is_some() => session.give_up(),
            () = caller_left(&mut session.current) => session.withdraw(),
            input = inbox.recv() => match input {
                Some(Input::Call(call)) => session.take(call),
                Some(Input::Signal(signal)) => session.note(signal),
                None => break Closed::Stopped,
            },
            read = reader.read(&mut chunk), if session.protocol.wants_bytes() => match read {
                Ok(0) => break Closed::Eof,
                Ok(count) => session.receive(&chunk[..count]),
                Err(error) => break Closed::Failed(Arc::new(error)),
            },
            written = session.outgoing.write_some(&mut writer), if session.outgoing.is_pending() => match written {
                Ok(()) => session.wrote(),
                Err(error) => break Closed::Failed(Arc::new(error)),
            },
        }
    };
    session.close(&why);
    why
}

/// The conversation and the one call under way.
struct Session {
    protocol: Protocol,
    outgoing: Outgoing,
    current: Option<Current>,
    options: Options,
    port_closed: bool,
}

struct Current {
    call: Call,
    since: Instant,
    /// From its first byte on.
    sent: bool,
}

/// Ends when the caller of a command gives up on it that is not on its way yet.
async fn caller_left(current: &mut Option<Current>) {
    match current {
        Some(current) if !current.sent => current.call.answer.closed().await,
        _ => pending().await,
    }
}

impl Session {
    fn new(options: Options) -> Self {
        Self {
            protocol: Protocol::new(options.max_message, options.max_depth),
            outgoing: Outgoing::default(),
            current: None,
            options,
            port_closed: false,
        }
    }

    /// When to give up on the call under way.
    fn limit(&self) -> Option<Instant> {
        self.current.as_ref().map(|current| {
            let deadline = current.call.request.deadline;
            match current.since.checked_add(self.options.sync_limit) {
                Some(sync) if !current.sent => deadline.min(sync),
                _ => deadline,
            }
        })
    }

    /// A new call. If another is under way, its caller has left.
    fn take(&mut self, call: Call) {
        self.withdraw();
        let since = Instant::now();
        if call.request.deadline <= since {
            let error = Error::expired(&call.request.name);
            let _ = call.answer.send(Err(error));
            return;
        }
        self.current = Some(Current {
            call,
            since,
            sent: false,
        });
        self.advance();
    }

    fn note(&mut self, signal: Signal) {
        match signal {
            Signal::PortOpened => self.port_closed = false,
            Signal::PortClosed => self.port_closed = true,
            _ => {}
        }
        let step = self.protocol.note(signal);
        self.react(step);
        self.advance();
    }

    fn receive(&mut self, bytes: &[u8]) {
        let skipped = self.protocol.skipped();
        self.protocol.receive(bytes);
        while let Some(step) = self.protocol.step() {
            self.react(Some(step));
        }
        if self.protocol.skipped() != skipped {
            let lines = self.protocol.skipped() - skipped;
            tracing::debug!(lines, "skipped what the agent said unasked");
        }
        self.advance();
    }

    fn react(&mut self, step: Option<Step>) {
        match step {
            None | Some(Step::Synced) => {}
            Some(Step::TryPlain) => {
                let bytes = self.protocol.sync_plain(nonce());
                self.outgoing.replace(bytes, false);
            }
            Some(Step::Answer(Ok(value))) => self.finish(|_| Ok(Reply::Value(value))),
            Some(Step::Answer(Err(refusal))) => {
                self.finish(|name| Err(Error::refusal(name, &refusal)));
            }
            Some(Step::Garbled(garbled)) => self.finish(|name| Err(Error::garbled(name, garbled))),
            Some(Step::Proven(proof)) => self.finish(|_| Ok(Reply::Proven(proof))),
            Some(Step::Interrupted(signal)) => {
                self.finish(|name| Err(Error::session_lost(name, signal)));
            }
        }
    }

    /// Puts next on the wire what the call under way needs next.
    fn advance(&mut self) {
        let Some(current) = &self.current else {
            return;
        };
        if current.sent {
            return;
        }
        match self.protocol.phase() {
            Phase::Lost => {
                let bytes = self.protocol.sync(nonce());
                self.outgoing.replace(bytes, false);
            }
            Phase::Ready if !self.outgoing.is_pending() => {
                let bytes = current.call.request.to_line();
                self.outgoing.replace(bytes, true);
            }
            Phase::Ready | Phase::Syncing | Phase::Busy => {}
        }
    }

    /// Forgets the call under way, if there is one. Nothing of it stays behind to be sent.
    fn withdraw(&mut self) {
        if self.current.take().is_some() {
            self.stop_sending();
            if self.protocol.phase() != Phase::Ready {
                self.protocol.lose_sync();
            }
        }
    }

    /// Leaves what is not written unwritten. Half a message on the wire is ended by the next sync.
    fn stop_sending(&mut self) {
        if self.outgoing.is_half_written() {
            self.protocol.lose_sync();
        }
        self.outgoing.clear();
    }

    fn wrote(&mut self) {
        if let Some(current) = &mut self.current
            && self.outgoing.is_command
            && !current.sent
        {
            current.sent = true;
            self.protocol.sent(current.call.request.silent);
        }
        self.advance();
    }

    fn give_up(&mut self) {
        let port_closed = self.port_closed;
        let Some(current) = &self.current else {
            return;
        };
        let (sent, waited) = (current.sent, current.since.elapsed());
        self.protocol.lose_sync();
        self.finish(|name| {
            Err(if sent {
                Error::timed_out(name, waited)
            } else {
                Error::no_sync(name, waited, port_closed)
            })
        });
    }

    fn close(mut self, why: &Closed) {
        let Some(current) = &self.current else {
            return;
        };
        let (sent, silent) = (current.sent, current.call.request.silent);
        let whole = sent && !self.outgoing.is_pending();
        self.finish(|name| match (sent, silent && whole) {
            (_, true) => Ok(Reply::Proven(Proof::Closed)),
            (true, _) => Err(Error::closed(name, why.clone(), Effect::Unknown)),
            (false, _) => Err(Error::closed(name, why.clone(), Effect::None)),
        });
    }

    /// Ends the call under way. That its caller may have left is no news.
    fn finish(&mut self, result: impl FnOnce(&str) -> Result<Reply, Error>) {
        self.stop_sending();
        if let Some(Current { call, .. }) = self.current.take() {
            let result = result(&call.request.name);
            let _ = call.answer.send(result);
        }
    }
}

/// The message being written. Whatever replaces half of one begins with 0xFF, which ends the half.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
    flushed: bool,
    is_command: bool,
}

impl Outgoing {
    fn replace(&mut self, bytes: Vec<u8>, is_command: bool) {
        *self = Self {
            bytes,
            written: 0,
            flushed: false,
            is_command,
        };
    }

    fn clear(&mut self) {
        *self = Self::default();
    }

    fn is_half_written(&self) -> bool {
        0 < self.written && self.written < self.bytes.len()
    }

    fn is_pending(&self) -> bool {
        self.written < self.bytes.len() || (!self.bytes.is_empty() && !self.flushed)
    }

    /// One write or the flush that follows the last. Dropped at any point, it loses no count.
    async fn write_some(&mut self, writer: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        if self.written < self.bytes.len() {
            match writer.write(&self.bytes[self.written..]).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => self.written += count,
            }
        } else {
            writer.flush().await?;
            self.flushed = true;
        }
        Ok(())
    }
}

/// A number that has not been used before. It need not be secret, for the guest is told it at once.
fn nonce() -> u64 {
    RandomState::new().build_hasher().finish()
}
