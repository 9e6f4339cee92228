//! Question: what does a command cost through monitor-qmp, beside the bare socket and the two
//! other Rust clients, all in one run?
//!
//! `peers [--short]`. Each client is a process of its own with a current_thread runtime, against
//! a canned responder in another, both bound to one CPU: else the wake-up of an idle CPU, some
//! 40 µs, hides every client's own cost. Clients take turns; figures are medians over the
//! turns. Against a real QEMU nothing is bound. A figure that is short ends the run with 1.

#![allow(missing_docs, reason = "a program, not a library")]

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

mod client;
mod count;
mod respond;

const CLIENTS: [&str; 4] = ["raw", "ours", "qapi", "qmp"];

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["respond", path] => {
            bind();
            respond::serve(Path::new(path)).expect("the responder serves");
            ExitCode::SUCCESS
        }
        ["client", client, scenario, path, count] => {
            let count = count.parse().expect("a count");
            if !scenario.starts_with("qemu") {
                bind();
            }
            measure(client, scenario, Path::new(path), count);
            ExitCode::SUCCESS
        }
        [] => compare(9, 1),
        ["--short"] => compare(3, 10),
        _ => {
            eprintln!("usage: peers [--short]");
            ExitCode::from(2)
        }
    }
}

/// This process to the first CPU.
fn bind() {
    // SAFETY: a set of bits without other meaning, which the kernel copies.
    unsafe {
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut cpus);
        libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus);
    }
}

fn measure(client: &str, scenario: &str, path: &Path, count: usize) {
    if client == "raw" {
        return client::raw(scenario, path, count);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    // As any program does it: the main future, and what the clients spawn beside it.
    runtime.block_on(async {
        match client {
            "ours" => client::ours(scenario, path, count).await,
            "qapi" => client::any::<client::Qapi>(scenario, path, count).await,
            "qmp" => client::any::<qmp::Client>(scenario, path, count).await,
            other => panic!("no client {other}"),
        }
    });
}

/// A process that ends with the run.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Medians = BTreeMap<(&'static str, &'static str, String), f64>;

fn compare(turns: usize, divisor: usize) -> ExitCode {
    let folder = env::temp_dir().join(format!("peers-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for sockets");
    let canned = folder.join("canned");
    let _responder = responder(&canned);
    let qemu = real_qemu(&folder);

    let mut plan = vec![
        ("trip", &CLIENTS[..], 20_000),
        ("trip-timed", &CLIENTS[2..], 20_000),
        ("many-8", &CLIENTS[..], 40_000),
        ("many-16", &CLIENTS[1..], 20_000),
        ("many-64", &CLIENTS[1..], 20_000),
        ("schema", &CLIENTS[..], 200),
        ("commands", &CLIENTS[..], 10),
        ("events", &CLIENTS[1..2], 1),
        ("idle", &CLIENTS[1..2], 1_000),
    ];
    if qemu.is_some() {
        plan.push(("qemu", &CLIENTS[..3], 5_000));
        plan.push(("qemu-bare", &CLIENTS[..1], 5_000));
    }
    let mut samples: BTreeMap<_, Vec<f64>> = BTreeMap::new();
    for turn in 0..turns {
        eprintln!("turn {} of {turns}", turn + 1);
        for (scenario, clients, count) in &plan {
            let path = match (*scenario, &qemu) {
                ("qemu" | "qemu-bare", Some((_, path))) => path,
                _ => &canned,
            };
            for shift in 0..clients.len() {
                let client = clients[(turn + shift) % clients.len()];
                for (name, value) in one(client, scenario, path, (count / divisor).max(2)) {
                    samples
                        .entry((client, *scenario, name))
                        .or_default()
                        .push(value);
                }
            }
        }
    }
    let medians = samples.into_iter().map(|(key, mut values)| {
        values.sort_by(f64::total_cmp);
        (key, values[values.len() / 2])
    });
    let medians: Medians = medians.collect();
    drop(qemu);
    let _ = fs::remove_dir_all(&folder);
    report(&medians)
}

fn responder(path: &Path) -> Server {
    let child = Command::new(env::current_exe().expect("this program"))
        .args(["respond".as_ref(), path.as_os_str()])
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.expect("the responder starts");
    let output = child.stdout.take().expect("stdout was asked to be a pipe");
    let ready = BufReader::new(output).lines().next();
    assert!(
        ready.is_some_and(|line| line.is_ok()),
        "the responder failed"
    );
    Server(child)
}

fn real_qemu(folder: &Path) -> Option<(Server, PathBuf)> {
    let path = folder.join("qemu");
    let binary = env::var_os("VMWRIGHT_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
    let child = Command::new(binary)
        .args([
            "-M",
            "none",
            "-S",
            "-display",
            "none",
            "-nodefaults",
            "-qmp",
        ])
        .arg(format!("unix:{},server=on,wait=off", path.display()))
        .stdin(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        eprintln!("no QEMU: its figures are left out");
        return None;
    };
    let server = Server(child);
    for _ in 0..400 {
        if path.exists() {
            return Some((server, path));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    eprintln!("QEMU made no socket: its figures are left out");
    None
}

/// One client doing one thing once.
fn one(client: &str, scenario: &str, path: &Path, count: usize) -> Vec<(String, f64)> {
    let output = Command::new(env::current_exe().expect("this program"))
        .args(["client", client, scenario])
        .arg(path)
        .arg(count.to_string())
        .stderr(Stdio::inherit())
        .output()
        .expect("the client starts");
    if !output.status.success() {
        eprintln!("{client} failed at {scenario}: {}", output.status);
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
        .collect()
}

fn report(medians: &Medians) -> ExitCode {
    println!("medians, by client and scenario:");
    for ((client, scenario, name), value) in medians {
        println!("  {scenario:<9} {name:<12} {client:<5} {value:.2}");
    }
    let of = |client: &'static str, scenario: &'static str, name: &str| {
        let found = medians.get(&(client, scenario, name.to_owned()));
        found.copied().unwrap_or(f64::NAN)
    };
    let ratio = |scenario, name, to| of("ours", scenario, name) / of(to, scenario, name);
    let mut all_hold = true;
    let mut figure = |name: &str, value: f64, unit: &str, op: &str, limit: f64| {
        let holds = match op {
            "<=" => value <= limit,
            "<" => value < limit,
            _ => value >= limit,
        };
        all_hold &= holds;
        let verdict = if holds { "ok" } else { "short" };
        println!("figure {name} {value:.3} {unit} bar {op} {limit} {verdict}");
    };
    figure("trip-to-raw", ratio("trip", "p50", "raw"), "x", "<=", 1.5);
    figure("trip-to-qapi", ratio("trip", "p50", "qapi"), "x", "<", 1.0);
    figure("trip-to-qmp", ratio("trip", "p50", "qmp"), "x", "<", 1.0);
    for peer in ["qapi", "qmp"] {
        let ratio = of("ours", "trip", "p50") / of(peer, "trip-timed", "p50");
        figure(&format!("trip-to-{peer}-timed"), ratio, "x", "<", 1.0);
    }
    figure(
        "allocations",
        of("ours", "trip", "allocations"),
        "each",
        "<=",
        4.0,
    );
    figure("sends", of("ours", "trip", "sends"), "each", "<=", 1.0);
    let longer = of("ours", "trip", "bytes") - of("raw", "trip", "bytes");
    figure(
        "request-longer",
        longer,
        "B",
        "<=",
        ",\"id\":12345".len() as f64,
    );
    figure(
        "eight-to-raw",
        ratio("many-8", "each", "raw"),
        "x",
        "<=",
        2.0,
    );
    for callers in ["many-16", "many-64"] {
        for peer in ["qapi", "qmp"] {
            let name = format!("{callers}-to-{peer}");
            figure(&name, ratio(callers, "each", peer), "x", "<", 1.0);
        }
    }
    for (scenario, size) in [("schema", "207k"), ("commands", "10M")] {
        let time = ratio(scenario, "p50", "qapi");
        figure(&format!("reply-{size}-to-qapi"), time, "x", "<=", 0.5);
        let peak = ratio(scenario, "peak", "qapi");
        figure(&format!("peak-{size}-to-qapi"), peak, "x", "<=", 0.5);
        let sums = CLIENTS.map(|client| of(client, scenario, "checksum"));
        let differ = sums.iter().filter(|sum| **sum != sums[0]).count();
        figure(
            &format!("checksums-{size}-differ"),
            differ as f64,
            "clients",
            "<=",
            0.0,
        );
    }
    figure("events-sink", of("ours", "events", "sink"), "/s", ">=", 1e6);
    figure(
        "events-stream",
        of("ours", "events", "stream"),
        "/s",
        ">=",
        1e6,
    );
    let grown = of("ours", "events", "memory") / f64::from(1 << 20);
    figure("events-slow-memory", grown, "MiB", "<=", 2.0);
    figure(
        "idle",
        of("ours", "idle", "each") / 1024.0,
        "KiB",
        "<=",
        16.0,
    );
    figure(
        "idle-after-10M",
        of("ours", "idle", "after-big") / 1024.0,
        "KiB",
        "<=",
        16.0,
    );
    if medians.contains_key(&("ours", "qemu", "p50".to_owned())) {
        let more = of("ours", "qemu", "p50") - of("raw", "qemu", "p50");
        figure("qemu-over-raw", more, "us", "<=", 15.0);
    }
    if all_hold {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
