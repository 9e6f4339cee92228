//! What do ten thousand domains cost: a list, memory, an idle half minute, the others' calls while a hundred are silent,
//! and another's events during a flood?
//!
//! The QEMUs are fakes in a process of their own, met through a transport of one socket.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use driver::{Domain, Driver, Notice, Run, What};
use futures::StreamExt;
use futures::future::join_all;
use futures::stream;
use job_core::JobKind;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep};
use transport_host::{Error, ErrorKind, Transport, Transports};

use crate::fakes::monotonic;
use crate::figures::{Bar, Figures};
use crate::{SECOND, ms, quantile};

/// As many as are wanted.
const DOMAINS: u64 = 10_000;
/// Of those, so many are silent for a while.
const SILENT: u64 = 100;
/// Descriptors of a process that are not a domain's.
const OTHERS: u64 = 500;
const PAIRS: usize = 7;

/// Lets this process, and those it starts, have as many descriptors as it may. Yields how many.
pub(crate) fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).expect("a process may raise its limit to the hard one");
    limit.maximum.unwrap_or(u64::MAX)
}

/// The process of the fakes. Ends with this.
struct Fakes {
    stdin: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Fakes {
    async fn start(path: &Path) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let mut child = Command::new(program)
            .arg("fakes")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it starts");
        let stdout = child.stdout.take().expect("a pipe was asked for");
        let mut fakes = Self {
            stdin: child.stdin.take().expect("a pipe was asked for"),
            said: BufReader::new(stdout).lines(),
            _child: child,
        };
        fakes.says("ready").await;
        fakes
    }

    async fn says(&mut self, wanted: &str) {
        let said = self.said.next_line().await.expect("it runs");
        assert_eq!(said.as_deref(), Some(wanted));
    }

    async fn silence(&mut self, count: u64) {
        let line = format!("{count}\n");
        let told = self.stdin.write_all(line.as_bytes()).await;
        told.expect("it listens");
        self.says("done").await;
    }
}

/// `fleet:NUMBER`: one socket for all, and the number as the first line.
struct Fleet(PathBuf);

#[async_trait]
impl Transport for Fleet {
    fn name(&self) -> &str {
        "fleet"
    }

    async fn dial(&self, address: &str, _: transport_host::Deadline) -> Result<OwnedFd, Error> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Unsupported {
                text: error.to_string(),
            })
        };
        let mut stream = UnixStream::connect(&self.0).await.map_err(failed)?;
        let line = format!("{address}\n");
        stream.write_all(line.as_bytes()).await.map_err(failed)?;
        Ok(stream.into_std().map_err(failed)?.into())
    }
}

pub(crate) async fn run(figures: &mut Figures, limit: u64, is_short: bool) {
    let wanted = if is_short { DOMAINS / 10 } else { DOMAINS };
    let count = wanted.min(limit.saturating_sub(OTHERS));
    if count < wanted {
        println!("{count} domains instead of {wanted}: a process may have {limit} descriptors");
    }
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let socket = dir.path().join("fleet");
    let mut fakes = Fakes::start(&socket).await;
    let transports = Transports::builder().register(Arc::new(Fleet(socket)));
    let transports = transports.build().expect("one transport");
    let driver = Driver::builder(transports, dir.path().join("run")).build();
    let driver = driver.expect("the directories can be made");

    let before = resident();
    let began = Instant::now();
    let attached: Vec<Domain> = stream::iter(0..count)
        .map(|number| {
            let attach = driver.attach(format!("fleet:{number}"));
            async move { attach.await.expect("it is taken in") }
        })
        .buffered(64)
        .collect()
        .await;
    println!("{count} domains in {:.1} s", began.elapsed().as_secs_f64());
    memory(figures, "idle", before, count);
    // The connections by which each was first looked at have yet to be put away.
    sleep(SECOND).await;
    list(figures, &driver, count);
    idle(figures, if is_short { 3 } else { 30 }).await;
    silence(
        figures,
        &mut fakes,
        &attached,
        if is_short { 500 } else { 4000 },
    )
    .await;
    flood(figures, &attached, if is_short { 10_000 } else { 100_000 }).await;
    aged(&attached).await;
    memory(figures, "idle-with-a-full-log", before, count);
}

/// Memory of this process that is in RAM, in KiB.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/status").expect("there is one");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let words = line.and_then(|line| line.split_whitespace().next());
    words
        .and_then(|word| word.parse().ok())
        .expect("a number of kB")
}

fn memory(figures: &mut Figures, name: &str, before: u64, count: u64) {
    let each = resident().saturating_sub(before) as f64 / count as f64;
    let name = format!("memory-of-a-domain-{name}");
    figures.put(&name, each, "KiB", Bar::AtMost(32.0));
}

fn list(figures: &mut Figures, driver: &Driver, count: u64) {
    let mut times = Vec::new();
    for _ in 0..200 {
        let began = Instant::now();
        let rows = driver.list();
        times.push(began.elapsed());
        assert_eq!(rows.len() as u64, count);
        assert!(rows.iter().all(|row| row.run.is_running()));
    }
    let (median, late) = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
    figures.put("list-p50", ms(median), "ms", Bar::None);
    figures.put("list-p99", ms(late), "ms", Bar::AtMost(5.0));
}

/// Processor time that this process takes while nobody wants anything of it.
async fn idle(figures: &mut Figures, seconds: u32) {
    sleep(SECOND).await;
    let used = || {
        let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
    };
    let before = used();
    sleep(seconds * SECOND).await;
    let share = (used() - before) / f64::from(seconds) * 100.0;
    figures.put("idle-processor", share, "%", Bar::AtMost(1.0));
}

/// Calls to the others while some are silent and asked all the same, beside the same calls while all answer, in turn.
async fn silence(figures: &mut Figures, fakes: &mut Fakes, all: &[Domain], calls: usize) {
    let (silent, rest) = all.split_at(SILENT as usize);
    let (mut ratios, mut quiets, mut besides) = (Vec::new(), Vec::new(), Vec::new());
    asked(rest, calls).await;
    for pair in 0..PAIRS {
        let mut quiet = Duration::ZERO;
        let mut beside = Duration::ZERO;
        // Whatever the first place in a pair is worth, each gets it in turn.
        for turn in 0..2 {
            if (pair + turn) % 2 == 0 {
                quiet = quantile(&mut asked(rest, calls).await, 0.99);
            } else {
                fakes.silence(SILENT).await;
                let is_over = Arc::new(AtomicBool::new(false));
                let asking: Vec<_> = silent
                    .iter()
                    .map(|domain| tokio::spawn(ask_on(domain.clone(), is_over.clone())))
                    .collect();
                beside = quantile(&mut asked(rest, calls).await, 0.99);
                is_over.store(true, Ordering::SeqCst);
                for ended in join_all(asking).await {
                    ended.expect("no panic");
                }
                fakes.silence(0).await;
                healthy(silent).await;
            }
        }
        ratios.push(beside.as_secs_f64() / quiet.as_secs_f64());
        quiets.push(quiet);
        besides.push(beside);
    }
    ratios.sort_by(f64::total_cmp);
    figures.put(
        "rest-p99-undisturbed",
        ms(quantile(&mut quiets, 0.5)),
        "ms",
        Bar::None,
    );
    let beside = ms(quantile(&mut besides, 0.5));
    figures.put("rest-p99-beside-100-silent", beside, "ms", Bar::None);
    figures.put("rest-p99-ratio", ratios[PAIRS / 2], "x", Bar::AtMost(1.25));
}

/// Asks a domain that does not answer, again and again, each time for a quarter of a second.
async fn ask_on(domain: Domain, is_over: Arc<AtomicBool>) {
    let limit = SECOND / 4;
    while !is_over.load(Ordering::SeqCst) {
        let again = Instant::now() + limit;
        let asked = domain.query_status().deadline(limit).await;
        asked.expect_err("it is silent");
        tokio::time::sleep_until(again).await;
    }
}

async fn healthy(domains: &[Domain]) {
    let deadline = Instant::now() + 30 * SECOND;
    for domain in domains {
        let is_well = |seen: &driver::Observed| seen.health == monitor_qmp::Health::Ok;
        let well = domain.wait_for(is_well, deadline).await;
        well.expect("it answers again");
    }
}

/// Four callers, each with a domain after the other.
async fn asked(domains: &[Domain], calls: usize) -> Vec<Duration> {
    const CALLERS: usize = 4;
    let callers = (0..CALLERS).map(|caller| {
        let mine: Vec<Domain> = (0..calls / CALLERS)
            .map(|call| domains[(caller + call * 97) % domains.len()].clone())
            .collect();
        tokio::spawn(async move {
            let mut times = Vec::with_capacity(mine.len());
            for domain in mine {
                let began = Instant::now();
                domain.query_status().await.expect("it answers");
                times.push(began.elapsed());
            }
            times
        })
    });
    let all = join_all(callers).await;
    all.into_iter()
        .flat_map(|times| times.expect("no panic"))
        .collect()
}

/// How late the events of one domain are, with and without a flood of another's.
async fn flood(figures: &mut Figures, all: &[Domain], count: u64) {
    let (flooded, other) = (&all[0], &all[1]);
    let quiet = lateness(other, 1000).await;
    let mut received = flooded.subscribe();
    let began = Instant::now();
    let flooding = tokio::spawn(events(flooded.clone(), count, 0));
    let beside = lateness(other, 1000).await;
    flooding.await.expect("no panic");
    let mut seen = 0;
    while seen < count {
        seen += match received.next().await {
            Notice::Gap { missed } => missed,
            Notice::News { news, .. } => u64::from(matches!(news.what, What::Qemu(_))),
            _ => 0,
        };
    }
    let took = began.elapsed();
    println!("{count} events in {:.2} s", took.as_secs_f64());
    let (quiet, beside) = (ms(quiet), ms(beside));
    figures.put("event-p99-undisturbed", quiet, "ms", Bar::None);
    figures.put("event-p99-beside-a-flood", beside, "ms", Bar::None);
    let moved = beside - quiet;
    figures.put("event-p99-moved-by", moved, "ms", Bar::AtMost(5.0));
}

async fn lateness(domain: &Domain, count: u64) -> Duration {
    let mut received = domain.subscribe();
    let sending = tokio::spawn(events(domain.clone(), count, 500));
    let mut times = Vec::new();
    while (times.len() as u64) < count {
        let Notice::News { news, .. } = received.next().await else {
            panic!("its events come slowly enough to be followed")
        };
        let What::Qemu(event) = &news.what else {
            continue;
        };
        let now = monotonic();
        let sent: Sent = serde_json::from_str(event.data.as_ref().expect("there is some").get())
            .expect("as the fakes say it");
        times.push(Duration::from_nanos(now.saturating_sub(sent.sent)));
    }
    sending.await.expect("no panic");
    quantile(&mut times, 0.99)
}

#[derive(serde::Deserialize)]
struct Sent {
    sent: u64,
}

/// Has the domain's QEMU tell of so many events.
async fn events(domain: Domain, count: u64, every_us: u64) {
    let deadline = Instant::now() + 30 * SECOND;
    let work = move |mut op: driver::Op| async move {
        let arguments = json!({"count": count, "every-us": every_us});
        op.monitor()?.execute_raw("x-events", arguments).await
    };
    let asked = domain.run("events", JobKind::Query, deadline, work).await;
    asked.expect("it is answered");
}

/// Each domain has more to tell than it remembers.
async fn aged(all: &[Domain]) {
    const MORE: u64 = 300;
    let tell = |domain: &Domain| {
        let domain = domain.clone();
        async move {
            let mut received = domain.subscribe();
            events(domain.clone(), MORE, 0).await;
            let mut seen = 0;
            while seen < MORE {
                seen += match received.next().await {
                    Notice::Gap { missed } => missed,
                    Notice::News { news, .. } => u64::from(matches!(news.what, What::Qemu(_))),
                    _ => 0,
                };
            }
        }
    };
    stream::iter(all.iter().map(tell))
        .buffer_unordered(64)
        .count()
        .await;
    assert!(all.iter().all(|domain| domain.observed().run != Run::Lost));
}
