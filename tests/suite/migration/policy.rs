//! A guest that writes faster than its memory can be sent, and what its policy does about it.

use std::future::IntoFuture;
use std::num::NonZero;
use std::time::Duration;

use driver::{Domain, ErrorKind, MigrateOptions, Policy, Remedy, StartOptions, Tuning};
use remote_migrate::{Eta, Owner, Progress};

use super::{SECOND, counts_on, is_performing, peer, seen};
use crate::rig::{Rig, jobs_until};

/// For ever, if nothing is done about it.
pub(super) fn hopeless(then: Vec<Remedy>) -> MigrateOptions {
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

pub(super) async fn busy(rig: &Rig) -> Domain {
    writes(rig, 200).await
}

/// A guest that writes so many MB/s, over the same 64 MiB again and again.
async fn writes(rig: &Rig, rate: u32) -> Domain {
    let mut guest = rig.guest("web");
    let kernel = guest.kernel.as_mut().expect("it has one");
    kernel.arguments += &format!(" vmwright.dirty=64 vmwright.dirtyrate={rate}");
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

pub(super) async fn a_guest_that_writes_faster_than_can_be_sent_shows_no_end_until_it_is_sent_faster(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let domain = writes(&rig, 30).await;
    let options = MigrateOptions {
        bandwidth: Some(15 << 20),
        downtime: Some(Duration::from_millis(20)),
        ..MigrateOptions::default()
    };
    let moving = tokio::spawn(domain.migrate(peer(&there), options).into_future());
    assert!(is_performing(&domain).await);
    let copy = there.driver.by_uuid(domain.uuid()).expect("it comes");
    let job_shows_an_end = |jobs: &job_core::Snapshot| {
        let progress = jobs.asynchronous.as_ref().and_then(|held| held.progress);
        progress.is_some_and(|progress| progress.eta.is_some())
    };
    let has_none = async |side: &Domain| {
        let is_hopeless = |now: &Progress| {
            assert_eq!(now.estimate.eta.left(), None, "{now:?}");
            assert!(!job_shows_an_end(&side.jobs()), "nor does its job");
            now.estimate.eta == Eta::DoesNotConverge
        };
        let last = seen(side, is_hopeless).await;
        assert!(last.transfer.pass > 2, "one pass shows nothing: {last:?}");
    };
    tokio::join!(has_none(&domain), has_none(&copy));
    let shows_one = async |side: &Domain| {
        let (told, is_told) = tokio::join!(
            seen(side, |now| now.estimate.eta.left().is_some()),
            jobs_until(side, 60 * SECOND, job_shows_an_end),
        );
        assert!(is_told, "so does its job");
        told
    };
    let faster = async {
        let bandwidth = Some(60 << 20);
        let tuned = domain.tune_migration(Tuning {
            bandwidth,
            ..Tuning::default()
        });
        tuned.await.expect("it passes beside the migration");
    };
    let ((), here, known_there) = tokio::join!(faster, shows_one(&domain), shows_one(&copy));
    for Progress {
        transfer, estimate, ..
    } in [here, known_there]
    {
        let left = estimate.eta.left().expect("it was seen");
        assert!(
            estimate.pass_left.is_some_and(|pass| pass <= left),
            "{estimate:?}"
        );
        assert!(
            estimate.rate > transfer.dirty_rate && estimate.rate > 15 << 20,
            "{estimate:?}"
        );
    }
    let report = moving.await.expect("no panic").expect("it moves");
    assert_eq!(report.owner, Owner::Destination);
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
