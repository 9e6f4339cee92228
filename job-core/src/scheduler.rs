//! One domain's jobs as a daemon sees them: open callers, take snapshots, cancel, end a generation, close.

use std::fmt;

use tracing::debug;

use crate::caller::Caller;
use crate::error::{BeginError, CancelError, GoneWhy, Holder};
use crate::guard::{self, AsyncJob, Job};
use crate::held::wait;
use crate::kind::Kind;
use crate::label::Label;
use crate::ledger::Ledger;
use crate::overdue::Overdue;
use crate::shared::{Admitted, Shared, now};
use crate::slots::{Effects, Limits, SlotName};
use crate::snapshot::{AsyncRecord, Finished, Snapshot};
use crate::sync::{Arc, Mutex, lock};

/// One domain's jobs: who holds it and who waits. Clones share it.
///
/// Owns no guest and no connection, so it serves any daemon that must keep callers of one object apart.
#[derive(Clone)]
pub struct Scheduler(pub(crate) Arc<Shared>);
impl Scheduler {
    /// A scheduler for the domain of that name, with default limits and no overdue list.
    #[must_use]
    pub fn new(domain: impl Into<Label>) -> Self {
        Self::build(domain.into(), Limits::default(), None)
    }

    /// A scheduler with limits of its own, which puts itself on `overdue` when a sweep has something to look after.
    #[must_use]
    pub fn with(domain: impl Into<Label>, limits: Limits, overdue: &Overdue) -> Self {
        Self::build(domain.into(), limits, Some(overdue.clone()))
    }

    fn build(domain: Label, limits: Limits, overdue: Option<Overdue>) -> Self {
        let ledger = Mutex::new(Ledger::new(limits));
        Self(Arc::new(Shared {
            domain,
            overdue,
            ledger,
        }))
    }

    /// Opens one operation's claim on the domain. `owner` is what errors and snapshots call it.
    pub fn caller(&self, owner: impl Into<Label>) -> Caller {
        Caller::open(self.0.clone(), owner.into())
    }

    /// The name of the domain.
    #[must_use]
    pub fn domain(&self) -> &Label {
        &self.0.domain
    }

    /// The generation of the guest that runs now, or will run next.
    #[must_use]
    pub fn generation(&self) -> u64 {
        lock(&self.0.ledger).slots.generation()
    }

    /// Whether both are the scheduler of the same domain, not merely of domains that are called the same.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Who holds what, and who waits why.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.0.snapshot()
    }

    /// Who holds the domain now: the async job if there is one, else the normal one, else the agent's. Costs a fraction of
    /// a [`snapshot`](Self::snapshot).
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        let now = now();
        let ledger = lock(&self.0.ledger);
        [SlotName::Async, SlotName::Normal, SlotName::Agent]
            .into_iter()
            .find_map(|name| ledger.held(name, now))
            .map(|held| held.holder)
    }

    /// The finished jobs, oldest first; at most 32.
    #[must_use]
    pub fn history(&self) -> Vec<Finished> {
        let now = now();
        let ledger = lock(&self.0.ledger);
        ledger.history().map(|ended| ended.picture(now)).collect()
    }

    /// Asks the job of that id to stop: fires its token. Needs no job and no mask.
    ///
    /// # Errors
    ///
    /// - [`CancelError::NotRunning`]: no job of that id runs; it may have ended by itself.
    /// - [`CancelError::TooLate`]: it is past its point of return.
    pub fn cancel(&self, id: u64, by: impl Into<Label>) -> Result<(), CancelError> {
        self.0
            .cancel(|slot_id, _| slot_id == id, by.into())
            .map(|_| ())
    }

    /// Asks whichever async job runs to stop. Yields its id.
    ///
    /// # Errors
    ///
    /// As [`cancel`](Self::cancel).
    pub fn cancel_async(&self, by: impl Into<Label>) -> Result<u64, CancelError> {
        self.0
            .cancel(|_, kind| matches!(kind, Kind::Async(_)), by.into())
    }

    /// The guest of the current generation is gone: all who wait fail, all tokens fire, old guards give no right any more.
    ///
    /// The clean-up is queued in the same instant, before anyone else can be: it is the first job of the new
    /// generation, and begins once the old guards have dropped, or were evicted after ten seconds.
    pub fn end_generation(&self, why: GoneWhy, owner: impl Into<Label>) -> Cleanup {
        Cleanup {
            waiting: self.0.end_generation(why, owner.into()),
        }
    }

    /// Removes the domain, for ever: all who wait fail as closed, and so does whoever comes later. Holders may finish.
    pub fn close(&self) {
        self.0.with(|ledger, after| {
            let mut effects = Effects::default();
            ledger.slots.close(&mut effects);
            ledger.settle(effects, now(), after);
        });
        debug!(domain = %self.0.domain, "domain closed");
    }

    /// Takes up an async job that another daemon process had begun, as its record says.
    ///
    /// # Errors
    ///
    /// [`BeginError::Busy`] if the domain is held, [`BeginError::Closed`] if it was removed: a record is restored before
    /// the domain is shown to callers.
    pub fn restore(&self, record: AsyncRecord) -> Result<AsyncJob, BeginError> {
        lock(&self.0.ledger)
            .slots
            .skip_ids(record.id.saturating_sub(1));
        let job = self
            .caller(record.owner)
            .try_begin_async_with(record.kind, record.mask)?;
        job.restore(record.phase, record.decided);
        Ok(job)
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler")
            .field("domain", &self.0.domain)
            .field("snapshot", &self.snapshot())
            .finish()
    }
}

/// The place of the clean-up after a guest that is gone, already at the head of the queue.
#[must_use = "dropping it gives the place away, and nobody cleans up"]
#[derive(Debug)]
pub struct Cleanup {
    waiting: Admitted,
}

impl Cleanup {
    /// Begins the clean-up as a `Destroy` job.
    ///
    /// # Errors
    ///
    /// As [`Caller::begin`]; [`BeginError::Gone`] if the next generation ended as well meanwhile.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe, but the place is lost: the next clean-up has to queue.
    pub async fn begin(self, deadline: impl Future<Output = ()>) -> Result<Job, BeginError> {
        match self.waiting? {
            Ok(held) => Ok(guard::job(held)),
            Err(waiting) => wait(waiting, deadline).await.map(guard::job),
        }
    }
}
