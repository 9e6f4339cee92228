//! Every call dropped at every poll, and every answer cut at every byte: whoever asks afterwards
//! gets the answer to what they asked.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::pin::pin;
use std::time::Duration;

use agent_qga::{Agent, Limits, Options, Qga as _, QgaExt as _, Signal, digest_in_guest};
use futures::poll;
use serde_json::json;
use tests::fake_guest::{Act, FakeGuest, Syncs, Table};
use tokio::runtime::Builder;
use tokio::task::yield_now;
use tokio::time::Instant;

/// Small enough that no message passes whole, so that calls are dropped within each.
const NARROW: usize = 7;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn table() -> Table {
    let exited = json!({ "exited": true, "exitcode": 0, "out-data": "aGk=" });
    Table::typical()
        .on("guest-exec", [Act::Return(json!({ "pid": 1 }))])
        .on("guest-exec-status", [Act::Return(exited)])
        .on_call("guest-echo", |request| {
            vec![Act::Return(request.arguments["number"].clone())]
        })
}

fn agent(syncs: Syncs) -> Agent {
    let (stream, guest) = tokio::io::duplex(NARROW);
    let mut guest = FakeGuest::over(guest);
    guest.set_syncs(syncs);
    tokio::spawn(async move { guest.serve(&mut table()).await });
    Agent::new(stream, Options::default())
}

async fn assert_answers_reach_their_callers(agent: &Agent, context: &str) {
    assert_so_many_reach_their_callers(10, agent, context).await;
}

async fn assert_so_many_reach_their_callers(count: u64, agent: &Agent, context: &str) {
    for number in 0..count {
        let arguments = json!({ "number": number });
        let answer = agent.execute_raw("guest-echo", arguments, soon()).await;
        assert_eq!(answer.unwrap(), number, "{context}");
    }
}

/// Polls `future` up to `polls` times, all others having their turn in between, then drops it.
/// Whether it came to its end.
async fn dropped_after(polls: usize, future: impl Future) -> bool {
    let mut future = pin!(future);
    for _ in 0..polls {
        if poll!(&mut future).is_ready() {
            return true;
        }
        yield_now().await;
    }
    false
}

/// Runs `call` on a connection of its own, dropped after one poll, after two, ... until it ends.
async fn drop_at_every_poll(name: &str, syncs: Syncs, call: impl AsyncFn(&Agent)) {
    let mut polls = 0;
    loop {
        let agent = agent(syncs);
        let ended = dropped_after(polls, call(&agent)).await;
        let context = format!("{name} dropped after {polls} polls");
        assert_so_many_reach_their_callers(100, &agent, &context).await;
        if ended {
            break;
        }
        polls += 1;
    }
    assert!(
        polls > 10,
        "{name} ended after {polls} polls, too few to prove anything"
    );
}

/// Runs `test` with its turn after every single poll of any other task.
fn step_by_step(test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .event_interval(1)
        .build();
    runtime.unwrap().block_on(test);
}

#[test]
fn a_call_dropped_at_any_poll_shifts_no_answer() {
    step_by_step(async {
        for syncs in [Syncs::Answered, Syncs::PlainOnly] {
            drop_at_every_poll("execute", syncs, async |agent| {
                let arguments = json!({ "number": 99, "padding": "x".repeat(30) });
                agent
                    .execute_raw("guest-echo", arguments, soon())
                    .await
                    .unwrap();
            })
            .await;
        }
    });
}

#[test]
fn a_refused_call_and_its_question_about_the_freeze_dropped_at_any_poll_shift_no_answer() {
    step_by_step(async {
        drop_at_every_poll("refused", Syncs::Answered, async |agent| {
            let missing = agent.execute_raw("guest-missing", json!({}), soon());
            missing.await.unwrap_err();
        })
        .await;
    });
}

#[test]
fn a_run_dropped_at_any_poll_shifts_no_answer() {
    step_by_step(async {
        drop_at_every_poll("run", Syncs::Answered, async |agent| {
            let output = agent
                .run("echo", &["hi"], b"", Limits::default(), soon())
                .await;
            assert_eq!(output.unwrap().stdout, b"hi");
        })
        .await;
    });
}

#[test]
fn waiting_dropped_at_any_poll_shifts_no_answer() {
    step_by_step(async {
        drop_at_every_poll("wait_ready", Syncs::Answered, async |agent| {
            agent.wait_ready(soon()).await.unwrap();
        })
        .await;
    });
}

#[test]
fn calls_dropped_one_after_another_at_every_pair_of_polls_shift_no_answer() {
    step_by_step(async {
        for first in 0..40 {
            for second in (0..40).step_by(3) {
                let agent = agent(Syncs::Answered);
                for (number, polls) in [(98, first), (99, second)] {
                    let arguments = json!({ "number": number });
                    dropped_after(polls, agent.execute_raw("guest-echo", arguments, soon())).await;
                }
                let context = format!("dropped after {first} and {second} polls");
                assert_answers_reach_their_callers(&agent, &context).await;
            }
        }
    });
}

#[test]
fn a_new_session_at_any_poll_shifts_no_answer() {
    step_by_step(async {
        for polls in 0..60 {
            let agent = agent(Syncs::Answered);
            {
                let mut call =
                    pin!(agent.execute_raw("guest-echo", json!({ "number": 99 }), soon()));
                if !dropped_after(polls, &mut call).await {
                    agent.note(Signal::PortOpened);
                    // Either the session took it along, or it had not been sent and is sent now.
                    if let Ok(answer) = call.await {
                        assert_eq!(answer, 99);
                    }
                }
            }
            assert_answers_reach_their_callers(&agent, &format!("signal after {polls} polls"))
                .await;
        }
    });
}

#[tokio::test(start_paused = true)]
async fn an_answer_cut_at_any_byte_is_the_same_answer() {
    let answer = "{\"return\": {\"host-name\": \"a \\\"quoted\\\\ näme\"}}\n".as_bytes();
    for at in 0..=answer.len() {
        let (head, tail) = answer.split_at(at);
        let acts = [
            Act::Raw(head.to_vec()),
            Act::Wait(Duration::from_millis(1)),
            Act::Raw(tail.to_vec()),
        ];
        let (stream, mut guest) = FakeGuest::open();
        let agent = Agent::new(stream, Options::default());
        let mut table = table().on("guest-get-host-name", acts);
        tokio::spawn(async move { guest.serve(&mut table).await });
        let name = agent.execute(agent_qga::GetHostName, soon()).await.unwrap();
        assert_eq!(name.host_name, "a \"quoted\\ näme", "cut at {at}");
        assert_answers_reach_their_callers(&agent, &format!("cut at {at}")).await;
    }
}

#[test]
fn a_digest_dropped_at_any_poll_shifts_no_answer() {
    step_by_step(async {
        drop_at_every_poll("digest", Syncs::Answered, async |agent| {
            // This guest's program says no digest: the way there and back is the same.
            let told = digest_in_guest(agent, "/f", soon()).await;
            told.unwrap_err();
        })
        .await;
    });
}

#[test]
fn waiting_for_the_end_dropped_at_any_poll_shifts_no_answer() {
    step_by_step(async {
        let agent = agent(Syncs::Answered);
        for polls in 0..20 {
            let ended = dropped_after(polls, agent.closed()).await;
            assert!(!ended, "it is open");
            assert_answers_reach_their_callers(&agent, "closed").await;
        }
    });
}
