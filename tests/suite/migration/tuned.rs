//! What is asked of a QEMU that sends its guest, before and while it does: that it takes time from the guest's processors, and
//! other limits; and what is done where nothing of that helps. Seen as QEMU tells it.

use std::future::IntoFuture;
use std::time::Duration;

use driver::{Domain, ErrorKind, MigrateOptions, Op, Policy, Run, Tuning};
use job_core::JobKind;
use monitor_qmp::Command;
use monitor_qmp::command::{MigrationInfo, QueryMigrate, QueryMigrateParameters};
use remote_migrate::{Owner, Progress};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::policy::{busy, hopeless};
use super::{SECOND, at_full_speed, counts_on, is_performing, peer, slow};
use crate::rig::{Rig, Signal, boot, kill};

/// What QEMU answers, asked beside the migration.
pub(super) async fn asked<C>(domain: &Domain, command: C) -> C::Reply
where
    C: Command + Send + 'static,
    C::Reply: Send + 'static,
{
    let look = |mut op: Op| async move { op.monitor()?.execute(command).await };
    let deadline = Instant::now() + 10 * SECOND;
    let looked = domain.run("look", JobKind::Query, deadline, look);
    looked.await.expect("it answers")
}

/// How a migration stands, for as long as one is under way.
async fn progress(domain: &Domain) -> watch::Receiver<Progress> {
    assert!(is_performing(domain).await);
    domain.migration_progress().expect("it is under way")
}

/// What QEMU says of its migration, at the first report of it at which that is so.
async fn qemu_says(domain: &Domain, is_so: impl Fn(&MigrationInfo) -> bool) -> MigrationInfo {
    let mut reports = progress(domain).await;
    let looking = async {
        loop {
            let info = asked(domain, QueryMigrate).await;
            if is_so(&info) {
                return info;
            }
            reports.changed().await.expect("it goes on");
        }
    };
    let looked = timeout_at(Instant::now() + 60 * SECOND, looking).await;
    looked.expect("it comes to that")
}

/// Slower than the guest writes, and nothing but QEMU's throttle to help.
fn throttled(auto_converge: bool) -> MigrateOptions {
    MigrateOptions {
        bandwidth: Some(60 << 20),
        auto_converge,
        ..hopeless(Vec::new())
    }
}

pub(super) async fn a_guest_that_writes_faster_than_can_be_sent_is_throttled_where_that_is_wanted(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let domain = busy(&rig).await;
    let passes = |info: &MigrationInfo| info.ram.map_or(0, |ram| ram.dirty_sync_count);

    let moving = domain.migrate(peer(&there), throttled(false));
    let moving = tokio::spawn(moving.into_future());
    let after = qemu_says(&domain, |info| passes(info) > 8).await;
    assert_eq!(after.cpu_throttle_percentage, None);
    domain.cancel_job("test").expect("it goes on for ever");
    moving.await.expect("no panic").expect_err("it stays");

    let moving = domain.migrate(peer(&there), throttled(true));
    let moving = tokio::spawn(moving.into_future());
    let taken = |info: &MigrationInfo| info.cpu_throttle_percentage.unwrap_or_default();
    let first = taken(&qemu_says(&domain, |info| taken(info) > 0).await);
    let more = taken(&qemu_says(&domain, |info| taken(info) > first).await);
    assert!((20..more).contains(&first) && more <= 99, "{first}, {more}");
    let report = moving
        .await
        .expect("no panic")
        .expect("it comes to its end");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    counts_on(&rig, 1, 30 * SECOND).await;
}

pub(super) async fn what_is_tuned_while_a_guest_moves_takes_effect_and_the_rest_stays(rig: Rig) {
    let there = Rig::new(&rig.env);
    let domain = busy(&rig).await;
    let moving = domain.migrate(peer(&there), hopeless(Vec::new()));
    let moving = tokio::spawn(moving.into_future());
    assert!(is_performing(&domain).await);
    let limits = async || {
        let told = asked(&domain, QueryMigrateParameters).await;
        let speed = (told.max_bandwidth, told.max_postcopy_bandwidth);
        // The guest is stopped by the driver, and not by QEMU, if it can be.
        assert_eq!(told.downtime_limit, Some(1));
        speed
    };
    assert_eq!(limits().await, (Some(20 << 20), Some(0)));
    for (tuning, is) in [
        (
            Tuning {
                downtime: Some(Duration::from_millis(30)),
                ..Tuning::default()
            },
            (Some(20 << 20), Some(0)),
        ),
        (
            Tuning {
                bandwidth: Some(21 << 20),
                post_copy_bandwidth: Some(5 << 20),
                ..Tuning::default()
            },
            (Some(21 << 20), Some(5 << 20)),
        ),
    ] {
        let tuned = domain.tune_migration(tuning).await;
        tuned.expect("it passes beside the migration");
        assert_eq!(limits().await, is);
    }
    assert!(!moving.is_finished(), "nothing of that is enough");
    let tuned = domain.tune_migration(Tuning {
        downtime: Some(60 * SECOND),
        ..Tuning::default()
    });
    tuned.await.expect("it passes beside the migration");
    let report = moving.await.expect("no panic").expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    counts_on(&rig, 1, 30 * SECOND).await;
}

/// To QEMU's source that is no error, ever.
pub(super) async fn a_destination_that_takes_nothing_any_more_is_given_up_as_the_policy_says(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let stall = 3 * SECOND;
    let options = MigrateOptions {
        policy: Policy {
            stall,
            ..Policy::default()
        },
        ..slow()
    };
    let moving = domain.migrate(peer(&there), options);
    let moving = tokio::spawn(moving.into_future());
    let mut reports = progress(&domain).await;
    let copy = there.driver.by_uuid(domain.uuid()).expect("it comes");
    let stopped = Instant::now();
    kill(copy.observed().pid.expect("it runs"), Signal::STOP);
    at_full_speed(&domain).await;
    let error = moving
        .await
        .expect("no panic")
        .expect_err("it was given up");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    let text = format!("{error:#}");
    assert!(text.contains("not a byte was moved"), "{text}");
    assert!(stopped.elapsed() >= stall, "not before it may");
    let last = reports.borrow_and_update().transfer;
    assert!(last.remaining > 0, "there was more to move: {last:?}");
    assert!(domain.query_status().await.expect("it answers").running);
    counts_on(&rig, 3, 20 * SECOND).await;
    let is_off = |seen: &driver::Observed| seen.run == Run::Off;
    let off = copy.wait_for(is_off, Instant::now() + 20 * SECOND);
    off.await.expect("its QEMU is ended, stopped or not");
    let moved = domain.migrate(peer(&there), MigrateOptions::default());
    moved
        .await
        .expect("nothing of that is in the way of the next");
    counts_on(&rig, 1, 20 * SECOND).await;
}
