//! Futures dropped at every poll: nothing is torn, and every later reply reaches its own caller.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::{
    fs,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    task::Poll,
};

use async_trait::async_trait;
use futures::StreamExt as _;
use monitor_qmp::{
    Command, Dial, Effect, Error, Monitor, NoFds, Notice, Options, Patience, Qmp, Reconnect,
    Schema, Settled, command::*, events,
};
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
            let call = monitor.execute(Echo { n: 1 << 60 }, soon());
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

/// What a future of the drop law is made of.
type Act = for<'a> fn(&'a Monitor) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Every future of a monitor and of what stands in for one, but `connect` and the streams, which
/// have tests of their own.
const EVERY_FUTURE: &[(&str, Act)] = &[
    ("execute", |monitor| {
        Box::pin(async {
            let _told = monitor.execute(Echo { n: 1 }, soon()).await.unwrap();
        })
    }),
    ("execute_oob", |monitor| {
        Box::pin(async {
            let _told = monitor.execute_oob(QueryYank, soon()).await.unwrap();
        })
    }),
    ("execute_raw", |monitor| {
        Box::pin(async {
            let _told = monitor
                .execute_raw("stop", Value::Null, soon())
                .await
                .unwrap();
        })
    }),
    ("a refused call", |monitor| {
        Box::pin(async {
            let _told = monitor.execute(Quit, soon()).await.unwrap_err();
        })
    }),
    ("execute_settled", |monitor| {
        Box::pin(async {
            let _told = monitor
                .execute_settled(&Cont, soon(), soon())
                .await
                .unwrap();
        })
    }),
    ("settle", |monitor| {
        Box::pin(async { assert_eq!(monitor.settle(&Cont, soon()).await, Settled::Done) })
    }),
    ("settled", |monitor| {
        Box::pin(async {
            // Something to settle, left by a caller that gave up.
            let _ = timeout_now(monitor.execute(Echo { n: 1 }, soon())).await;
            monitor.settled(soon()).await.unwrap();
        })
    }),
    ("diagnose", |monitor| {
        Box::pin(async {
            let _told = monitor.diagnose(soon()).await;
        })
    }),
    ("expect_event and wait", |monitor| {
        Box::pin(async {
            let mut stopped = monitor.expect_event(|event| event.name == "STOP");
            monitor.execute(Echo { n: 1 }, soon()).await.unwrap();
            stopped.wait(soon()).await.unwrap();
        })
    }),
    ("Schema::ask", |monitor| {
        Box::pin(async {
            let _told = Schema::ask(monitor, soon()).await.unwrap();
        })
    }),
    ("dyn execute", |monitor| {
        Box::pin(async {
            let qmp: &dyn Qmp = monitor;
            qmp.execute(Echo { n: 1 }, soon()).await.unwrap();
        })
    }),
    ("dyn execute_oob", |monitor| {
        Box::pin(async {
            let qmp: &dyn Qmp = monitor;
            qmp.execute_oob(QueryYank, soon()).await.unwrap();
        })
    }),
    ("dyn execute_settled", |monitor| {
        Box::pin(async {
            let qmp: &dyn Qmp = monitor;
            let _told = qmp.execute_settled(&Cont, soon(), soon()).await.unwrap();
        })
    }),
];

/// Polls once more than it takes to queue a call, and gives up.
async fn timeout_now<F: Future>(future: F) -> Option<F::Output> {
    drop_after(2, future).await
}

#[tokio::test]
async fn every_future_dropped_at_any_poll_shifts_no_answer_and_leaks_nothing() {
    tokio::spawn(async {
        for (name, act) in EVERY_FUTURE {
            drop_one_at_every_poll(name, *act).await;
        }
    })
    .await
    .unwrap();
}

/// Answers, and tells of a STOP before each echo.
async fn tell_and_answer(mut qemu: FakeQemu) {
    qemu.negotiate(true).await;
    while let Some(asked) = qemu.next().await {
        let answer = match asked.name.as_str() {
            "echo" => {
                qemu.event("STOP", json!({})).await;
                asked.arguments.clone()
            }
            "query-status" => json!({"running": true, "status": "running"}),
            "query-version" => json!({"qemu": {"major": 9, "minor": 0, "micro": 0}}),
            "query-yank" | "query-qmp-schema" => json!([]),
            "quit" => {
                qemu.refuse(&asked, "GenericError", "not now").await;
                continue;
            }
            _ => json!({}),
        };
        qemu.reply(&asked, answer).await;
    }
}

async fn drop_one_at_every_poll(name: &str, act: Act) {
    let (client, qemu) = narrow(16);
    tokio::spawn(tell_and_answer(qemu));
    let monitor = Monitor::connect(NoFds(client), Options::default(), (), soon());
    let monitor = monitor.await.unwrap();
    let mut polls = 0;
    while drop_after(polls, act(&monitor)).await.is_none() {
        a_hundred_are_answered_right(&monitor).await;
        polls += 1;
    }
    assert!(polls > 3, "{name} ended after {polls} polls");
    a_hundred_are_answered_right(&monitor).await;
    let counters = monitor.counters();
    assert_eq!((counters.unknown, counters.unattributed), (0, 0), "{name}");
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

/// How often this process has the null device open: no other test here does.
fn descriptors() -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap();
    all.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .filter(|target| target.as_os_str() == "/dev/null")
        .count()
}

/// A set of descriptors rides on its command once or is closed, whenever the caller leaves.
#[tokio::test]
async fn a_call_with_descriptors_dropped_at_any_poll_leaks_none() {
    let (client, mut qemu) = FakeQemu::over_unix().unwrap();
    let wire = Monitor::connect(client, Options::default(), (), soon());
    let (monitor, _) = tokio::join!(wire, qemu.negotiate(true));
    let monitor = monitor.unwrap();
    let before = descriptors();
    let served = tokio::spawn(async move {
        while let Some(asked) = qemu.next().await {
            let expected = usize::from(asked.name == "getfd");
            assert_eq!(asked.fds.len(), expected, "{}", asked.name);
            let answer = asked.arguments.clone();
            qemu.reply(&asked, if expected == 1 { json!({}) } else { answer })
                .await;
        }
    });
    let mut done = 0;
    for polls in 0..40 {
        let null = fs::File::open("/dev/null").unwrap().into();
        let fdname = format!("fd{polls}");
        let getfd = monitor.execute_with_fds(Getfd { fdname }, vec![null], soon());
        done += usize::from(drop_after(polls % 8, getfd).await.is_some());
        a_hundred_are_answered_right(&monitor).await;
    }
    assert!(done < 40, "nothing was dropped midway");
    assert_eq!(descriptors(), before);
    drop(monitor);
    served.await.unwrap();
}

#[tokio::test]
async fn asking_for_the_next_event_dropped_at_any_poll_loses_none() {
    let (client, mut qemu) = narrow(16);
    let (queue, mut stream) = events(1000);
    let connect = Monitor::connect(NoFds(client), Options::default(), queue, soon());
    let (monitor, _) = tokio::join!(connect, qemu.negotiate(true));
    let _monitor = monitor.unwrap();
    let told = tokio::spawn(async move {
        for n in 0..100 {
            qemu.event("STOP", json!({"n": n})).await;
        }
        qemu
    });
    let (mut seen, mut polls) = (0, 0);
    while seen < 100 {
        polls += 1;
        if let Some(notice) = drop_after(polls % 5, stream.next()).await {
            let Some(Notice::Event(event)) = notice else {
                panic!("{notice:?} after {seen} events")
            };
            let data = event.data.unwrap();
            assert_eq!(data.get(), format!("{{\"n\":{seen}}}"));
            seen += 1;
        }
    }
    told.await.unwrap();
}

/// Each connection is served by a fake of its own.
struct Dialler;

#[async_trait]
impl Dial for Dialler {
    type Wire = NoFds<DuplexStream>;

    async fn dial(&mut self) -> io::Result<Self::Wire> {
        let (client, qemu) = narrow(16);
        tokio::spawn(serve_until_quit(qemu));
        Ok(NoFds(client))
    }

    async fn resync(&mut self, monitor: &Monitor, _: u64) -> Result<(), Error> {
        monitor.execute(QueryStatus, soon()).await.map(drop)
    }
}

/// Answers, and dies of `quit` without a word.
async fn serve_until_quit(mut qemu: FakeQemu) {
    qemu.negotiate(true).await;
    while let Some(asked) = qemu.next().await {
        let answer = match asked.name.as_str() {
            "echo" => asked.arguments.clone(),
            "quit" => return,
            _ => json!({"running": true, "status": "running"}),
        };
        qemu.reply(&asked, answer).await;
    }
}

async fn reconnecting() -> Reconnect {
    let patience = Patience::default();
    let made = Reconnect::connect(Dialler, Options::default(), patience, (), soon());
    made.await.unwrap()
}

#[tokio::test]
async fn a_connection_that_comes_back_keeps_the_law_too() {
    tokio::spawn(async {
        for polls in 0..200 {
            drop(drop_after(polls, reconnecting()).await);
        }
        let reconnect = reconnecting().await;
        let qmp: &dyn Qmp = &reconnect;
        for polls in 0..60 {
            drop_after(polls, qmp.execute(Echo { n: 1 }, soon())).await;
            drop_after(polls, qmp.settled(soon())).await;
            assert!(drop_after(polls % 5, qmp.closed()).await.is_none());
            let monitor = reconnect.current().unwrap();
            a_hundred_are_answered_right(&monitor).await;
            if polls % 20 == 19 {
                // The next call meets the gap and is dropped in it.
                qmp.execute(Quit, soon()).await.unwrap_err();
                drop_after(polls, qmp.execute(Echo { n: 1 }, soon())).await;
                qmp.execute(Echo { n: 2 }, soon()).await.unwrap();
            }
        }
    })
    .await
    .unwrap();
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
