//! A granted slot and a place in the queue: what a guard and a waiting future hold, and give back on drop.

use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::task::{Poll, Waker};
use std::time::Duration;

use tracing::debug;

use crate::error::BeginError;
use crate::kind::Kind;
use crate::shared::{Shared, now};
use crate::slots::{Claim, Effects, Key, SlotName, Tick, Want};
use crate::snapshot::Outcome;
use crate::sync::{Arc, lock};

/// A granted slot; ends on drop.
#[expect(
    unnameable_types,
    reason = "what the sealed guard trait hands out; only this crate may name it"
)]
pub struct Held {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: u64,
    pub(crate) generation: u64,
    pub(crate) name: SlotName,
    pub(crate) kind: Kind,
    pub(crate) outcome: Option<Outcome>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {} of \"{}\"", self.id, self.shared.domain)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or_else(|| {
            if std::thread::panicking() {
                Outcome::Panicked
            } else {
                Outcome::Dropped
            }
        });
        self.shared.release(self.name, self.id, outcome);
    }
}

/// A place in the queue; leaves it on drop.
#[derive(Debug)]
pub(crate) struct Waiting {
    shared: Arc<Shared>,
    id: u64,
    want: Want,
    since: Tick,
    key: Option<Key>,
}

impl Waiting {
    pub(crate) fn new(shared: Arc<Shared>, id: u64, want: Want, since: Tick, key: Key) -> Self {
        Self {
            shared,
            id,
            want,
            since,
            key: Some(key),
        }
    }

    /// Looks whether the turn came, and leaves the waker if not.
    pub(crate) fn poll(&mut self, waker: &Waker) -> Poll<Result<Held, BeginError>> {
        // Cloned before the lock is taken and dropped after it: a waker is somebody else's code.
        let mut mine = Some(waker.clone());
        let key = self.key.expect("a place is polled until it is ready");
        let (claim, _left) = self.shared.with(|ledger, after| {
            let mut claim = ledger.slots.claim(key);
            if claim == Claim::Asleep {
                let now = now();
                let mut effects = Effects::default();
                ledger.slots.rouse(key, now, &mut effects);
                ledger.settle(effects, now, after);
                claim = ledger.slots.claim(key);
            }
            match claim {
                Claim::Waiting | Claim::Asleep => {
                    let place = ledger.pending[key as usize]
                        .as_mut()
                        .expect("a waiter is pending");
                    // Left anew at each poll: a grant that was taken back has used up the last one.
                    std::mem::swap(&mut place.waker, &mut mine);
                    (claim, None)
                }
                Claim::Granted { .. } | Claim::Failed(_) => {
                    self.key = None;
                    (claim, ledger.forget(key))
                }
            }
        });
        match claim {
            Claim::Waiting | Claim::Asleep => Poll::Pending,
            Claim::Granted {
                generation,
                granted,
            } => {
                let waited = Duration::from_nanos(granted.saturating_sub(self.since));
                debug!(domain = %self.shared.domain, job = self.id, kind = %self.want.kind(), ?waited, "job granted");
                let (shared, id) = (self.shared.clone(), self.id);
                Poll::Ready(Ok(Held {
                    shared,
                    id,
                    generation,
                    name: self.want.slot(),
                    kind: self.want.kind(),
                    outcome: None,
                }))
            }
            Claim::Failed(failure) => Poll::Ready(Err(self.shared.failure(failure, self.want))),
        }
    }

    /// The deadline came: names who was in the way. The place is left when `self` drops.
    pub(crate) fn timed_out(&self) -> BeginError {
        let now = now();
        let waited = Duration::from_nanos(now.saturating_sub(self.since));
        // A grant that came in this very instant is our own, and nobody's who was in the way.
        let holder = lock(&self.shared.ledger)
            .blocker(self.want, now)
            .filter(|holder| holder.id != self.id)
            .map(Box::new);
        debug!(domain = %self.shared.domain, job = self.id, kind = %self.want.kind(), ?waited, "job timed out");
        BeginError::TimedOut {
            wanted: self.want.kind(),
            waited,
            holder,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let now = now();
        let pending = self.shared.with(|ledger, after| {
            let mut effects = Effects::default();
            ledger.slots.withdraw(key, now, &mut effects);
            ledger.settle(effects, now, after);
            ledger.forget(key)
        });
        drop(pending);
        debug!(domain = %self.shared.domain, job = self.id, kind = %self.want.kind(), "waiter left");
    }
}

/// Waits for the turn or the deadline, whichever comes first; at a tie the turn.
pub(crate) async fn wait(
    mut waiting: Waiting,
    deadline: impl Future<Output = ()>,
) -> Result<Held, BeginError> {
    let mut deadline = pin!(deadline);
    poll_fn(|cx| match waiting.poll(cx.waker()) {
        Poll::Ready(turn) => Poll::Ready(turn),
        Poll::Pending => deadline
            .as_mut()
            .poll(cx)
            .map(|()| Err(waiting.timed_out())),
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::task::Context;

    use futures::FutureExt;
    use futures::task::{ArcWake, waker};

    use super::*;
    use crate::{Job, JobKind, Scheduler};

    /// Counts how often it was woken.
    #[derive(Default)]
    struct Bell(std::sync::atomic::AtomicUsize);

    impl ArcWake for Bell {
        fn wake_by_ref(bell: &Arc<Self>) {
            bell.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    impl Bell {
        fn rings(&self) -> usize {
            self.0.load(std::sync::atomic::Ordering::Relaxed)
        }
    }

    /// What a begin or release does in passing, a second after the last grant.
    fn take_back(domain: &Scheduler) -> u32 {
        domain
            .0
            .with(|ledger, after| ledger.reclaim(Tick::MAX, after))
    }

    #[test]
    fn a_waiter_whose_grant_was_taken_back_keeps_its_age_and_is_woken_again() {
        let domain = Scheduler::new("d");
        let bell = Arc::new(Bell::default());
        let waker = waker(bell.clone());
        let mut cx = Context::from_waker(&waker);
        let begin = |owner| {
            domain
                .caller(owner)
                .begin(JobKind::Query, pending())
                .boxed()
        };
        let holder = domain.caller("holder").try_begin(JobKind::Query).unwrap();
        let (mut late, mut next) = (begin("late"), begin("next"));
        assert!(late.poll_unpin(&mut cx).is_pending());
        assert!(next.poll_unpin(&mut cx).is_pending());
        let mut younger = begin("younger");
        assert!(younger.poll_unpin(&mut cx).is_pending());

        drop(holder);
        assert_eq!(bell.rings(), 1, "the oldest is granted");
        assert_eq!(take_back(&domain), 1);
        assert_eq!(bell.rings(), 2, "its grant passes on to the next");
        let next: Job = match next.poll_unpin(&mut cx) {
            Poll::Ready(job) => job.unwrap(),
            Poll::Pending => panic!("the next was granted"),
        };
        assert!(late.poll_unpin(&mut cx).is_pending(), "it queues again");
        drop(next);
        assert_eq!(bell.rings(), 3, "it is woken by the same waker as before");
        assert!(younger.poll_unpin(&mut cx).is_pending());
        assert!(
            late.poll_unpin(&mut cx).is_ready(),
            "it goes before those that came after it"
        );
    }
}
