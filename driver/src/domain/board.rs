//! What anybody may read of a domain without taking a lock of it: the observed state and who holds it, each published as
//! a whole by whoever changed it.
//!
//! Decides nothing: [`state`](super::state) takes observations in, the scheduler knows the holder. A reader gets what was
//! published last and never makes a writer wait, so a list of ten thousand domains delays none of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use job_core::Holder;
use tokio::sync::watch;

use super::glance::Glance;
use super::state::{Observation, Observed, Run};

/// The published picture of one domain.
pub(crate) struct Board {
    observed: ArcSwap<Observed>,
    /// A part of that, for lists.
    glance: Glance,
    /// Its lock is the writers' turn; readers of the state never take it. Tells those who wait of each change.
    revision: watch::Sender<u64>,
    holder: ArcSwapOption<Seen>,
    /// The turn of those who publish the holder.
    turn: Mutex<()>,
}

/// A holder, and when it was looked at.
struct Seen {
    holder: Holder,
    at: Instant,
}

impl Board {
    pub(crate) fn new(now: SystemTime) -> Self {
        let observed = Observed::new(now);
        Self {
            glance: Glance::new(&observed.run, observed.since),
            observed: ArcSwap::from_pointee(observed),
            revision: watch::Sender::new(0),
            holder: ArcSwapOption::empty(),
            turn: Mutex::new(()),
        }
    }

    /// What was seen last.
    pub(crate) fn observed(&self) -> Arc<Observed> {
        self.observed.load_full()
    }

    /// What the guest does, and since when to the microsecond, by what was seen last.
    pub(crate) fn run(&self) -> (Run, SystemTime) {
        self.glance.read().unwrap_or_else(|| {
            let observed = self.observed.load();
            (observed.run.clone(), observed.since)
        })
    }

    /// Takes in what was seen, and tells those who wait.
    pub(crate) fn observe(&self, observation: Observation<'_>, now: SystemTime) {
        let mut before = None;
        self.revision.send_modify(|revision| {
            let mut next = Observed::clone(&self.observed.load());
            next.apply(observation, now);
            *revision += 1;
            self.glance.publish(&next.run, next.since);
            before = Some(self.observed.swap(Arc::new(next)));
        });
        drop(before);
    }

    /// Tells those who wait to look again, though nothing was seen: the domain is closed.
    pub(crate) fn wake(&self) {
        self.revision.send_modify(|revision| *revision += 1);
    }

    /// Learns of each change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Publishes who holds the domain. `read` asks the scheduler when it is this writer's turn, so that whoever comes
    /// last publishes what is true last.
    pub(crate) fn publish_holder(&self, read: impl FnOnce() -> Option<Holder>) {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = read().map(|holder| {
            let at = Instant::now();
            Arc::new(Seen { holder, at })
        });
        let before = self.holder.swap(seen);
        drop(turn);
        drop(before);
    }

    /// Who holds the domain, by what was published last.
    pub(crate) fn holder(&self) -> Option<Holder> {
        let seen = self.holder.load();
        let seen = seen.as_ref()?;
        let mut holder = seen.holder.clone();
        holder.held += seen.at.elapsed();
        Some(holder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use job_core::{JobKind, Scheduler};

    const LAUNCHED: Observation<'static> = Observation::Launched {
        generation: 1,
        pid: None,
    };

    #[test]
    fn what_a_reader_holds_does_not_change_under_it() {
        let board = Board::new(SystemTime::UNIX_EPOCH);
        let before = board.observed();
        board.observe(LAUNCHED, SystemTime::UNIX_EPOCH);
        assert_eq!(before.run, Run::Off);
        assert_eq!(board.observed().run, Run::Starting);
    }

    #[test]
    fn reading_goes_on_while_a_writer_has_its_turn() {
        let board = Board::new(SystemTime::UNIX_EPOCH);
        let scheduler = Scheduler::new("web");
        let job = scheduler.caller("nightly").try_begin(JobKind::Modify);
        let job = job.expect("it is free");
        board.publish_holder(|| scheduler.holder());
        board.publish_holder(|| {
            // In the middle of a writer's turn, on its own thread: a lock would never be granted here.
            let holder = board.holder().expect("published before");
            assert_eq!((holder.owner, holder.id), ("nightly".into(), 1));
            job.finish();
            scheduler.holder()
        });
        assert_eq!(board.holder(), None);
    }

    #[tokio::test]
    async fn whoever_waits_learns_of_the_newest_only() {
        let board = Board::new(SystemTime::UNIX_EPOCH);
        let mut changes = board.changes();
        board.observe(LAUNCHED, SystemTime::UNIX_EPOCH);
        board.observe(Observation::Lost, SystemTime::UNIX_EPOCH);
        changes.changed().await.expect("the board is there");
        assert_eq!(board.observed().run, Run::Lost);
        assert!(!changes.has_changed().expect("the board is there"));
    }
}
