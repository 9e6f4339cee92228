//! Pattern 6: a job that asks a remote peer. The guest moves from one driver to another; while the other side is asked,
//! the job is held and nothing is locked.
//!
//! Both drivers live in this process, and the peer between them is in-process too. Each has a run directory of its own.
//!
//! ```text
//! migration TRANSPORTS guest.json
//! ```

use std::sync::Arc;
use std::time::Duration;

use driver::{Driver, MigrateOptions, StartOptions};
use remote_migrate::{Destination, InProcess};
use transport_host::Transports;

fn host(transports_dir: &str, name: &str) -> Result<Driver, Box<dyn std::error::Error>> {
    let mut transports = Transports::builder();
    transports.load_dir(transports_dir)?;
    let run_dir = std::env::temp_dir().join(format!("vmwright-{name}-{}", std::process::id()));
    Ok(Driver::builder(transports.build()?, run_dir).build()?)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [transports_dir, guest] = &arguments[..] else {
        return Err("usage: migration TRANSPORTS GUEST.json".into());
    };
    let (here, there) = (
        host(transports_dir, "here")?,
        host(transports_dir, "there")?,
    );
    let description = serde_json::from_slice(&std::fs::read(guest)?)?;
    let guest = here.start(description, StartOptions::default()).await?;
    guest.wait_agent().deadline(Duration::from_secs(60)).await?;

    // What a daemon serves: whoever asks it to take a guest in.
    let service = Destination::new(Arc::new(there.arrivals()), there.journal());
    let peer = Arc::new(InProcess::new(Arc::new(service)));
    let report = guest.migrate(peer, MigrateOptions::default()).await?;
    println!(
        "it belongs to the {} now, after {:?}",
        report.owner, report.took
    );

    let moved = there.by_uuid(guest.uuid()).ok_or("it is not there")?;
    println!(
        "here it is {}, there it is {}",
        guest.observed().run.name(),
        moved.observed().run.name()
    );
    moved.wait_agent().deadline(Duration::from_secs(30)).await?;
    println!("its agent answers there");
    Ok(moved.destroy().await?)
}
