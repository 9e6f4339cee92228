//! A connection that is made anew when it ends, for callers who choose that.
//!
//! A [`Monitor`] never comes back: what was in flight has an unknown outcome, and the events of
//! the gap are lost. [`Reconnect`] hides neither. It dials by the caller's closure, lets the
//! caller look at QEMU anew before anyone else may send, and numbers the connections: the same
//! number is on every event, and [`Followed::lost`] and [`Followed::connected`] stand around
//! each gap. Nothing is ever sent twice.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    error::{Closed, Error, Failure},
    event::{Event, EventSink},
    expect::Expected,
    monitor::{Monitor, Options},
    qmp::{Deadline, Greeting, Health, Qmp, Reply, Request},
    wire::Wire,
};

/// Where the stream comes from, and what is done before a new connection is used.
#[async_trait]
pub trait Dial: Send + 'static {
    /// The stream that it makes.
    type Wire: Wire;

    /// Makes a stream to the same QEMU.
    ///
    /// # Errors
    ///
    /// Those of the transport; it is tried again after a pause.
    ///
    /// # Cancel safety
    ///
    /// It is dropped when its time is over, and must leave nothing behind then.
    async fn dial(&mut self) -> io::Result<Self::Wire>;

    /// Looks at QEMU anew: no event tells of what happened in the gap. Others may send once
    /// this is done; `epoch` is 1 for the first connection.
    ///
    /// # Errors
    ///
    /// Whatever makes this connection useless, as another guest behind the same path. It is
    /// closed and tried again after a pause.
    ///
    /// # Cancel safety
    ///
    /// As [`dial`](Self::dial).
    async fn resync(&mut self, monitor: &Monitor, epoch: u64) -> Result<(), Error>;
}

/// Where the events of all connections go, in order. Called as an [`EventSink`] is.
pub trait Followed: Send + 'static {
    /// A connection greeted. Events of it may have come before.
    fn connected(&mut self, epoch: u64, greeting: &Greeting) {
        let _ = (epoch, greeting);
    }

    /// An event came.
    fn event(&mut self, epoch: u64, event: Event);

    /// A connection's health changed.
    fn health(&mut self, epoch: u64, health: Health) {
        let _ = (epoch, health);
    }

    /// A connection ended; events are lost from here to the next resync.
    fn lost(&mut self, epoch: u64, why: &Closed);
}

/// Follows nothing.
impl Followed for () {
    fn event(&mut self, _: u64, _: Event) {}

    fn lost(&mut self, _: u64, _: &Closed) {}
}

/// How patient a [`Reconnect`] is.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Patience {
    /// The pause after the first failure; doubles with each. Default 100 ms.
    pub first_pause: Duration,
    /// The longest pause. Default 5 s.
    pub longest_pause: Duration,
    /// How long one attempt may take, resync included. Default 10 s.
    pub attempt: Duration,
    /// After how long without a connection it gives up. Default never.
    pub give_up: Option<Duration>,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
            attempt: Duration::from_secs(10),
            give_up: None,
        }
    }
}

/// A monitor that comes back. Clones share it; the last one dropped closes it.
///
/// While there is no connection, calls wait for the next one within their deadline. A call that
/// was sent when the connection ended fails with [`Effect::Unknown`](crate::Effect::Unknown):
/// it is never sent again, and `settle` finds out what became of it.
#[derive(Clone)]
pub struct Reconnect(Arc<Inner>);

struct Inner {
    state: watch::Receiver<State>,
    greeting: Greeting,
    /// Its drop ends the task.
    _alive: oneshot::Sender<()>,
}

#[derive(Clone)]
enum State {
    Connected {
        epoch: u64,
        monitor: Monitor,
    },
    /// No connection since the one of this epoch ended.
    Between {
        epoch: u64,
    },
    Over(Closed),
}

impl Reconnect {
    /// Makes the first connection, and from then on the next whenever one ends.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) if dialling fails, else those of
    /// [`Monitor::connect`] and of the resync. The first connection is tried once.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropping the future closes the stream.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with its timer enabled.
    pub async fn connect<D: Dial>(
        dial: D,
        options: Options,
        patience: Patience,
        followed: impl Followed,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let mut keeper = Keeper {
            dial,
            options,
            patience,
            followed: Arc::new(Mutex::new(followed)),
            epoch: 0,
        };
        let monitor = keeper.attempt(deadline).await?;
        let greeting = monitor.greeting().clone();
        let (alive, dropped) = oneshot::channel();
        let (sender, state) = watch::channel(State::Connected {
            epoch: keeper.epoch,
            monitor,
        });
        tokio::spawn(async move {
            tokio::select! {
                // The last handle was dropped; nobody is left to be told.
                _ = dropped => {}
                () = keeper.keep(&sender) => {}
            }
        });
        Ok(Self(Arc::new(Inner {
            state,
            greeting,
            _alive: alive,
        })))
    }

    /// The number of the connection in use, or of the last one.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        match &*self.0.state.borrow() {
            State::Connected { epoch, .. } | State::Between { epoch } => *epoch,
            State::Over(_) => 0,
        }
    }

    /// The connection in use, if there is one. Holding it on keeps its slot in QEMU taken.
    #[must_use]
    pub fn current(&self) -> Option<Monitor> {
        match &*self.0.state.borrow() {
            State::Connected { monitor, .. } => Some(monitor.clone()),
            _ => None,
        }
    }

    /// Waits for a connection.
    async fn monitor(&self, deadline: Deadline) -> Result<Monitor, Failure> {
        let started = Instant::now();
        let mut state = self.0.state.clone();
        let settled = async {
            let found = state.wait_for(|state| match state {
                // One that ended just now is about to be replaced.
                State::Connected { monitor, .. } => monitor.health() != Health::Closed,
                State::Between { .. } => false,
                State::Over(_) => true,
            });
            found.await.map(|state| state.clone())
        };
        let why = match timeout_at(deadline, settled).await {
            Ok(Ok(State::Connected { monitor, .. })) => return Ok(monitor),
            Ok(Ok(State::Over(why))) => why,
            Ok(_) => Closed::Abandoned,
            Err(_) => {
                return Err(Failure::TimedOut {
                    waited: started.elapsed(),
                    sent: false,
                });
            }
        };
        Err(Failure::Closed { why, sent: false })
    }
}

#[async_trait]
impl Qmp for Reconnect {
    async fn call(&self, request: Request) -> Result<Reply, Error> {
        match self.monitor(request.deadline).await {
            Ok(monitor) => monitor.call(request).await,
            Err(failure) => Err(Error::new(request.name, failure)),
        }
    }

    async fn settled(&self, deadline: Deadline) -> Result<(), Error> {
        let monitor = self.monitor(deadline).await;
        let monitor = monitor.map_err(|failure| Error::new(None, failure))?;
        monitor.settled(deadline).await
    }

    /// On the connection in use only: nothing is seen of a gap.
    fn arm(&self, filter: Box<dyn FnMut(&Event) -> bool + Send>) -> Expected {
        match self.current() {
            Some(monitor) => monitor.expect_event(filter),
            None => Expected::never(),
        }
    }

    fn health(&self) -> Health {
        match &*self.0.state.borrow() {
            State::Connected { monitor, .. } => match monitor.health() {
                // It is about to be made anew.
                Health::Closed => Health::Unresponsive,
                other => other,
            },
            State::Between { .. } => Health::Unresponsive,
            State::Over(_) => Health::Closed,
        }
    }

    /// That of the first connection.
    fn greeting(&self) -> &Greeting {
        &self.0.greeting
    }

    /// Ends when it gave up.
    async fn closed(&self) -> Closed {
        let mut state = self.0.state.clone();
        let over = state.wait_for(|state| matches!(state, State::Over(_)));
        match over.await.as_deref() {
            Ok(State::Over(why)) => why.clone(),
            _ => Closed::Abandoned,
        }
    }
}

impl fmt::Debug for Reconnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconnect")
            .field("epoch", &self.epoch())
            .field("health", &self.health())
            .finish_non_exhaustive()
    }
}

/// What makes the connections.
struct Keeper<D, K> {
    dial: D,
    options: Options,
    patience: Patience,
    followed: Arc<Mutex<K>>,
    epoch: u64,
}

impl<D: Dial, K: Followed> Keeper<D, K> {
    /// One connection, resynced, or what was in the way.
    async fn attempt(&mut self, deadline: Deadline) -> Result<Monitor, Error> {
        self.epoch += 1;
        let epoch = self.epoch;
        let started = Instant::now();
        let whole = async {
            let wire = self.dial.dial().await.map_err(|error| {
                let why = Closed::Failed(Arc::new(error));
                Error::new(None, Failure::Closed { why, sent: false })
            })?;
            let followed = Arc::clone(&self.followed);
            let sink = Part { epoch, followed };
            let monitor = Monitor::connect(wire, self.options.clone(), sink, deadline).await?;
            follow(&self.followed, |all| {
                all.connected(epoch, monitor.greeting());
            });
            self.dial.resync(&monitor, epoch).await?;
            Ok(monitor)
        };
        let attempted = timeout_at(deadline, whole).await;
        attempted.unwrap_or_else(|_| {
            let waited = started.elapsed();
            let failure = Failure::TimedOut {
                waited,
                sent: false,
            };
            Err(Error::new(None, failure))
        })
    }

    async fn keep(&mut self, state: &watch::Sender<State>) {
        loop {
            let current = match &*state.borrow() {
                State::Connected { monitor, .. } => monitor.clone(),
                _ => return,
            };
            let why = current.closed().await;
            drop(current);
            if matches!(why, Closed::Local) {
                state.send_replace(State::Over(why));
                return;
            }
            let epoch = self.epoch;
            state.send_replace(State::Between { epoch });
            match self.again(why).await {
                Ok(monitor) => {
                    let epoch = self.epoch;
                    state.send_replace(State::Connected { epoch, monitor });
                }
                Err(why) => {
                    state.send_replace(State::Over(why));
                    return;
                }
            }
        }
    }

    /// The next connection, or why the last one ended if patience did as well.
    async fn again(&mut self, why: Closed) -> Result<Monitor, Closed> {
        let end = self
            .patience
            .give_up
            .map(|patience| Instant::now() + patience);
        let mut pause = self.patience.first_pause;
        loop {
            let deadline = Instant::now() + self.patience.attempt;
            match self.attempt(deadline).await {
                Ok(monitor) => return Ok(monitor),
                Err(error) => tracing::debug!(%error, "QEMU's monitor cannot be reached again yet"),
            }
            if end.is_some_and(|end| Instant::now() + pause >= end) {
                return Err(why);
            }
            sleep(pause).await;
            pause = (pause * 2).min(self.patience.longest_pause);
        }
    }
}

/// One connection's sink.
struct Part<K> {
    epoch: u64,
    followed: Arc<Mutex<K>>,
}

fn follow<K>(followed: &Mutex<K>, tell: impl FnOnce(&mut K)) {
    tell(&mut followed.lock().unwrap_or_else(PoisonError::into_inner));
}

impl<K: Followed> EventSink for Part<K> {
    fn event(&mut self, event: Event) {
        follow(&self.followed, |all| all.event(self.epoch, event));
    }

    fn health(&mut self, health: Health) {
        follow(&self.followed, |all| all.health(self.epoch, health));
    }

    fn closed(&mut self, why: &Closed) {
        follow(&self.followed, |all| all.lost(self.epoch, why));
    }
}
