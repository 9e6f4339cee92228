//! The main job on a real guest: what the job rules promise, shown on a QEMU as it happens.
//!
//! Each step tells what was observed and fails if it is not as claimed; the run ends with status 1 then. Called by
//! `cargo xtask demo`, which finds QEMU and builds the guest.

mod report;
#[path = "../../suite/rig.rs"]
mod rig;
mod timeline;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use driver::{Domain, Door, ErrorKind, MigrateOptions, Notice, SaveOptions, StartOptions, What};
use futures::future::join_all;
use job_core::{BeginError, Kind};
use remote_migrate::wire::{AllowList, Options, UnixDial, WirePeer};
use remote_migrate::{Downtime, Eta, Progress};
use report::Report;
use rig::{Env, Rig, Signal};
use tokio::net::UnixListener;
use tokio::time::Instant;

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> ExitCode {
    let is_json = std::env::args().any(|argument| argument == "--json");
    let env = match Env::find() {
        Ok(env) => env,
        Err(missing) => {
            eprintln!("demo: {missing}");
            return ExitCode::from(2);
        }
    };
    let (rig, there) = (Rig::new(&env), Rig::new(&env));
    let mut report = Report::new(is_json);
    if let Some(domain) = acts(&rig, &there, &mut report).await {
        report.text(timeline::lines(&domain));
        if domain.observed().pid.is_some() {
            let _ended = domain.destroy().await;
        }
    }
    if report.end() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// All acts, in order. Stops early only where nothing could follow.
async fn acts(rig: &Rig, there: &Rig, report: &mut Report) -> Option<Domain> {
    let domain = start(rig, report).await?;
    save_and_cancel(rig, report, &domain).await;
    kill_under_waiters(rig, report, &domain).await;
    if start_again(report, &domain).await {
        match move_away(rig, there, report, &domain).await {
            Some(moved) => shut_down(there, report, &moved).await,
            None => shut_down(rig, report, &domain).await,
        }
    }
    Some(domain)
}

async fn start(rig: &Rig, report: &mut Report) -> Option<Domain> {
    let mut step =
        report.step("A guest is started; its monitor and its agent are reached through plugins");
    let began = Instant::now();
    let mut follow = rig.driver.subscribe();
    let options = StartOptions::default();
    let started = rig.driver.start(rig.guest("demo"), options).await;
    let domain = step.must("start", started)?;
    step.took(
        "QEMU launched, monitor negotiated, guest running after",
        began.elapsed(),
    );
    let mut phases = Vec::new();
    while let Notice::News { news, .. } = follow.next().await {
        match &news.what {
            What::Phase { phase, .. } => phases.push(phase.to_string()),
            What::JobEnded { .. } => break,
            _ => {}
        }
    }
    step.saw("phases of the start job", phases.join(", "));
    let observed = domain.observed();
    step.saw(
        "QEMU",
        format!("{}, process {}", observed.qemu?, observed.pid?),
    );
    step.saw(
        "state, as QEMU's events tell it",
        observed.run.name().to_owned(),
    );
    let status = step.must("query", domain.query_status().await)?;
    step.saw("state, asked", status.status.as_str().to_owned());
    step.claim("QEMU says that the guest runs", status.running);

    let agent = domain.wait_agent().deadline(60 * SECOND).await;
    step.must("agent", agent)?;
    step.took("the guest's agent answers after", began.elapsed());
    step.claim(
        "the agent answers within 10 s of the start",
        began.elapsed() < 10 * SECOND,
    );
    if let Some(info) = step.must("os info", domain.os_info().await) {
        step.saw(
            "the guest says it is",
            info.pretty_name.unwrap_or_else(|| "unnamed".into()),
        );
    }
    let tick = step.must("console", rig.console("demo").past(0, 30 * SECOND).await)?;
    step.saw("the guest counts on its console, now at", tick);
    Some(domain)
}

async fn save_and_cancel(rig: &Rig, report: &mut Report, domain: &Domain) {
    let path = rig.dir.path().join("demo.save");
    let mut step = report.step("While an async save runs, a query passes, a modify waits its turn, an agent call does not care");
    let options = SaveOptions {
        live: true,
        bandwidth: Some(8 * MIB),
    };
    let mut follow = domain.subscribe();
    let saving = tokio::spawn(domain.save(&path, options).into_future());
    let mut bar = step.bar();
    let mut reports = 0;
    // The rest happens while the save is seen to move.
    while reports < 3 {
        if let Notice::News { news, .. } = follow.next().await {
            match &news.what {
                What::Progress { progress, .. } => {
                    reports += 1;
                    let eta = progress
                        .eta
                        .map_or_else(String::new, |eta| format!("eta {:.0}s", eta.as_secs_f64()));
                    bar.set(
                        progress.percent(),
                        format!(
                            "{:.0} MiB of {} MiB  {eta}",
                            progress.done as f64 / MIB as f64,
                            progress.total / MIB
                        ),
                    );
                }
                What::JobEnded { outcome, .. } => {
                    step.fail(format!(
                        "the save ended before it was seen to move: {outcome:?}"
                    ));
                    return;
                }
                _ => {}
            }
        }
    }
    drop(bar);
    if let Some(held) = domain.jobs().asynchronous {
        step.saw("the domain is held by", held.holder.to_string());
    }

    let began = Instant::now();
    if let Some(status) = step.must("query", domain.query_status().await) {
        step.saw(
            "a query beside the save answers",
            status.status.as_str().to_owned(),
        );
        step.took("  after", began.elapsed());
    }
    let began = Instant::now();
    if step.must("agent", domain.ping().await).is_some() {
        step.took(
            "an agent call beside the save is answered after",
            began.elapsed(),
        );
    }
    let refused = domain.set_memory(192 * MIB).deadline(SECOND / 2).await;
    match refused {
        Err(error) => {
            step.saw(
                "a modify with half a second of patience",
                format!("{error:#}"),
            );
            let names_the_save = matches!(error.begin(), Some(BeginError::TimedOut { holder: Some(holder), .. })
                if matches!(holder.kind, Kind::Async(job_core::AsyncKind::Save)));
            step.claim("it timed out and names the save", names_the_save);
        }
        Ok(()) => step.fail("a modify passed beside a save".into()),
    }
    let patient = tokio::spawn(domain.set_memory(192 * MIB).into_future());
    let is_waiting = rig::jobs_until(domain, 5 * SECOND, |jobs| !jobs.waiting.is_empty()).await;
    step.claim("a patient modify is seen in the queue", is_waiting);
    if let Some(waiting) = domain.jobs().waiting.first() {
        let blocker = waiting
            .blocked_by
            .as_ref()
            .map_or_else(String::new, ToString::to_string);
        step.saw(
            "a patient modify waits at place",
            format!("{}, behind {blocker}", waiting.place),
        );
    }
    drop(step);

    let mut step = report.step("The save is cancelled, and undone");
    let before = rig
        .console("demo")
        .ticks()
        .last()
        .copied()
        .unwrap_or_default();
    let began = Instant::now();
    step.must("cancel", domain.cancel_job("demo"));
    let ended = saving.await.expect("the save does not panic");
    step.took("the save ended after", began.elapsed());
    match ended {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            step.saw("it said", format!("{error:#}"));
        }
        other => step.fail(format!("the save ended otherwise: {other:?}")),
    }
    step.claim("no file is left", !path.exists());
    let patient = patient.await.expect("the modify does not panic");
    if step.must("the patient modify", patient).is_some() {
        step.took("the patient modify had its turn after", began.elapsed());
    }
    if let Some(tick) = step.must(
        "console",
        rig.console("demo").past(before, 10 * SECOND).await,
    ) {
        step.saw(
            "the guest went on counting",
            format!("from {before} past {tick}"),
        );
    }
    step.claim("without a gap", is_gapless(&rig.console("demo").ticks()));
}

async fn kill_under_waiters(rig: &Rig, report: &mut Report, domain: &Domain) {
    let mut step = report
        .step("QEMU is killed in the middle of a job; all who wait fail at once, with the reason");
    let path = rig.dir.path().join("killed.save");
    let options = SaveOptions {
        live: true,
        bandwidth: Some(4 * MIB),
    };
    let saving = tokio::spawn(domain.save(&path, options).into_future());
    let waiters = (0..10).map(|_| tokio::spawn(domain.set_memory(200 * MIB).into_future()));
    let waiters: Vec<_> = waiters.collect();
    let is_ready = rig::jobs_until(domain, 10 * SECOND, |jobs| {
        let is_writing = jobs.asynchronous.as_ref().is_some_and(|held| {
            held.holder
                .phase
                .as_ref()
                .is_some_and(|phase| phase == "writing")
        });
        is_writing && jobs.waiting.len() == 10
    });
    step.claim("a save writes and ten modifies wait", is_ready.await);
    let Some(pid) = domain.observed().pid else {
        return step.fail("QEMU's process is not known".into());
    };
    let began = Instant::now();
    rig::kill(pid, Signal::KILL);
    let ends = join_all(waiters).await;
    step.took("SIGKILL to the last of ten waiters told", began.elapsed());
    let errors: Vec<_> = ends
        .into_iter()
        .filter_map(|end| end.expect("no waiter panics").err())
        .collect();
    let gone = errors
        .iter()
        .filter(|error| error.kind() == ErrorKind::Gone)
        .count();
    step.saw("waiters that failed as gone", gone);
    step.claim("all ten, none hangs, none succeeds", gone == 10);
    if let Some(error) = errors.first() {
        step.saw("each was told", format!("{error:#}"));
    }
    match saving.await.expect("the save does not panic") {
        Err(error) => {
            step.saw("the save was told", format!("{error:#}"));
            step.claim("it is gone", error.kind() == ErrorKind::Gone);
        }
        Ok(_) => step.fail("a save survived its QEMU".into()),
    }
    let off = domain
        .wait_for(
            |observed| observed.run.name() == "off",
            Instant::now() + 5 * SECOND,
        )
        .await;
    step.must("state", off);
    step.claim("no partial file is left", !path.exists());
}

async fn start_again(report: &mut Report, domain: &Domain) -> bool {
    let mut step = report.step("It is started again, in a new generation");
    let began = Instant::now();
    if step.must("start", domain.start().await).is_none() {
        return false;
    }
    step.saw("generation", domain.observed().generation);
    let agent = domain.wait_agent().deadline(60 * SECOND).await;
    if step.must("agent", agent).is_none() {
        return false;
    }
    step.took("the agent answers after", began.elapsed());
    true
}

async fn shut_down(rig: &Rig, report: &mut Report, domain: &Domain) {
    let mut step = report.step("The guest shuts itself down, asked through its agent");
    let began = Instant::now();
    let asked = domain.shutdown(agent_qga::ShutdownMode::Powerdown).await;
    if let Some(proof) = step.must("shutdown", asked) {
        step.saw(
            "the agent never answers a shutdown; it is proven by",
            format!("{proof:?}"),
        );
    }
    let off = domain.wait_for(
        |observed| observed.run.name() == "off",
        Instant::now() + 20 * SECOND,
    );
    if let Some(observed) = step.must("state", off.await) {
        step.took("off after", began.elapsed());
        let why = observed
            .ended
            .map_or_else(|| "unknown".to_owned(), |why| why.to_string());
        step.claim(
            "it shut down, and did not die",
            why == job_core::GoneWhy::ShutDown.to_string(),
        );
        step.saw("why it ended", why);
    }
    // The clean-up is a job: once ours is granted, it is done.
    let deadline = Instant::now() + 10 * SECOND;
    let turn = domain.run("look", job_core::JobKind::Destroy, deadline, |_| async {
        Ok(())
    });
    step.must("clean-up", turn.await);
    step.claim(
        "nothing of it is left in the run directory",
        rig::is_clean(rig, domain),
    );
}

/// The guest goes to another driver, over the wire as if that were in another process, and runs on there.
async fn move_away(rig: &Rig, there: &Rig, report: &mut Report, domain: &Domain) -> Option<Domain> {
    let mut step = report.step("The guest moves to another driver, and runs there only");
    let before = rig
        .console("demo")
        .ticks()
        .last()
        .copied()
        .unwrap_or_default();
    let options = Options::new(AllowList::nobody().uid(rustix::process::getuid().as_raw()));
    let socket = there.dir.path().join("wire");
    let listener = step.must("listen", UnixListener::bind(&socket))?;
    there
        .driver
        .serve_migrations(Door::unix(listener), options.clone());
    let peer = Arc::new(WirePeer::new(UnixDial::new(socket), options));
    let link = peer.link().watch();
    let mut follow = domain.subscribe();
    let options = MigrateOptions {
        bandwidth: Some(32 * MIB),
        ..MigrateOptions::default()
    };
    let moving = tokio::spawn(domain.migrate(peer, options).into_future());
    let mut bar = step.bar();
    let (mut phases, mut moves) = (Vec::new(), None);
    while let Notice::News { news, .. } = follow.next().await {
        match &news.what {
            What::Phase { phase, .. } => phases.push(phase.to_string()),
            What::Progress { progress, .. } => {
                moves = moves.or_else(|| domain.migration_progress());
                let how = moves.as_ref().map(|moves| how_far(&moves.borrow()));
                bar.set(progress.percent(), how.unwrap_or_default());
            }
            What::JobEnded { .. } => break,
            _ => {}
        }
    }
    drop(bar);
    if let Some(last) = moves.map(|moves| *moves.borrow()) {
        step.saw("how its memory moved, at last", how_far(&last));
        step.claim("all of it", last.transfer.remaining == 0);
    }
    let report = step.must(
        "migrate",
        moving.await.expect("the migration does not panic"),
    )?;
    step.took("it moved in", report.took);
    if let Some(Downtime { took, error }) = step.must(
        "downtime",
        report
            .downtime
            .ok_or("how long it stood still is not known"),
    ) {
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let text = format!(
            "{:.1} ms, give or take {:.3} ms",
            millis(took),
            millis(error)
        );
        step.saw("it stood still, by the clocks of both, for", text);
        step.claim("for less than the move took", took < report.took);
    }
    step.saw("phases of the job here", phases.join(", "));
    step.saw("it belongs to", report.owner.to_string());
    if let Some(who) = &link.borrow().peer {
        step.saw("who took it", who.to_string());
    }
    step.saw("here it is", domain.observed().run.name().to_owned());
    step.claim(
        "its QEMU here has ended",
        domain.observed().run.name() == "off",
    );
    let moved = step.must(
        "there",
        there
            .driver
            .by_uuid(domain.uuid())
            .ok_or("it is not known there"),
    )?;
    step.saw("there it is", moved.observed().run.name().to_owned());
    step.claim("it runs there", moved.observed().run.is_running());
    if let Some(tick) = step.must(
        "console",
        rig.console("demo").past(before, 20 * SECOND).await,
    ) {
        step.saw("it went on counting", format!("from {before} past {tick}"));
    }
    step.claim(
        "without a gap or a repeat",
        is_gapless(&rig.console("demo").ticks()),
    );
    let agent = moved.wait_agent().deadline(30 * SECOND).await;
    step.must("agent", agent);
    Some(moved)
}

/// The pass is told beside the bar, which falls back as one begins.
fn how_far(now: &Progress) -> String {
    let (transfer, estimate) = (now.transfer, now.estimate);
    let end = match (estimate.eta, estimate.pass_left) {
        (Eta::In(left), _) => format!(", over in {:.1} s", left.as_secs_f64()),
        (Eta::DoesNotConverge, _) => ", does not converge".into(),
        (Eta::Unknown, Some(left)) => format!(", this pass over in {:.1} s", left.as_secs_f64()),
        (Eta::Unknown, None) => String::new(),
    };
    format!(
        "pass {}, {} MiB sent, {} MiB/s written{end}",
        transfer.pass,
        transfer.sent / MIB,
        transfer.dirty_rate / MIB
    )
}

/// Whether the guest counted without a gap or repetition, boots apart.
fn is_gapless(ticks: &[u64]) -> bool {
    ticks
        .windows(2)
        .all(|pair| pair[1] == pair[0] + 1 || pair[1] == 0)
}
