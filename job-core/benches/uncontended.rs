//! What does a job cost when nobody else is there?
//!
//! Begin and end through the public path as a daemon uses it: a 30 s tokio deadline (made, as an async
//! block makes it, once there is something to wait for), an owner label, the history, and a
//! tracing subscriber that is installed but does not want these events. Beside tokio's mutex, which knows no kinds, no
//! order of precedence, no holder and no history.

#![expect(clippy::unwrap_used, reason = "a bench may stop at the first surprise")]

#[path = "support/measure.rs"]
mod measure;

use std::sync::Arc;
use std::time::{Duration, Instant};

use job_core::{JobKind, Scheduler};
use measure::{Bar, figure, median, ratio};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(30);

fn main() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .init();
    let (rounds, jobs) = if measure::is_short() {
        (21, 5_000)
    } else {
        (101, 20_000)
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(tokio::task::unconstrained(compare(rounds, jobs)));
}

async fn compare(rounds: usize, jobs: u32) {
    let domain = Scheduler::new("web");
    let mutex = Mutex::new(());
    let owned = Arc::new(Mutex::new(()));
    let (mut ours, mut bare, mut locked, mut timed) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        ours.push(
            each(jobs, async || {
                let deadline = async { sleep(PATIENCE).await };
                let job = domain
                    .caller("status")
                    .begin(JobKind::Query, deadline)
                    .await;
                job.unwrap().finish();
            })
            .await,
        );
        bare.push(
            each(jobs, async || {
                let job = domain
                    .caller("status")
                    .begin(JobKind::Query, std::future::pending())
                    .await;
                job.unwrap().finish();
            })
            .await,
        );
        locked.push(each(jobs, async || drop(mutex.lock().await)).await);
        timed.push(
            each(jobs, async || {
                drop(timeout(PATIENCE, owned.clone().lock_owned()).await.unwrap());
            })
            .await,
        );
    }
    for (name, times) in [
        ("begin+end, 30 s deadline", &ours),
        ("begin+end, no deadline", &bare),
        ("tokio Mutex lock+unlock", &locked),
        ("tokio timeout(30 s, lock_owned)", &timed),
    ] {
        println!("{name:<34} {:>7.1} ns", median(times.clone()));
    }
    figure(
        "begin-end/tokio-mutex",
        ratio(&ours, &locked),
        "x",
        Bar::AtMost(3.0),
    );
    println!(
        "beside tokio timeout(lock_owned): {:.2} x",
        ratio(&ours, &timed)
    );
}

/// Nanoseconds of one `job`, over many.
async fn each(jobs: u32, job: impl AsyncFn()) -> f64 {
    let start = Instant::now();
    for _ in 0..jobs {
        job().await;
    }
    start.elapsed().as_nanos() as f64 / f64::from(jobs)
}
