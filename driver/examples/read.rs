//! Pattern 1: reading. Needs no job, waits for nobody, and asks no guest.
//!
//! What is observed is kept up to date by QEMU's events. The picture may be a moment old; it says since when it holds.

use driver::{Driver, Guest};
use transport_host::Transports;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let run_dir = std::env::temp_dir().join(format!("vmwright-read-{}", std::process::id()));
    let driver = Driver::builder(Transports::builder().build()?, &run_dir).build()?;
    let web = driver.define(Guest::new("web")).await?;

    // One guest: what it does, what it is defined as, who holds it.
    let observed = web.observed();
    println!(
        "{} is {} since {:?}",
        web.name(),
        observed.run.name(),
        observed.since
    );
    let records = web.records();
    println!(
        "defined with {:?} MiB",
        records.definition.as_ref().map(|guest| guest.memory_mib)
    );
    println!("{} callers wait", web.jobs().waiting.len());

    // All guests: a row each, without a lock on any.
    for row in driver.list() {
        println!(
            "{:3} {} {:10} {:8} {:?}",
            row.id,
            row.uuid,
            row.name,
            row.run.name(),
            row.holder
        );
    }
    Ok(std::fs::remove_dir_all(run_dir)?)
}
