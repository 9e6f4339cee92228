//! The smallest daemon: loads the transports in a folder, starts or attaches to one guest, prints what happens to it until
//! it is stopped. Guests outlive it.
//!
//! ```text
//! minimal_daemon TRANSPORTS RUN_DIR guest.json        start the guest described there
//! minimal_daemon TRANSPORTS RUN_DIR unix:/path/qmp    attach to a QEMU that runs
//! ```

use std::error::Error;
use std::time::Duration;

use driver::{Deadline, Driver, Notice, StartOptions};
use tokio::signal::unix::{SignalKind, signal};
use transport_host::Transports;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [transports_dir, run_dir, guest] = &arguments[..] else {
        return Err("usage: minimal_daemon TRANSPORTS RUN_DIR GUEST.json|URI".into());
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut transports = Transports::builder();
    let report = transports.load_dir(transports_dir)?;
    for refused in &report.refused {
        eprintln!("not loaded: {}", refused.error);
    }
    let driver = Driver::builder(transports.build()?, run_dir).build()?;
    let mut events = driver.subscribe();

    let domain = if guest.ends_with(".json") {
        let description = serde_json::from_slice(&std::fs::read(guest)?)?;
        driver.start(description, StartOptions::default()).await?
    } else {
        driver.attach(guest.clone()).await?
    };
    println!("{domain:?} is {}", domain.observed().run.name());

    loop {
        tokio::select! {
            notice = events.next() => match notice {
                Notice::News { sequence, news } => println!("{sequence} {}: {:?}", news.name, news.what),
                gap => println!("{gap:?}"),
            },
            _ = tokio::signal::ctrl_c() => break,
            _ = terminate.recv() => break,
        }
    }
    Ok(driver
        .shutdown(Deadline::now() + Duration::from_secs(10))
        .await?)
}
