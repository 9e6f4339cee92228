//! A QEMU that is stopped and says nothing: its own callers end by their deadlines, nobody else notices, and it can be
//! destroyed.

use std::time::Duration;

use driver::{ErrorKind, Run};
use monitor_qmp::Health;
use tokio::time::Instant;

use crate::guests::signal;
use crate::harness::tests;
use crate::rig::{Rig, Signal, boot};

tests! {
    calls_to_a_stopped_qemu_end_by_their_deadlines_and_others_go_on,
    a_stopped_qemu_is_called_unresponsive_and_recovers,
    a_stopped_qemu_is_destroyed_within_its_bound,
    a_silent_agent_costs_only_those_who_ask_it,
}

const SECOND: Duration = Duration::from_secs(1);

async fn calls_to_a_stopped_qemu_end_by_their_deadlines_and_others_go_on(rig: Rig) {
    let stopped = rig.started(rig.empty("stopped")).await;
    let other = rig.started(rig.empty("other")).await;
    signal(&stopped, Signal::STOP);
    let began = Instant::now();
    let asking = stopped.query_status().deadline(SECOND);
    let others = async {
        for _ in 0..100 {
            other.query_status().await.expect("the other answers");
        }
        began.elapsed()
    };
    let (silent, others) = tokio::join!(asking, others);
    let error = silent.expect_err("nobody answers");
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, driver::Effect::Unknown),
        "{error:#}"
    );
    assert!(
        others < SECOND,
        "a hundred calls to the other ended before the deadline of the silent one: {others:?}"
    );
    signal(&stopped, Signal::CONT);
}

async fn a_stopped_qemu_is_called_unresponsive_and_recovers(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    signal(&domain, Signal::STOP);
    domain
        .query_status()
        .deadline(SECOND / 5)
        .await
        .expect_err("nobody answers");
    let told = domain
        .wait_for(
            |observed| observed.health == Health::Unresponsive,
            Instant::now() + 10 * SECOND,
        )
        .await;
    told.expect("it is told from busy");
    let error = domain.query_status().await.expect_err("refused at once");
    assert_eq!(error.kind(), ErrorKind::Unresponsive, "{error:#}");
    signal(&domain, Signal::CONT);
    let told = domain
        .wait_for(
            |observed| observed.health == Health::Ok,
            Instant::now() + 10 * SECOND,
        )
        .await;
    told.expect("its late answers are taken as signs of life");
    domain.query_status().await.expect("it answers again");
}

async fn a_stopped_qemu_is_destroyed_within_its_bound(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    signal(&domain, Signal::STOP);
    domain
        .destroy()
        .deadline(10 * SECOND)
        .await
        .expect("SIGTERM does nothing, SIGKILL does");
    assert_eq!(domain.observed().run, Run::Off);
}

async fn a_silent_agent_costs_only_those_who_ask_it(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    // The guest's processors stand still, so its agent is silent; QEMU itself is not.
    domain.pause().await.expect("it pauses");
    let asking = domain.ping().deadline(2 * SECOND);
    let queries = async {
        for _ in 0..100 {
            domain.query_status().await.expect("the monitor answers");
        }
    };
    let (silent, ()) = tokio::join!(asking, queries);
    let error = silent.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error:#}");
    domain.resume().await.expect("it runs again");
    domain
        .wait_agent()
        .deadline(30 * SECOND)
        .await
        .expect("the agent answers again, and no stale answer is taken");
}
