//! Two daemons, two processes: a guest moves from one to the other over the wire, and back.
//!
//! ```text
//! migrate_pair TRANSPORTS guest.json
//!
//!  this program ── stdin: start, move ──► here  ──┐ requests: a unix socket, one user allowed, beats both ways
//!               ◄── stdout: how it goes ─ there ◄─┘ memory: a unix socket for each guest
//! ```
//!
//! The guest stands still from its stop at the source to its start at the destination. Each is told by its own host's
//! clock; how far those are apart was measured by the wire.

mod process;

use std::error::Error;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use driver::{Deadline, Domain, Door, Driver, MigrateOptions, Notice, Run, StartOptions, What};
use remote_migrate::wire::{AllowList, ClockOffset, Options, UnixDial, WirePeer};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use transport_host::Transports;

use process::Process;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [transports, guest] => there_and_back(transports, guest).await,
        [mode, transports, dir] if mode == "--daemon" => daemon(transports, Path::new(dir)).await,
        _ => Err("usage: migrate_pair TRANSPORTS GUEST.json".into()),
    }
}

async fn there_and_back(transports: &str, guest: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut here = Process::launch("here", folder.path(), transports)?;
    let mut there = Process::launch("there", folder.path(), transports)?;
    here.ask(&format!("start {guest}")).await?;
    println!("the guest runs here");
    travel(&mut here, &mut there).await?;
    travel(&mut there, &mut here).await?;
    here.end().await?;
    there.end().await
}

/// Moves the guest, and tells how long it stood still.
async fn travel(from: &mut Process, to: &mut Process) -> Result<()> {
    let socket = to.dir.join("wire");
    let moved = from.ask(&format!("move {}", socket.display())).await?;
    let [stopped, nanos, error, took] = moved[..] else {
        return Err("it does not say when the guest stopped".into());
    };
    let error = Duration::from_nanos(u64::try_from(error)?);
    let since = to.ask("since").await?;
    let [runs] = since[..] else {
        return Err("it does not say since when the guest runs".into());
    };
    let stood_still = ClockOffset { nanos, error }.between(stopped, runs);
    println!(
        "it runs {} after {:.2} s; it stood still for {:.1} ms, give or take {error:?} between clocks {nanos} ns apart",
        to.name,
        took as f64 / 1e9,
        stood_still as f64 / 1e6,
    );
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

    let orders = std::io::stdin().as_fd().try_clone_to_owned()?;
    let mut orders = BufReader::new(pipe::Receiver::from_owned_fd(orders)?).lines();
    while let Some(order) = orders.next_line().await? {
        let (verb, object) = order.split_once(' ').unwrap_or((&order, ""));
        let done = match verb {
            "start" => start(&driver, object).await,
            "move" => move_to(&driver, object, &options).await,
            _ => since(&driver),
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

/// Answers in nanoseconds: when the guest stopped here, how far the other clock is ahead, give or take how much, and how
/// long it all took.
async fn move_to(driver: &Driver, socket: &str, options: &Options) -> Result<String> {
    let peer = Arc::new(WirePeer::new(UnixDial::new(socket), options.clone()));
    let link = peer.link().clone();
    let domain = only(driver)?;
    let mut events = domain.subscribe();
    let how = MigrateOptions {
        there: Some(socket.into()),
        ..MigrateOptions::default()
    };
    let moving = domain.migrate(peer, how).into_future();
    tokio::pin!(moving);
    let mut stopped = None;
    let report = loop {
        let notice = tokio::select! {
            biased;
            notice = events.next() => notice,
            moved = &mut moving => break moved?,
        };
        let Notice::News { news, .. } = notice else {
            continue;
        };
        match &news.what {
            What::Progress { progress, .. } => {
                let (done, total) = (progress.done / MIB, progress.total / MIB);
                println!("{:3.0} %, {done} of {total} MiB", progress.percent());
            }
            What::Qemu(event) if event.name == "STOP" => stopped = Some(news.at),
            _ => {}
        }
    };
    let stopped = nanos(stopped.ok_or("it was not seen to stop")?)?;
    let clock = link.watch().borrow().clock;
    let ClockOffset { nanos, error } = clock.ok_or("the other clock was not measured")?;
    let (error, took) = (error.as_nanos(), report.took.as_nanos());
    Ok(format!("{stopped} {nanos} {error} {took}"))
}

/// Answers since when the guest runs.
fn since(driver: &Driver) -> Result<String> {
    let seen = only(driver)?.observed();
    if !seen.run.is_running() {
        return Err(format!("it is {}", seen.run.name()).into());
    }
    Ok(nanos(seen.since)?.to_string())
}

fn only(driver: &Driver) -> Result<Domain> {
    Ok(driver.domains().pop().ok_or("there is no guest")?)
}

fn nanos(at: SystemTime) -> Result<i64> {
    Ok(i64::try_from(at.duration_since(UNIX_EPOCH)?.as_nanos())?)
}
