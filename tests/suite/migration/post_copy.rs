//! Post-copy on real QEMU: the guest runs at the destination before its memory is there, and there is no way back.

use std::future::IntoFuture;
use std::sync::Arc;

use driver::{Domain, Error, ErrorKind, Landing, MigrateOptions, Notice, Op, Tuning, What};
use job_core::JobKind;
use monitor_qmp::QmpEvent;
use monitor_qmp::command::{MigratePause, MigrationStatus};
use remote_migrate::{Owner, Peer, Report};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::{SECOND, counts_on, is_performing, peer, seen, slow};
use crate::authority::Authority;
use crate::rig::{Rig, boot, jobs_until};

fn slow_with_post_copy() -> MigrateOptions {
    MigrateOptions {
        post_copy: true,
        ..slow()
    }
}

/// A guest in the middle of its post-copy, which takes its time.
pub(super) async fn in_post_copy(
    rig: &Rig,
    there: &Rig,
) -> (Domain, JoinHandle<Result<Report, Error>>) {
    let (domain, _) = boot(rig, "web").await.expect("it boots");
    let moving = turned_to_post_copy(&domain, peer(there)).await;
    is_in_post_copy(&domain).await;
    (domain, moving)
}

/// Waits until the guest's job says so.
pub(super) async fn is_in_post_copy(domain: &Domain) {
    let is_in_it = |jobs: &job_core::Snapshot| {
        let phase = jobs
            .asynchronous
            .as_ref()
            .and_then(|held| held.holder.phase.clone());
        phase.is_some_and(|phase| &*phase == "post-copy")
    };
    assert!(jobs_until(domain, 20 * SECOND, is_in_it).await);
}

/// Moves a guest, and asks that it go on at the other side before its memory is there.
pub(super) async fn turned_to_post_copy(
    domain: &Domain,
    there: Arc<dyn Peer>,
) -> JoinHandle<Result<Report, Error>> {
    let moving = domain.migrate(there, slow_with_post_copy());
    let moving = tokio::spawn(moving.into_future());
    assert!(is_performing(domain).await);
    let tuned = domain.tune_migration(Tuning {
        post_copy_bandwidth: Some(4 << 20),
        ..Tuning::default()
    });
    tuned.await.expect("it passes beside the migration");
    domain.post_copy().await.expect("it is asked for");
    moving
}

pub(super) async fn unlimited(domain: &Domain) {
    let tuned = domain.tune_migration(Tuning {
        post_copy_bandwidth: Some(0),
        ..Tuning::default()
    });
    tuned.await.expect("it passes beside the migration");
}

/// The end of it: one owner, one guest, no tick twice and none left out.
async fn arrives(
    rig: &Rig,
    there: &Rig,
    domain: &Domain,
    moving: JoinHandle<Result<Report, Error>>,
) {
    let report = moving.await.expect("no panic").expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(rig, 2, 20 * SECOND).await;
    let reset = moved.reset().deadline(10 * SECOND).await;
    reset.expect("nobody holds it any more");
}

pub(super) async fn a_guest_that_was_turned_to_post_copy_runs_there_and_cannot_be_called_back(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, moving) = in_post_copy(&rig, &there).await;
    // QEMU 7.2 would obey, and let the guest run here again.
    let error = domain.cancel_job("test").expect_err("it is too late");
    assert_eq!(error.kind(), ErrorKind::TooLate, "{error:#}");
    let error = domain.resume().deadline(SECOND / 5).await;
    error.expect_err("it would run twice");
    let copy = there.driver.by_uuid(domain.uuid()).expect("it is there");
    let error = copy.cancel_job("test").expect_err("it is too late");
    assert_eq!(error.kind(), ErrorKind::TooLate, "{error:#}");
    assert!(copy.observed().run.is_running());
    assert!(!moving.is_finished());
    // Nothing is written any more that is to be sent.
    for side in [&domain, &copy] {
        seen(side, |now| {
            now.transfer.is_still && now.estimate.eta.left().is_some()
        })
        .await;
    }
    unlimited(&domain).await;
    arrives(&rig, &there, &domain, moving).await;
}

pub(super) async fn a_post_copy_whose_stream_broke_goes_on_over_another(rig: Rig) {
    let plaintext = || Landing::plaintext(std::net::Ipv4Addr::LOCALHOST.into());
    breaks_and_goes_on(&rig, plaintext(), plaintext()).await;
}

pub(super) async fn a_post_copy_under_tls_whose_stream_broke_goes_on_under_tls(rig: Rig) {
    let authority = Authority::new();
    let (from, to) = (
        authority.landing("a.example"),
        authority.landing("b.example"),
    );
    breaks_and_goes_on(&rig, from, to).await;
}

async fn breaks_and_goes_on(rig: &Rig, from: Landing, to: Landing) {
    let rig = Rig::at(&rig.env, from);
    let there = Rig::at(&rig.env, to);
    let (domain, moving) = in_post_copy(&rig, &there).await;
    breaks(&domain).await;
    unlimited(&domain).await;
    arrives(&rig, &there, &domain, moving).await;
}

/// Breaks the stream of a post-copy, and waits until it is taken up over another.
pub(super) async fn breaks(domain: &Domain) {
    let mut events = domain.subscribe();
    let breaks = |mut op: Op| async move {
        op.monitor()?.execute(MigratePause).await?;
        Ok(())
    };
    let deadline = Instant::now() + 10 * SECOND;
    let broken = domain.run("break", JobKind::MigrationOp, deadline, breaks);
    broken.await.expect("its stream breaks");
    let again = async {
        loop {
            if let Notice::News { news, .. } = events.next().await
                && let What::Qemu(event) = &news.what
                && matches!(
                    event.typed(),
                    QmpEvent::Migration(MigrationStatus::PostcopyRecover)
                )
            {
                return;
            }
        }
    };
    let again = timeout_at(Instant::now() + 30 * SECOND, again).await;
    again.expect("it is taken up again");
}

pub(super) async fn post_copy_is_not_for_a_migration_that_was_begun_without_it(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let error = domain.post_copy().await.expect_err("none is under way");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let error = domain.post_copy().await.expect_err("it cannot");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    domain.cancel_job("test").expect("it can be cancelled");
    moving
        .await
        .expect("no panic")
        .expect_err("it was cancelled");
    assert!(domain.query_status().await.expect("it answers").running);
}
