//! What handles and task share, and one call from queueing to its end.
//!
//! A call lives in its caller's future: it queues the request, waits, and on its deadline or drop
//! takes the request back or leaves it an orphan. The task only moves bytes.
//! The protocol is under a lock that nobody holds across a wait; answers are handed over, and
//! wakers run, after it was let go.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, timeout_at},
};

use crate::{
    error::{Closed, ErrorClass, Failure},
    expect::Expectations,
    protocol::{Departure, Order, Protocol},
    qmp::{Deadline, Reply},
};

/// How a command ends, as its caller learns it.
pub(crate) enum Outcome {
    Done(Reply),
    Refused {
        class: ErrorClass,
        desc: String,
    },
    Unattributed {
        class: ErrorClass,
        desc: String,
        among: usize,
    },
    Closed {
        why: Closed,
        sent: bool,
    },
}

pub(crate) type Waiter = oneshot::Sender<Outcome>;

/// What handles and task share: the protocol under a lock that nobody holds across a wait.
pub(crate) struct Shared {
    protocol: Mutex<Protocol<Waiter>>,
    pub(crate) expectations: Expectations,
    /// There is something for the task to do.
    pub(crate) work: Notify,
    /// Orphans or the end may have changed.
    pub(crate) changed: Notify,
}

impl Shared {
    pub(crate) fn new(first_id: u64) -> Self {
        Self {
            protocol: Mutex::new(Protocol::new(first_id)),
            expectations: Expectations::default(),
            work: Notify::new(),
            changed: Notify::new(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Protocol<Waiter>> {
        self.protocol.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `check` has something to say; it is asked again after every change.
    pub(crate) async fn wait_for<T>(&self, check: impl Fn(&Protocol<Waiter>) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = check(&self.lock()) {
                return found;
            }
            changed.await;
        }
    }

    /// Queues `order` and waits for its `answer`, which the order's waiter gives.
    pub(crate) async fn answer(
        &self,
        order: Order<Waiter>,
        mut answer: oneshot::Receiver<Outcome>,
        started: Instant,
        deadline: Deadline,
    ) -> Result<Reply, Failure> {
        let id = self
            .lock()
            .submit(order)
            .map_err(|why| Failure::Closed { why, sent: false })?;
        let mut presence = Presence {
            shared: self,
            id: Some(id),
        };
        self.work.notify_one();

        let outcome = match timeout_at(deadline, &mut answer).await {
            Ok(answered) => {
                presence.id = None;
                answered.ok()
            }
            Err(_) => {
                let sent = match presence.leave(true) {
                    Departure::Withdrawn(_) => Some(false),
                    Departure::Orphaned(_) => Some(true),
                    Departure::Ended => None,
                };
                if let Some(sent) = sent {
                    return Err(Failure::TimedOut {
                        waited: started.elapsed(),
                        sent,
                    });
                }
                // The answer was on its way as the deadline came.
                answer.await.ok()
            }
        };
        match outcome {
            Some(Outcome::Done(reply)) => Ok(reply),
            Some(Outcome::Refused { class, desc }) => Err(Failure::Refused { class, desc }),
            Some(Outcome::Unattributed { class, desc, among }) => {
                Err(Failure::Unattributed { class, desc, among })
            }
            Some(Outcome::Closed { why, sent }) => Err(Failure::Closed { why, sent }),
            None => Err(Failure::Closed {
                why: Closed::Abandoned,
                sent: true,
            }),
        }
    }
}

/// A caller that waits. Its drop tells the protocol that nobody does any more.
struct Presence<'a> {
    shared: &'a Shared,
    id: Option<u64>,
}

impl Presence<'_> {
    fn leave(&mut self, overdue: bool) -> Departure<Waiter> {
        let Some(id) = self.id.take() else {
            return Departure::Ended;
        };
        let left = self.shared.lock().depart(id, overdue);
        if overdue {
            self.shared.work.notify_one();
        }
        left
    }
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        self.leave(false);
    }
}
