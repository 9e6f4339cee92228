//! One client in a process of its own: does one scenario and prints what it measured.

use std::{
    future::Future,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream as Blocking,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, future::join_all};
use monitor_qmp::{
    Closed, Deadline, Event, EventSink, Monitor, Notice, Options,
    command::{
        CommandName, QueryCommands, QueryName, QueryQmpSchema, QueryStatus, SchemaEntry, Stop,
    },
    events,
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::{count, respond::BURST};

/// A client that can be measured.
#[allow(async_fn_in_trait, reason = "one thread, one process")]
pub trait Client: Clone {
    async fn connect(path: &Path) -> Self;
    async fn status(&self);
    /// What the responder read of us since it was last asked: reads and bytes.
    async fn seen(&self) -> (f64, f64);
    /// The 207 kB reply, fully typed, as a checksum.
    async fn schema(&self) -> usize;
    /// The 10 MB reply.
    async fn commands(&self) -> usize;
}

fn checksum<T>(entries: &[T], name: impl Fn(&T) -> &str) -> usize {
    let of = |(n, entry)| {
        let name: &str = name(entry);
        (n + 1) * name.len() + usize::from(*name.as_bytes().last().unwrap_or(&0))
    };
    entries.iter().enumerate().map(of).sum()
}

fn two(text: &str) -> (f64, f64) {
    let mut numbers = text.split(' ').filter_map(|word| word.parse().ok());
    (numbers.next().unwrap_or(0.0), numbers.next().unwrap_or(0.0))
}

/// Far enough away that nothing meets it.
fn never() -> Deadline {
    Deadline::now() + Duration::from_secs(3600)
}

impl Client for Monitor {
    async fn connect(path: &Path) -> Self {
        let wire = UnixStream::connect(path)
            .await
            .expect("the responder listens");
        let connect = Self::connect(wire, Options::default(), (), never());
        connect.await.expect("the responder greets")
    }

    async fn status(&self) {
        self.execute(QueryStatus, never()).await.expect("a status");
    }

    async fn seen(&self) -> (f64, f64) {
        let name = self.execute(QueryName, never()).await.expect("a name");
        two(&name.name.unwrap_or_default())
    }

    async fn schema(&self) -> usize {
        let all = self.execute(QueryQmpSchema, never()).await;
        checksum(&all.expect("a schema"), |entry| &entry.name)
    }

    async fn commands(&self) -> usize {
        let all = self.execute(QueryCommands, never()).await;
        checksum(&all.expect("names"), |command| &command.name)
    }
}

type Write = qapi::futures::QmpStreamTokio<tokio::io::WriteHalf<UnixStream>>;

#[derive(Clone)]
pub struct Qapi(Arc<qapi::futures::QapiService<Write>>);

impl Client for Qapi {
    async fn connect(path: &Path) -> Self {
        let stream = qapi::futures::QmpStreamTokio::open_uds(path).await;
        let stream = stream.expect("the responder greets").negotiate().await;
        Self(Arc::new(stream.expect("it negotiates").spawn_tokio().0))
    }

    async fn status(&self) {
        let status = self.0.execute(qapi::qmp::query_status {}).await;
        status.expect("a status");
    }

    async fn seen(&self) -> (f64, f64) {
        let name = self.0.execute(qapi::qmp::query_name {}).await;
        two(&name.expect("a name").name.unwrap_or_default())
    }

    async fn schema(&self) -> usize {
        let all = self.0.execute(qapi::qmp::query_qmp_schema {}).await;
        checksum(&all.expect("a schema"), |entry| match entry {
            qapi::qmp::SchemaInfo::command { base, .. } => &base.name,
            _ => "",
        })
    }

    async fn commands(&self) -> usize {
        let all = self.0.execute(qapi::qmp::query_commands {}).await;
        checksum(&all.expect("names"), |command| &command.name)
    }
}

#[derive(Deserialize)]
struct Status {
    #[serde(rename = "running")]
    _running: bool,
    #[serde(rename = "status")]
    _status: String,
}

#[derive(Deserialize)]
struct Name {
    name: String,
}

impl Client for qmp::Client {
    async fn connect(path: &Path) -> Self {
        let client = Self::connect(qmp::Endpoint::unix(path)).await;
        client.expect("the responder greets")
    }

    async fn status(&self) {
        let status: Status = self
            .execute("query-status", None::<()>)
            .await
            .expect("a status");
        drop(status);
    }

    async fn seen(&self) -> (f64, f64) {
        let name: Name = self
            .execute("query-name", None::<()>)
            .await
            .expect("a name");
        two(&name.name)
    }

    async fn schema(&self) -> usize {
        let all: Vec<SchemaEntry> = self
            .execute("query-qmp-schema", None::<()>)
            .await
            .expect("a schema");
        checksum(&all, |entry| &entry.name)
    }

    async fn commands(&self) -> usize {
        let all: Vec<CommandName> = self
            .execute("query-commands", None::<()>)
            .await
            .expect("names");
        checksum(&all, |command| &command.name)
    }
}

/// The floor: a blocking loop over the bare socket, with the same typed decoding.
struct Raw {
    stream: Blocking,
    input: Vec<u8>,
}

#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "return")]
    value: T,
}

impl Raw {
    fn connect(path: &Path) -> Self {
        let stream = Blocking::connect(path).expect("the responder listens");
        let mut raw = Self {
            stream,
            input: Vec::with_capacity(1 << 16),
        };
        raw.line();
        raw.call(b"{\"execute\":\"qmp_capabilities\"}");
        raw
    }

    /// Reads to the end of a line and gives where it ends.
    fn line(&mut self) -> usize {
        self.input.clear();
        self.lines(1)
    }

    fn lines(&mut self, wanted: usize) -> usize {
        let mut chunk = [0; 1 << 16];
        let mut seen = 0;
        loop {
            let count = self.stream.read(&mut chunk).expect("an answer");
            assert!(count > 0, "the responder is gone");
            seen += chunk[..count].iter().filter(|byte| **byte == b'\n').count();
            self.input.extend_from_slice(&chunk[..count]);
            if seen >= wanted {
                return self.input.len();
            }
        }
    }

    fn call(&mut self, request: &[u8]) {
        self.stream
            .write_all(request)
            .expect("the responder listens");
        self.line();
    }

    fn trips(&mut self, count: usize, request: impl Fn(usize) -> Vec<u8>) {
        let mut times = Vec::with_capacity(count);
        for n in 1..=count / 10 + count {
            let request = request(n);
            let start = Instant::now();
            let _: Status = self.ask(&request);
            times.push(start.elapsed());
        }
        percentiles(times.split_off(count / 10));
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &[u8]) -> T {
        self.call(request);
        let answer: Answer<T> = serde_json::from_slice(&self.input).expect("an answer");
        answer.value
    }
}

const STATUS: &[u8] = b"{\"execute\":\"query-status\"}";

fn say(name: &str, value: f64) {
    println!("{name} {value}");
}

/// What one of many commands costs: the median over stretches of 80 of them, so that a stretch in
/// which this process had no CPU does not count for all.
fn each(mut ends: Vec<Instant>) {
    const STRETCH: usize = 80;
    ends.sort_unstable();
    let edges: Vec<_> = ends.into_iter().step_by(STRETCH).collect();
    let mut times: Vec<_> = edges.windows(2).map(|edge| edge[1] - edge[0]).collect();
    times.sort_unstable();
    let median = times[times.len() / 2].as_secs_f64();
    say("each", median * 1e6 / STRETCH as f64);
}

fn percentiles(mut times: Vec<Duration>) {
    times.sort_unstable();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    say("p50", micros(times[times.len() / 2]));
    say("p99", micros(times[times.len() * 99 / 100]));
}

/// Everything that the floor is measured at.
pub fn raw(scenario: &str, path: &Path, count: usize) {
    let mut raw = Raw::connect(path);
    match scenario {
        "trip" | "qemu-bare" => {
            raw.trips(count, |_| STATUS.to_vec());
            say("bytes", STATUS.len() as f64);
        }
        // QEMU takes time for every byte of a request, and without an id nobody can tell which
        // command an answer belongs to: the floor has one too.
        "qemu" => raw.trips(count, |n| {
            let body = &STATUS[..STATUS.len() - 1];
            [body, format!(",\"id\":{n}}}").as_bytes()].concat()
        }),
        "many-8" => {
            let eight = STATUS.repeat(8);
            let mut ends = Vec::with_capacity(count);
            for _ in 0..count / 8 {
                raw.stream.write_all(&eight).expect("the responder listens");
                raw.input.clear();
                raw.lines(8);
                for line in raw.input.split(|byte| *byte == b'\n').take(8) {
                    let _: Answer<Status> = serde_json::from_slice(line).expect("an answer");
                }
                ends.extend([Instant::now(); 8]);
            }
            each(ends);
        }
        "schema" => {
            big(count, || {
                let all: Vec<SchemaEntry> = raw.ask(b"{\"execute\":\"query-qmp-schema\"}");
                checksum(&all, |entry| &entry.name)
            });
        }
        "commands" => {
            big(count, || {
                let all: Vec<CommandName> = raw.ask(b"{\"execute\":\"query-commands\"}");
                checksum(&all, |command| &command.name)
            });
        }
        _ => {}
    }
}

fn big(count: usize, mut ask: impl FnMut() -> usize) {
    let mut times = Vec::new();
    let mut sum = 0;
    let (before, _) = count::memory();
    for _ in 0..count {
        let start = Instant::now();
        sum = ask();
        times.push(start.elapsed());
    }
    percentiles(times);
    say("peak", count::memory().1 - before);
    say("checksum", sum as f64);
}

/// Everything that any client can be measured at.
pub async fn any<C: Client>(scenario: &str, path: &Path, count: usize) {
    let client = C::connect(path).await;
    match scenario {
        // With a deadline around it, as ours has one: it makes the kernel wait with a timer.
        "trip-timed" => {
            let mut times = Vec::with_capacity(count);
            for _ in 0..count {
                let start = Instant::now();
                let call = tokio::time::timeout_at(never(), client.status());
                call.await.expect("an answer");
                times.push(start.elapsed());
            }
            percentiles(times);
        }
        "trip" | "qemu" => {
            for _ in 0..count / 10 {
                client.status().await;
            }
            if scenario == "trip" {
                client.seen().await;
            }
            let mut times = Vec::with_capacity(count);
            let before = count::allocations();
            for _ in 0..count {
                let start = Instant::now();
                client.status().await;
                times.push(start.elapsed());
            }
            let each = |total: f64| total / count as f64;
            say("allocations", each((count::allocations() - before) as f64));
            if scenario == "trip" {
                let (reads, bytes) = client.seen().await;
                // The question itself is seen as well.
                say("sends", (reads - 1.0) / count as f64);
                say("bytes", bytes / (count + 1) as f64);
            }
            percentiles(times);
        }
        "many-8" => many(&client, 8, count).await,
        "many-16" => many(&client, 16, count).await,
        "many-64" => many(&client, 64, count).await,
        "schema" => big_async(count, || client.schema()).await,
        "commands" => big_async(count, || client.commands()).await,
        _ => {}
    }
}

async fn many<C: Client>(client: &C, callers: usize, count: usize) {
    let one = || async {
        let mut calls = Vec::with_capacity(count / callers);
        for _ in 0..count / callers {
            let start = Instant::now();
            client.status().await;
            calls.push((start, Instant::now()));
        }
        calls
    };
    let calls = join_all((0..callers).map(|_| one())).await.concat();
    each(calls.iter().map(|(_, end)| *end).collect());
    percentiles(calls.iter().map(|(start, end)| *end - *start).collect());
}

async fn big_async<F: Future<Output = usize>>(count: usize, ask: impl Fn() -> F) {
    let mut times = Vec::new();
    let mut sum = 0;
    let (before, _) = count::memory();
    for _ in 0..count {
        let start = Instant::now();
        sum = ask().await;
        times.push(start.elapsed());
    }
    percentiles(times);
    say("peak", count::memory().1 - before);
    say("checksum", sum as f64);
}

/// What only ours is measured at.
pub async fn ours(scenario: &str, path: &Path, count: usize) {
    match scenario {
        "events" => burst(path).await,
        "idle" => idle(path, count).await,
        _ => any::<Monitor>(scenario, path, count).await,
    }
}

/// Counts, and feeds streams.
struct Sink {
    seen: Arc<AtomicUsize>,
    streams: Vec<monitor_qmp::EventQueue>,
}

impl EventSink for Sink {
    fn event(&mut self, event: Event) {
        self.seen.fetch_add(1, Ordering::Relaxed);
        if let Some((last, others)) = self.streams.split_last_mut() {
            for stream in others {
                stream.event(event.clone());
            }
            last.event(event);
        }
    }

    fn closed(&mut self, _: &Closed) {}
}

/// A burst into a sink, into a stream that is read, and into that beside one that nobody reads.
async fn burst(path: &Path) {
    for (name, reads, ignores) in [
        ("sink", false, false),
        ("stream", true, false),
        ("both", true, true),
    ] {
        let (fast, mut reading) = events(BURST);
        let (slow, _unread) = events(1000);
        let mut streams = Vec::new();
        streams.extend(ignores.then_some(slow));
        streams.extend(reads.then_some(fast));
        let seen = Arc::new(AtomicUsize::new(0));
        let sink = Sink {
            seen: Arc::clone(&seen),
            streams,
        };
        let wire = UnixStream::connect(path)
            .await
            .expect("the responder listens");
        let monitor = Monitor::connect(wire, Options::default(), sink, never()).await;
        let monitor = monitor.expect("the responder greets");
        // The most there was before: what the one that nobody reads adds to it.
        let (_, before) = count::memory();
        let (start, cpu) = (Instant::now(), count::cpu());
        let read = async {
            for read in 0..if reads { BURST } else { 0 } {
                let notice = reading.next().await;
                let is_event = matches!(notice, Some(Notice::Event(_)));
                assert!(is_event, "{notice:?} after {read} events");
            }
        };
        let (stopped, ()) = tokio::join!(monitor.execute(Stop, never()), read);
        stopped.expect("a burst");
        assert_eq!(seen.load(Ordering::Relaxed), BURST, "an event was lost");
        // The responder may take its turns on the same CPU, so the client's own time tells more.
        say(name, BURST as f64 / (count::cpu() - cpu));
        let wall = BURST as f64 / start.elapsed().as_secs_f64();
        say(&format!("{name}-wall"), wall);
        if ignores {
            say("memory", count::memory().1 - before);
        }
    }
}

async fn idle(path: &Path, count: usize) {
    let mut all = Vec::with_capacity(count);
    let first = <Monitor as Client>::connect(path).await;
    first.status().await;
    let (before, _) = count::memory();
    for _ in 0..count {
        let monitor = <Monitor as Client>::connect(path).await;
        monitor.status().await;
        all.push(monitor);
    }
    let (after, _) = count::memory();
    say("each", (after - before) / count as f64);
    // The same connections after each of some received 10 MB once.
    let some = 50.min(count);
    for monitor in &all[..some] {
        monitor.commands().await;
    }
    say("after-big", (count::memory().0 - before) / count as f64);
}
