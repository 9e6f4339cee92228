//! A guest that writes faster than its memory can be sent, and what its policy does about it.

use std::num::NonZero;
use std::time::Duration;

use driver::{Domain, ErrorKind, MigrateOptions, Policy, Remedy, StartOptions};
use remote_migrate::Owner;

use super::{SECOND, counts_on, peer};
use crate::rig::Rig;

/// For ever, if nothing is done about it.
fn hopeless(then: Vec<Remedy>) -> MigrateOptions {
    MigrateOptions {
        bandwidth: Some(20 << 20),
        downtime: Some(Duration::from_millis(20)),
        post_copy: then.contains(&Remedy::PostCopy),
        policy: Policy {
            deadline: SECOND * 8,
            then,
            grace: SECOND * 2,
            ..Policy::default()
        },
        ..MigrateOptions::default()
    }
}

async fn busy(rig: &Rig) -> Domain {
    let mut guest = rig.guest("web");
    let kernel = guest.kernel.as_mut().expect("it has one");
    kernel.arguments += " vmwright.dirty=64 vmwright.dirtyrate=200";
    let started = rig.driver.start(guest, StartOptions::default());
    let domain = started.await.expect("it starts");
    let console = rig.console("web");
    console.past(3, 60 * SECOND).await.expect("it counts");
    domain
}

pub(super) async fn a_guest_that_writes_faster_than_can_be_sent_stays_when_its_policy_says_so(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let domain = busy(&rig).await;
    let moved = domain.migrate(
        peer(&there),
        hopeless(vec![Remedy::Throttle, Remedy::GiveUp]),
    );
    let error = moved.await.expect_err("it was given up");
    let text = format!("{error:#}");
    assert!(text.contains("longer than its policy allows"), "{text}");
    assert!(domain.query_status().await.expect("it answers").running);
    counts_on(&rig, 1, 30 * SECOND).await;
}

pub(super) async fn a_guest_that_writes_faster_than_can_be_sent_arrives_once_it_may_stand_still_for_longer(
    rig: Rig,
) {
    arrives_by(rig, Remedy::Downtime(SECOND * 60)).await;
}

pub(super) async fn a_guest_that_writes_faster_than_can_be_sent_arrives_by_post_copy(rig: Rig) {
    arrives_by(rig, Remedy::PostCopy).await;
}

async fn arrives_by(rig: Rig, remedy: Remedy) {
    let there = Rig::new(&rig.env);
    let domain = busy(&rig).await;
    let moved = domain.migrate(peer(&there), hopeless(vec![remedy]));
    let report = moved.await.expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert!(report.took >= SECOND * 8, "not before its deadline");
    counts_on(&rig, 1, 30 * SECOND).await;
}

pub(super) async fn options_that_contradict_each_other_are_refused_before_anything_is_begun(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let paused = StartOptions { paused: true };
    let started = rig.driver.start(rig.guest("web"), paused);
    let domain = started.await.expect("it starts");
    let without = MigrateOptions {
        post_copy: false,
        ..hopeless(vec![Remedy::PostCopy])
    };
    let several = MigrateOptions {
        channels: NonZero::new(2),
        post_copy: true,
        ..MigrateOptions::default()
    };
    for options in [without, several] {
        let error = domain.migrate(peer(&there), options).await;
        let error = error.expect_err("it makes no sense");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:#}");
    }
    assert!(there.driver.domains().is_empty());
}
