//! What does it cost to hand a domain on while 64 tasks want it?
//!
//! Each task begins a job, yields once while it holds it, and ends it: every end is a hand-over to the oldest waiter.
//! Beside tokio's semaphore of one permit, which is as fair and knows nothing else; both on a current-thread runtime,
//! with a 30 s deadline on each wait and without.

#![expect(clippy::unwrap_used, reason = "a bench may stop at the first surprise")]

#[path = "support/measure.rs"]
mod measure;

use std::sync::Arc;
use std::time::{Duration, Instant};

use job_core::{JobKind, Limits, Overdue, Scheduler};
use measure::{Bar, figure, median, ratio};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{sleep, timeout};

const TASKS: usize = 64;
const PATIENCE: Duration = Duration::from_secs(30);

fn main() {
    let (rounds, turns) = if measure::is_short() {
        (11, 200)
    } else {
        (51, 500)
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(compare(rounds, turns));
}

async fn compare(rounds: usize, turns: usize) {
    let domain = Scheduler::with("web", Limits::default(), &Overdue::new());
    let permits = Arc::new(Semaphore::new(1));
    let (mut ours, mut theirs, mut ours_late, mut theirs_late) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        ours.push(
            each(turns, &domain, |domain| async move {
                let begin = domain
                    .caller("op")
                    .begin(JobKind::Modify, std::future::pending());
                let job = begin.await.unwrap();
                yield_now().await;
                job.finish();
            })
            .await,
        );
        theirs.push(
            each(turns, &permits, |permits| async move {
                let permit = permits.acquire_owned().await.unwrap();
                yield_now().await;
                drop(permit);
            })
            .await,
        );
        ours_late.push(
            each(turns, &domain, |domain| async move {
                let job = domain
                    .caller("op")
                    .begin(JobKind::Modify, sleep(PATIENCE))
                    .await
                    .unwrap();
                yield_now().await;
                job.finish();
            })
            .await,
        );
        theirs_late.push(
            each(turns, &permits, |permits| async move {
                let permit = timeout(PATIENCE, permits.acquire_owned())
                    .await
                    .unwrap()
                    .unwrap();
                yield_now().await;
                drop(permit);
            })
            .await,
        );
    }
    for (name, times) in [
        ("hand-over", &ours),
        ("tokio Semaphore", &theirs),
        ("hand-over, 30 s deadline", &ours_late),
        ("tokio timeout(30 s, acquire)", &theirs_late),
    ] {
        println!("{name:<34} {:>7.0} ns", median(times.clone()));
    }
    figure(
        "handover-64/tokio-semaphore",
        ratio(&ours, &theirs),
        "x",
        Bar::AtMost(1.5),
    );
    println!("with deadlines: {:.2} x", ratio(&ours_late, &theirs_late));
}

/// Nanoseconds of one turn, with all tasks at it.
async fn each<T, F>(turns: usize, shared: &T, turn: fn(T) -> F) -> f64
where
    T: Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let shared = shared.clone();
        tasks.spawn(async move {
            for _ in 0..turns {
                turn(shared.clone()).await;
            }
        });
    }
    tasks.join_all().await;
    start.elapsed().as_nanos() as f64 / (turns * TASKS) as f64
}
