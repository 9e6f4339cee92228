//! The handle to an agent, and the trait that stands for it elsewhere.
//!
//! It orders callers and knows nothing of lines and nonces: [`protocol`](crate::protocol) decides
//! those, the task behind the handle reads and writes.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use crate::command::{Command, FsfreezeStatus, FsfreezeThaw};
use crate::error::{Closed, Effect, Error};
use crate::protocol::{Proof, Signal};
use crate::task::{self, Call, Input};

/// The moment by which a call has ended, one way or the other.
pub type Deadline = Instant;

/// What can be asked of a guest agent, object safe, so that another can stand in its place.
///
/// Typed commands and helpers are in [`QgaExt`](crate::QgaExt), for every implementation.
#[async_trait]
pub trait Qga: Send + Sync {
    /// Has one command done and waits for its end.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind) that is not of the typed calls, of a freeze or of a file;
    /// [`Error::effect`] says whether the guest may have acted.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. Before the command is sent, dropping the future withdraws it; afterwards it
    /// takes its course in the guest, and no later call sees its answer.
    async fn call(&self, request: Request) -> Result<Reply, Error>;

    /// Hands in what the monitor saw. Never blocks.
    fn note(&self, signal: Signal);

    /// Waits until the connection has ended, and says why.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only looks.
    async fn closed(&self) -> Closed;
}

/// One command for the agent.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "a wrapper takes it apart and builds another"
)]
pub struct Request {
    /// The agent's name for it, such as `guest-ping`.
    pub name: Cow<'static, str>,
    /// A JSON object, if there are arguments.
    pub arguments: Option<Box<RawValue>>,
    /// When to give up, the wait for other callers and for a sync included.
    pub deadline: Deadline,
    /// Success is silence: the command ends by the [`Signal`] that proves it.
    pub silent: bool,
}

impl Request {
    /// A command without arguments.
    #[must_use]
    pub fn new(name: impl Into<Cow<'static, str>>, deadline: Deadline) -> Self {
        Self {
            name: name.into(),
            arguments: None,
            deadline,
            silent: false,
        }
    }

    /// A typed command.
    ///
    /// # Errors
    ///
    /// `InvalidArguments`: it does not serialise.
    pub fn of<C: Command>(command: &C, deadline: Deadline) -> Result<Self, Error> {
        let arguments =
            to_raw_value(command).map_err(|error| Error::invalid_arguments(C::NAME, error))?;
        Ok(Self {
            // A command without members is a unit struct, and those become `null`.
            arguments: Some(arguments).filter(|arguments| arguments.get() != "null"),
            silent: C::SILENT,
            ..Self::new(C::NAME, deadline)
        })
    }

    /// As it goes over the wire.
    pub(crate) fn to_line(&self) -> Vec<u8> {
        let name = serde_json::Value::from(&*self.name);
        let arguments = match &self.arguments {
            Some(arguments) => format!(",\"arguments\":{arguments}"),
            None => String::new(),
        };
        format!("{{\"execute\":{name}{arguments}}}\n").into_bytes()
    }
}

/// How a command ended well.
#[derive(Clone, Debug)]
#[expect(clippy::exhaustive_enums, reason = "closed: by words or by silence")]
pub enum Reply {
    /// The agent's answer, unread. What is in it, the guest wrote.
    Value(Box<RawValue>),
    /// A command whose success is silence was seen to succeed.
    Proven(Proof),
}

impl Reply {
    /// Reads the answer as `T`. A [`Proof`] is read as one.
    ///
    /// # Errors
    ///
    /// `UnexpectedReply`: it has another shape. `command` is named in the error.
    pub fn decode<T: DeserializeOwned>(self, command: &str) -> Result<T, Error> {
        let read = match self {
            Self::Value(value) => serde_json::from_str(value.get()),
            Self::Proven(proof) => serde_json::from_str(proof.as_json()),
        };
        // The parser's message quotes the guest: it is made fit to be shown, and not kept as it is.
        read.map_err(|error| Error::unexpected_reply(command, &error))
    }
}

/// What a connection to an agent allows the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// How long a sync may take before the agent counts as not there. 5 s, as libvirt's.
    pub sync_limit: Duration,
    /// The longest answer, in bytes: 16 MiB.
    ///
    /// An agent hands over up to 16 MiB of each output of a program, half as much again in base64;
    /// who runs programs that talk that much raises it.
    pub max_message: usize,
    /// The deepest answer: 128, which is where `serde_json` stops too. No answer of a real agent
    /// is deeper than ten.
    pub max_depth: usize,
}

impl Options {
    /// The same with another [`sync_limit`](Self::sync_limit).
    #[must_use]
    pub const fn with_sync_limit(mut self, limit: Duration) -> Self {
        self.sync_limit = limit;
        self
    }

    /// The same with another [`max_message`](Self::max_message).
    #[must_use]
    pub const fn with_max_message(mut self, bytes: usize) -> Self {
        self.max_message = bytes;
        self
    }

    /// The same with another [`max_depth`](Self::max_depth).
    #[must_use]
    pub const fn with_max_depth(mut self, depth: usize) -> Self {
        self.max_depth = depth;
        self
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sync_limit: Duration::from_secs(5),
            max_message: 16 << 20,
            max_depth: 128,
        }
    }
}

/// A connection to one guest's agent.
///
/// One command is under way at a time; the others wait in the order in which they came, but that
/// `guest-fsfreeze-thaw` and `guest-fsfreeze-status` are next whoever waits.
///
/// Clones share the connection. It ends with the last of them, which frees the channel for the
/// next client: QEMU serves one at a time.
#[derive(Clone)]
pub struct Agent {
    shared: Arc<Shared>,
}

struct Shared {
    /// One command at a time.
    turn: Semaphore,
    /// Callers wait here, first come, first served: one at most waits for the turn itself, so that
    /// a thaw, which does not come through here, is next.
    queue: Semaphore,
    inbox: mpsc::UnboundedSender<Input>,
    closed: watch::Receiver<Option<Closed>>,
}

/// The right to have the agent do something. The turn goes before the place in the queue, so that
/// a thaw takes it before the next in the queue can.
struct Turn<'a> {
    _turn: SemaphorePermit<'a>,
    _place: Option<SemaphorePermit<'a>>,
}

impl Shared {
    async fn turn(&self, command: &str) -> Turn<'_> {
        const NEVER: &str = "the semaphore is never closed";
        // The status too, for a thaw is done only once that has been seen.
        let place = if command == FsfreezeThaw::NAME || command == FsfreezeStatus::NAME {
            None
        } else {
            Some(self.queue.acquire().await.expect(NEVER))
        };
        Turn {
            _turn: self.turn.acquire().await.expect(NEVER),
            _place: place,
        }
    }
}

impl Agent {
    /// Takes over a connected stream. Nothing is sent before the first call, and nobody waits: the
    /// guest may still be booting.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with time enabled.
    #[must_use = "the connection ends with its last handle"]
    pub fn new(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        options: Options,
    ) -> Self {
        let (inbox, mut incoming) = mpsc::unbounded_channel();
        let (ended, closed) = watch::channel(None);
        tokio::spawn(async move {
            let why = task::serve(stream, options, &mut incoming).await;
            tracing::debug!(%why, "agent connection ended");
            // Before `incoming` goes: who finds the inbox shut finds the reason too.
            ended.send_replace(Some(why));
        });
        Self {
            shared: Arc::new(Shared {
                turn: Semaphore::new(1),
                queue: Semaphore::new(1),
                inbox,
                closed,
            }),
        }
    }

    /// Why the connection ended, for a command that it left unanswered.
    fn end(&self) -> Closed {
        self.shared
            .closed
            .borrow()
            .clone()
            .unwrap_or(Closed::Stopped)
    }
}

#[async_trait]
impl Qga for Agent {
    async fn call(&self, request: Request) -> Result<Reply, Error> {
        let since = Instant::now();
        let turn = timeout_at(request.deadline, self.shared.turn(&request.name)).await;
        let Ok(_turn) = turn else {
            return Err(Error::busy(&request.name, since.elapsed()));
        };
        let name = request.name.clone();
        let (answer, result) = oneshot::channel();
        if self
            .shared
            .inbox
            .send(Input::Call(Call { request, answer }))
            .is_err()
        {
            return Err(Error::closed(&name, self.end(), Effect::None));
        }
        // The task answers by the deadline. If it ended in good order and did not, it had not taken
        // the call; if it was stopped, nobody knows how far the call was.
        result.await.unwrap_or_else(|_| {
            let why = self.end();
            let effect = match why {
                Closed::Stopped => Effect::Unknown,
                _ => Effect::None,
            };
            Err(Error::closed(&name, why, effect))
        })
    }

    fn note(&self, signal: Signal) {
        // A connection that has ended has nothing to learn.
        let _ = self.shared.inbox.send(Input::Signal(signal));
    }

    async fn closed(&self) -> Closed {
        let mut closed = self.shared.closed.clone();
        let why = closed.wait_for(Option::is_some).await;
        why.ok()
            .and_then(|why| why.clone())
            .unwrap_or(Closed::Stopped)
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("closed", &*self.shared.closed.borrow())
            .finish_non_exhaustive()
    }
}
