//! When the files of a guest's disks are taken by the QEMU that it arrives in.
//!
//! Left alone, QEMU takes them, with its locks on them, as soon as the guest's state has come whole. That is too early: a
//! source that keeps the guest by then could not let it run until this side has let go, which it may not be there to do. So
//! they are taken when the guest is let run, and not before. One that stays paused is not let run: each of its disks is
//! offered to readers for a moment, before which QEMU takes it.

use monitor_qmp::command::{BlockExportAdd, NbdServerStart, NbdServerStop, SocketAddress};

use crate::devices::first_node;
use crate::error::Error;
use crate::ops::AsyncOp;
use crate::ops::start::as_it_runs;

/// The capability of whoever takes a guest in.
pub(super) const LATE: &str = "late-block-activate";

/// Takes the disks of a guest that is not let run.
pub(super) async fn take(op: &mut AsyncOp) -> Result<(), Error> {
    let disks = as_it_runs(op.domain()).await?.disks;
    if disks.is_empty() {
        return Ok(());
    }
    let place = op.domain().0.run_dir().join("disks.sock");
    let path = place.display().to_string();
    let monitor = op.monitor().await?;
    let addr = SocketAddress::Unix { path };
    monitor.execute(NbdServerStart::new(addr)).await?;
    let mut taken = Ok(());
    for disk in &disks {
        let node = first_node(&disk.name);
        let offered = BlockExportAdd::new("nbd", node, node);
        taken = monitor.execute(offered).await.map(drop);
        if taken.is_err() {
            break;
        }
    }
    // The first failure is the one to tell.
    let stopped = monitor.execute(NbdServerStop).await.map(drop);
    taken.and(stopped)
}
