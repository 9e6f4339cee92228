//! Pattern 2: updating. Whoever changes a domain holds a job of it; the change itself is a closure that cannot wait.

use std::time::Duration;

use driver::{Deadline, Driver, Guest};
use job_core::JobKind;
use transport_host::Transports;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let run_dir = std::env::temp_dir().join(format!("vmwright-update-{}", std::process::id()));
    let driver = Driver::builder(Transports::builder().build()?, &run_dir).build()?;
    let web = driver.define(Guest::new("web")).await?;

    // A domain without a guest takes jobs too: its definition is changed for the next start.
    let deadline = Deadline::now() + Duration::from_secs(5);
    let before = web.run("resize", JobKind::Modify, deadline, |op| async move {
        op.with_state(|records| {
            let guest = records.definition.as_mut()?;
            Some(std::mem::replace(&mut guest.memory_mib, 1024))
        })
    });
    println!("it had {:?} MiB", before.await?);
    let records = web.records();
    println!(
        "it has {:?} MiB at its next start",
        records.definition.as_ref().map(|guest| guest.memory_mib)
    );
    Ok(std::fs::remove_dir_all(run_dir)?)
}
