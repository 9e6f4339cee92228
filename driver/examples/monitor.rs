//! Pattern 3: a monitor command. Under a normal job, through a door that checks before and after that the guest lives.
//!
//! ```text
//! monitor TRANSPORTS unix:/path/qmp.sock
//! ```

use std::time::Duration;

use driver::{Deadline, Driver, ErrorKind};
use job_core::JobKind;
use monitor_qmp::command::{QueryCpusFast, QueryVersion};
use transport_host::Transports;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [transports_dir, target] = &arguments[..] else {
        return Err("usage: monitor TRANSPORTS URI".into());
    };
    let mut transports = Transports::builder();
    transports.load_dir(transports_dir)?;
    let run_dir = std::env::temp_dir().join(format!("vmwright-monitor-{}", std::process::id()));
    let driver = Driver::builder(transports.build()?, &run_dir).build()?;
    let guest = driver.attach(target.clone()).await?;

    let deadline = Deadline::now() + Duration::from_secs(5);
    let asked = guest.run("look", JobKind::Query, deadline, |mut op| async move {
        let monitor = op.monitor()?;
        let version = monitor.execute(QueryVersion).await?;
        let cpus = monitor.execute(QueryCpusFast).await?;
        Ok((version.qemu, cpus.len()))
    });
    match asked.await {
        Ok((version, cpus)) => println!("QEMU {version} with {cpus} CPUs"),
        Err(error) if error.kind() == ErrorKind::Gone => println!("it ended meanwhile: {error:#}"),
        Err(error) => return Err(error.into()),
    }
    Ok(std::fs::remove_dir_all(run_dir)?)
}
