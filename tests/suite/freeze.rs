//! The driver's freezes of a real ext4: a lease in the guest's record, which the next driver honours.

use std::fs;

use agent_qga::{ErrorKind as AgentError, FreezeEnd, FreezeState, Limits, ThawedBy};
use driver::{Disk, DiskFormat, Domain, ErrorKind, FreezeOptions, Guest, What};
use tokio::time::{Instant, timeout};

use crate::harness::tests;
use crate::recovery::{back, cut};
use crate::rig::{Rig, WRITER, ext4};
use crate::storage::{SECOND, told};

tests! {
    a_freeze_is_written_down_first_keeps_nobody_from_the_monitor_and_is_thawed_by_drop,
    a_freeze_outlives_its_driver_and_the_next_one_thaws_and_tells_so,
    a_guest_whose_agent_is_silent_is_thawed_once_it_answers,
    a_freeze_that_is_not_ours_is_refused_and_left,
    a_freeze_is_thawed_over_a_connection_that_was_made_anew,
}

/// A guest that writes to its disk.
pub(crate) async fn writing(rig: &Rig) -> Domain {
    let guest = Guest {
        disks: vec![Disk::new("root", ext4(rig.dir.path()), DiskFormat::Raw)],
        ..rig.guest("web")
    };
    let web = rig.booted(guest).await;
    write_on(&web).await;
    writes(rig).await;
    web
}

/// Has the guest write for ever.
pub(crate) async fn write_on(domain: &Domain) {
    let script = format!("({WRITER}) </dev/null >/dev/null 2>&1 &");
    let arguments = vec!["-c".to_owned(), script];
    let started = domain.exec("/bin/sh", arguments, Limits::default()).await;
    assert!(started.expect("it starts").success());
}

async fn writes(rig: &Rig) {
    let written = rig.console("web").writes(30 * SECOND).await;
    written.unwrap_or_else(|error| panic!("{error}"));
}

async fn stands_still(rig: &Rig) {
    let still = rig.console("web").stands_still().await;
    still.unwrap_or_else(|error| panic!("{error}"));
}

fn options() -> FreezeOptions {
    FreezeOptions {
        hold: 600 * SECOND,
        ..FreezeOptions::default()
    }
}

fn is_written(rig: &Rig, domain: &Domain) -> bool {
    let path = format!("run/records/{}.json", domain.uuid());
    let record = fs::read_to_string(rig.dir.path().join(path)).expect("it runs");
    record.contains("\"freezes\"")
}

fn is_thawed(what: &What) -> Option<i64> {
    match what {
        What::Thawed { file_systems } => Some(*file_systems),
        _ => None,
    }
}

async fn a_freeze_is_written_down_first_keeps_nobody_from_the_monitor_and_is_thawed_by_drop(
    rig: Rig,
) {
    let web = writing(&rig).await;
    assert!(!is_written(&rig, &web));
    let lease = web.freeze(options()).await.expect("it freezes");
    assert_eq!(lease.file_systems(), 1, "the one ext4");
    assert!(is_written(&rig, &web));
    assert_eq!(
        web.freeze_state().await.expect("it says"),
        FreezeState::Frozen
    );
    assert!(web.query_status().await.expect("it answers").running);
    stands_still(&rig).await;
    let jobs = web.jobs();
    assert!(
        jobs.agent.is_none() && jobs.asynchronous.is_none(),
        "a lease holds no job"
    );
    let twice = web.freeze(options()).await.expect_err("it is frozen");
    assert_eq!(twice.kind(), ErrorKind::Agent, "{twice:#}");
    assert!(
        twice.to_string().contains("freeze domain \"web\""),
        "{twice}"
    );
    let watch = lease.watch();
    drop(lease);
    let end = timeout(30 * SECOND, watch.ended()).await.expect("it ends");
    assert!(
        matches!(end, FreezeEnd::Thawed(thawed) if thawed.by == ThawedBy::Drop && thawed.file_systems == 1),
        "{end:?}"
    );
    writes(&rig).await;
    assert!(!is_written(&rig, &web));

    let short = FreezeOptions {
        hold: 2 * SECOND,
        ..FreezeOptions::default()
    };
    let lease = web.freeze(short).await.expect("it freezes again");
    let end = timeout(30 * SECOND, lease.watch().ended())
        .await
        .expect("it ends");
    assert!(
        matches!(end, FreezeEnd::Thawed(thawed) if thawed.by == ThawedBy::Deadline),
        "{end:?}"
    );
    writes(&rig).await;
}

async fn a_freeze_outlives_its_driver_and_the_next_one_thaws_and_tells_so(rig: Rig) {
    let web = writing(&rig).await;
    let lease = web.freeze(options()).await.expect("it freezes");
    let watch = lease.watch();
    drop(web);
    let rig = Rig::again(rig.leave().await);
    // The holder lives on, and its driver does not.
    drop(lease);
    let end = timeout(30 * SECOND, watch.ended()).await.expect("it ends");
    assert!(matches!(end, FreezeEnd::Lost(_)), "{end:?}");
    let web = rig.driver.by_name("web").expect("known");
    let thawed = told(&mut web.subscribe_from(0), is_thawed).await;
    assert_eq!(thawed, 1, "the one ext4");
    writes(&rig).await;
    assert!(!is_written(&rig, &web));
    let lease = web.freeze(options()).await.expect("nothing is in the way");
    lease
        .thaw(Instant::now() + 30 * SECOND)
        .await
        .expect("it thaws");
}

async fn a_guest_whose_agent_is_silent_is_thawed_once_it_answers(rig: Rig) {
    let web = writing(&rig).await;
    let lease = web.freeze(options()).await.expect("it freezes");
    web.pause().await.expect("nothing of it answers now");
    drop(web);
    let rig = Rig::again(rig.leave().await);
    drop(lease);
    let web = rig.driver.by_name("web").expect("known");
    let mut news = web.subscribe_from(0);
    let silent = told(&mut news, |what| match what {
        What::StillFrozen { reason } => Some(reason.clone()),
        _ => None,
    });
    let reason = silent.await;
    assert!(is_written(&rig, &web), "{reason}");
    web.resume().await.expect("it runs on");
    let thawed = told(&mut news, is_thawed).await;
    assert_eq!(thawed, 1, "the one ext4");
    writes(&rig).await;
}

async fn a_freeze_that_is_not_ours_is_refused_and_left(rig: Rig) {
    let web = writing(&rig).await;
    let frozen = web.agent_command("guest-fsfreeze-freeze", serde_json::Value::Null);
    frozen.await.expect("somebody froze it");
    let refused = web.freeze(options()).await.expect_err("it is frozen");
    let source = std::error::Error::source(&refused).expect("the agent's crate said so");
    let source = source
        .downcast_ref::<agent_qga::Error>()
        .expect("its error");
    assert_eq!(source.kind(), AgentError::ForeignFreeze, "{refused:#}");
    drop(web);
    let rig = Rig::again(rig.leave().await);
    let web = rig.driver.by_name("web").expect("known");
    let all = rig.driver.recovered(Instant::now() + 30 * SECOND).await;
    assert_eq!(all.expect("it is found").len(), 1);
    assert_eq!(
        web.freeze_state().await.expect("it says"),
        FreezeState::Frozen
    );
    stands_still(&rig).await;
    let thawed = web.agent_command("guest-fsfreeze-thaw", serde_json::Value::Null);
    thawed.await.expect("who froze it thaws it");
    writes(&rig).await;
}

async fn a_freeze_is_thawed_over_a_connection_that_was_made_anew(rig: Rig) {
    let web = writing(&rig).await;
    let lease = web.freeze(options()).await.expect("it freezes");
    let before = web.observed().generation;
    cut(&rig, &web);
    back(&web, before).await;
    stands_still(&rig).await;
    let thawed = lease.thaw(Instant::now() + 60 * SECOND).await;
    assert_eq!(thawed.expect("it thaws").by, ThawedBy::Holder);
    writes(&rig).await;
    assert!(!is_written(&rig, &web));
}
