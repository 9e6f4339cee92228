//! A disk is plugged in, moves to another file while it is used, and is plugged out again.
//!
//! ```text
//! disks TRANSPORTS RUN_DIR GUEST.json DISK.raw NEW.qcow2
//! ```

use std::time::Duration;

use driver::{
    Deadline, Disk, DiskFormat, Driver, ErrorKind, Guest, MirrorOptions, Pivot, Scope, StartOptions,
};
use transport_host::Transports;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [transports_dir, run_dir, guest, disk, new] = &arguments[..] else {
        return Err("usage: disks TRANSPORTS RUN_DIR GUEST.json DISK.raw NEW.qcow2".into());
    };
    let mut transports = Transports::builder();
    transports.load_dir(transports_dir)?;
    let driver = Driver::builder(transports.build()?, run_dir).build()?;
    let guest: Guest = serde_json::from_slice(&std::fs::read(guest)?)?;
    let web = driver.start(guest, StartOptions::default()).await?;
    web.wait_agent().deadline(Duration::from_secs(60)).await?;

    let data = Disk::new("data", disk, DiskFormat::Raw);
    let data = web.plug_disk(data, Scope::Live).await?;
    println!("{} is in slot {:?}", data.name, data.slot);

    let options = MirrorOptions {
        path: new.into(),
        format: DiskFormat::Qcow2,
        pivot: Pivot::WhenReady,
        bandwidth: None,
    };
    let job = web.mirror_disk("data", options).await?;
    let end = job.wait(Deadline::now() + Duration::from_secs(60)).await?;
    let live = web.description().ok_or("it runs")?;
    println!(
        "{} ended: {end:?}, the disk is {}",
        job.id(),
        live.disks[0].path.display()
    );

    // The guest decides when it lets go. Who does not want to wait may leave: it is cleaned up whenever it does.
    match web.unplug_disk("data", Scope::Live).await {
        Ok(()) => println!("it let go"),
        Err(error) if error.kind() == ErrorKind::TimedOut => println!("it has it still: {error}"),
        Err(error) => return Err(error.into()),
    }
    Ok(web.destroy().await?)
}
