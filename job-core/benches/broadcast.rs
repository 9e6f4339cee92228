//! What does waking everybody cost, and what does waking one?
//!
//! 64 threads share one domain, each job sleeps 300 µs. On one side the scheduler as libvirt has it: one lock, one
//! condition, every end wakes all who wait, and whoever gets the lock first goes. On the other side this crate: each
//! thread blocks on the handle of a tokio runtime of one worker, which keeps the 30 s deadlines. The threads of both
//! sides run the same loop, a round of each in turn.

#![expect(clippy::unwrap_used, reason = "a bench may stop at the first surprise")]

#[path = "support/measure.rs"]
mod measure;

use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use job_core::{JobKind, Limits, Overdue, Scheduler};
use measure::{Bar, figure, median, ratio};
use rustix::time::{ClockId, clock_gettime};

const THREADS: usize = 64;
const WORK: Duration = Duration::from_micros(300);
const PATIENCE: Duration = Duration::from_secs(30);

/// One round of one side.
#[derive(Clone, Copy)]
struct Round {
    jobs_per_second: f64,
    p99: f64,
    longest: f64,
    cpu: f64,
}

type Pick = fn(&Round) -> f64;

fn main() {
    let (rounds, length) = if measure::is_short() {
        (3, Duration::from_secs(1))
    } else {
        (7, Duration::from_secs(3))
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .unwrap();
    let domain = Scheduler::with("web", Limits::default(), &Overdue::new());
    let herd = Herd::default();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(round(length, |work| {
            let begin = async {
                let deadline = tokio::time::sleep(PATIENCE);
                domain
                    .caller("op")
                    .begin(JobKind::Modify, deadline)
                    .await
                    .unwrap()
            };
            let job = runtime.block_on(begin);
            work();
            job.finish();
        }));
        theirs.push(round(length, |work| {
            herd.begin();
            work();
            herd.end();
        }));
    }
    let column = |rounds: &[Round], pick: Pick| rounds.iter().map(pick).collect::<Vec<_>>();
    let figures: [(&str, &str, Pick, Bar); 4] = [
        (
            "throughput",
            "jobs/s",
            |round| round.jobs_per_second,
            Bar::AtLeast(1.0),
        ),
        (
            "p99-wait",
            "ms",
            |round| round.p99 * 1e3,
            Bar::AtMost(1.0 / 3.0),
        ),
        (
            "longest-wait",
            "ms",
            |round| round.longest * 1e3,
            Bar::AtMost(0.2),
        ),
        (
            "cpu-per-job",
            "us",
            |round| round.cpu * 1e6,
            Bar::AtMost(0.25),
        ),
    ];
    for (name, unit, pick, _) in &figures {
        let (one, all) = (median(column(&ours, *pick)), median(column(&theirs, *pick)));
        println!("{name:<14} wake one {one:>9.1} {unit:<6}  wake all {all:>9.1} {unit}");
    }
    for (name, _, pick, bar) in figures {
        let value = ratio(&column(&ours, pick), &column(&theirs, pick));
        figure(&format!("{name}/broadcast"), value, "x", bar);
    }
}

/// All threads at it for that long. A wait is what passes before a job may work.
fn round(length: Duration, job: impl Fn(&dyn Fn()) + Sync) -> Round {
    let cpu = cpu_seconds();
    let start = Instant::now();
    let run = || {
        let mut waits = Vec::new();
        while start.elapsed() < length {
            let asked = Instant::now();
            let waited = std::cell::Cell::new(Duration::ZERO);
            job(&|| {
                waited.set(asked.elapsed());
                thread::sleep(WORK);
            });
            waits.push(waited.get().as_secs_f64());
        }
        waits
    };
    let mut waits: Vec<f64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
        let waits = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap());
        waits.collect()
    });
    waits.sort_by(f64::total_cmp);
    let jobs = waits.len() as f64;
    Round {
        jobs_per_second: jobs / start.elapsed().as_secs_f64(),
        p99: waits[waits.len() * 99 / 100],
        longest: waits[waits.len() - 1],
        cpu: (cpu_seconds() - cpu) / jobs,
    }
}

/// Of this process, all threads together.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Written for this bench after the rules of libvirt's driver: wait while it is taken, one deadline, wake all at the end.
#[derive(Default)]
struct Herd {
    taken: Mutex<bool>,
    changed: Condvar,
}

impl Herd {
    fn begin(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut taken = self.taken.lock().unwrap();
        while *taken {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nobody waits for 30 s here");
            taken = self.changed.wait_timeout(taken, left).unwrap().0;
        }
        *taken = true;
    }

    fn end(&self) {
        *self.taken.lock().unwrap() = false;
        self.changed.notify_all();
    }
}
