//! What QEMU is asked of a migration that leaves, and how what it says is read. Knows nothing of when.

use std::time::Duration;

use monitor_qmp::command::{self, MigrationInfo, YankInstance};
use remote_migrate::Transfer;
use tokio::time::sleep;
use tracing::warn;

use super::switchover::Seen;
use crate::access::Rescue;
use crate::error::Error;
use crate::ops::AsyncOp;

/// Asks QEMU how far it is, [unless it is stuck](unless_stuck).
pub(super) async fn ask(
    op: &mut AsyncOp,
    rescue: &Rescue,
    silence: Duration,
) -> Result<MigrationInfo, Error> {
    let asking = async { op.monitor().await?.execute(command::QueryMigrate).await };
    unless_stuck(asking, rescue, silence).await
}

/// Waits for an answer of QEMU's. If it is silent for so long, its main loop is stuck at the last of the memory, behind a link
/// that is down: that is cut, past the main loop, and the guest goes on here (test bed, section 6).
pub(super) async fn unless_stuck<T>(
    asking: impl Future<Output = Result<T, Error>>,
    rescue: &Rescue,
    silence: Duration,
) -> Result<T, Error> {
    tokio::pin!(asking);
    tokio::select! {
        answer = &mut asking => return answer,
        () = sleep(silence) => cut(rescue).await,
    }
    asking.await
}

/// Cuts the stream past QEMU's main loop. Only before the guest may be in two halves: then the copy that is not whole by then
/// never is.
pub(super) async fn cut(rescue: &Rescue) {
    let instances = vec![YankInstance::Migration];
    match rescue.execute(command::Yank { instances }).await {
        Ok(_) => warn!("the stream of a migration was cut since QEMU was stuck in it"),
        // There may be none any more.
        Err(error) => warn!(
            error = format!("{error:#}"),
            "a stuck QEMU could not be freed"
        ),
    }
}

/// How far it is, if QEMU says so. At first, after a failure, and in the instant in which it says `completed`, its counters
/// may be missing or read 0 (7.2): that is no progress, and none undone.
pub(super) fn transfer(info: &MigrationInfo, is_still: bool) -> Option<Transfer> {
    let ram = info.ram.as_ref().filter(|ram| ram.total > 0)?;
    Some(Transfer {
        sent: ram.transferred,
        remaining: ram.remaining,
        total: ram.total,
        pass: ram.dirty_sync_count,
        // In post-copy it goes on to say what the guest wrote before.
        dirty_rate: if is_still {
            0
        } else {
            ram.dirty_pages_rate.saturating_mul(ram.page_size)
        },
        is_still,
    })
}

pub(super) fn seen(info: &MigrationInfo, transfer: Transfer, took: Duration) -> Seen {
    let rate = info.ram.as_ref().map_or(0.0, |ram| ram.mbps * 1e6 / 8.0);
    Seen {
        pass: transfer.pass,
        sent: transfer.sent,
        remaining: transfer.remaining,
        dirty_rate: transfer.dirty_rate,
        rate: rate as u64,
        took,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn told(ram: &serde_json::Value, is_still: bool) -> Option<Transfer> {
        let mut info = json!({"status": "completed"});
        if !ram.is_null() {
            info["ram"] = ram.clone();
        }
        transfer(&from_value(info).expect("as QEMU says it"), is_still)
    }

    #[test]
    fn counters_that_read_0_are_no_progress() {
        let ram = |total: u64, sent: u64| {
            json!({
                "transferred": sent, "remaining": 0, "total": total, "dirty-sync-count": 0, "dirty-pages-rate": 3,
                "page-size": 4096, "duplicate": 0, "skipped": 0, "normal": 0, "normal-bytes": 0, "mbps": 0.0,
                "postcopy-requests": 0, "multifd-bytes": 0, "pages-per-second": 0, "subpage-count": 0,
                "precopy-bytes": 0, "downtime-bytes": 0, "postcopy-bytes": 0, "dirty-sync-missed-zero-copy": 0,
            })
        };
        assert_eq!(told(&json!(null), false), None);
        assert_eq!(told(&ram(0, 0), false), None);
        let told =
            |is_still| told(&ram(1 << 28, 1 << 20), is_still).expect("it says how far it is");
        let (moved, still) = (told(false), told(true));
        assert_eq!((moved.sent, moved.dirty_rate), (1 << 20, 3 * 4096));
        assert_eq!((still.is_still, still.dirty_rate), (true, 0));
    }
}
