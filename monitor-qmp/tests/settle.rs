//! A command whose answer comes too late is settled by a question, and never sent twice.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use monitor_qmp::{Diagnosis, Effect, ErrorKind, Monitor, Outcome, Settled, command::*};
use serde_json::{Value, json};
use tests::fake_qemu::FakeQemu;
use tokio::time::Instant;

use crate::support::{scripted, scripted_with, soon};

mod support;

fn rng() -> DeviceAdd {
    DeviceAdd::new("virtio-rng-pci").with("id", "rng0")
}

#[tokio::test(start_paused = true)]
async fn an_answer_after_the_deadline_ends_as_done_without_a_duplicate() {
    let (monitor, mut qemu) = scripted().await;
    let deadline = Instant::now() + Duration::from_secs(1);
    let add = rng();
    let (outcome, ()) = tokio::join!(monitor.execute_settled(&add, deadline, soon()), async {
        let asked = qemu.expect("device_add").await;
        // The deadline passes: QEMU is asked for a sign of life, then what became of it.
        let probe = qemu.expect("query-yank").await;
        qemu.reply(&probe, json!([])).await;
        let question = qemu.expect("qom-list").await;
        assert_eq!(question.arguments, json!({"path": "/machine/peripheral"}));
        qemu.reply(&asked, json!({})).await;
        let found =
            json!([{"name": "type", "type": "string"}, {"name": "rng0", "type": "child<x>"}]);
        qemu.reply(&question, found).await;
    });
    assert!(matches!(outcome.unwrap(), Outcome::Done));
    assert_eq!(monitor.counters().late, 1);
    drop(monitor);
    qemu.expect_end().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_found_not_done_may_be_sent_again() {
    let (monitor, mut qemu) = scripted().await;
    let deadline = Instant::now() + Duration::from_secs(1);
    let add = rng();
    let (outcome, ()) = tokio::join!(monitor.execute_settled(&add, deadline, soon()), async {
        let asked = qemu.expect("device_add").await;
        qemu.reply_to("query-yank", json!([])).await;
        let question = qemu.expect("qom-list").await;
        qemu.refuse(&asked, "GenericError", "no such bus").await;
        qemu.reply(&question, json!([])).await;
    });
    let error = outcome.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::None)
    );
    assert_eq!(
        error.to_string(),
        "cannot run device_add: it was not answered, and was found not done"
    );
}

#[tokio::test(start_paused = true)]
async fn a_qemu_that_stays_silent_leaves_the_outcome_unknown() {
    let (monitor, mut qemu) = scripted().await;
    let deadline = Instant::now() + Duration::from_secs(1);
    let patience = deadline + Duration::from_secs(1);
    let add = rng();
    let (outcome, asked) = tokio::join!(
        monitor.execute_settled(&add, deadline, patience),
        qemu.expect("device_add")
    );
    assert_eq!(outcome.unwrap_err().effect(), Effect::Unknown);
    assert_eq!(asked.arguments["id"], "rng0");
    // Nothing that could be asked for: no question is sent.
    let nameless = DeviceAdd::new("virtio-rng-pci");
    assert_eq!(monitor.settle(&nameless, soon()).await, Settled::Unknown);
}

/// Diagnoses a QEMU that answers so in band and so past its main loop, where it does.
async fn diagnosed(
    monitor: &Monitor,
    qemu: &mut FakeQemu,
    in_band: Option<Value>,
    past_it: Option<Value>,
) -> Diagnosis {
    let serve = async {
        while let Some(asked) = qemu.next().await {
            if let Some(answer) = if asked.oob { &past_it } else { &in_band } {
                qemu.reply(&asked, answer.clone()).await;
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        diagnosis = monitor.diagnose(Instant::now() + Duration::from_secs(1)) => diagnosis,
        never = serve => never,
    }
}

#[tokio::test(start_paused = true)]
async fn a_diagnosis_tells_fine_busy_link_down_silent_and_closed_apart() {
    let (monitor, mut qemu) = scripted().await;
    let version = json!({"qemu": {"major": 7, "minor": 2, "micro": 0}});
    let chardev = json!({"type": "chardev", "id": "mon0"});
    let disk = json!({"type": "block-node", "node-name": "far"});

    let fine = diagnosed(&monitor, &mut qemu, Some(version), None).await;
    assert!(matches!(fine, Diagnosis::Fine), "{fine:?}");
    let busy = diagnosed(&monitor, &mut qemu, None, Some(json!([chardev]))).await;
    assert!(matches!(busy, Diagnosis::Busy), "{busy:?}");
    let link = diagnosed(&monitor, &mut qemu, None, Some(json!([chardev, disk]))).await;
    let Diagnosis::LinkDown(instances) = link else {
        panic!("{link:?}")
    };
    let disk = YankInstance::BlockNode {
        node_name: "far".to_owned(),
    };
    assert_eq!(instances, [disk]);
    let silent = diagnosed(&monitor, &mut qemu, None, None).await;
    assert!(matches!(silent, Diagnosis::Silent), "{silent:?}");

    qemu.die();
    monitor.closed().await;
    let closed = monitor.diagnose(soon()).await;
    assert!(matches!(closed, Diagnosis::Closed(_)), "{closed:?}");
}

#[tokio::test(start_paused = true)]
async fn without_the_lane_a_diagnosis_owns_that_it_cannot_tell() {
    let (monitor, mut qemu) = scripted_with(false, ()).await;
    let unknown = diagnosed(&monitor, &mut qemu, None, None).await;
    assert!(matches!(unknown, Diagnosis::Unknown), "{unknown:?}");
}
