//! How a guest that leaves is stopped: for good, or on trial. When, is for [`switchover`](super::switchover) to say.

use futures::future::try_join;
use monitor_qmp::command;

use crate::error::{Error, ErrorKind};
use crate::ops::AsyncOp;

/// Bytes a second for the last of it, as QEMU itself would send it: as fast as it goes.
pub(super) const UNBOUND: u64 = 1 << 50;

/// Stops the guest, and says what it does then.
pub(super) async fn stop(op: &mut AsyncOp) -> Result<command::RunState, Error> {
    let monitor = op.monitor().await?;
    // In one go, before QEMU can be through with the rest.
    let (stop, status) = (
        monitor.execute(command::Stop),
        monitor.execute(command::QueryStatus),
    );
    Ok(try_join(stop, status).await?.1.status)
}

/// Whether a guest stands still by a stop from outside, or by what it did itself, and not by QEMU's own before the
/// switchover (`finish-migrate`): only then does nobody but this driver let it run again. One that sleeps (`suspended`) is
/// woken by itself.
pub(super) fn stands_still(status: &command::RunState) -> bool {
    use command::RunState as Is;
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

/// Lets a guest run on that was stopped on trial. Not if its user has paused it meanwhile, nor once QEMU is about to end the
/// migration: then it refuses that (7.2, `finish-migrate`). Whether it runs.
pub(super) async fn let_run(op: &mut AsyncOp) -> Result<bool, Error> {
    let is_paused = |op: &AsyncOp| op.live().is_some_and(|live| live.was_paused());
    if is_paused(op) {
        return Ok(false);
    }
    match op.monitor().await?.execute(command::Cont).await {
        Err(error) if error.kind() == ErrorKind::Refused => return Ok(false),
        told => told?,
    };
    // A pause is noted before it is done, so the stop of one that came in between may have been the first of the two.
    Ok(!is_paused(op) || !stands_still(&stop(op).await?))
}

/// Has QEMU keep to so many bytes a second. It may be asleep, and sends by that once it wakes.
pub(super) async fn limit(op: &mut AsyncOp, bandwidth: u64) -> Result<(), Error> {
    let mut parameters = command::MigrateSetParameters::default();
    parameters.max_bandwidth = Some(bandwidth);
    op.monitor().await?.execute(parameters).await?;
    Ok(())
}
