//! How a guest that leaves is stopped: for good, or on trial. When, is for [`switchover`](super::switchover) to say.

use futures::future::try_join3;
use monitor_qmp::command::{self, MigrationStatus, RunState};
use tokio::time::Instant;

use super::asking::{seen, transfer, unless_stuck};
use super::switchover::{Switchover, Trial};
use super::tune::Lead;
use crate::access::{Monitor, Rescue};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind};
use crate::ops::AsyncOp;

/// Bytes a second for the last of it, as QEMU itself would send it: as fast as it goes.
const UNBOUND: u64 = 1 << 50;

/// Stops the guest, so that what is left is sent at once. Whether it [stands still](stands_still) by that.
pub(super) async fn stop_for_the_last(op: &mut AsyncOp) -> Result<bool, Error> {
    let monitor = op.monitor().await?;
    let by_host = stands_still(&stop(&monitor, None).await?);
    if by_host {
        // QEMU may be asleep still, and sends by that once it wakes.
        limit(&monitor, UNBOUND).await?;
    }
    Ok(by_host)
}

/// A guest that is stopped on trial.
pub(super) struct OnTrial<'a> {
    pub(super) switchover: &'a mut Switchover,
    /// When its migration began.
    pub(super) began: Instant,
    pub(super) lead: &'a Lead,
}

impl OnTrial<'_> {
    /// Stops the guest, with QEMU held to so many bytes a second meanwhile, and lets it run on unless what is left fits. Whether
    /// it [stands still](stands_still) in the end.
    ///
    /// All of it is one visit to the monitor, of some milliseconds: whoever pauses the guest, or changes the limits, comes
    /// before or after.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it may leave the guest stopped, as a migration may that is dropped anywhere later.
    pub(super) async fn stop(
        self,
        op: &mut AsyncOp,
        rescue: &Rescue,
        bandwidth: u64,
    ) -> Result<bool, Error> {
        let domain = op.domain().clone();
        let silence = domain.0.context.defaults.silence;
        let monitor = op.monitor().await?;
        let asked = Instant::now();
        let status = stop(&monitor, Some(bandwidth)).await?;
        self.switchover.tried(asked.elapsed());
        // It may have reset itself in that instant.
        if !matches!(status, RunState::Paused | RunState::PreLaunch) {
            let bandwidth = self.lead.bounds.borrow().bandwidth;
            limit(&monitor, bandwidth).await?;
            return Ok(stands_still(&status));
        }
        loop {
            let mut changes = domain.changes();
            let asked = Instant::now();
            let asking = monitor.execute(command::QueryMigrate);
            let info = unless_stuck(asking, rescue, silence).await?;
            if info.status != Some(MigrationStatus::Active) {
                return Ok(true);
            }
            let bounds = *self.lead.bounds.borrow();
            let next = transfer(&info, true).map_or(Trial::LetRun, |transfer| {
                let seen = seen(&info, transfer, asked.elapsed());
                self.switchover.on_trial(self.began.elapsed(), seen, bounds)
            });
            match next {
                Trial::Ask(after) => changes.wait(after).await,
                Trial::Keep => {
                    limit(&monitor, UNBOUND).await?;
                    return Ok(true);
                }
                Trial::LetRun => {
                    limit(&monitor, bounds.bandwidth).await?;
                    return Ok(!let_run(&domain, &monitor).await?);
                }
            }
        }
    }
}

/// Lets a guest run on that was stopped on trial. Not if its user had paused it just before, nor once QEMU is about to end the
/// migration: then it refuses that (7.2, `finish-migrate`). Whether it runs.
async fn let_run(domain: &Domain, monitor: &Monitor<'_>) -> Result<bool, Error> {
    if domain.0.live().is_some_and(|live| live.was_paused()) {
        return Ok(false);
    }
    match monitor.execute(command::Cont).await {
        Err(error) if error.kind() == ErrorKind::Refused => Ok(false),
        told => told.map(|_| true),
    }
}

/// Stops the guest, and says what it does then.
async fn stop(monitor: &Monitor<'_>, bandwidth: Option<u64>) -> Result<RunState, Error> {
    // In one go, before QEMU can be through with the rest.
    let limited = async {
        match bandwidth {
            Some(bandwidth) => limit(monitor, bandwidth).await,
            None => Ok(()),
        }
    };
    let (stop, status) = (
        monitor.execute(command::Stop),
        monitor.execute(command::QueryStatus),
    );
    Ok(try_join3(limited, stop, status).await?.2.status)
}

/// Whether a guest stands still by a stop from outside, or by what it did itself, and not by QEMU's own before the
/// switchover (`finish-migrate`): only then does nobody but this driver let it run again. One that sleeps (`suspended`) is
/// woken by itself.
pub(super) fn stands_still(status: &RunState) -> bool {
    use RunState as Is;
    matches!(
        status,
        Is::Paused
            | Is::PreLaunch
            | Is::IoError
            | Is::GuestPanicked
            | Is::InternalError
            | Is::Watchdog
            | Is::Shutdown
    )
}

/// Has QEMU keep to so many bytes a second.
async fn limit(monitor: &Monitor<'_>, bandwidth: u64) -> Result<(), Error> {
    let mut parameters = command::MigrateSetParameters::default();
    parameters.max_bandwidth = Some(bandwidth);
    monitor.execute(parameters).await?;
    Ok(())
}
