//! A QEMU that somebody else started, taken in by the address of its monitor.

use std::time::Duration;

use driver::{Attach, Became, Domain, ErrorKind, Run, SaveOptions, StartOptions};
use job_core::{AgentKind, JobKind};
use serde_json::json;
use tokio::time::Instant;

use crate::guests::is_off;
use crate::harness::tests;
use crate::rig::{Foreign, Rig, boot};

tests! {
    a_foreign_qemu_is_queried_paused_and_destroyed,
    the_death_of_a_foreign_qemu_is_noticed,
    an_attached_guest_that_is_gone_cannot_be_started,
    letting_an_attached_guest_go_frees_its_monitor,
    an_observer_reads_and_changes_nothing_and_lets_go,
    a_running_process_is_attached_by_its_number_with_its_agent,
    a_process_that_cannot_be_attached_is_refused_with_the_reason,
    a_driver_that_comes_back_knows_the_guest_it_had_attached,
}

const SECOND: Duration = Duration::from_secs(1);

async fn attached(rig: &Rig, foreign: &Foreign) -> Domain {
    let attached = rig.driver.attach(foreign.target()).await;
    attached.expect("it is taken in")
}

async fn a_foreign_qemu_is_queried_paused_and_destroyed(rig: Rig) {
    let mut foreign = Foreign::start(&rig).await;
    let domain = attached(&rig, &foreign).await;
    assert_eq!(domain.name(), "foreign");
    assert_eq!(
        domain.observed().pid,
        Some(foreign.child.id()),
        "its process is known, from the socket"
    );
    assert!(domain.query_status().await.expect("it answers").running);
    domain.pause().await.expect("it pauses");
    assert_eq!(domain.observed().run.name(), "paused");
    domain.destroy().await.expect("it ends");
    let status = foreign.child.wait().expect("it is our child");
    assert!(status.success(), "asked to end, it did: {status}");
}

async fn the_death_of_a_foreign_qemu_is_noticed(rig: Rig) {
    let mut foreign = Foreign::start(&rig).await;
    let domain = attached(&rig, &foreign).await;
    foreign.child.kill().expect("it can be killed");
    is_off(&domain).await;
}

async fn an_attached_guest_that_is_gone_cannot_be_started(rig: Rig) {
    let foreign = Foreign::start(&rig).await;
    let domain = attached(&rig, &foreign).await;
    domain.destroy().await.expect("it ends");
    let error = domain.start().await.expect_err("nobody knows how");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    domain.remove().await.expect("it can be forgotten");
    assert!(rig.driver.by_name("foreign").is_none());
    assert_eq!(
        domain.query_status().await.expect_err("removed").kind(),
        ErrorKind::Closed
    );
}

async fn letting_an_attached_guest_go_frees_its_monitor(rig: Rig) {
    let foreign = Foreign::start(&rig).await;
    let first = Rig::new(&rig.env);
    let domain = attached(&first, &foreign).await;
    let taken = rig
        .driver
        .attach(foreign.target())
        .deadline(SECOND)
        .await
        .expect_err("QEMU serves one at a time");
    assert_eq!(taken.kind(), ErrorKind::Monitor, "{taken:#}");
    drop(domain);
    first
        .driver
        .shutdown(Instant::now() + 5 * SECOND)
        .await
        .expect("nothing runs");
    drop(first);
    rig.driver
        .attach(foreign.target())
        .await
        .expect("the next one is served");
}

async fn an_observer_reads_and_changes_nothing_and_lets_go(rig: Rig) {
    let mut foreign = Foreign::start(&rig).await;
    let observed = Attach::to(foreign.target()).observe_only();
    let domain = rig.driver.attach(observed).await.expect("it is taken in");
    assert!(domain.records().observe_only);
    assert!(domain.query_status().await.expect("it answers").running);
    let deadline = Instant::now() + 20 * SECOND;
    let raw = |command: &'static str| {
        let work = move |mut op: driver::Op| async move {
            op.monitor()?.execute_raw(command, json!(null)).await
        };
        domain.run("look", JobKind::Query, deadline, work)
    };
    raw("query-version").await.expect("that only asks");
    let file = rig.dir.path().join("foreign.save");
    let agent = domain.run_agent("run", AgentKind::Modify, deadline, |_op| async { Ok(()) });
    for (what, error) in [
        ("stop by name", raw("stop").await.expect_err("refused")),
        ("pause", domain.pause().await.expect_err("refused")),
        ("resume", domain.resume().await.expect_err("refused")),
        ("reset", domain.reset().await.expect_err("refused")),
        (
            "save",
            domain
                .save(&file, SaveOptions::default())
                .await
                .expect_err("refused"),
        ),
        ("agent", agent.await.expect_err("refused")),
        ("destroy", domain.destroy().await.expect_err("refused")),
    ] {
        assert_eq!(error.kind(), ErrorKind::ObserveOnly, "{what}: {error:#}");
        assert_eq!(error.effect(), driver::Effect::None, "{what}");
        let text = error.to_string();
        assert!(text.contains("observe only"), "{what}: {text}");
        assert_eq!(error.domain(), Some("foreign"), "{what}: {text}");
    }
    assert!(!file.exists());
    assert!(domain.query_status().await.expect("it answers").running);
    domain.detach().await.expect("nothing works on it");
    assert!(rig.driver.by_name("foreign").is_none());
    let error = domain.query_status().await.expect_err("it is let go");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error:#}");
    assert!(
        foreign.child.try_wait().expect("ours").is_none(),
        "it runs on"
    );
    let managed = rig.driver.attach(foreign.target()).await;
    managed
        .expect("its monitor is free")
        .pause()
        .await
        .expect("it is managed");
}

/// A QEMU with its sockets passed by number, and an agent in it: one of our own, whose driver has left.
async fn a_running_process_is_attached_by_its_number_with_its_agent(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let (pid, uuid) = (web.observed().pid.expect("it runs"), web.uuid());
    drop(web);
    let first = rig.leave().await;
    let rig = Rig::new(&first.0);
    let web = rig.driver.attach(Attach::process(pid)).await;
    let web = web.expect("it is taken in");
    assert_eq!((web.name(), web.uuid()), ("web", uuid));
    assert_eq!(web.observed().pid, Some(pid));
    assert!(web.query_status().await.expect("it answers").running);
    web.ping().await.expect("its agent answers");
    let again = rig
        .driver
        .attach(Attach::process(pid))
        .deadline(2 * SECOND)
        .await;
    again.expect_err("its monitor has a client");
    web.destroy().await.expect("it ends");
    assert_eq!(web.observed().run, Run::Off);
}

async fn a_process_that_cannot_be_attached_is_refused_with_the_reason(rig: Rig) {
    let refused = async |pid: u32| {
        let error = rig.driver.attach(Attach::process(pid)).await;
        let error = error.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
        format!("{error:#}")
    };
    let text = refused(std::process::id()).await;
    assert!(text.contains("is no QEMU"), "{text}");
    let mut without = std::process::Command::new(&rig.env.qemu)
        .args(["-M", "none", "-nodefaults", "-display", "none"])
        .stdin(std::process::Stdio::null())
        .spawn()
        .expect("QEMU starts");
    let pid = without.id();
    // Between fork and exec it is not a QEMU yet.
    let is_there = || {
        let program = std::fs::read_link(format!("/proc/{pid}/exe"));
        program.is_ok_and(|path| path.to_string_lossy().contains("qemu"))
    };
    while !is_there() {
        tokio::time::sleep(SECOND / 100).await;
    }
    let text = refused(pid).await;
    without.kill().expect("it runs");
    without.wait().expect("it is ours");
    assert!(text.contains("names none"), "{text}");
}

async fn a_driver_that_comes_back_knows_the_guest_it_had_attached(rig: Rig) {
    let mut foreign = Foreign::start(&rig).await;
    let observed = Attach::to(foreign.target()).observe_only();
    drop(rig.driver.attach(observed).await.expect("it is taken in"));
    let rig = Rig::again(rig.leave().await);
    let domain = rig.driver.by_name("foreign").expect("known at once");
    let all = rig.driver.recovered(Instant::now() + 20 * SECOND).await;
    let all = all.expect("all were looked at");
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].became, Became::Kept);
    assert!(domain.query_status().await.expect("it answers").running);
    assert_eq!(domain.observed().pid, Some(foreign.child.id()));
    let error = domain.pause().await.expect_err("it is still observed only");
    assert_eq!(error.kind(), ErrorKind::ObserveOnly);
    drop(domain);
    let left = rig.leave().await;
    foreign.child.kill().expect("it runs");
    foreign.child.wait().expect("it is ours");
    let rig = Rig::again(left);
    let all = rig.driver.recovered(Instant::now() + 20 * SECOND).await;
    assert_eq!(all.expect("looked at")[0].became, Became::Ended);
    let rig = Rig::again(rig.leave().await);
    assert!(
        rig.driver.by_name("foreign").is_none(),
        "it is told of once"
    );
    let own = rig.driver.start(rig.empty("own"), StartOptions::default());
    own.await.expect("and others are served");
}
