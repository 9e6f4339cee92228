//! Pattern 5: an async job. Many visits to the monitor, each a nested job; between them others pass, as the mask allows.
//! It has phases and progress, and can be asked to stop.
//!
//! ```text
//! async_job TRANSPORTS unix:/path/qmp.sock
//! ```

use std::time::Duration;

use driver::{AsyncOp, Deadline, Driver, Error};
use job_core::{AsyncKind, JobKind, KindSet};
use monitor_qmp::command::QueryBlockstats;
use transport_host::Transports;

/// Watches the guest's disks for so many seconds. A query or a modify passes meanwhile, a migration does not begin.
async fn watch(mut op: AsyncOp, seconds: u64) -> Result<u64, Error> {
    op.set_phase("watching");
    let mut written = 0;
    for second in 0..seconds {
        // Undoing what was begun would go here, through visits of its own.
        op.check_cancelled()?;
        let stats = op
            .monitor()
            .await?
            .execute(QueryBlockstats::default())
            .await?;
        written = stats.iter().map(|disk| disk.stats.wr_bytes).sum();
        op.report(second + 1, seconds);
        op.pause(Duration::from_secs(1)).await;
    }
    Ok(written)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [transports_dir, target] = &arguments[..] else {
        return Err("usage: async_job TRANSPORTS URI".into());
    };
    let mut transports = Transports::builder();
    transports.load_dir(transports_dir)?;
    let run_dir = std::env::temp_dir().join(format!("vmwright-async-{}", std::process::id()));
    let driver = Driver::builder(transports.build()?, &run_dir).build()?;
    let guest = driver.attach(target.clone()).await?;

    let mask = KindSet::DEFAULT.with(JobKind::Modify);
    let deadline = Deadline::now() + Duration::from_secs(60);
    let watching = guest.run_async("watch", AsyncKind::Backup, mask, deadline, |op| {
        watch(op, 3)
    });
    let (written, status) = tokio::join!(watching, guest.query_status());
    println!(
        "beside the job the guest was asked and is {}",
        status?.status.as_str()
    );
    println!("{} bytes written", written?);
    Ok(std::fs::remove_dir_all(run_dir)?)
}
