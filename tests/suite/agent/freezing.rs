//! Freezes of a real ext4, and how each of them ends.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use agent_qga::{
    Agent, Effect, ErrorKind, FileLeases, FreezeEnd, FreezePlan, FreezeState, FsfreezeFreeze,
    FsfreezeThaw, GetHostName, LeaseStore as _, Options, Qga, QgaExt as _, Recovered, Shutdown,
    ShutdownMode, ThawedBy, freeze, recover,
};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::time::{sleep, timeout};

use super::bench::{Bench, NAME, SECOND, assert_answers_reach_their_callers, soon, status};
use crate::rig::Rig;

/// Tells this program to freeze and wait to be killed: the agent's socket and the store, one a line.
const FREEZER: &str = "VMWRIGHT_FREEZER";

/// Whether this process was started to freeze a guest and be killed; then it does that and nothing else.
pub(crate) fn freezer() -> Option<ExitCode> {
    let told = std::env::var(FREEZER).ok()?;
    let (socket, store) = told.split_once('\n').expect("two lines");
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    runtime.block_on(async {
        let stream = UnixStream::connect(socket)
            .await
            .expect("the agent's socket is free");
        let agent: Arc<dyn Qga> = Arc::new(Agent::new(stream, Options::default()));
        let store = Arc::new(FileLeases::new(store));
        let _lease = freeze(agent, store, FreezePlan::new(NAME, 600 * SECOND), soon())
            .await
            .expect("it freezes");
        println!("frozen");
        std::future::pending::<()>().await;
    });
    Some(ExitCode::FAILURE)
}

pub(super) async fn a_dropped_freeze_of_a_real_ext4_is_thawed(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    bench.write_on(&agent).await;
    let lease = bench.freeze(&agent, 600 * SECOND).await;
    assert_eq!(status(&agent).await, FreezeState::Frozen);
    assert_eq!(bench.leases().pending().expect("it can be read").len(), 1);
    bench.stands_still().await;
    let watch = lease.watch();
    drop(lease);
    let end = timeout(30 * SECOND, watch.ended())
        .await
        .expect("it is thawed");
    assert!(
        matches!(end, FreezeEnd::Thawed(thawed) if thawed.by == ThawedBy::Drop && thawed.file_systems == 1),
        "{end:?}"
    );
    bench.writes().await;
    assert_eq!(bench.leases().pending().expect("it can be read"), []);

    // And a freezer whose future is dropped while the freeze is under way.
    for micros in [0, 500, 2_000, 8_000, 30_000, 100_000] {
        let plan = FreezePlan::new(NAME, 600 * SECOND);
        let freezing = freeze(agent.clone(), bench.leases(), plan, soon());
        let _lease = timeout(Duration::from_micros(micros), freezing).await;
    }
    let settled = async {
        while Arc::strong_count(&agent) > 1 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(60 * SECOND, settled)
        .await
        .expect("all of them are thawed");
    assert_eq!(status(&agent).await, FreezeState::Thawed);
    bench.writes().await;
    assert_eq!(bench.leases().pending().expect("it can be read"), []);
}

pub(super) async fn a_freeze_of_a_real_ext4_is_thawed_when_its_time_is_over(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    bench.write_on(&agent).await;
    let lease = bench.freeze(&agent, 4 * SECOND).await;
    bench.stands_still().await;
    let end = timeout(60 * SECOND, lease.watch().ended())
        .await
        .expect("it is thawed");
    assert!(
        matches!(end, FreezeEnd::Thawed(thawed) if thawed.by == ThawedBy::Deadline),
        "{end:?}"
    );
    bench.writes().await;
    assert_eq!(status(&agent).await, FreezeState::Thawed);
    let told = lease.thaw(soon()).await.expect("it is thawed");
    assert_eq!(told.by, ThawedBy::Deadline);
}

pub(super) async fn a_freeze_whose_process_was_killed_is_thawed_by_the_next(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    bench.write_on(&agent).await;
    drop(agent);

    let (socket, store) = (bench.socket.clone(), bench.store.clone());
    let killed = tokio::task::spawn_blocking(move || {
        let mut freezer = Command::new(std::env::current_exe().expect("this program has a path"))
            .env(
                FREEZER,
                format!("{}\n{}", socket.display(), store.display()),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let mut said = BufReader::new(freezer.stdout.take().expect("it is piped"));
        let read = said.read_line(&mut line);
        // SIGKILL: nothing of it gets to thaw anything.
        freezer.kill().expect("it lives");
        freezer.wait().expect("it is ours");
        read.map(|_| line)
    });
    assert_eq!(
        killed.await.expect("no panic").expect("it speaks"),
        "frozen\n"
    );
    bench.stands_still().await;

    let agent = bench.connect().await;
    assert_eq!(status(&agent).await, FreezeState::Frozen);
    let plan = FreezePlan::new(NAME, SECOND);
    let early = freeze(agent.clone(), bench.leases(), plan, soon())
        .await
        .expect_err("it is frozen");
    assert_eq!(early.kind(), ErrorKind::LeasePending, "{early}");
    let found = recover(&*agent, bench.leases(), NAME, soon())
        .await
        .expect("it thaws");
    assert_eq!(
        found,
        Recovered::Thawed {
            records: 1,
            file_systems: 1
        }
    );
    bench.writes().await;
    assert_eq!(bench.leases().pending().expect("it can be read"), []);
    assert_answers_reach_their_callers(&agent).await;
}

pub(super) async fn a_freeze_that_is_not_ours_is_reported_and_stays(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    bench.write_on(&agent).await;
    agent
        .execute(FsfreezeFreeze, soon())
        .await
        .expect("it freezes");
    let plan = FreezePlan::new(NAME, SECOND);
    let refused = freeze(agent.clone(), bench.leases(), plan, soon())
        .await
        .expect_err("it is frozen");
    assert_eq!(
        (refused.kind(), refused.effect()),
        (ErrorKind::ForeignFreeze, Effect::None),
        "{refused}"
    );
    let found = recover(&*agent, bench.leases(), NAME, soon())
        .await
        .expect("it answers");
    assert_eq!(found, Recovered::Foreign);
    bench.stands_still().await;
    agent.execute(FsfreezeThaw, soon()).await.expect("it thaws");
    bench.writes().await;
}

pub(super) async fn a_frozen_agent_is_told_from_one_that_lacks_the_command(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    let lease = bench.freeze(&agent, 600 * SECOND).await;
    let frozen = agent
        .execute(GetHostName, soon())
        .await
        .expect_err("it is frozen");
    assert_eq!(
        (frozen.kind(), frozen.effect()),
        (ErrorKind::Frozen, Effect::Refused),
        "{frozen}"
    );
    let missing = agent
        .execute_raw("guest-nonsense", Value::Null, soon())
        .await
        .expect_err("there is none");
    assert_eq!(missing.kind(), ErrorKind::Refused, "{missing}");
    assert_eq!(
        frozen.class(),
        missing.class(),
        "the agent's class is the same"
    );
    let mode = ShutdownMode::Powerdown;
    let refused = agent
        .execute(Shutdown { mode }, soon())
        .await
        .expect_err("it is frozen");
    assert_eq!(
        refused.kind(),
        ErrorKind::Frozen,
        "silence is not taken for success: {refused}"
    );
    lease.thaw(soon()).await.expect("it thaws");
    agent
        .execute(GetHostName, soon())
        .await
        .expect("it answers again");
    let missing = agent
        .execute_raw("guest-nonsense", Value::Null, soon())
        .await
        .expect_err("there is none");
    assert_eq!(missing.kind(), ErrorKind::Refused, "{missing}");
}
