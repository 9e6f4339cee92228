//! What does it cost to have a guest moved by drivers, beside a plain script that talks to the same QEMUs? And does a
//! migration under way cost whoever asks the guest something, or wants it to stop? And what does it cost that a guest's memory
//! passes under TLS?
//!
//! Two drivers with a wire between them, and a pair of bare QEMUs; each has one guest, of the same image. The guests move in
//! turn, there and back, so that both meet the same machine. Both have `events`, `return-path` and
//! `pause-before-switchover` on. The bare one leaves it to QEMU when the guest is stopped, with QEMU's own longest downtime.

use std::future::IntoFuture;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use driver::{Domain, Door, Landing, MigrateOptions, Notice, StartOptions, Subscription, What};
use monitor_qmp::command::MigrationStatus;
use monitor_qmp::{Event, QmpEvent};
use remote_migrate::wire::{AllowList, Options, UnixDial, WirePeer};
use tokio::time::Instant as Clock;

use crate::authority::Authority;
use crate::bare::{Bare, Line, Times, now};
use crate::figures::{Bar, Figures};
use crate::rig::{Env, Rig};
use crate::{SECOND, ms, quantile};

/// Bytes a second: about five seconds for the guest, and as fast as it goes.
const SLOW: u64 = 20 << 20;
const FAST: u64 = 100 << 30;

pub(crate) async fn run(env: &Env, figures: &mut Figures, is_short: bool) {
    let rounds = if is_short { 3 } else { 10 };
    let mut pair = Pair::new([Rig::new(env), Rig::new(env)]).await;
    let line = Line::of(pair.pid(), pair.rigs[0].dir.path());
    let mut bare = Some(Bare::boot(&line));
    // The bare guest boots as long as the other one did, and then both are idle.
    tokio::time::sleep(10 * SECOND).await;

    moves(
        figures,
        "unthrottled",
        FAST,
        1.5,
        rounds,
        &mut pair,
        &mut bare,
    )
    .await;
    moves(
        figures,
        "at-20-mb-s",
        SLOW,
        1.05,
        rounds,
        &mut pair,
        &mut bare,
    )
    .await;
    let mut bare = bare.expect("the last one runs");
    cancels(figures, rounds.min(5), &pair, &mut bare).await;
    queries(figures, if is_short { 100 } else { 400 }, &pair).await;
    // Neither is to be in the way of those that come.
    drop((pair, bare));
    streams(env, figures, rounds).await;
}

/// Two drivers, a guest at one of them, and a second monitor of its QEMU.
struct Pair {
    rigs: [Rig; 2],
    options: Options,
    raw: UnixListener,
    domain: Domain,
    at: usize,
}

impl Pair {
    async fn new(rigs: [Rig; 2]) -> Self {
        let uid = rustix::process::getuid().as_raw();
        let options = Options::new(AllowList::nobody().uid(uid));
        for rig in &rigs {
            let listener = tokio::net::UnixListener::bind(rig.dir.path().join("wire"));
            let door = Door::unix(listener.expect("a socket can be made"));
            rig.driver.serve_migrations(door, options.clone());
        }
        let path = rigs[0].dir.path().join("raw");
        let raw = UnixListener::bind(&path).expect("a socket can be made");
        let mut guest = rigs[0].guest("moves");
        let chardev = format!("socket,id=raw,path={}", path.display());
        let extra = ["-chardev", &chardev, "-mon", "chardev=raw,mode=control"];
        guest.extra_arguments.extend(extra.map(str::to_owned));
        let domain = rigs[0].driver.start(guest, StartOptions::default()).await;
        let domain = domain.expect("it starts");
        let booted = domain.wait_agent().deadline(60 * SECOND).await;
        booted.expect("it boots");
        Self {
            rigs,
            options,
            raw,
            domain,
            at: 0,
        }
    }

    fn pid(&self) -> u32 {
        self.domain.observed().pid.expect("it runs")
    }

    fn peer(&self) -> Arc<WirePeer> {
        let there = self.rigs[1 - self.at].dir.path().join("wire");
        Arc::new(WirePeer::new(UnixDial::new(there), self.options.clone()))
    }

    async fn migrate(&mut self, bandwidth: u64) -> Times {
        let mut here = self.rigs[self.at].driver.subscribe();
        let mut there = self.rigs[1 - self.at].driver.subscribe();
        let began = now();
        let moved = self.domain.migrate(self.peer(), with(bandwidth)).await;
        moved.expect("it moves");
        let stopped = told(&mut here, |event| event.name == "STOP").await;
        let resumed = told(&mut there, |event| event.name == "RESUME").await;
        self.at = 1 - self.at;
        let domain = self.rigs[self.at].driver.by_uuid(self.domain.uuid());
        self.domain = domain.expect("it is there");
        Times {
            began,
            stopped,
            resumed,
        }
    }
}

fn with(bandwidth: u64) -> MigrateOptions {
    MigrateOptions {
        bandwidth: Some(bandwidth),
        ..MigrateOptions::default()
    }
}

/// When QEMU told of that event, by its own clock.
async fn told(news: &mut Subscription, is_it: impl Fn(&Event) -> bool) -> Duration {
    loop {
        if let Notice::News { news, .. } = news.next().await
            && let What::Qemu(event) = &news.what
            && is_it(event)
        {
            let at = event.timestamp.to_system_time();
            let at = at.unwrap_or(SystemTime::UNIX_EPOCH);
            return at.duration_since(UNIX_EPOCH).expect("it is past 1970");
        }
    }
}

fn is_status(event: &Event, status: MigrationStatus) -> bool {
    matches!(event.typed(), QmpEvent::Migration(told) if told == status)
}

/// Both guests move in turn.
async fn moves(
    figures: &mut Figures,
    name: &str,
    bandwidth: u64,
    bar: f64,
    rounds: usize,
    pair: &mut Pair,
    bare: &mut Option<Bare>,
) {
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(pair.migrate(bandwidth).await);
        let qemu = bare.take().expect("one runs");
        let (there, times) = tokio::task::block_in_place(|| qemu.migrate(bandwidth));
        *bare = Some(there);
        floor.push(times);
    }
    let (took, least) = (median(&ours, Times::took), median(&floor, Times::took));
    figures.put(
        &format!("{name}-call-to-resume-bare"),
        ms(least),
        "ms",
        Bar::None,
    );
    figures.put(&format!("{name}-call-to-resume"), ms(took), "ms", Bar::None);
    let ratio = took.as_secs_f64() / least.as_secs_f64();
    figures.put(&format!("{name}-ratio"), ratio, "x", Bar::AtMost(bar));
    let (still, least) = (
        median(&ours, Times::stood_still),
        median(&floor, Times::stood_still),
    );
    figures.put(&format!("{name}-stopped-bare"), ms(least), "ms", Bar::None);
    figures.put(&format!("{name}-stopped"), ms(still), "ms", Bar::None);
    let beyond = ms(still) - ms(least);
    figures.put(
        &format!("{name}-stopped-beyond-bare"),
        beyond,
        "ms",
        Bar::AtMost(10.0),
    );
}

fn median(all: &[Times], of: fn(Times) -> Duration) -> Duration {
    quantile(&mut all.iter().copied().map(of).collect::<Vec<_>>(), 0.5)
}

/// The same move over the loopback device in plaintext and under TLS, in turn, as fast as it goes.
async fn streams(env: &Env, figures: &mut Figures, rounds: usize) {
    let authority = Authority::new();
    let plaintext = || Landing::plaintext(Ipv4Addr::LOCALHOST.into());
    let pair = |here: Landing, there: Landing| Pair::new([here, there].map(|at| Rig::at(env, at)));
    let [here, there] = ["a.example", "b.example"].map(|name| authority.landing(name));
    let mut under_tls = pair(here, there).await;
    let mut in_plaintext = pair(plaintext(), plaintext()).await;
    tokio::time::sleep(10 * SECOND).await;
    let (mut tls, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        plain.push(in_plaintext.migrate(FAST).await);
        tls.push(under_tls.migrate(FAST).await);
    }
    for (part, of) in [
        ("call-to-resume", Times::took as fn(Times) -> Duration),
        ("stopped", Times::stood_still),
    ] {
        let (took, least) = (median(&tls, of), median(&plain, of));
        figures.put(&format!("tcp-plaintext-{part}"), ms(least), "ms", Bar::None);
        figures.put(&format!("tcp-tls-{part}"), ms(took), "ms", Bar::None);
        let ratio = took.as_secs_f64() / least.as_secs_f64();
        figures.put(&format!("tcp-tls-{part}-ratio"), ratio, "x", Bar::None);
    }
}

/// From the order to stop until the call that migrates has returned, less what QEMU itself took from `cancelling` to
/// `cancelled` in that very migration: up to a tenth of a second, since it looks up from a throttled stream that often.
async fn cancels(figures: &mut Figures, rounds: usize, pair: &Pair, bare: &mut Bare) {
    let (mut ours, mut beyond, mut floor) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        // Not always at the same place of its tenth of a second.
        let after = SECOND + Duration::from_millis(37) * round as u32;
        let moving = begun(pair).await;
        tokio::time::sleep(after).await;
        let mut news = pair.domain.subscribe();
        let began = Instant::now();
        let cancelled = pair.domain.cancel_job("bench");
        cancelled.expect("it can be cancelled");
        let moved = moving.await.expect("no panic");
        moved.expect_err("it was cancelled");
        let took = began.elapsed();
        let from = told(&mut news, |event| {
            is_status(event, MigrationStatus::Cancelling)
        });
        let from = from.await;
        let until = told(&mut news, |event| {
            is_status(event, MigrationStatus::Cancelled)
        });
        let own = until.await.saturating_sub(from);
        ours.push(took);
        beyond.push(took.saturating_sub(own));
        floor.push(tokio::task::block_in_place(|| bare.cancel(SLOW, after)));
    }
    let median = |times: &mut [Duration]| ms(quantile(times, 0.5));
    figures.put("cancel-bare", median(&mut floor), "ms", Bar::None);
    figures.put("cancel", median(&mut ours), "ms", Bar::None);
    let beyond = median(&mut beyond);
    figures.put("cancel-beyond-qemu", beyond, "ms", Bar::AtMost(50.0));
}

type Moving = tokio::task::JoinHandle<Result<remote_migrate::Report, driver::Error>>;

/// A migration whose memory moves, slowly.
async fn begun(pair: &Pair) -> Moving {
    let moving = tokio::spawn(pair.domain.migrate(pair.peer(), with(SLOW)).into_future());
    let is_active = |seen: &driver::Observed| seen.migration == Some(MigrationStatus::Active);
    let active = pair
        .domain
        .wait_for(is_active, Clock::now() + 20 * SECOND)
        .await;
    active.expect("memory moves");
    moving
}

/// The same question by the driver and over a second monitor, in turn, while memory moves.
async fn queries(figures: &mut Figures, rounds: usize, pair: &Pair) {
    let mut raw = Raw::accept(&pair.raw, pair.pid());
    let moving = begun(pair).await;
    let domain = pair.domain.clone();
    // On a task, as in a daemon. The raw one blocks its thread, which is the least that it can cost.
    let asking = tokio::spawn(async move {
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let began = Instant::now();
            domain.query_status().await.expect("it answers");
            ours.push(began.elapsed());
            floor.push(raw.query_status());
        }
        (ours, floor)
    });
    let (mut ours, mut floor) = asking.await.expect("no panic");
    pair.domain.cancel_job("bench").expect("memory moves still");
    moving
        .await
        .expect("no panic")
        .expect_err("it was cancelled");
    for (part, at) in [("p50", 0.5), ("p95", 0.95)] {
        let (took, least) = (quantile(&mut ours, at), quantile(&mut floor, at));
        figures.put(&format!("query-raw-{part}"), ms(least), "ms", Bar::None);
        figures.put(&format!("query-{part}"), ms(took), "ms", Bar::None);
        let ratio = took.as_secs_f64() / least.as_secs_f64();
        let bar = if part == "p50" {
            Bar::AtMost(1.2)
        } else {
            Bar::None
        };
        figures.put(&format!("query-ratio-{part}"), ratio, "x", bar);
    }
}

/// A second monitor of a QEMU, without anything around it.
struct Raw {
    input: UnixStream,
    output: BufReader<UnixStream>,
}

impl Raw {
    /// That of this process, among all that have dialled.
    fn accept(listener: &UnixListener, pid: u32) -> Self {
        loop {
            let (input, _) = listener.accept().expect("it has dialled");
            let peer = rustix::net::sockopt::socket_peercred(&input).expect("it is a process");
            if peer.pid.as_raw_nonzero().get().unsigned_abs() != pid {
                continue;
            }
            let output = BufReader::new(input.try_clone().expect("a socket has two ends"));
            let mut raw = Self { input, output };
            raw.line();
            raw.ask("{\"execute\":\"qmp_capabilities\"}\r\n");
            return raw;
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it answers");
        line
    }

    fn ask(&mut self, request: &str) {
        self.input
            .write_all(request.as_bytes())
            .expect("it listens");
        while !self.line().starts_with("{\"return\"") {}
    }

    fn query_status(&mut self) -> Duration {
        let began = Instant::now();
        self.ask("{\"execute\":\"query-status\"}\r\n");
        began.elapsed()
    }
}
