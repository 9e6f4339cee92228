//! A real guest into a file and back, and what becomes of both when something is in the way.

use std::fs;
use std::time::Duration;

use driver::{Domain, ErrorKind, SaveOptions, StartOptions};
use job_core::JobKind;
use tokio::time::Instant;

use crate::guests::is_off;
use crate::harness::tests;
use crate::rig::{Rig, boot};

tests! {
    a_saved_guest_goes_on_at_the_next_tick_when_restored,
    a_file_is_restored_once,
    a_save_into_a_missing_folder_leaves_the_guest_running,
    a_damaged_save_is_refused_and_nothing_is_left,
    a_definition_that_was_changed_while_the_guest_ran_is_not_what_is_saved,
}

const SECOND: Duration = Duration::from_secs(1);

async fn a_saved_guest_goes_on_at_the_next_tick_when_restored(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let console = rig.console("web");
    console.past(5, 20 * SECOND).await.expect("it counts");
    let path = rig.dir.path().join("web.save");
    let saved = domain
        .save(&path, SaveOptions::default())
        .await
        .expect("it is saved");
    assert_eq!(
        saved.bytes,
        fs::metadata(&path).expect("it is there").len() - 16384
    );
    is_off(&domain).await;

    let restored = rig.driver.restore(&path).await.expect("it comes back");
    assert_eq!(restored.uuid(), domain.uuid());
    assert!(
        restored.observed().run.is_running(),
        "it ran when it was saved"
    );
    let last = *console.ticks().last().expect("it counted");
    console
        .past(last + 3, 30 * SECOND)
        .await
        .expect("it goes on");
    let ticks = console.ticks();
    assert!(
        ticks.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "no gap, no repeat, no second boot: {ticks:?}"
    );
    restored
        .wait_agent()
        .deadline(30 * SECOND)
        .await
        .expect("its agent answers on the new channel");
}

async fn a_file_is_restored_once(rig: Rig) {
    let domain = rig
        .driver
        .start(rig.empty("web"), StartOptions { paused: true })
        .await
        .expect("it starts");
    let path = rig.dir.path().join("web.save");
    domain
        .save(&path, SaveOptions::default())
        .await
        .expect("it is saved");
    rig.driver.restore(&path).await.expect("it comes back");
    let error = rig.driver.restore(&path).await.expect_err("not twice");
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error:#}");
    assert!(error.to_string().contains("restored already"), "{error}");
}

async fn a_save_into_a_missing_folder_leaves_the_guest_running(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let error = domain
        .save("/no/such/folder/web.save", SaveOptions::default())
        .await
        .expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Io, "{error:#}");
    assert!(
        error.to_string().contains("/no/such/folder/web.save"),
        "{error}"
    );
    assert!(domain.query_status().await.expect("it answers").running);
}

async fn a_damaged_save_is_refused_and_nothing_is_left(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let path = rig.dir.path().join("web.save");
    domain
        .save(&path, SaveOptions::default())
        .await
        .expect("it is saved");
    is_off(&domain).await;
    let whole = fs::read(&path).expect("it is there");
    fs::write(&path, &whole[..16384 + 10]).expect("it is cut off");
    let error = rig
        .driver
        .restore(&path)
        .await
        .expect_err("the stream is not whole");
    assert!(
        matches!(
            error.kind(),
            ErrorKind::Gone | ErrorKind::Refused | ErrorKind::Process
        ),
        "{error:#}"
    );
    is_off(&domain).await;
    // Nothing ran from it: it may be tried again once it is whole.
    fs::write(&path, &whole).expect("it is whole again");
    rig.driver.restore(&path).await.expect("it comes back");
}

async fn a_definition_that_was_changed_while_the_guest_ran_is_not_what_is_saved(rig: Rig) {
    let domain = rig.driver.define(rig.empty("web")).await.expect("free");
    domain.start().await.expect("it starts");
    let memory = |domain: &Domain| {
        let live = domain.description().map(|guest| guest.memory_mib);
        let next = domain.records().definition.clone();
        (live, next.map(|guest| guest.memory_mib))
    };
    let deadline = Instant::now() + 5 * SECOND;
    let change = domain.run("resize", JobKind::Modify, deadline, |op| async move {
        op.with_state(|records| {
            records
                .definition
                .as_mut()
                .map(|guest| guest.memory_mib = 2)
        })
    });
    change.await.expect("nobody else is at it");
    assert_eq!(memory(&domain), (Some(1), Some(2)));

    let path = rig.dir.path().join("web.save");
    let saved = domain.save(&path, SaveOptions::default()).await;
    saved.expect("it is saved");
    assert_eq!(memory(&domain), (None, Some(2)));
    // QEMU refuses a state of other memory than it has.
    let restored = rig.driver.restore(&path).await.expect("it comes back");
    assert_eq!(
        memory(&restored),
        (Some(1), Some(2)),
        "the definition stays"
    );
    drop((domain, restored));
    let rig = Rig::again(rig.leave().await);
    let again = rig.driver.recovered(Instant::now() + 10 * SECOND);
    again.await.expect("it is found");
    let web = rig.driver.by_name("web").expect("known");
    assert_eq!(
        memory(&web).0,
        Some(1),
        "what runs is remembered as it runs"
    );
    web.query_status().await.expect("it answers");
}
