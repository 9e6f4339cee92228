//! What all domains of a driver share. Immutable once built; what changes inside locks itself (R4).

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use job_core::{Jobs, Limits, Overdue, Scheduler};
use monitor_qmp::Qmp;
use remote_migrate::{Journal, Record};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use transport_host::Transports;
use uuid::Uuid;

use crate::error::Cause;
use crate::events::Log;
use crate::journal::{Unreadable, unreadable};
use crate::landing::Landing;
use crate::metrics::Meter;
use crate::ops::migrate::Moves;
use crate::ops::recover::Recoveries;
use crate::process::Launcher;
use crate::registry::Registry;
use crate::settling::{FindPeer, Settling};
use crate::store::StateStore;

/// How long things may take unless a call says otherwise.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..Defaults::default()`"
)]
pub struct Defaults {
    /// A call as a whole: waiting for its job, for orphaned commands, and its commands. 30 s, as libvirt's job wait.
    pub call: Duration,
    /// One command of a long operation. 30 s.
    pub command: Duration,
    /// The agent's sync. 5 s, as libvirt.
    pub agent_sync: Duration,
    /// Starting QEMU up to its greeting, and connecting. 30 s: a host under load starts slowly.
    pub connect: Duration,
    /// Ending a guest, whatever it takes. 10 s.
    pub destroy: Duration,
    /// Of that, for QEMU to end by itself before it is killed. 3 s.
    pub terminate: Duration,
    /// The connection that carries the memory of a guest that moves: given up when the other host has been silent for so
    /// long. 15 s, as at the door of migrations.
    pub silence: Duration,
    /// Until somebody brings the memory of a guest that is to arrive, or it is given up. 45 s: the other host has
    /// [`connect`](Self::connect) to come, and some more if it is slow.
    pub arrival: Duration,
    /// A save, restore or another operation whose length the guest decides. An hour.
    pub long: Duration,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(30),
            command: Duration::from_secs(30),
            agent_sync: Duration::from_secs(5),
            connect: Duration::from_secs(30),
            destroy: Duration::from_secs(10),
            terminate: Duration::from_secs(3),
            silence: Duration::from_secs(15),
            arrival: Duration::from_secs(45),
            long: Duration::from_secs(3600),
        }
    }
}

/// Puts a scheduler of one's own choice around, or in place of, a domain's.
pub(crate) type WrapJobs = Box<dyn Fn(&Scheduler) -> Arc<dyn Jobs> + Send + Sync>;
/// Puts a monitor of one's own choice around a domain's.
pub(crate) type WrapMonitor = Box<dyn Fn(&str, Arc<dyn Qmp>) -> Arc<dyn Qmp> + Send + Sync>;

pub(crate) struct Context {
    pub(crate) transports: Transports,
    pub(crate) run_dir: PathBuf,
    pub(crate) qemu: PathBuf,
    pub(crate) defaults: Defaults,
    pub(crate) limits: Limits,
    pub(crate) launcher: Box<dyn Launcher>,
    pub(crate) wrap_jobs: WrapJobs,
    pub(crate) wrap_monitor: WrapMonitor,
    /// Where the memory of guests that arrive is taken in.
    pub(crate) landing: Landing,
    pub(crate) journal: Arc<dyn Journal>,
    /// Finds the daemon of the words that are kept of a migration.
    pub(crate) find_peer: FindPeer,
    pub(crate) settling: Settling,
    pub(crate) moves: Moves,
    pub(crate) store: Arc<dyn StateStore>,
    pub(crate) recoveries: Recoveries,
    pub(crate) overdue: Overdue,
    pub(crate) log: Arc<Log>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) registry: Registry,
    /// Operations. A shutdown waits for them.
    pub(crate) tracker: TaskTracker,
    /// No new operation begins.
    pub(crate) closing: CancellationToken,
    /// What watches guests and sweeps. They serve the last operations, and end after them.
    pub(crate) watchers: TaskTracker,
    /// The watchers end, and leave the guests running.
    pub(crate) parting: CancellationToken,
    /// Keep a second driver off the run directory and the state directory for as long as this one lives.
    pub(crate) _locks: Vec<File>,
}

impl Context {
    /// All records of migrations. That they cannot be read is not the same as that there are none.
    pub(crate) async fn migrations(&self) -> Result<Vec<Record>, Cause> {
        let records = self.journal.list().await;
        records.map_err(|error| {
            Cause::State(format!("the migration journal cannot be read: {error:#}"))
        })
    }

    /// Refuses a guest that a migration's record may be of which cannot be read.
    pub(crate) async fn refuse_unreadable(&self, domain: Uuid) -> Result<(), Cause> {
        let found = self.unreadable().await?;
        match found.iter().find(|bad| bad.may_be_of(domain)) {
            None => Ok(()),
            Some(bad) => {
                let (key, reason) = (&bad.key, &bad.reason);
                Err(Cause::State(format!(
                    "a migration of it may be open: the record {key} {reason}; once it is certain where the guest is, take \
                     that record away"
                )))
            }
        }
    }

    /// The records of migrations that cannot be read.
    pub(crate) async fn unreadable(&self) -> Result<Vec<Unreadable>, Cause> {
        let store = self.store.clone();
        let read = tokio::task::spawn_blocking(move || unreadable(&*store)).await;
        let read = read.map_err(|error| Cause::Panicked(error.to_string()))?;
        read.map_err(|error| Cause::State(format!("the migration journal cannot be read: {error}")))
    }

    /// The driver's one timer: looks at domains that have something overdue, and sleeps for ever while none has.
    pub(crate) async fn sweep(overdue: Overdue, parting: CancellationToken) {
        let sweeping = async {
            loop {
                overdue.filled().await;
                sleep(Duration::from_secs(1)).await;
                overdue.sweep();
            }
        };
        parting.run_until_cancelled(sweeping).await;
    }
}
