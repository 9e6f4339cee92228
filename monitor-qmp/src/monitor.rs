//! The handle that callers hold, and how a connection is made.
//!
//! Knows neither bytes nor ids: a request is checked and put into text here, the rest of its
//! way is in `shared` and `task`.

use std::{
    borrow::Cow,
    fmt,
    hash::{BuildHasher as _, RandomState},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use serde::Serialize;
use serde_json::value::Value;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use crate::{
    command::{Command, QmpCapabilities},
    error::{Closed, Error, Failure},
    event::{Event, EventSink},
    expect::{Expected, Filter},
    frame::Limits,
    message,
    protocol::{Counters, Order},
    qmp::{Deadline, Greeting, Health, Lane, Qmp, Reply, Request},
    settle::{Outcome, Settle, Settled},
    shared::Shared,
    task::Task,
    wire::{MAX_FDS, Wire},
};

/// What can be chosen about a connection.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// What QEMU may send at most in one message.
    pub limits: Limits,
    /// How long an overdue QEMU may be silent before it counts as unresponsive. Default 1 s.
    pub probe_limit: Duration,
    /// Whether to use the out-of-band lane where QEMU offers it. Default true.
    pub oob: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            probe_limit: Duration::from_secs(1),
            oob: true,
        }
    }
}

/// A QMP connection. Clones share it; the last one dropped closes it.
///
/// While any clone lives, QEMU's monitor is taken: it serves one client at a time. The drop
/// never blocks, and does not undo what was sent.
#[derive(Clone)]
pub struct Monitor(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    greeting: Greeting,
    oob: bool,
    passes_fds: bool,
}

impl Monitor {
    /// Takes the greeting, negotiates, and starts the task that serves the connection.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotQmp`](crate::ErrorKind::NotQmp) if the peer does not greet as QEMU does
    /// before `deadline`; otherwise as [`call`](Self::call).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropping the future closes the stream.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with its timer enabled.
    pub async fn connect(
        wire: impl Wire,
        options: Options,
        sink: impl EventSink,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let started = Instant::now();
        let shared = Arc::new(Shared::new(nonce()));
        let passes_fds = wire.passes_fds();
        let mut task = Task::new(wire, sink, Arc::clone(&shared), &options);

        let greeting = match timeout_at(deadline, task.greeting()).await {
            Ok(greeted) => greeted.map_err(|failure| Error::new(None, failure))?,
            Err(_) => {
                return Err(Error::new(
                    None,
                    Failure::NoGreeting {
                        waited: started.elapsed(),
                    },
                ));
            }
        };
        let oob = options.oob && greeting.offers_oob();
        let handle = Self(Arc::new(Handle {
            shared,
            greeting,
            oob,
            passes_fds,
        }));
        let negotiation = handle.execute(QmpCapabilities::new(oob), deadline);
        tokio::select! {
            // The task is served here until the answer is there, so that a dropped `connect`
            // leaves nothing behind.
            biased;
            answer = negotiation => answer?,
            why = task.serve() => {
                return Err(Error::closed(QmpCapabilities::NAME, why, true));
            }
        };
        handle.0.shared.lock().negotiated(oob);
        tokio::spawn(task.run());
        Ok(handle)
    }

    /// Sends `request` and waits for its answer.
    ///
    /// # Errors
    ///
    /// [`Error::kind`] tells why, [`Error::effect`] whether QEMU may have acted.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future withdraws a request that the task has not taken yet. One that it has
    /// is written whole and not undone: its answer reaches nobody, and
    /// [`settled`](Self::settled) waits for it.
    pub async fn call(&self, request: Request) -> Result<Reply, Error> {
        let Request {
            name,
            arguments,
            fds,
            lane,
            deadline,
        } = request;
        self.send(name, arguments.as_ref(), fds, lane, deadline)
            .await
    }

    /// Sends a typed command and waits for its typed reply, decoded in the caller's task.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call), and [`ErrorKind::Decode`](crate::ErrorKind::Decode).
    ///
    /// # Cancel safety
    ///
    /// As [`call`](Self::call).
    pub async fn execute<C: Command>(
        &self,
        command: C,
        deadline: Deadline,
    ) -> Result<C::Reply, Error> {
        self.execute_on(command, Vec::new(), Lane::InBand, deadline)
            .await
    }

    /// Sends a typed command with descriptors riding on it.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute), and
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the stream passes none.
    ///
    /// # Cancel safety
    ///
    /// As [`call`](Self::call); the descriptors of a withdrawn request are closed.
    pub async fn execute_with_fds<C: Command>(
        &self,
        command: C,
        fds: Vec<OwnedFd>,
        deadline: Deadline,
    ) -> Result<C::Reply, Error> {
        self.execute_on(command, fds, Lane::InBand, deadline).await
    }

    /// Sends a typed command past QEMU's main loop. Compiles only for commands that may.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute), and
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if there is no such lane.
    ///
    /// # Cancel safety
    ///
    /// As [`call`](Self::call).
    pub async fn execute_oob<C: Command>(
        &self,
        command: C,
        deadline: Deadline,
    ) -> Result<C::Reply, Error> {
        const { assert!(C::OOB, "this command may not run out of band") };
        self.execute_on(command, Vec::new(), Lane::OutOfBand, deadline)
            .await
    }

    /// Sends a command by name. `arguments` is an object, or null for none.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    ///
    /// # Cancel safety
    ///
    /// As [`call`](Self::call).
    pub async fn execute_raw(
        &self,
        name: impl Into<Cow<'static, str>> + Send,
        arguments: Value,
        deadline: Deadline,
    ) -> Result<Value, Error> {
        let qmp: &dyn Qmp = self;
        qmp.execute_raw(name, arguments, deadline).await
    }

    /// Finds out what became of a command whose [`effect`](Error::effect) is unknown; what is asked
    /// stands with [`Settle`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the question changes nothing.
    pub async fn settle<C: Settle>(&self, command: &C, deadline: Deadline) -> Settled {
        let qmp: &dyn Qmp = self;
        qmp.settle(command, deadline).await
    }

    /// Sends a command once and, if its answer does not come by `deadline`, asks until `patience`
    /// what became of it. Never sends it twice.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute): with [`Effect::Unknown`](crate::Effect::Unknown) only if
    /// asking did not tell either; if it told that it was not done, with
    /// [`Effect::None`](crate::Effect::None).
    ///
    /// # Cancel safety
    ///
    /// As [`call`](Self::call).
    pub async fn execute_settled<C: Settle>(
        &self,
        command: &C,
        deadline: Deadline,
        patience: Deadline,
    ) -> Result<Outcome<C::Reply>, Error> {
        let qmp: &dyn Qmp = self;
        qmp.execute_settled(command, deadline, patience).await
    }

    /// Waits until no command whose caller left is outstanding.
    ///
    /// Who is about to change the guest waits here first: else it acts on a guest that an
    /// abandoned command may still be changing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`](crate::ErrorKind::TimedOut) and
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn settled(&self, deadline: Deadline) -> Result<(), Error> {
        let started = Instant::now();
        let shared = &self.0.shared;
        let settled = shared.wait_for(|protocol| match protocol.closed() {
            Some(why) => Some(Err(Failure::Closed {
                why: why.clone(),
                sent: false,
            })),
            None => (protocol.orphans() == 0).then_some(Ok(())),
        });
        let failure = match timeout_at(deadline, settled).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(failure)) => failure,
            Err(_) => {
                let orphans = shared.lock().orphans();
                Failure::Unsettled {
                    waited: started.elapsed(),
                    orphans,
                }
            }
        };
        Err(Error::new(None, failure))
    }

    /// Waits for an event that a command will cause, armed before the command is written.
    ///
    /// The first event from now on for which `filter` says yes is kept for the caller; the
    /// connection's [`EventSink`] sees it as well, and before. `filter` runs in the task that
    /// reads, so it must be quick.
    ///
    /// ```
    /// use monitor_qmp::{Deadline, Error, Monitor, QmpEvent, command::*};
    ///
    /// async fn unplug(monitor: &Monitor, id: &'static str, deadline: Deadline) -> Result<(), Error> {
    ///     let mut gone = monitor.expect_event(move |event| match event.typed() {
    ///         QmpEvent::DeviceDeleted(path) => path.device.as_deref() == Some(id),
    ///         _ => false,
    ///     });
    ///     monitor.execute(DeviceDel::new(id), deadline).await?;
    ///     gone.wait(deadline).await?; // also if it came before the reply
    ///     Ok(())
    /// }
    /// ```
    pub fn expect_event(&self, filter: impl FnMut(&Event) -> bool + Send + 'static) -> Expected {
        self.0.shared.expectations.arm(Box::new(filter))
    }

    /// How the connection does.
    #[must_use]
    pub fn health(&self) -> Health {
        self.0.shared.lock().health()
    }

    /// What QEMU said on connect.
    #[must_use]
    pub fn greeting(&self) -> &Greeting {
        &self.0.greeting
    }

    /// Whether commands can go past QEMU's main loop.
    #[must_use]
    pub fn has_oob(&self) -> bool {
        self.0.oob
    }

    /// Answers that reached nobody.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.0.shared.lock().counters
    }

    /// Closes the connection for all its handles. Returns at once; [`closed`](Self::closed)
    /// tells when it is done.
    pub fn close(&self) {
        self.0.shared.lock().close_soon();
        self.0.shared.work.notify_one();
    }

    /// Waits until the connection ended and says why.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn closed(&self) -> Closed {
        self.0
            .shared
            .wait_for(|protocol| protocol.closed().cloned())
            .await
    }

    async fn execute_on<C: Command>(
        &self,
        command: C,
        fds: Vec<OwnedFd>,
        lane: Lane,
        deadline: Deadline,
    ) -> Result<C::Reply, Error> {
        let reply = self
            .send(Cow::Borrowed(C::NAME), Some(&command), fds, lane, deadline)
            .await?;
        reply.decode_for(C::NAME)
    }

    async fn send<A: Serialize>(
        &self,
        name: Cow<'static, str>,
        arguments: Option<&A>,
        fds: Vec<OwnedFd>,
        lane: Lane,
        deadline: Deadline,
    ) -> Result<Reply, Error> {
        let started = Instant::now();
        let result = match self.prepare(&name, arguments, &fds, lane, started, deadline) {
            Err(failure) => Err(failure),
            Ok(line) => {
                let (waiter, answer) = oneshot::channel();
                let order = Order {
                    name: name.clone(),
                    line,
                    fds,
                    lane,
                    waiter,
                };
                let shared = &self.0.shared;
                shared.answer(order, answer, started, deadline).await
            }
        };
        result.map_err(|failure| Error::new(name, failure))
    }

    fn prepare<A: Serialize>(
        &self,
        name: &str,
        arguments: Option<&A>,
        fds: &[OwnedFd],
        lane: Lane,
        now: Instant,
        deadline: Deadline,
    ) -> Result<Vec<u8>, Failure> {
        if lane == Lane::OutOfBand && !self.0.oob {
            return Err(Failure::Unsupported("this monitor has no out-of-band lane"));
        }
        if !fds.is_empty() && !self.0.passes_fds {
            return Err(Failure::Unsupported("this stream passes no descriptors"));
        }
        if fds.len() > MAX_FDS {
            return Err(Failure::Unsupported(
                "one message carries at most 253 descriptors",
            ));
        }
        if deadline <= now {
            return Err(Failure::TimedOut {
                waited: Duration::ZERO,
                sent: false,
            });
        }
        message::begin(name, lane, arguments)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().close_soon();
        self.shared.work.notify_one();
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor")
            .field("qemu", &self.0.greeting.version.qemu)
            .field("health", &self.health())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Qmp for Monitor {
    async fn call(&self, request: Request) -> Result<Reply, Error> {
        Self::call(self, request).await
    }

    async fn settled(&self, deadline: Deadline) -> Result<(), Error> {
        Self::settled(self, deadline).await
    }

    fn arm(&self, filter: Filter) -> Expected {
        self.0.shared.expectations.arm(filter)
    }

    fn health(&self) -> Health {
        Self::health(self)
    }

    fn greeting(&self) -> &Greeting {
        Self::greeting(self)
    }

    async fn closed(&self) -> Closed {
        Self::closed(self).await
    }
}

/// An id for the negotiation that no former client of this QEMU has used.
fn nonce() -> u64 {
    // Between 2^32 and 2^53: longer than any counter, and exact in every JSON parser.
    (RandomState::new().hash_one(()) >> 11) | (1 << 32)
}
