//! Futures dropped at every poll: nothing is torn, and every later reply reaches its own caller.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

use monitor_qmp::{Command, Effect, Monitor, NoFds, Options, command::*};
use serde::Serialize;
use serde_json::{Value, json};
use tests::fake_qemu::{Answer, Answers, FakeQemu};
use tokio::io::DuplexStream;

use crate::support::{scripted, soon};

mod support;

/// A command whose reply is its argument.
#[derive(Serialize)]
struct Echo {
    n: u64,
}

impl Command for Echo {
    const NAME: &'static str = "echo";
    type Reply = Value;
}

/// Lets every task that is ready run once. `yield_now` would let them run until none is.
async fn one_turn() {
    let mut turned = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut turned, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Polls `future` so often, letting everyone else run in between, then drops it.
async fn drop_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..polls {
        let polled = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await;
        if let Poll::Ready(output) = polled {
            return Some(output);
        }
        one_turn().await;
    }
    None
}

fn echoing() -> Answers {
    Answers::new().with("echo", |asked| Answer::Return(asked.arguments.clone()))
}

/// A pipe that holds so few bytes that every message takes many polls.
fn narrow(room: usize) -> (DuplexStream, FakeQemu) {
    let (client, ours) = tokio::io::duplex(room);
    (client, FakeQemu::on(ours))
}

async fn a_hundred_are_answered_right(monitor: &Monitor) {
    for first in (0..100).step_by(10) {
        let calls = (first..first + 10).map(|n| monitor.execute(Echo { n }, soon()));
        for (n, outcome) in (first..).zip(futures::future::join_all(calls).await) {
            assert_eq!(outcome.unwrap(), json!({"n": n}));
        }
    }
    monitor.settled(soon()).await.unwrap();
}

#[tokio::test]
async fn a_call_dropped_at_any_poll_disturbs_no_other() {
    // On a task of its own, the runtime polls it in turn with the monitor and the peer.
    tokio::spawn(drop_calls_at_every_poll()).await.unwrap();
}

async fn drop_calls_at_every_poll() {
    for room in [3, 16] {
        let (client, qemu) = narrow(room);
        tokio::spawn(qemu.serve(echoing()));
        let wire = NoFds(client);
        let monitor = Monitor::connect(wire, Options::default(), (), soon())
            .await
            .unwrap();
        let mut polls = 0;
        loop {
            let call = monitor.execute(Echo { n: 1_000_000 }, soon());
            // A second caller, so that what is dropped lies between others.
            let (dropped, kept) = tokio::join!(
                drop_after(polls, call),
                monitor.execute(Echo { n: 7 }, soon()),
            );
            assert_eq!(kept.unwrap(), json!({"n": 7}));
            a_hundred_are_answered_right(&monitor).await;
            if dropped.is_some() {
                break;
            }
            polls += 1;
        }
        assert!(
            polls > 10,
            "the call was over after {polls} polls: nothing was dropped midway"
        );
    }
}

#[tokio::test]
async fn settled_and_closed_dropped_at_any_poll_lose_nothing() {
    let (client, qemu) = FakeQemu::over_memory();
    tokio::spawn(qemu.serve(echoing()));
    let monitor = Monitor::connect(NoFds(client), Options::default(), (), soon())
        .await
        .unwrap();
    for polls in 0..5 {
        drop_after(1, monitor.execute(Echo { n: 0 }, soon())).await;
        drop_after(polls, monitor.settled(soon())).await;
        assert!(drop_after(polls, monitor.closed()).await.is_none());
        a_hundred_are_answered_right(&monitor).await;
    }
}

#[tokio::test]
async fn a_connect_dropped_at_any_poll_closes_the_stream() {
    tokio::spawn(drop_connects_at_every_poll()).await.unwrap();
}

async fn drop_connects_at_every_poll() {
    let mut polls = 0;
    loop {
        let (client, qemu) = narrow(3);
        let served = tokio::spawn(qemu.serve(Answers::new()));
        let connect = Monitor::connect(NoFds(client), Options::default(), (), soon());
        let made = drop_after(polls, connect).await;
        let last = made.is_some();
        drop(made);
        served.await.unwrap();
        if last {
            break;
        }
        polls += 1;
    }
    assert!(polls > 20, "connected after {polls} polls");
}

#[tokio::test]
async fn a_request_that_was_not_taken_is_withdrawn_when_dropped() {
    let (monitor, mut qemu) = scripted().await;
    // One poll queues it; the task had no chance to take it.
    let mut call = Box::pin(monitor.execute(Quit, soon()));
    let pending = poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx).is_pending())).await;
    assert!(pending);
    drop(call);
    drop(monitor);
    qemu.expect_end().await;
}

#[tokio::test]
async fn a_message_half_written_is_finished_after_its_caller_left() {
    // The pipe holds 64 KiB, so a longer request is torn unless somebody goes on writing it.
    let (monitor, mut qemu) = scripted().await;
    let long = "x".repeat(200_000);
    drop_after(
        5,
        monitor.execute(HumanMonitorCommand::new(long.clone()), soon()),
    )
    .await;
    let (next, ()) = tokio::join!(monitor.execute(QueryName, soon()), async {
        let asked = qemu.expect("human-monitor-command").await;
        assert_eq!(asked.arguments, json!({"command-line": long}));
        qemu.reply(&asked, json!("")).await;
        qemu.reply_to("query-name", json!({"name": "n"})).await;
    });
    assert_eq!(next.unwrap().name.as_deref(), Some("n"));
    assert_eq!(monitor.counters().late, 1);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_says_whether_the_command_left() {
    let (monitor, mut qemu) = scripted().await;
    let long = HumanMonitorCommand::new("x".repeat(200_000));
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(1);
    // The first is being written when its deadline comes, the second waits behind it.
    let (first, second) = tokio::join!(monitor.execute(long, deadline), async {
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        monitor.execute(Quit, deadline).await
    });
    assert_eq!(first.unwrap_err().effect(), Effect::Unknown);
    assert_eq!(second.unwrap_err().effect(), Effect::None);
    qemu.expect("human-monitor-command").await;
    assert_eq!(qemu.next().await.unwrap().name, "query-yank");
}
