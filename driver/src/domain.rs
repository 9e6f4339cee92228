//! One domain: its scheduler, its state, the guest that runs in it, and the handle that callers have.

mod board;
mod glance;
mod leases;
mod live;
mod memory;
mod reap;
mod sight;
pub(crate) mod state;
mod watch;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use board::Board;
use job_core::{
    BeginError, Cleanup, Finished, GoneWhy, Guarded, Holder, Jobs, Label, Scheduler, Snapshot,
};
use tokio::time::timeout_at;
use uuid::Uuid;

use crate::context::Context;
use crate::error::{Cause, Error};
use crate::events::{Bound, Log, News, Subscription, What};
use crate::guest::Guest;
use crate::metrics::{Counts, Tally, one};
use crate::ops::Deadline;
use crate::ops::block_jobs::Tracks;
use crate::ops::parts::Worker;
use crate::records::{Attached, Running};
pub(crate) use leases::Leases;
pub(crate) use live::{Live, SERIAL, STDERR, resync, resync_migration};
pub(crate) use reap::{EXIT_AFTER_EOF, last_words, reap};
pub(crate) use sight::Sight;
use state::{Observation, Observed, Run};
pub use watch::Watch;

/// How much a domain remembers for those who ask later. Ten thousand domains that all had much to tell weigh 120 MiB by it.
const DOMAIN_LOG: Bound = Bound {
    entries: 256,
    bytes: 12 << 10,
};

/// A handle on one domain. Counted: it stays valid while the domain is removed, and every operation then says so.
#[derive(Clone)]
pub struct Domain(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) id: u64,
    pub(crate) uuid: Uuid,
    pub(crate) name: Label,
    pub(crate) context: Arc<Context>,
    pub(crate) scheduler: Scheduler,
    pub(crate) jobs: Arc<dyn Jobs>,
    /// What only a job's holder changes.
    pub(crate) records: Guarded<Records>,
    /// Nothing may be done that changes its guest.
    pub(crate) is_observed: bool,
    attached: Mutex<Option<Attached>>,
    board: Board,
    is_closed: AtomicBool,
    live: Mutex<Option<Arc<Live>>>,
    /// What a later daemon must know of the guest that runs. Held only while it is written.
    running: Arc<tokio::sync::Mutex<Option<Running>>>,
    /// The description in it, for those who ask without waiting.
    description: Arc<Mutex<Option<Arc<Guest>>>>,
    log: Arc<Log>,
    tally: Tally,
    /// What is left to do with parts that came or went.
    pub(crate) worker: Worker,
    /// The block jobs that are followed.
    pub(crate) block_jobs: Tracks,
}

/// Definition and intent.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Records {
    /// The description the next start uses; none for one that was attached. The guest that runs has
    /// [one of its own](Domain::description).
    pub definition: Option<Guest>,
    /// The address of its monitor, for one that was attached.
    pub attached: Option<String>,
    /// Whether it was attached to be observed only. What is written here later changes nothing of that.
    pub observe_only: bool,
    /// Whether the guest moved to another host: it is not started here until it comes back.
    pub moved_away: bool,
    /// Whether the definition is kept when the guest is off and the driver restarted.
    pub persistent: bool,
    /// Whether the guest is started with the first driver after the host was.
    pub autostart: bool,
}

/// One row of a list of domains.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Row {
    /// Its number in this driver.
    pub id: u64,
    /// Its identity.
    pub uuid: Uuid,
    /// Its name.
    pub name: Label,
    /// What its guest does.
    pub run: Run,
    /// Since when, to the microsecond.
    pub since: SystemTime,
    /// Which operation holds it: an async job if there is one, else a normal one, else the agent's.
    pub holder: Option<Holder>,
}

impl Domain {
    /// Its number in this driver.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Its identity.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.0.uuid
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What is known of its guest now. Needs no job and never waits.
    #[must_use]
    pub fn observed(&self) -> Observed {
        Observed::clone(&self.0.observed())
    }

    /// Definition and intent. Needs no job and never waits.
    #[must_use]
    pub fn records(&self) -> Arc<Records> {
        self.0.records.get()
    }

    /// The guest as it runs now, with what was plugged in and out since its start; none while it is off, or if it was
    /// attached. What its next start uses is in the [records](Self::records). Needs no job and never waits.
    #[must_use]
    pub fn description(&self) -> Option<Arc<Guest>> {
        let shown = &self.0.description;
        shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who holds the domain, in which phase and command, and who waits at which place. Needs no job and never waits.
    #[must_use]
    pub fn jobs(&self) -> Snapshot {
        self.0.scheduler.snapshot()
    }

    /// The jobs that have ended, oldest first; the last 32.
    #[must_use]
    pub fn history(&self) -> Vec<Finished> {
        self.0.scheduler.history()
    }

    /// Asks whichever async job runs to stop. Needs no job: the holder undoes what it did. Yields the job's id.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if none runs, [`TooLate`](crate::ErrorKind::TooLate) past its point of
    /// return.
    pub fn cancel_job(&self, by: impl Into<Label>) -> Result<u64, Error> {
        self.0
            .scheduler
            .cancel_async(by)
            .map_err(|error| self.error("cancel the job of", error))
    }

    /// What was counted of this domain since this driver knows it; [`Driver::metrics`](crate::Driver::metrics) has all
    /// together.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = self.0.tally.read();
        counts.gaps = self.0.log.gaps();
        counts
    }

    /// Follows what happens to this domain from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription::from_now(&self.0.log)
    }

    /// Follows what happens to this domain from that number on; a gap is told.
    #[must_use]
    pub fn subscribe_from(&self, sequence: u64) -> Subscription {
        Subscription::from(&self.0.log, sequence)
    }

    /// Waits until what is known of the guest satisfies `done`. Needs no job.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](crate::ErrorKind::TimedOut) at the deadline, [`Closed`](crate::ErrorKind::Closed) if the domain is
    /// removed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn wait_for(
        &self,
        mut done: impl FnMut(&Observed) -> bool + Send,
        deadline: Deadline,
    ) -> Result<Observed, Error> {
        let began = Deadline::now();
        // The closure is the caller's, so it is given a picture of its own and keeps nobody waiting.
        let waiting = async {
            let mut watch = self.watch();
            while let Some(observed) = watch.next().await {
                if done(&observed) {
                    return Some(observed);
                }
            }
            None
        };
        match timeout_at(deadline, waiting).await {
            Ok(Some(found)) => Ok(Observed::clone(&found)),
            Ok(None) => Err(self.error("watch", BeginError::Closed)),
            Err(_) => Err(self.error(
                "watch",
                Cause::TimedOut {
                    what: "its state",
                    waited: began.elapsed(),
                },
            )),
        }
    }

    /// Follows what is known of the guest: first as it is now, then after each change. A reader that is slow sees the
    /// newest and none in between; one that wants to know all that happened [subscribes](Self::subscribe).
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch::new(self)
    }

    /// Its line in a list. Takes no lock of the domain: it is what was published last.
    #[must_use]
    pub fn row(&self) -> Row {
        let (run, since) = self.0.board.run();
        let holder = self.0.board.holder();
        Row {
            id: self.0.id,
            uuid: self.0.uuid,
            name: self.0.name.clone(),
            run,
            since,
            holder,
        }
    }

    pub(crate) fn error(&self, operation: impl Into<Label>, cause: impl Into<Cause>) -> Error {
        Error::new(operation, Some(self.0.name.clone()), cause)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "domain \"{}\" ({})", self.0.name, self.0.uuid)
    }
}

impl Inner {
    pub(crate) fn new(
        id: u64,
        name: &str,
        uuid: Uuid,
        context: &Arc<Context>,
        records: Records,
    ) -> Arc<Self> {
        let name = Label::from(name.to_owned());
        let scheduler = Scheduler::with(name.clone(), context.limits, &context.overdue);
        Arc::new(Self {
            id,
            uuid,
            name,
            context: context.clone(),
            jobs: (context.wrap_jobs)(&scheduler),
            is_observed: records.observe_only,
            attached: Mutex::new(None),
            records: Guarded::new(&scheduler, records),
            scheduler,
            board: Board::new(SystemTime::now()),
            is_closed: AtomicBool::new(false),
            live: Mutex::new(None),
            running: Arc::default(),
            description: Arc::default(),
            log: Arc::new(Log::new(DOMAIN_LOG)),
            tally: Tally::default(),
            worker: Worker::default(),
            block_jobs: Tracks::default(),
        })
    }

    /// Takes in what was seen. The only way into the observed state.
    pub(crate) fn observe(&self, observation: Observation<'_>) {
        self.board.observe(observation, SystemTime::now());
    }

    pub(crate) fn observed(&self) -> Arc<Observed> {
        self.board.observed()
    }

    /// Publishes who holds the domain, for lists. Called by whoever was granted a job, or ended one.
    pub(crate) fn publish_holder(&self) {
        self.board.publish_holder(|| self.scheduler.holder());
    }

    /// Takes the domain out, for ever: it is not found any more, and whoever waits for it learns that.
    pub(crate) fn close(self: &Arc<Self>) {
        self.context.registry.remove(self);
        self.scheduler.close();
        self.is_closed.store(true, Ordering::SeqCst);
        self.board.wake();
    }

    /// Counts one, of this domain and of all.
    pub(crate) fn count(&self, of: impl Fn(&Tally) -> &AtomicU64) {
        one(of(&self.tally));
        one(of(&self.context.meter.tally));
    }

    /// Tells those who follow the domain or the driver.
    pub(crate) fn tell(&self, what: What) {
        let news = News {
            uuid: self.uuid,
            name: self.name.clone(),
            at: SystemTime::now(),
            what,
        };
        let news = Arc::new(news);
        self.log.push(news.clone());
        self.context.log.push(news);
    }

    /// The guest that runs, or is being started.
    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Puts a guest in, if there is none.
    pub(crate) fn set_live(&self, live: &Arc<Live>) -> Result<(), Cause> {
        let mut place = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() {
            return Err(Cause::State("a guest runs in it already".into()));
        }
        *place = Some(live.clone());
        Ok(())
    }

    /// Takes that guest out.
    pub(crate) fn clear_live(&self, live: &Arc<Live>) {
        let mut place = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let old = place.take_if(|found| Arc::ptr_eq(found, live));
        drop(place);
        drop(old);
    }

    /// Puts the same guest in under a new generation.
    pub(crate) fn replace_live(&self, old: &Arc<Live>, new: &Arc<Live>) {
        let mut place = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let is_old = place.as_ref().is_some_and(|found| Arc::ptr_eq(found, old));
        let old = is_old.then(|| place.replace(new.clone()));
        drop(place);
        drop(old);
    }

    /// Lets go of the guest, and leaves it running.
    pub(crate) fn let_go(&self) {
        let guest = self
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(guest);
    }

    /// Ends the generation: all who wait or hold learn that the guest is gone. The clean-up is first in the next one.
    pub(crate) fn end_generation(&self, generation: u64, why: &GoneWhy) -> Cleanup {
        let cleanup = self.scheduler.end_generation(why.clone(), "clean-up");
        self.tell(What::Gone {
            generation,
            why: why.clone(),
        });
        cleanup
    }

    /// Where the sockets and the log of its QEMU are.
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.context.run_dir.join(self.uuid.to_string())
    }
}

/// Publishes who holds the domain, now and once more when it is dropped: after the guard, however that ends.
pub(crate) struct Published(Arc<Inner>);

impl Published {
    pub(crate) fn new(domain: &Arc<Inner>) -> Self {
        domain.publish_holder();
        Self(domain.clone())
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.0.publish_holder();
    }
}
