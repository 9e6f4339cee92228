//! A daemon as the campaign needs one: it serves migrations on its host's address, does what it is told, a line each, and
//! stands still where it is told to. What it knows after a kill is what the driver wrote down.
//!
//! ```text
//!  restore FILE       the guest, kept and to be started with the host     arm POINT  go     of the gate
//!  move MIB_A_SECOND [post-copy]  answered at once; `moved …` follows at its end
//!  follow             turns it to post-copy                               hurry  cancel  resolve RULING  status  end
//! ```

use std::io::{BufRead, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use driver::{
    Defaults, Domain, Door, Driver, FileStore, Landing, MigrateOptions, Next, Notice,
    OpenMigration, Run, Subscription, Tuning, What,
};
use job_core::{AsyncKind, Kind};
use remote_migrate::verdict::Ruling;
use remote_migrate::wire::{AllowList, DialError, Dialled, Options, PeerIdentity, WirePeer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::gate::{Gate, GatedPeer, GatedStore};
use crate::lab::{ADDRESSES, PORT};
use crate::rig::Env;

/// How long silence is taken, of a daemon and of a stream of memory: a run has half a minute in all.
const SILENCE: Duration = Duration::from_secs(3);

/// Bytes a second of the rest of the memory, in post-copy.
const FOLLOWS: u64 = 12 << 20;

/// Bytes a second of what is to be there at once.
const AT_ONCE: u64 = 1 << 30;

/// How long the guests of an earlier daemon are looked for.
const RECOVERED: Duration = Duration::from_secs(20);

/// What a daemon is told on its command line: where it lives, and which of the two hosts it is.
pub(crate) fn serve(dir: &Path, host: usize) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(run(dir, host))
}

/// All that a command may need.
struct Daemon {
    driver: Driver,
    gate: Gate,
    options: Options,
    host: usize,
}

async fn run(dir: &Path, host: usize) -> Result<(), String> {
    let env = Env::find()?;
    let gate = Gate::new();
    let (run_dir, state_dir) = (dir.join("run"), dir.join("state"));
    let store = FileStore::new(&run_dir, &state_dir).map_err(|error| error.to_string())?;
    let store = GatedStore {
        store,
        probe: state_dir.join("probe"),
        gate: gate.clone(),
        runtime: tokio::runtime::Handle::current(),
    };
    let mut options = Options::new(AllowList::nobody().allow_plaintext(other(host)));
    options.beat = Duration::from_millis(500);
    options.silence = SILENCE;
    options.connect = SILENCE;
    let found_by = options.clone();
    let driver = Driver::builder(env.transports()?, run_dir)
        .state_dir(state_dir)
        .state_store(Arc::new(store))
        .qemu(&env.qemu)
        .landing(Landing::plaintext(address(host).ip()))
        .peers(move |words| {
            let there: SocketAddr = words.parse().ok()?;
            Some(Arc::new(peer(there, found_by.clone())))
        })
        .defaults(Defaults {
            silence: SILENCE,
            ..Defaults::default()
        })
        .build()
        .map_err(text)?;
    tokio::spawn(follow(driver.subscribe()));
    let daemon = Arc::new(Daemon {
        driver,
        gate,
        options,
        host,
    });
    let all = daemon.driver.recovered(Instant::now() + RECOVERED);
    all.await.map_err(text)?;
    let listener = TcpListener::bind(address(host)).await;
    let listener = listener.map_err(|error| format!("cannot listen on {host}: {error}"))?;
    daemon
        .driver
        .serve_migrations(Door::plaintext(listener), daemon.options.clone());
    say("ready");

    let mut orders = orders();
    while let Some(order) = orders.recv().await {
        let is_end = order == "end";
        match obey(&daemon, &order).await {
            Ok(text) => say(&format!("ok {text}")),
            Err(error) => say(&format!("error {error}")),
        }
        if is_end {
            break;
        }
    }
    Ok(())
}

/// Tells what became of guests of an earlier daemon, of migrations that were left open, and of guests that are gone.
async fn follow(mut news: Subscription) {
    loop {
        let Notice::News { news, .. } = news.next().await else {
            continue;
        };
        match &news.what {
            What::Recovered(found) => {
                let job = found.job.as_deref().unwrap_or("nothing");
                say(&format!("recovered {job} {:?}", found.became));
            }
            What::Gone { why, .. } => say(&format!("gone {why}")),
            _ => {}
        }
    }
}

/// The lines of the standard input.
fn orders() -> mpsc::UnboundedReceiver<String> {
    let (told, orders) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if told.send(line).is_err() {
                return;
            }
        }
    });
    orders
}

pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // One that nobody listens to any more has been left by the campaign, and is about to end.
    let _heard = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn text(error: driver::Error) -> String {
    format!("{error:#}")
}

fn other(host: usize) -> IpAddr {
    ADDRESSES[1 - host].parse().expect("an address of ours")
}

fn address(host: usize) -> SocketAddr {
    SocketAddr::new(ADDRESSES[host].parse().expect("an address of ours"), PORT)
}

/// The way to whoever is at that address.
fn peer(address: SocketAddr, options: Options) -> WirePeer {
    let dial = move || async move {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let identity = PeerIdentity::of_tcp(&stream)?;
        Ok::<_, DialError>(Dialled::new(stream, identity))
    };
    WirePeer::new(dial, options)
}

impl Daemon {
    fn web(&self) -> Result<Domain, String> {
        let web = self.driver.by_name(crate::NAME);
        web.ok_or_else(|| "no such domain".to_owned())
    }

    async fn open(&self) -> Result<Vec<OpenMigration>, String> {
        self.driver.migrations().await.map_err(text)
    }
}

async fn obey(daemon: &Arc<Daemon>, order: &str) -> Result<String, String> {
    let (verb, object) = order.split_once(' ').unwrap_or((order, ""));
    match verb {
        "arm" => daemon.gate.arm(object),
        "go" => daemon.gate.open(),
        "boot" => {
            let guest = serde_json::from_str(object).map_err(|error| error.to_string())?;
            let web = daemon.driver.define(guest).await.map_err(text)?;
            web.set_autostart(true).await.map_err(text)?;
            web.start().await.map_err(text)?;
        }
        "save" => {
            let saved = daemon
                .web()?
                .save(PathBuf::from(object), driver::SaveOptions::default());
            saved.await.map_err(text)?;
        }
        "restore" => {
            let (path, guest) = object.split_once(' ').ok_or("a path and a guest")?;
            let guest = serde_json::from_str(guest).map_err(|error| error.to_string())?;
            let web = daemon.driver.define(guest).await.map_err(text)?;
            web.set_autostart(true).await.map_err(text)?;
            daemon.driver.restore(path).await.map_err(text)?;
        }
        "move" => {
            let (bandwidth, how) = object.split_once(' ').unwrap_or((object, ""));
            let bandwidth: u64 = bandwidth.parse().map_err(|_| "how fast?")?;
            begin(daemon, bandwidth << 20, how == "post-copy")?;
        }
        "start" => daemon.web()?.start().await.map_err(text)?,
        "follow" => follow_on(daemon).await?,
        "hurry" => hurry(daemon).await?,
        "cancel" => drop(tokio::spawn({
            let daemon = daemon.clone();
            async move {
                match cancel(&daemon).await {
                    Ok(()) => say("cancel ok"),
                    Err(error) => say(&format!("cancel error {error}")),
                }
            }
        })),
        "resolve" => return resolve(daemon, object).await,
        "status" => return status(daemon).await,
        "end" => return end(daemon).await,
        other => return Err(format!("no such order: {other}")),
    }
    Ok(verb.to_owned())
}

/// Begins to move the guest to the other host. Its end is told when it comes.
fn begin(daemon: &Arc<Daemon>, bandwidth: u64, post_copy: bool) -> Result<(), String> {
    let there = address(1 - daemon.host);
    let peer = GatedPeer {
        peer: peer(there, daemon.options.clone()),
        gate: daemon.gate.clone(),
    };
    let options = MigrateOptions {
        bandwidth: Some(bandwidth),
        post_copy,
        there: Some(there.to_string().into()),
        home: Some(address(daemon.host).to_string().into()),
        ..MigrateOptions::default()
    };
    let moving = daemon.web()?.migrate(Arc::new(peer), options);
    tokio::spawn(async move {
        match moving.await {
            Ok(report) => say(&format!("moved ok {:?}", report.owner)),
            Err(error) => say(&format!("moved error {error:#}")),
        }
    });
    Ok(())
}

/// Turns to post-copy, with the rest of the memory slow enough for a fault to come meanwhile.
async fn follow_on(daemon: &Daemon) -> Result<(), String> {
    let tuning = Tuning {
        post_copy_bandwidth: Some(FOLLOWS),
        ..Tuning::default()
    };
    let web = daemon.web()?;
    web.tune_migration(tuning).await.map_err(text)?;
    web.post_copy().await.map_err(text)
}

/// Has what is left of the memory sent as fast as it goes.
async fn hurry(daemon: &Daemon) -> Result<(), String> {
    let tuning = Tuning {
        bandwidth: Some(AT_ONCE),
        post_copy_bandwidth: Some(AT_ONCE),
        ..Tuning::default()
    };
    let tuned = daemon.web()?.tune_migration(tuning);
    tuned.await.map_err(text)
}

/// Cancels what leaves from here, or what arrives.
async fn cancel(daemon: &Daemon) -> Result<(), String> {
    // A daemon that stands at a record cannot read its journal, so what leaves is found by its job.
    let kind = |jobs: &job_core::Snapshot| jobs.asynchronous.as_ref().map(|held| held.holder.kind);
    let web = daemon.web()?;
    if kind(&web.jobs()) == Some(Kind::Async(AsyncKind::MigrationOut)) {
        let cancelled = web.cancel_job("campaign").map(drop);
        let is_late = |error: &driver::Error| error.kind() == driver::ErrorKind::TooLate;
        return cancelled.map_err(|error| refused(is_late(&error), &error));
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    let destination = daemon.driver.destination();
    let open = daemon.open().await?;
    let open = open.first().ok_or("nothing moves here")?;
    let cancelled = destination.cancel(open.id, deadline).await;
    let is_late =
        |error: &remote_migrate::Error| error.kind() == remote_migrate::ErrorKind::TooLate;
    cancelled
        .map(drop)
        .map_err(|error| refused(is_late(&error), &error))
}

/// A cancel that came too late is told as such.
fn refused(is_late: bool, error: &impl std::fmt::Display) -> String {
    let word = if is_late { "too late: " } else { "" };
    format!("{word}{error:#}")
}

/// Decides what is in doubt, as an operator does: `fenced`, `owns`, or `has-all`.
async fn resolve(daemon: &Daemon, ruling: &str) -> Result<String, String> {
    let ruling = match ruling {
        "fenced" => Ruling::PeerFenced,
        "owns" => Ruling::PeerOwns,
        "has-all" => Ruling::PeerHasAll,
        other => return Err(format!("no such ruling: {other}")),
    };
    for open in daemon.open().await? {
        let resolved = daemon.driver.resolve_migration(open.id, open.side, ruling);
        let resolved = resolved.deadline(Duration::from_secs(10)).await;
        resolved.map_err(text)?;
    }
    Ok("resolved".to_owned())
}

/// What there is to know, as JSON: what the guest does here, whether a job is at it, which migrations are open.
async fn status(daemon: &Daemon) -> Result<String, String> {
    let web = daemon.web().ok();
    let run = match &web {
        Some(web) => web.observed().run.name().to_owned(),
        None => "unknown".to_owned(),
    };
    let is_held = web.is_some_and(|web| web.jobs().asynchronous.is_some());
    let open = daemon.open().await?;
    let open = open.iter().map(|open| {
        json!({
            "migration": open.id.to_string(),
            "side": open.side.to_string(),
            "phase": format!("{:?}", open.phase),
            "owner": format!("{:?}", open.owner),
            "post_copy": open.post_copy.map(|rest| format!("{rest:?}")),
            "is_under_way": open.next == Next::UnderWay,
        })
    });
    let open: Vec<_> = open.collect();
    Ok(json!({"run": run, "held": is_held, "open": open}).to_string())
}

/// Ends the guest if it is here, forgets it, and ends the driver in good order.
async fn end(daemon: &Daemon) -> Result<String, String> {
    for web in daemon.driver.domains() {
        if web.observed().run != Run::Off {
            web.destroy().await.map_err(text)?;
        }
        web.remove().await.map_err(text)?;
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    daemon.driver.shutdown(deadline).await.map_err(text)?;
    Ok("ended".to_owned())
}
