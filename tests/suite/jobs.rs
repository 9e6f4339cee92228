//! The job rules beside a real QEMU: what passes a save, who waits, and that a dropped future ends nothing half way.

use std::future::IntoFuture;
use std::time::Duration;

use driver::{ErrorKind, SaveOptions};
use futures::FutureExt;
use job_core::{AsyncKind, JobKind, KindSet};
use monitor_qmp::command;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::guests::signal;
use crate::harness::tests;
use crate::rig::{Rig, Signal, jobs_until};

tests! {
    beside_a_save_a_query_passes_and_a_modify_waits_its_turn,
    a_dropped_call_gives_its_place_up_before_the_grant_and_goes_on_after_it,
    an_operation_that_panics_costs_only_itself,
    the_snapshot_names_the_command_a_job_waits_for,
    a_widened_mask_lets_the_waiting_pass_at_once,
    operations_of_ones_own_are_written_like_the_drivers,
}

const SECOND: Duration = Duration::from_secs(1);

async fn beside_a_save_a_query_passes_and_a_modify_waits_its_turn(rig: Rig) {
    let domain = rig.started(rig.guest("web")).await;
    rig.console("web")
        .past(0, 60 * SECOND)
        .await
        .expect("it boots");
    let options = SaveOptions {
        live: true,
        bandwidth: Some(4 << 20),
    };
    let saving = tokio::spawn(
        domain
            .save(rig.dir.path().join("save"), options)
            .into_future(),
    );
    let is_writing = |jobs: &job_core::Snapshot| {
        jobs.asynchronous.as_ref().is_some_and(|held| {
            held.holder
                .phase
                .as_ref()
                .is_some_and(|phase| phase == "writing")
        })
    };
    assert!(jobs_until(&domain, 10 * SECOND, is_writing).await);

    domain.query_status().await.expect("a query passes");
    let error = domain
        .reset()
        .deadline(SECOND / 5)
        .await
        .expect_err("a modify does not");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(
        format!("{error:#}").contains("held by save (writing, "),
        "{error:#}"
    );

    let waiting = tokio::spawn(domain.set_memory(200 << 20).into_future());
    assert!(jobs_until(&domain, 5 * SECOND, |jobs| jobs.waiting.len() == 1).await);
    domain.cancel_job("test").expect("it can be cancelled");
    let cancelled = saving
        .await
        .expect("no panic")
        .expect_err("it was cancelled");
    assert_eq!(cancelled.kind(), ErrorKind::Cancelled, "{cancelled:#}");
    waiting
        .await
        .expect("no panic")
        .expect("the modify has its turn");
}

async fn a_dropped_call_gives_its_place_up_before_the_grant_and_goes_on_after_it(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let (release, released) = oneshot::channel::<()>();
    let (done, is_done) = oneshot::channel();
    let deadline = Instant::now() + 20 * SECOND;
    let holding = domain.run("hold", JobKind::Modify, deadline, |mut op| async move {
        let _released = released.await;
        op.monitor()?.execute(command::QueryStatus).await?;
        let _heard = done.send(());
        Ok(())
    });
    // Polled once: granted, and its work goes on by itself.
    let mut holding = Box::pin(holding);
    assert!(jobs_until_polled(&domain, &mut holding).await);
    drop(holding);

    let mut waiting = Box::pin(domain.query_status().into_future());
    assert!((&mut waiting).now_or_never().is_none());
    assert_eq!(domain.jobs().waiting.len(), 1);
    drop(waiting);
    assert!(domain.jobs().waiting.is_empty(), "its place is given up");

    release.send(()).expect("the work is still there");
    is_done
        .await
        .expect("the dropped call's work went on to its end");
    domain
        .query_status()
        .await
        .expect("and the job ended after it");
}

async fn jobs_until_polled<F: Future + Unpin>(domain: &driver::Domain, future: &mut F) -> bool {
    for _ in 0..1000 {
        assert!(future.now_or_never().is_none());
        if domain.jobs().normal.is_some() {
            return true;
        }
        tokio::task::yield_now().await;
    }
    false
}

async fn an_operation_that_panics_costs_only_itself(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let deadline = Instant::now() + 5 * SECOND;
    let result = domain
        .run::<(), _, _>("trip", JobKind::Modify, deadline, |_| async {
            panic!("over a cable")
        })
        .await;
    let error = result.expect_err("it panicked");
    assert_eq!(error.kind(), ErrorKind::Panicked);
    assert!(error.to_string().contains("over a cable"), "{error}");
    domain.query_status().await.expect("the next has its turn");
    let ended = domain
        .history()
        .into_iter()
        .find(|job| job.owner == "trip")
        .expect("it is remembered");
    assert_eq!(ended.outcome, job_core::Outcome::Panicked);
}

async fn the_snapshot_names_the_command_a_job_waits_for(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    signal(&domain, Signal::STOP);
    let asking = tokio::spawn(domain.query_status().deadline(5 * SECOND).into_future());
    let named = jobs_until(&domain, 5 * SECOND, |jobs| {
        jobs.normal
            .as_ref()
            .and_then(|held| held.holder.command.as_ref())
            .is_some_and(|command| command == "query-status")
    });
    assert!(named.await);
    signal(&domain, Signal::CONT);
    asking
        .await
        .expect("no panic")
        .expect("it answers when it runs again");
}

async fn a_widened_mask_lets_the_waiting_pass_at_once(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let (widen, widened) = oneshot::channel::<()>();
    let (end, ended) = oneshot::channel::<()>();
    let deadline = Instant::now() + 20 * SECOND;
    let (long, mask) = (domain.clone(), KindSet::DESTROY_ONLY);
    let long = tokio::spawn(async move {
        let work = |mut op: driver::AsyncOp| async move {
            let _asked = widened.await;
            op.job().set_mask(KindSet::DEFAULT);
            let _asked = ended.await;
            Ok(())
        };
        long.run_async("long", AsyncKind::Snapshot, mask, deadline, work)
            .await
    });
    assert!(jobs_until(&domain, 5 * SECOND, |jobs| jobs.asynchronous.is_some()).await);
    let query = tokio::spawn(domain.query_status().into_future());
    assert!(jobs_until(&domain, 5 * SECOND, |jobs| jobs.waiting.len() == 1).await);
    widen.send(()).expect("it listens");
    timeout(5 * SECOND, query)
        .await
        .expect("at once")
        .expect("no panic")
        .expect("it passes");
    end.send(()).expect("it listens");
    long.await.expect("no panic").expect("it ends");
}

async fn operations_of_ones_own_are_written_like_the_drivers(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let deadline = Instant::now() + 10 * SECOND;
    let version = domain.run("version", JobKind::Query, deadline, |mut op| async move {
        let version = op.monitor()?.execute(command::QueryVersion).await?;
        Ok(version.qemu)
    });
    assert_eq!(
        Some(version.await.expect("it answers")),
        domain.observed().qemu
    );
    let refused = domain.run("nonsense", JobKind::Query, deadline, |mut op| async move {
        op.monitor()?
            .execute_raw("make-coffee", serde_json::Value::Null)
            .await
    });
    let error = refused.await.expect_err("QEMU has no such command");
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Refused, driver::Effect::Refused),
        "{error:#}"
    );
}
