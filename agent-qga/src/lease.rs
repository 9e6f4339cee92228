//! A freeze that cannot be forgotten.
//!
//! A guest whose file systems are frozen is a guest that hangs, and the agent keeps them frozen for
//! as long as nobody says otherwise. So a freeze is lent for a time: it is written down before it
//! is asked for, and thawed when its [`FreezeLease`] is dropped, when its time is over, or by
//! [`recover`] after the process that asked for it has died.
//!
//! ```text
//!  freeze() ─► is it thawed? ─► record ─► freeze ─► FreezeLease ──┬─ thaw(), drop, time over
//!               │ no                        │ no answer           ▼
//!               ▼                           └───────────────►  thaw, asked until it is seen
//!          ForeignFreeze, LeasePending                         record removed
//! ```
//!
//! A task of its own does all of it, with a handle to the agent of its own: no drop waits, and the
//! connection lives until the guest is thawed or the other end is gone. It knows neither jobs nor
//! domains; the owner of those hands in an agent whose [`call`](crate::Qga::call) queues as it should.
//!
//! What this cannot do: tell whose freeze it is that it finds. It goes by the record. A freeze
//! without one is somebody else's and is reported, not thawed.

mod store;
mod warden;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout_at};

use crate::agent::{Deadline, Qga};
use crate::command::{Command, FreezeState, FsfreezeFreeze, FsfreezeStatus, FsfreezeThaw};
use crate::error::{Closed, Effect, Error};
use crate::ext::QgaExt as _;

use self::store::Shelf;
pub use self::store::{FileLeases, LeaseRecord, LeaseStore, MemoryLeases};

/// What to freeze, and for how long at most.
#[derive(Clone, Debug)]
pub struct FreezePlan {
    guest: String,
    hold: Duration,
    answer_within: Duration,
    mountpoints: Vec<String>,
}

impl FreezePlan {
    /// All file systems of a guest, for `hold` at most.
    ///
    /// `guest` is what the record is filed under: no other guest has that name, and it changes when
    /// the guest's QEMU is started anew, for no freeze outlives that. A uuid and a generation do.
    pub fn new(guest: impl Into<String>, hold: Duration) -> Self {
        Self {
            guest: guest.into(),
            hold,
            answer_within: Duration::from_secs(20),
            mountpoints: Vec::new(),
        }
    }

    /// Only the file systems mounted there (2.2).
    #[must_use]
    pub fn mountpoints(self, mountpoints: impl Into<Vec<String>>) -> Self {
        Self {
            mountpoints: mountpoints.into(),
            ..self
        }
    }

    /// How long the agent may take over the freeze itself: 20 s, if not told.
    ///
    /// What is left of the call's deadline goes into finding out what became of a freeze that was
    /// not answered.
    #[must_use]
    pub fn answer_within(self, limit: Duration) -> Self {
        Self {
            answer_within: limit,
            ..self
        }
    }
}

/// A guest's file systems, frozen for as long as this lives and its time is not over.
///
/// Drop thaws them. It never blocks and may happen on any thread; the thaw itself is done by a task
/// and asked again and again while the connection lives. [`ended`](FreezeWatch::ended) tells when.
/// What drop cannot do is to outlive its process: that is what [`recover`] is for.
#[derive(Debug)]
#[must_use = "the guest is thawed as soon as the lease is dropped"]
pub struct FreezeLease {
    release: oneshot::Sender<()>,
    watch: FreezeWatch,
    file_systems: i64,
    until: Instant,
}

/// Sees the end of a freeze, whoever holds it.
#[derive(Clone, Debug)]
pub struct FreezeWatch {
    end: watch::Receiver<Option<FreezeEnd>>,
}

/// How a freeze ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum FreezeEnd {
    /// The agent said that the file systems are thawed. The record is gone, or its store failed
    /// and said so in the log.
    Thawed(Thawed),
    /// The connection ended first. The record stays for [`recover`].
    Lost(Closed),
    /// The task that kept it was stopped with its runtime. The record stays for [`recover`].
    Stopped,
}

/// A thaw that was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Thawed {
    /// On whose behalf.
    pub by: ThawedBy,
    /// How many file systems, as the agent says; 0 if another thawed them, or a reset did.
    pub file_systems: i64,
    /// How long they were frozen, at most.
    pub held: Duration,
}

/// Why a freeze was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ThawedBy {
    /// [`FreezeLease::thaw`].
    Holder,
    /// The lease was dropped, or the call that was to get it.
    Drop,
    /// Its time was over. What was done meanwhile may not have been done on a frozen guest.
    Deadline,
}

/// What [`recover`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recovered {
    /// No record, and the guest is not frozen.
    Nothing,
    /// There were `records` of a freeze; the guest is thawed now, and they are removed.
    Thawed {
        /// How many freezes were recorded.
        records: usize,
        /// How many file systems the agent thawed; 0 if they were thawed already.
        file_systems: i64,
    },
    /// The guest is frozen, and not by us. It was left as it is.
    Foreign,
}

/// Freezes a guest's file systems, on a lease.
///
/// The deadline covers everything up to the lease; how long the lease then lasts, the plan says.
///
/// # Errors
///
/// - `ForeignFreeze`: it is frozen already, and not by us. Nothing was done.
/// - `LeasePending`: it is frozen already, and the store has a record of it: [`recover`] first.
/// - `LeaseStore`: the record could not be written, so nothing was asked of the guest.
/// - `FreezeUndone`: the agent did not answer the freeze in time; then it was seen to be thawed.
/// - As [`Qga::call`]. Where the effect is `Unknown`, the guest may be frozen still: it is thawed
///   as soon as its agent answers, and the record stays until then.
///
/// # Cancel safety
///
/// Cancel safe. Dropping the future thaws the guest if the freeze was on its way.
///
/// # Panics
///
/// Outside of a tokio runtime with time enabled.
pub async fn freeze(
    qga: Arc<dyn Qga>,
    store: Arc<dyn LeaseStore>,
    plan: FreezePlan,
    deadline: Deadline,
) -> Result<FreezeLease, Error> {
    let since = Instant::now();
    let (handed, lease) = oneshot::channel();
    tokio::spawn(warden::keep(qga, Shelf(store), plan, deadline, handed));
    match timeout_at(deadline, lease).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Error::closed(
            FsfreezeFreeze::NAME,
            Closed::Stopped,
            Effect::Unknown,
        )),
        Err(_) => Err(Error::timed_out(FsfreezeFreeze::NAME, since.elapsed())),
    }
}

/// Thaws what an earlier process froze and did not live to thaw. To be called once a guest's agent
/// is connected anew, before anybody freezes it again.
///
/// # Errors
///
/// `LeaseStore`; as [`Qga::call`]. The records stay.
///
/// # Cancel safety
///
/// Cancel safe: what was not done can be done again.
pub async fn recover(
    qga: &dyn Qga,
    store: Arc<dyn LeaseStore>,
    guest: &str,
    deadline: Deadline,
) -> Result<Recovered, Error> {
    let shelf = Shelf(store);
    let records = shelf.of(guest).await?;
    if records.is_empty() {
        let state = qga.execute(FsfreezeStatus, deadline).await?;
        return Ok(match state {
            FreezeState::Thawed => Recovered::Nothing,
            _ => Recovered::Foreign,
        });
    }
    let file_systems = warden::thaw_by(qga, deadline).await?;
    for record in &records {
        shelf.remove(record).await?;
    }
    Ok(Recovered::Thawed {
        records: records.len(),
        file_systems,
    })
}

impl FreezeLease {
    /// How many file systems the agent says it froze.
    #[must_use]
    pub fn file_systems(&self) -> i64 {
        self.file_systems
    }

    /// When it is thawed at the latest.
    #[must_use]
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Sees its end, also after the lease is gone.
    #[must_use]
    pub fn watch(&self) -> FreezeWatch {
        self.watch.clone()
    }

    /// Thaws now and waits until the agent says that it is done. [`Thawed::by`] tells whether the
    /// freeze had lasted until here.
    ///
    /// # Errors
    ///
    /// `TimedOut`: not by `deadline`; it is asked on. `Closed`: the connection ended first, and the
    /// record stays for [`recover`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the thaw is done all the same.
    pub async fn thaw(self, deadline: Deadline) -> Result<Thawed, Error> {
        let since = Instant::now();
        // A task that has ended needs no telling.
        let _ = self.release.send(());
        match timeout_at(deadline, self.watch.ended()).await {
            Ok(FreezeEnd::Thawed(thawed)) => Ok(thawed),
            Ok(FreezeEnd::Lost(why)) => {
                Err(Error::closed(FsfreezeThaw::NAME, why, Effect::Unknown))
            }
            Ok(FreezeEnd::Stopped) => Err(Error::closed(
                FsfreezeThaw::NAME,
                Closed::Stopped,
                Effect::Unknown,
            )),
            Err(_) => Err(Error::timed_out(FsfreezeThaw::NAME, since.elapsed())),
        }
    }
}

impl FreezeWatch {
    /// Waits until the freeze has ended, and says how.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only looks.
    pub async fn ended(&self) -> FreezeEnd {
        let mut end = self.end.clone();
        let seen = end.wait_for(Option::is_some).await;
        seen.ok()
            .and_then(|end| end.clone())
            .unwrap_or(FreezeEnd::Stopped)
    }
}
