//! Two daemons, two processes: a guest moves from one to the other over the wire, and back.
//!
//! ```text
//! migrate_pair TRANSPORTS guest.json [MIB]
//!
//!  this program ── stdin: start, move ──► here  ──┐ requests: a unix socket, one user allowed, beats both ways
//!               ◄── stdout: how it goes ─ there ◄─┘ memory: a unix socket for each guest
//! ```
//!
//! Both show how far it is, and at the end how long the guest stood still: from its stop at the source to its start at the
//! destination, each by its own host's clock, less what the wire measured those to be apart. `MIB` a second at most are sent;
//! with little of it, and a guest that writes much, there is more to see.

mod bar;
mod process;

use std::error::Error;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use driver::{
    Deadline, Door, Driver, MigrateOptions, Notice, Run, StartOptions, Subscription, What,
};
use remote_migrate::Downtime;
use remote_migrate::wire::{AllowList, Options, UnixDial, WirePeer};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use transport_host::Transports;

use process::Process;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [mode, transports, dir] if mode == "--daemon" => daemon(transports, Path::new(dir)).await,
        [transports, guest] => there_and_back(transports, guest, "").await,
        [transports, guest, mib] => there_and_back(transports, guest, mib).await,
        _ => Err("usage: migrate_pair TRANSPORTS GUEST.json [MIB]".into()),
    }
}

async fn there_and_back(transports: &str, guest: &str, mib: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut here = Process::launch("here", folder.path(), transports)?;
    let mut there = Process::launch("there", folder.path(), transports)?;
    here.ask(&format!("start {guest}")).await?;
    println!("the guest runs here");
    travel(&mut here, &mut there, mib).await?;
    travel(&mut there, &mut here, mib).await?;
    here.end().await?;
    there.end().await
}

/// Moves the guest, and tells how that went.
async fn travel(from: &mut Process, to: &mut Process, mib: &str) -> Result<()> {
    let socket = to.dir.join("wire");
    let moved = from
        .ask(&format!("move {} {mib}", socket.display()))
        .await?;
    println!("it runs {} {moved}", to.name);
    Ok(())
}

/// A daemon: takes in whatever a process of the same user brings, and does what it is told until nobody is there to tell.
async fn daemon(transports_dir: &str, dir: &Path) -> Result<()> {
    let mut transports = Transports::builder();
    transports.load_dir(transports_dir)?;
    let driver = Driver::builder(transports.build()?, dir.join("run")).build()?;
    let allowed = AllowList::nobody().uid(rustix::process::getuid().as_raw());
    let options = Options::new(allowed);
    let listener = UnixListener::bind(dir.join("wire"))?;
    driver.serve_migrations(Door::unix(listener), options.clone());
    tokio::spawn(show(driver.clone(), driver.subscribe()));

    let orders = std::io::stdin().as_fd().try_clone_to_owned()?;
    let mut orders = BufReader::new(pipe::Receiver::from_owned_fd(orders)?).lines();
    while let Some(order) = orders.next_line().await? {
        let (verb, object) = order.split_once(' ').unwrap_or((&order, ""));
        let done = match verb {
            "start" => start(&driver, object).await,
            _ => move_to(&driver, object, &options).await,
        };
        match done {
            Ok(answer) => println!("done {answer}"),
            Err(error) => println!("failed {error:#}"),
        }
    }
    for domain in driver.domains() {
        if domain.observed().run != Run::Off {
            domain.destroy().await?;
        }
    }
    let limit = Deadline::now() + Duration::from_secs(10);
    Ok(driver.shutdown(limit).await?)
}

async fn start(driver: &Driver, path: &str) -> Result<String> {
    let guest = serde_json::from_slice(&std::fs::read(path)?)?;
    let domain = driver.start(guest, StartOptions::default()).await?;
    domain
        .wait_agent()
        .deadline(Duration::from_secs(60))
        .await?;
    Ok(String::new())
}

/// Answers how long it took, and how long the guest stood still.
async fn move_to(driver: &Driver, object: &str, options: &Options) -> Result<String> {
    let (socket, mib) = object.split_once(' ').unwrap_or((object, ""));
    let bandwidth = if mib.is_empty() {
        None
    } else {
        Some(mib.parse::<u64>()? << 20)
    };
    let peer = Arc::new(WirePeer::new(UnixDial::new(socket), options.clone()));
    let domain = driver.domains().pop().ok_or("there is no guest")?;
    let how = MigrateOptions {
        bandwidth,
        there: Some(socket.into()),
        ..MigrateOptions::default()
    };
    let report = domain.migrate(peer, how).await?;
    let took = report.took.as_secs_f64();
    Ok(format!(
        "after {took:.2} s; {}",
        stood_still(report.downtime)
    ))
}

fn stood_still(downtime: Option<Downtime>) -> String {
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    downtime.map_or_else(
        || "how long it stood still is not known".into(),
        |Downtime { took, error }| {
            let (took, error) = (millis(took), millis(error));
            format!("it stood still for {took:.1} ms, give or take {error:.3} ms")
        },
    )
}

/// Shows how far a guest is that leaves or arrives, and how long it stood still.
async fn show(driver: Driver, mut news: Subscription) {
    let mut moves = None;
    loop {
        let Notice::News { news, .. } = news.next().await else {
            continue;
        };
        match &news.what {
            What::Progress { .. } => {
                if moves.is_none() {
                    moves = driver
                        .by_uuid(news.uuid)
                        .and_then(|domain| domain.migration_progress());
                }
                if let Some(progress) = &moves {
                    println!("{}", bar::line(&progress.borrow()));
                }
            }
            What::JobEnded { .. } => moves = None,
            What::Moved { downtime, .. } => println!("{}", stood_still(*downtime)),
            _ => {}
        }
    }
}
