//! A QEMU that somebody else started, taken in by the address of its monitor.

use std::time::Duration;

use driver::{ErrorKind, Run};
use tokio::time::Instant;

use crate::harness::tests;
use crate::rig::{Foreign, Rig};

tests! {
    a_foreign_qemu_is_queried_paused_and_destroyed,
    the_death_of_a_foreign_qemu_is_noticed,
    an_attached_guest_that_is_gone_cannot_be_started,
    letting_an_attached_guest_go_frees_its_monitor,
}

const SECOND: Duration = Duration::from_secs(1);

async fn a_foreign_qemu_is_queried_paused_and_destroyed(rig: Rig) {
    let mut foreign = Foreign::start(&rig).await;
    let domain = rig
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
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
    let domain = rig
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
    foreign.child.kill().expect("it can be killed");
    let off = domain
        .wait_for(
            |observed| observed.run == Run::Off,
            Instant::now() + 5 * SECOND,
        )
        .await;
    off.expect("it is noticed");
}

async fn an_attached_guest_that_is_gone_cannot_be_started(rig: Rig) {
    let foreign = Foreign::start(&rig).await;
    let domain = rig
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
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
    let domain = first
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
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
