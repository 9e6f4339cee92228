//! Waiting for one event, armed before the command that causes it is written.
//!
//! Knows nothing of sinks: it only looks at what passes on the way to one. A filter is the
//! caller's code, so it runs while no lock is held.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use crate::{
    error::{Closed, Error, Failure},
    event::Event,
    qmp::Deadline,
};

/// Says whether an event is the one that is waited for.
pub(crate) type Filter = Box<dyn FnMut(&Event) -> bool + Send>;

/// An event that is waited for, from [`expect_event`](crate::Monitor::expect_event).
///
/// While it lives, the first event that fits is kept for it, however long before
/// [`wait`](Self::wait) it comes. Other sinks see that event as well. Dropping it forgets both.
#[must_use = "the event is forgotten as soon as this is dropped"]
pub struct Expected {
    event: Option<oneshot::Receiver<Event>>,
    /// The reason of the end, where the connection tells one.
    ended: Arc<Mutex<Option<Closed>>>,
}

/// Those who wait for an event on one connection.
#[derive(Default)]
pub(crate) struct Expectations {
    waiting: Mutex<Vec<Expectation>>,
    ended: Arc<Mutex<Option<Closed>>>,
}

struct Expectation {
    filter: Filter,
    waiter: oneshot::Sender<Event>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Expectations {
    pub(crate) fn arm(&self, filter: Filter) -> Expected {
        let (waiter, event) = oneshot::channel();
        let mut waiting = lock(&self.waiting);
        // Those that were dropped leave here, so that waiting in vain again and again costs nothing.
        let forgotten: Vec<_> = waiting
            .extract_if(.., |expectation| expectation.waiter.is_closed())
            .collect();
        // Under the lock that `end` takes: armed after the end, there is nobody to tell of it.
        if lock(&self.ended).is_none() {
            waiting.push(Expectation { filter, waiter });
        }
        drop(waiting);
        drop(forgotten);
        Expected {
            event: Some(event),
            ended: Arc::clone(&self.ended),
        }
    }

    /// Takes those out that `event` is for. They are told once the sink has seen it.
    pub(crate) fn met_by(&self, event: &Event) -> Vec<oneshot::Sender<Event>> {
        // Filters are run on a list of their own: one of them may arm another.
        let mut asked = std::mem::take(&mut *lock(&self.waiting));
        if asked.is_empty() {
            return Vec::new();
        }
        let met = asked
            .extract_if(.., |expectation| (expectation.filter)(event))
            .map(|expectation| expectation.waiter)
            .collect();
        let mut waiting = lock(&self.waiting);
        asked.append(&mut waiting);
        *waiting = asked;
        met
    }

    pub(crate) fn end(&self, why: &Closed) {
        let mut waiting = lock(&self.waiting);
        lock(&self.ended).get_or_insert_with(|| why.clone());
        let waiting = std::mem::take(&mut *waiting);
        drop(waiting);
    }
}

impl Expected {
    /// One that never comes, because whoever stands in for a monitor passes no events on.
    pub(crate) fn never() -> Self {
        Self {
            event: None,
            ended: Arc::default(),
        }
    }

    /// Waits for the event. May be called again after a deadline.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`](crate::ErrorKind::TimedOut),
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) if the connection ended first, and
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if it was armed on something
    /// that passes no events on, or has been handed out before.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: an event that came is kept.
    pub async fn wait(&mut self, deadline: Deadline) -> Result<Event, Error> {
        let started = Instant::now();
        let Some(event) = &mut self.event else {
            let failure = Failure::Unsupported("no event can be waited for here any more");
            return Err(Error::new(None, failure));
        };
        match timeout_at(deadline, &mut *event).await {
            Ok(Ok(event)) => {
                self.event = None;
                Ok(event)
            }
            Ok(Err(_)) => {
                self.event = None;
                let why = lock(&self.ended).clone().unwrap_or(Closed::Abandoned);
                Err(Error::new(None, Failure::Closed { why, sent: false }))
            }
            Err(_) => {
                let waited = started.elapsed();
                Err(Error::new(None, Failure::NoEvent { waited }))
            }
        }
    }
}

impl fmt::Debug for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expected").finish_non_exhaustive()
    }
}
