//! How long does a driver take to tell everybody that a guest died, what does one stopped guest cost another, how soon is
//! a guest started, destroyed and found again, and what do ten thousand domains cost? What a move costs is in `migrate.rs`.
//!
//! Called by `cargo xtask bench driver|migrate [--short]`, which sets where QEMU is.

#[path = "../../suite/authority.rs"]
mod authority;
mod bare;
mod fakes;
mod figures;
mod fleet;
mod life;
mod migrate;
#[path = "../../suite/rig.rs"]
mod rig;

use std::future::IntoFuture;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use driver::{Domain, ErrorKind, Run, StartOptions};
use figures::{Bar, Figures};
use futures::future::join_all;
use job_core::{AsyncKind, KindSet};
use rig::{Env, Rig, Signal};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> ExitCode {
    let limit = fleet::raise_limit();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [first, socket] = &arguments[..]
        && first == "fakes"
    {
        fakes::serve(Path::new(socket)).await;
        return ExitCode::SUCCESS;
    }
    let (flags, names): (Vec<_>, Vec<_>) = arguments.iter().partition(|word| word.starts_with('-'));
    let is_short = flags.iter().any(|flag| *flag == "--short");
    let (name, parts) = match &names[..] {
        [name, parts @ ..] if *name == "driver" => ("driver", parts),
        [name] if *name == "migrate" => ("migrate", &[][..]),
        _ => {
            eprintln!("bench: knows `driver [PART...]` and `migrate`, not {names:?}");
            return ExitCode::from(2);
        }
    };
    let is_wanted = |part: &str| {
        name == "driver" && (parts.is_empty() || parts.iter().any(|wanted| *wanted == part))
    };
    let env = match Env::find() {
        Ok(env) => env,
        Err(missing) => {
            eprintln!("bench: {missing}");
            return ExitCode::from(2);
        }
    };
    let mut figures = Figures::new(name);
    let rounds = if is_short { 5 } else { 25 };
    if name == "migrate" {
        migrate::run(&env, &mut figures, is_short).await;
    }
    // First, while this process has no memory to give back that it had for anything else.
    if is_wanted("fleet") {
        fleet::run(&mut figures, limit, is_short).await;
    }
    if is_wanted("death") {
        death(&env, &mut figures, rounds).await;
    }
    if is_wanted("silence") {
        silence(&env, &mut figures, if is_short { 300 } else { 3000 }).await;
    }
    if is_wanted("life") {
        life::run(&env, &mut figures, rounds).await;
    }
    if is_wanted("restart") {
        life::restart(&env, &mut figures, if is_short { 20 } else { 100 }).await;
    }
    if figures.end() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// SIGKILL of QEMU to the last of ten waiters told.
async fn death(env: &Env, figures: &mut Figures, rounds: usize) {
    let rig = Rig::new(env);
    let mut times = Vec::new();
    for round in 0..rounds {
        let domain = started(&rig, &format!("death-{round}")).await;
        let deadline = Instant::now() + 30 * SECOND;
        let (holder, mask) = (domain.clone(), KindSet::DESTROY_ONLY);
        let work = |mut op: driver::AsyncOp| async move {
            let token = job_core::Guard::token(op.job());
            token.stop().await;
            op.check_cancelled()
        };
        let holding = tokio::spawn(async move {
            holder
                .run_async("hold", AsyncKind::Save, mask, deadline, work)
                .await
        });
        let is_held = |jobs: &job_core::Snapshot| jobs.asynchronous.is_some();
        assert!(rig::jobs_until(&domain, 5 * SECOND, is_held).await);
        let waiting: Vec<_> = (0..10)
            .map(|_| tokio::spawn(domain.pause().into_future()))
            .collect();
        assert!(rig::jobs_until(&domain, 5 * SECOND, |jobs| jobs.waiting.len() == 10).await);
        let pid = domain.observed().pid.expect("it has a process");
        let began = Instant::now();
        rig::kill(pid, Signal::KILL);
        for end in join_all(waiting).await {
            let error = end.expect("no panic").expect_err("nobody succeeds");
            assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
        }
        times.push(began.elapsed());
        let held = holding
            .await
            .expect("no panic")
            .expect_err("its guest is gone");
        assert_eq!(held.kind(), ErrorKind::Gone);
        // Not while the dead one is cleaned up: the next round measures its own.
        domain
            .wait_for(|seen| seen.run == Run::Off, deadline)
            .await
            .expect("off");
    }
    figures.put(
        "kill-to-ten-told-p50",
        ms(quantile(&mut times, 0.5)),
        "ms",
        Bar::AtMost(100.0),
    );
    figures.put(
        "kill-to-ten-told-max",
        ms(quantile(&mut times, 1.0)),
        "ms",
        Bar::AtMost(100.0),
    );
}

/// Calls to one domain while another one's QEMU is stopped, beside the same calls while it runs, in turn.
async fn silence(env: &Env, figures: &mut Figures, calls: usize) {
    let rig = Rig::new(env);
    let other = started(&rig, "other").await;
    let stopped = started(&rig, "stopped").await;
    let pid = stopped.observed().pid.expect("it has a process");
    let limit = Duration::from_millis(250);
    let (mut quiet, mut beside, mut overrun) = (Vec::new(), Vec::new(), Vec::new());
    const PAIRS: usize = 6;
    for _ in 0..PAIRS {
        quiet.extend(asked(&other, calls / PAIRS).await);
        rig::kill(pid, Signal::STOP);
        let silent = tokio::spawn({
            let stopped = stopped.clone();
            async move {
                let mut overrun = Vec::new();
                for _ in 0..4 {
                    let began = Instant::now();
                    stopped
                        .query_status()
                        .deadline(limit)
                        .await
                        .expect_err("nobody answers");
                    overrun.push(began.elapsed().saturating_sub(limit));
                }
                overrun
            }
        });
        beside.extend(asked(&other, calls / PAIRS).await);
        overrun.extend(silent.await.expect("no panic"));
        rig::kill(pid, Signal::CONT);
        let healthy = |seen: &driver::Observed| seen.health == monitor_qmp::Health::Ok;
        stopped
            .wait_for(healthy, Instant::now() + 10 * SECOND)
            .await
            .expect("it answers again");
    }
    let (quiet, beside) = (quantile(&mut quiet, 0.99), quantile(&mut beside, 0.99));
    figures.put("other-domain-p99-undisturbed", ms(quiet), "ms", Bar::None);
    figures.put(
        "other-domain-p99-beside-a-stopped-one",
        ms(beside),
        "ms",
        Bar::None,
    );
    figures.put(
        "other-domain-p99-ratio",
        beside.as_secs_f64() / quiet.as_secs_f64(),
        "x",
        Bar::AtMost(1.25),
    );
    figures.put(
        "stopped-domain-past-its-deadline-max",
        ms(quantile(&mut overrun, 1.0)),
        "ms",
        Bar::AtMost(50.0),
    );

    rig::kill(pid, Signal::STOP);
    let began = Instant::now();
    stopped
        .destroy()
        .deadline(10 * SECOND)
        .await
        .expect("it ends");
    figures.put(
        "destroy-of-a-stopped-qemu",
        ms(began.elapsed()),
        "ms",
        Bar::AtMost(10_000.0),
    );
}

async fn started(rig: &Rig, name: &str) -> Domain {
    rig.driver
        .start(rig.empty(name), StartOptions::default())
        .await
        .expect("it starts")
}

async fn asked(domain: &Domain, calls: usize) -> Vec<Duration> {
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let began = Instant::now();
        domain.query_status().await.expect("it answers");
        times.push(began.elapsed());
    }
    times
}

fn quantile(times: &mut [Duration], at: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * at).round() as usize]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
