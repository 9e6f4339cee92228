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
    waker: Option<Waker>,
}

impl Waiting {
    pub(crate) fn new(shared: Arc<Shared>, id: u64, want: Want, since: Tick, key: Key) -> Self {
        Self {
            shared,
            id,
            want,
            since,
            key: Some(key),
            waker: None,
        }
    }

    /// Looks whether the turn came, and leaves the waker if not.
    pub(crate) fn poll(&mut self, waker: &Waker) -> Poll<Result<Held, BeginError>> {
        // Cloned before the lock is taken: a waker is somebody else's code.
        let fresh = match &self.waker {
            Some(known) if known.will_wake(waker) => None,
            _ => Some(waker.clone()),
        };
        let key = self.key.expect("a place is polled until it is ready");
        let now = now();
        let (claim, old) = self.shared.with(|ledger, after| {
            let mut effects = Effects::default();
            let claim = ledger.slots.claim(key, now, &mut effects);
            ledger.settle(effects, now, after);
            let old = match claim {
                Claim::Waiting => {
                    let place = ledger.pending[key as usize]
                        .as_mut()
                        .expect("a waiter is pending");
                    fresh.clone().map(|fresh| place.waker.replace(fresh))
                }
                Claim::Granted { .. } | Claim::Failed(_) => {
                    self.key = None;
                    Some(ledger.forget(key).and_then(|pending| pending.waker))
                }
            };
            (claim, old)
        });
        drop(old);
        if fresh.is_some() {
            self.waker = fresh;
        }
        match claim {
            Claim::Waiting => Poll::Pending,
            Claim::Granted { generation } => {
                let waited = Duration::from_nanos(now.saturating_sub(self.since));
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
        let holder = lock(&self.shared.ledger).blocker(self.want, now);
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
