//! Agents that are stopped, killed or paused, and answers that come when nobody waits for them.

use std::time::Duration;

use agent_qga::{Effect, ErrorKind, GetTime, Ping, QgaExt as _, SyncDelimited, SyncPlain};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::bench::{
    Bench, SECOND, assert_answers_reach_their_callers, exec, soon, stop_agent, within,
};
use crate::rig::Rig;

pub(super) async fn an_agent_stopped_in_the_guest_costs_deadlines_and_no_answer_goes_astray(
    rig: Rig,
) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    stop_agent(&agent, 6).await;
    let mut ended = 0;
    // Each has an answer of its own, and each was sent or queued while nobody answers.
    let mut id = 1_000;
    loop {
        id += 1;
        let call = agent.execute(SyncDelimited { id }, within(300));
        let result = timeout(20 * SECOND, call)
            .await
            .expect("it ends by its deadline");
        match result {
            Ok(answer) => {
                assert_eq!(
                    answer, id,
                    "the first answer after the stop is the right one"
                );
                break;
            }
            Err(error) => {
                let kind = error.kind();
                assert!(
                    matches!(
                        kind,
                        ErrorKind::TimedOut | ErrorKind::Unresponsive | ErrorKind::Busy
                    ),
                    "{error}"
                );
                ended += 1;
            }
        }
    }
    assert!(ended >= 3, "{ended} calls met the stopped agent");
    assert_answers_reach_their_callers(&agent).await;

    // A call with time enough outlives the stop.
    stop_agent(&agent, 2).await;
    assert_eq!(
        agent
            .execute(SyncDelimited { id: 7 }, soon())
            .await
            .expect("it waits"),
        7
    );
    assert_answers_reach_their_callers(&agent).await;
}

pub(super) async fn a_late_answer_does_not_reach_the_next_client(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    for _ in 0..3 {
        let agent = bench.connect().await;
        stop_agent(&agent, 2).await;
        // Under way, and given up together with the connection.
        let call = agent.execute(GetTime, within(100)).await;
        call.expect_err("it is stopped");
        drop(agent);
        // A client that cares for nothing.
        let mut rude = UnixStream::connect(&bench.socket)
            .await
            .expect("QEMU listens");
        let asked = r#"{"execute":"guest-sync","arguments":{"id":77}}{"execute":"guest-nonsense"}{"execute":"gue"#;
        rude.write_all(asked.as_bytes())
            .await
            .expect("there is room");
        drop(rude);
        let agent = bench.connect().await;
        let first = agent
            .execute(SyncPlain { id: 5 }, soon())
            .await
            .expect("it answers");
        assert_eq!(first, 5, "the first answer is the right one");
        assert_answers_reach_their_callers(&agent).await;
    }
}

pub(super) async fn a_message_that_a_stopped_agent_takes_half_of_spoils_nothing(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    stop_agent(&agent, 3).await;
    // More than the channel holds: QEMU was seen to take 193 to 266 KB for an agent that reads none.
    let big = json!({ "id": 5, "padding": "x".repeat(1 << 20) });
    let error = agent
        .execute_raw("guest-sync", big, within(500))
        .await
        .expect_err("it is stopped");
    assert!(
        matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unresponsive),
        "{error}"
    );
    assert_answers_reach_their_callers(&agent).await;
    // Half a message that was on its way for certain.
    let big = json!({ "handle": 1, "buf-b64": "x".repeat(1 << 20) });
    let writing = agent.execute_raw("guest-file-write", big, soon());
    let _half = timeout(Duration::from_millis(5), writing).await;
    assert_answers_reach_their_callers(&agent).await;
}

pub(super) async fn an_agent_killed_in_the_guest_is_found_again(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    let before = agent.execute(Ping, soon()).await;
    before.expect("it answers");
    exec(&agent, "sleep 0.2; kill -9 $PPID").await;
    let asking = async { while agent.execute(Ping, within(300)).await.is_ok() {} };
    timeout(30 * SECOND, asking).await.expect("it dies");
    agent
        .wait_ready(soon())
        .await
        .expect("the next one answers on the same connection");
    assert_answers_reach_their_callers(&agent).await;
}

pub(super) async fn a_paused_guest_costs_a_deadline_and_answers_after_it(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    agent.execute(Ping, soon()).await.expect("it answers");
    bench.domain.pause().await.expect("it pauses");
    for id in 0..3 {
        let error = agent
            .execute(SyncDelimited { id }, within(300))
            .await
            .expect_err("it is paused");
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unresponsive),
            "{error}"
        );
    }
    bench.domain.resume().await.expect("it resumes");
    assert_answers_reach_their_callers(&agent).await;
}

pub(super) async fn a_second_client_meets_silence_until_the_first_has_left(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let first = bench.connect().await;
    first.execute(Ping, soon()).await.expect("it answers");
    let second = bench.connect().await;
    let error = second
        .execute(SyncDelimited { id: 1 }, within(500))
        .await
        .expect_err("nobody hears it");
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unresponsive, Effect::None),
        "{error}"
    );
    assert_answers_reach_their_callers(&first).await;
    drop(first);
    // What it sent before is served now too, and answers nobody.
    assert_answers_reach_their_callers(&second).await;
}
