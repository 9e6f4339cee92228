//! QEMU dies: at any moment, in the middle of any job. Everybody is told, at once, and nothing is left.

use std::future::IntoFuture;
use std::time::Duration;

use driver::{ErrorKind, Run, SaveOptions};
use futures::future::join_all;
use job_core::{GoneWhy, JobKind, Outcome};
use tokio::time::Instant;

use crate::guests::{is_off, signal};
use crate::harness::tests;
use crate::rig::{Rig, Signal, boot, is_clean, jobs_until, kill};

tests! {
    ten_who_wait_all_fail_as_gone,
    a_command_inside_qemu_fails_as_gone_with_the_reason,
    an_agent_call_under_way_fails_when_qemu_dies,
    a_killed_guest_starts_again_in_a_new_generation,
    destroy_reaches_past_a_job_that_is_stuck,
    a_guard_of_the_old_guest_cannot_touch_the_next,
    destroy_during_a_start_leaves_nothing,
}

const SECOND: Duration = Duration::from_secs(1);

async fn ten_who_wait_all_fail_as_gone(rig: Rig) {
    let domain = rig.started(rig.guest("web")).await;
    rig.console("web")
        .past(0, 60 * SECOND)
        .await
        .expect("it boots");
    let options = SaveOptions {
        live: true,
        bandwidth: Some(4 << 20),
    };
    let path = rig.dir.path().join("save");
    let saving = tokio::spawn(domain.save(&path, options).into_future());
    assert!(jobs_until(&domain, 10 * SECOND, |jobs| jobs.asynchronous.is_some()).await);
    let waiting: Vec<_> = (0..10)
        .map(|_| tokio::spawn(domain.set_memory(200 << 20).into_future()))
        .collect();
    assert!(
        jobs_until(&domain, 10 * SECOND, |jobs| jobs.waiting.len() == 10
            && jobs.asynchronous.is_some())
        .await
    );
    signal(&domain, Signal::KILL);
    for end in join_all(waiting).await {
        let error = end.expect("no panic").expect_err("nobody succeeds");
        assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
        assert!(
            format!("{error:#}").contains("killed by signal 9"),
            "{error:#}"
        );
    }
    let error = saving
        .await
        .expect("no panic")
        .expect_err("the save fails too");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
    let off = is_off(&domain).await;
    assert!(matches!(off.ended, Some(GoneWhy::Died(_))), "{off:?}");
    assert!(!path.exists(), "no partial save is left");
}

async fn a_command_inside_qemu_fails_as_gone_with_the_reason(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    signal(&domain, Signal::STOP);
    let asking = tokio::spawn(domain.query_status().into_future());
    assert!(jobs_until(&domain, 5 * SECOND, |jobs| jobs.normal.is_some()).await);
    signal(&domain, Signal::KILL);
    let error = asking
        .await
        .expect("no panic")
        .expect_err("there is no answer");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
    assert!(format!("{error:#}").contains("signal 9"), "{error:#}");
}

async fn an_agent_call_under_way_fails_when_qemu_dies(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let arguments = vec!["60".into()];
    let running = tokio::spawn(
        domain
            .exec("/bin/sleep", arguments, agent_qga::Limits::default())
            .into_future(),
    );
    assert!(jobs_until(&domain, 5 * SECOND, |jobs| jobs.agent.is_some()).await);
    signal(&domain, Signal::KILL);
    let error = running
        .await
        .expect("no panic")
        .expect_err("its guest is gone");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
}

async fn a_killed_guest_starts_again_in_a_new_generation(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    for generation in 1..4 {
        assert_eq!(domain.observed().generation, generation);
        signal(&domain, Signal::KILL);
        is_off(&domain).await;
        // Waits for the clean-up like for any other job.
        domain.start().await.expect("it starts again");
    }
    domain.destroy().await.expect("it ends");
    assert!(is_clean(&rig, &domain));
}

async fn destroy_reaches_past_a_job_that_is_stuck(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let deadline = Instant::now() + 60 * SECOND;
    let stuck = domain.clone();
    let stuck = tokio::spawn(async move {
        // It holds its job and asks nobody: nothing but the eviction takes the slot from it.
        let work = |_op: driver::Op| async { std::future::pending().await };
        stuck
            .run::<(), _, _>("stuck", JobKind::Modify, deadline, work)
            .await
    });
    assert!(jobs_until(&domain, 5 * SECOND, |jobs| jobs.normal.is_some()).await);
    domain
        .destroy()
        .deadline(20 * SECOND)
        .await
        .expect("nothing is in its way");
    assert_eq!(domain.observed().run, Run::Off);
    let evicted = domain
        .history()
        .into_iter()
        .any(|job| job.outcome == Outcome::Evicted);
    assert!(
        evicted,
        "the stuck job lost its slot after the grace: {:?}",
        domain.history()
    );
    stuck.abort();
}

async fn a_guard_of_the_old_guest_cannot_touch_the_next(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let pid = domain.observed().pid.expect("it has a process");
    let late = domain.run(
        "late",
        JobKind::Modify,
        Instant::now() + 20 * SECOND,
        move |mut op| async move {
            kill(pid, Signal::KILL);
            let domain = op.domain().clone();
            let ended = domain.wait_for(
                |observed| observed.run == Run::Off,
                Instant::now() + 5 * SECOND,
            );
            ended.await.expect("it is noticed while the job is held");
            op.monitor()?
                .execute(monitor_qmp::command::QueryStatus)
                .await?;
            Ok(())
        },
    );
    let error = late.await.expect_err("its guest is gone");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
    domain.start().await.expect("the next one starts");
}

async fn destroy_during_a_start_leaves_nothing(rig: Rig) {
    for _ in 0..10 {
        let domain = rig
            .driver
            .define(rig.empty("web"))
            .await
            .expect("the name is free");
        let starting = tokio::spawn(domain.start().into_future());
        jobs_until(&domain, SECOND, |jobs| jobs.asynchronous.is_some()).await;
        let destroyed = domain.destroy().await;
        let started = starting.await.expect("no panic");
        if let Err(error) = &destroyed {
            // The start had ended, or not begun: then there was nothing to destroy yet.
            assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
            if started.is_ok() {
                domain.destroy().await.expect("now there is");
            }
        }
        assert_eq!(domain.observed().run, Run::Off, "{destroyed:?} {started:?}");
        assert!(is_clean(&rig, &domain), "{destroyed:?} {started:?}");
        domain.remove().await.expect("it is off");
    }
}
