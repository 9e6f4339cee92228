//! Guests that are silent, late, flooding and lying, on a fake agent and with the clock in hand.
//!
//! Time is paused: it passes only when nobody has anything to do, so a wait of hours costs nothing
//! and what is measured is exact.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::io;
use std::pin::pin;
use std::time::Duration;

use agent_qga::{
    Agent, Blame, Closed, Effect, Error, ErrorKind, Exec, FsfreezeFreeze, GetHostName, GetOsinfo,
    GetTime, Limits, Options, Ping, Proof, Qga, QgaExt, Shutdown, ShutdownMode, Signal, SuspendRam,
};
use futures::future::join_all;
use futures::poll;
use serde_json::{Value, json};
use tests::fake_guest::{Act, FakeGuest, Syncs, Table};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

fn connect() -> (Agent, FakeGuest) {
    let (stream, guest) = FakeGuest::open();
    (Agent::new(stream, Options::default()), guest)
}

/// An agent that serves itself. The numbers it answers to `guest-echo` are those it is asked.
fn served(table: Table) -> Agent {
    let (agent, mut guest) = connect();
    let mut table = echoing(table);
    tokio::spawn(async move { guest.serve(&mut table).await });
    agent
}

fn echoing(table: Table) -> Table {
    table.on_call("guest-echo", |request| {
        vec![Act::Return(request.arguments["number"].clone())]
    })
}

async fn echo(agent: &Agent, number: u32) -> Result<Value, Error> {
    agent
        .execute_raw("guest-echo", json!({ "number": number }), soon())
        .await
}

/// That the connection still gives every caller its own answer.
async fn assert_answers_reach_their_callers(agent: &Agent) {
    for number in 0..5 {
        assert_eq!(echo(agent, number).await.unwrap(), number);
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn within(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn the_first_command_syncs_and_the_next_need_not() {
    let (agent, mut guest) = connect();
    for syncs in [1, 1, 1] {
        let (answer, ()) = tokio::join!(agent.execute(Ping, soon()), async {
            guest.expect("guest-ping").await;
            guest.answer(json!({})).await;
        });
        answer.unwrap();
        assert_eq!(guest.syncs_heard(), syncs);
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_costs_five_seconds_and_nothing_was_sent() {
    let (agent, mut guest) = connect();
    guest.set_syncs(Syncs::Swallowed);
    tokio::spawn(async move { guest.request().await });
    let start = Instant::now();
    let error = agent.execute(Ping, soon()).await.unwrap_err();
    assert_eq!(start.elapsed().as_secs(), 5);
    assert_eq!(error.kind(), ErrorKind::Unresponsive);
    assert_eq!(error.effect(), Effect::None);
    assert_eq!(error.blame(), Blame::Guest);
    assert_eq!(
        error.to_string(),
        "cannot execute guest-ping: the agent answered no sync within 5.0s"
    );
}

#[tokio::test(start_paused = true)]
async fn the_callers_deadline_also_bounds_the_sync() {
    let (agent, _guest) = connect();
    let start = Instant::now();
    let error = agent.execute(Ping, within(2)).await.unwrap_err();
    assert_eq!(start.elapsed().as_secs(), 2);
    assert_eq!(error.kind(), ErrorKind::Unresponsive);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_in_the_past_sends_nothing() {
    let (agent, mut guest) = connect();
    let error = agent.execute(Ping, Instant::now()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::None)
    );
    drop(agent);
    assert_eq!(guest.request().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_reaches_nobody() {
    let late = [
        Act::Wait(Duration::from_secs(57)),
        Act::Return(json!("late")),
    ];
    let agent = served(Table::typical().on("guest-slow", late));
    let slow = agent.execute_raw("guest-slow", Value::Null, within(50));
    let error = slow.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(error.effect(), Effect::Unknown);
    // Its sync is answered once the agent is done with the slow one.
    assert_eq!(
        echo(&agent, 100).await.unwrap_err().kind(),
        ErrorKind::Unresponsive
    );
    assert_eq!(echo(&agent, 101).await.unwrap(), 101);
    assert_answers_reach_their_callers(&agent).await;
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_commands_answer_reaches_nobody() {
    let (agent, mut guest) = connect();
    let script = async {
        guest.expect("guest-get-time").await;
        guest.send(b"{\"return\": 1}\n").await;
        guest
    };
    let abandoned = agent.execute(GetTime, soon());
    let mut guest = {
        tokio::pin!(abandoned);
        tokio::select! {
            biased;
            guest = script => guest,
            result = &mut abandoned => panic!("answered before it was abandoned: {result:?}"),
        }
    };
    let (time, ()) = tokio::join!(agent.execute(GetTime, soon()), async {
        guest.expect("guest-get-time").await;
        guest.answer(json!(2)).await;
    });
    assert_eq!(time.unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_command_withdrawn_during_its_sync_is_never_sent() {
    let (agent, mut guest) = connect();
    guest.set_syncs(Syncs::Scripted);
    {
        let withdrawn = agent.execute(FsfreezeFreeze, soon());
        tokio::pin!(withdrawn);
        tokio::select! {
            biased;
            _ = guest.expect("guest-sync-delimited") => {}
            result = &mut withdrawn => panic!("ended without a sync: {result:?}"),
        }
    }
    guest.set_syncs(Syncs::Answered);
    let (answer, ()) = tokio::join!(agent.execute(Ping, soon()), async {
        guest.expect("guest-ping").await;
        guest.answer(json!({})).await;
    });
    answer.unwrap();
    drop(agent);
    assert_eq!(guest.request().await, None);
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_client_left_behind_is_skipped() {
    let (mut first, mut guest) = FakeGuest::open();
    tokio::io::AsyncWriteExt::write_all(
        &mut first,
        b"{\"execute\":\"guest-echo\",\"arguments\":{\"number\":77}}{\"execute\":\"gue",
    )
    .await
    .unwrap();
    guest.expect("guest-echo").await;
    drop(first);
    guest.answer(json!(77)).await;

    let agent = Agent::new(guest.reconnect(), Options::default());
    guest.send(b"").await;
    let mut table = echoing(Table::typical());
    tokio::spawn(async move { guest.serve(&mut table).await });
    assert_answers_reach_their_callers(&agent).await;
}

#[tokio::test(start_paused = true)]
async fn glued_doubled_and_unasked_answers_reach_nobody() {
    let one = || Act::Return(json!("first"));
    let double = [one(), Act::Return(json!("second"))];
    let trailing = [one(), Act::Raw(b"{\"return\": ".to_vec())];
    let later = [
        one(),
        Act::Wait(Duration::from_secs(1)),
        Act::Return(json!("later")),
    ];
    for acts in [double.to_vec(), trailing.to_vec(), later.to_vec()] {
        let agent = served(Table::typical().on("guest-glue", acts.clone()));
        for _ in 0..3 {
            let answer = agent.execute_raw("guest-glue", Value::Null, soon()).await;
            assert_eq!(answer.unwrap(), "first", "{acts:?}");
            sleep(Duration::from_secs(2)).await;
            assert_answers_reach_their_callers(&agent).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn lies_end_in_a_typed_error_and_the_next_command_is_answered_right() {
    let deep = format!("{{\"return\": {}{}}}\n", "[".repeat(200), "]".repeat(200));
    let lies: [(&[u8], ErrorKind); 9] = [
        (b"hello\n", ErrorKind::Malformed),
        (b"{}\n", ErrorKind::Malformed),
        (b"\x00\x01\xfe\n", ErrorKind::Malformed),
        (b"{\"return\": 1, \"error\": {}}\n", ErrorKind::Malformed),
        (deep.as_bytes(), ErrorKind::TooDeep),
        (b"{\"return\": \"\xfe\"}\n", ErrorKind::Malformed),
        (
            b"{\"return\": \"a\\u001b[31m word\"}\n",
            ErrorKind::UnexpectedReply,
        ),
        (b"{\"return\": null}\n", ErrorKind::UnexpectedReply),
        (
            b"{\"error\": {\"class\": \"\\u001b[2J\"}}\n",
            ErrorKind::Refused,
        ),
    ];
    for (lie, expected) in lies {
        let shown = String::from_utf8_lossy(lie).into_owned();
        let agent = served(Table::typical().on("guest-get-time", [Act::Raw(lie.to_vec())]));
        let error = agent.execute(GetTime, soon()).await.unwrap_err();
        assert_eq!(error.kind(), expected, "{shown}");
        let text = format!("{error} {error:?}");
        assert!(!text.chars().any(char::is_control), "{text:?}");
        assert_answers_reach_their_callers(&agent).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_ends_in_too_large_and_the_connection_recovers() {
    let (stream, mut guest) = FakeGuest::open();
    let agent = Agent::new(stream, Options::default().with_max_message(100_000));
    let mut table = echoing(Table::typical().on("guest-get-osinfo", [Act::Flood(1_000_000)]));
    tokio::spawn(async move { guest.serve(&mut table).await });
    let error = agent.execute(GetOsinfo, soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    assert_eq!(error.effect(), Effect::Unknown);
    assert_answers_reach_their_callers(&agent).await;
}

#[tokio::test]
async fn a_guest_that_never_stops_talking_delays_no_deadline() {
    let (stream, mut guest) = FakeGuest::open();
    let limit = Duration::from_millis(50);
    let agent = Agent::new(stream, Options::default().with_sync_limit(limit));
    let flood = tokio::spawn(async move { guest.flood(usize::MAX).await });
    for _ in 0..3 {
        let error = agent.execute(Ping, soon()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unresponsive);
    }
    drop(agent);
    flood.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_knows_only_the_plain_sync_is_synced() {
    let (agent, mut guest) = connect();
    guest.set_syncs(Syncs::PlainOnly);
    let mut table = echoing(Table::typical());
    tokio::spawn(async move { guest.serve(&mut table).await });
    assert_answers_reach_their_callers(&agent).await;
}

#[tokio::test(start_paused = true)]
async fn callers_queue_and_each_leaves_at_its_own_deadline() {
    let (agent, mut guest) = connect();
    let start = Instant::now();
    let call = |seconds| {
        let agent = agent.clone();
        async move {
            let error = agent
                .execute(GetHostName, within(seconds))
                .await
                .unwrap_err();
            (start.elapsed().as_secs(), error.kind(), error.effect())
        }
    };
    let script = async {
        guest.expect("guest-get-host-name").await;
        // Silent from here on: whatever is asked next waits for a sync.
        guest.set_syncs(Syncs::Swallowed);
        guest.request().await
    };
    let first = call(10);
    let calls = async { tokio::join!(first, call(3), call(5), call(12), call(40)) };
    let ended = tokio::select! {
        biased;
        ended = calls => ended,
        asked = script => panic!("two commands were under way: {asked:?}"),
    };
    assert_eq!(ended.0, (10, ErrorKind::TimedOut, Effect::Unknown));
    assert_eq!(ended.1, (3, ErrorKind::Busy, Effect::None));
    assert_eq!(ended.2, (5, ErrorKind::Busy, Effect::None));
    assert_eq!(ended.3, (12, ErrorKind::Unresponsive, Effect::None));
    assert_eq!(ended.4, (17, ErrorKind::Unresponsive, Effect::None));
}

#[tokio::test(start_paused = true)]
async fn many_callers_each_get_their_own_answer() {
    let agent = served(Table::typical());
    let answers = join_all((0..200).map(|number| echo(&agent, number))).await;
    for (number, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap(), number);
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_command_ends_by_what_the_monitor_saw() {
    let proofs = [
        (Signal::Shutdown, Proof::Shutdown),
        (Signal::Reset, Proof::Reset),
        (Signal::Suspended, Proof::Suspended),
    ];
    for (signal, expected) in proofs {
        let (agent, mut guest) = connect();
        // What happened before proves nothing, and an agent rests before its guest does.
        agent.note(signal);
        let shutdown = Shutdown {
            mode: ShutdownMode::Powerdown,
        };
        let (proof, ()) = tokio::join!(agent.execute(shutdown, soon()), async {
            let request = guest.expect("guest-shutdown").await;
            assert_eq!(request.arguments, json!({ "mode": "powerdown" }));
            agent.note(Signal::PortClosed);
            sleep(Duration::from_secs(1)).await;
            agent.note(signal);
        });
        assert_eq!(proof.unwrap(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_command_ends_by_the_end_of_the_channel_or_by_a_refusal() {
    let hangs_up = served(Table::new().on("guest-suspend-ram", [Act::HangUp]));
    assert_eq!(
        hangs_up.execute(SuspendRam, soon()).await.unwrap(),
        Proof::Closed
    );

    let answers = served(Table::new().on("guest-suspend-ram", [Act::Return(json!({}))]));
    assert_eq!(
        answers.execute(SuspendRam, soon()).await.unwrap(),
        Proof::Answered
    );

    let refuse = Act::refuse("GenericError", "no suspend here");
    let refuses = served(Table::new().on("guest-suspend-ram", [refuse]));
    let error = refuses.execute(SuspendRam, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Refused, Effect::Refused)
    );
    assert_eq!(error.desc(), Some("no suspend here"));

    let nothing = served(Table::typical());
    let error = nothing.execute(SuspendRam, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown)
    );
    assert_answers_reach_their_callers(&nothing).await;
}

#[tokio::test(start_paused = true)]
async fn a_new_session_ends_the_command_under_way_at_once() {
    for signal in [
        Signal::PortOpened,
        Signal::PortClosed,
        Signal::Reset,
        Signal::Shutdown,
    ] {
        let (agent, mut guest) = connect();
        let start = Instant::now();
        let (result, ()) = tokio::join!(agent.execute(GetTime, soon()), async {
            guest.expect("guest-get-time").await;
            agent.note(signal);
        });
        let error = result.unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::SessionLost, Effect::Unknown)
        );
        assert_eq!(start.elapsed(), Duration::ZERO);
        // The answer of the old session may still come.
        guest.send(b"{\"return\": 1}\n").await;
        let (result, ()) = tokio::join!(agent.execute(GetTime, soon()), async {
            guest.expect("guest-get-time").await;
            guest.answer(json!(2)).await;
        });
        assert_eq!(result.unwrap(), 2, "{signal:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_sync_that_sat_in_a_closed_port_is_sent_again_when_it_opens() {
    let (agent, mut guest) = connect();
    agent.note(Signal::PortClosed);
    guest.set_syncs(Syncs::Scripted);
    let (result, ()) = tokio::join!(agent.execute(Ping, soon()), async {
        guest.expect("guest-sync-delimited").await;
        guest.set_syncs(Syncs::Answered);
        sleep(Duration::from_secs(1)).await;
        agent.note(Signal::PortOpened);
        guest.expect("guest-ping").await;
        guest.answer(json!({})).await;
    });
    result.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_port_known_to_be_closed_is_named_as_the_reason() {
    let (agent, _guest) = connect();
    agent.note(Signal::PortClosed);
    let error = agent.execute(Ping, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::NotListening, Effect::None)
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_boots_for_minutes_is_waited_for() {
    let (agent, mut guest) = connect();
    guest.set_syncs(Syncs::Swallowed);
    let start = Instant::now();
    let (ready, asked) = tokio::join!(agent.wait_ready(within(600)), async {
        tokio::select! {
            asked = guest.request() => panic!("{asked:?} was sent without a sync"),
            () = sleep(Duration::from_secs(200)) => {}
        }
        let asked = guest.syncs_heard();
        guest.set_syncs(Syncs::Answered);
        guest.expect("guest-ping").await;
        guest.answer(json!({})).await;
        asked
    });
    ready.unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(203),
        "{:?}",
        start.elapsed()
    );
    assert!((100..110).contains(&asked), "{asked} syncs in 200 s");
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_guest_ends_at_the_deadline_and_with_the_connection() {
    let (agent, guest) = connect();
    let start = Instant::now();
    let error = agent.wait_ready(within(7)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unresponsive);
    assert_eq!(start.elapsed().as_secs(), 7);
    drop(guest);
    let error = agent.wait_ready(within(7)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert_eq!(start.elapsed().as_secs(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_ends_tells_what_was_sent_and_what_not() {
    let agent = served(Table::typical().on("guest-get-time", [Act::HangUp]));
    let error = agent.execute(GetTime, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Closed, Effect::Unknown)
    );
    assert_eq!(error.blame(), Blame::Link);
    assert!(matches!(agent.closed().await, Closed::Eof));
    let error = agent.execute(GetTime, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Closed, Effect::None)
    );
}

#[tokio::test(start_paused = true)]
async fn the_channel_is_freed_with_the_last_handle() {
    let (mut stream, client) = tokio::io::duplex(64);
    let agent = Agent::new(client, Options::default());
    let clone = agent.clone();
    let mut byte = [0];
    let mut end = pin!(stream.read(&mut byte));
    drop(agent);
    sleep(Duration::from_secs(1)).await;
    assert!(poll!(&mut end).is_pending());
    drop(clone);
    assert_eq!(end.await.unwrap(), 0);
}

/// Answers a sync as soon as its number is known, its last bytes still unread. The channel is so
/// narrow that they stay in it, and keep whatever follows out.
async fn answer_a_sync_early(channel: &mut DuplexStream) {
    let mut heard = Vec::new();
    while !heard.ends_with(b"}") {
        heard.push(channel.read_u8().await.unwrap());
    }
    let text = String::from_utf8_lossy(&heard);
    let (_, number) = text.trim_end_matches('}').rsplit_once(':').unwrap();
    let answer = format!("\n{{\"return\": {number}}}\n");
    channel.write_all(answer.as_bytes()).await.unwrap();
}

/// From now on the other end reads and answers as it should. What it is asked is told.
fn serve(channel: DuplexStream) -> mpsc::UnboundedReceiver<Value> {
    let (tell, told) = mpsc::unbounded_channel();
    let mut guest = FakeGuest::over(channel);
    let mut table = Table::typical().on_call("guest-echo", move |request| {
        let number = &request.arguments["number"];
        let _ = tell.send(number.clone());
        vec![Act::Return(number.clone())]
    });
    tokio::spawn(async move { guest.serve(&mut table).await });
    told
}

#[tokio::test(start_paused = true)]
async fn a_command_waits_for_the_end_of_a_sync_that_was_answered_early() {
    for width in 1..=3 {
        let (stream, mut channel) = tokio::io::duplex(width);
        let agent = Agent::new(stream, Options::default());
        let (answer, ()) = tokio::join!(echo(&agent, 99), async {
            answer_a_sync_early(&mut channel).await;
            sleep(Duration::from_secs(1)).await;
            while channel.read_u8().await.unwrap() != b'\n' {}
            serve(channel);
        });
        assert_eq!(answer.unwrap(), 99, "{width} bytes wide");
    }
}

#[tokio::test(start_paused = true)]
async fn a_command_withdrawn_while_the_channel_is_full_is_never_sent() {
    for width in 1..=3 {
        for next_at_once in [false, true] {
            let (stream, mut channel) = tokio::io::duplex(width);
            let agent = Agent::new(stream, Options::default());
            tokio::select! {
                result = echo(&agent, 99) => panic!("answered before it was sent: {result:?}"),
                () = async {
                    answer_a_sync_early(&mut channel).await;
                    sleep(Duration::from_secs(1)).await;
                } => {}
            }
            let next = echo(&agent, 1);
            let mut told = if next_at_once {
                let (answer, told) = tokio::join!(next, async { serve(channel) });
                assert_eq!(answer.unwrap(), 1);
                told
            } else {
                let told = serve(channel);
                sleep(Duration::from_secs(1)).await;
                assert_eq!(next.await.unwrap(), 1);
                told
            };
            assert_eq!(told.recv().await.unwrap(), 1, "{width} bytes wide");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_command_that_is_answered_before_it_is_sent_whole_is_not_finished_by_the_next() {
    let (stream, mut channel) = tokio::io::duplex(10);
    let agent = Agent::new(stream, Options::default());
    let (answer, ()) = tokio::join!(echo(&agent, 99), async {
        answer_a_sync_early(&mut channel).await;
        sleep(Duration::from_secs(1)).await;
        channel.read_exact(&mut [0; 10]).await.unwrap();
        channel.write_all(b"{\"return\": 7}\n").await.unwrap();
    });
    assert_eq!(answer.unwrap(), 7);
    serve(channel);
    assert_answers_reach_their_callers(&agent).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_read_costs_its_caller_only_the_deadline() {
    let (stream, mut channel) = tokio::io::duplex(100);
    let agent = Agent::new(stream, Options::default());
    let big = json!({ "number": 1, "padding": "x".repeat(1000) });
    let (result, ()) = tokio::join!(
        agent.execute_raw("guest-echo", big, within(3)),
        answer_a_sync_early(&mut channel)
    );
    let error = result.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown)
    );

    // It reads again: the half command is cut off, and never done.
    let mut told = serve(channel);
    assert_eq!(echo(&agent, 2).await.unwrap(), 2);
    assert_eq!(told.recv().await.unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_silent_command_of_which_a_part_was_sent_is_not_proven_by_the_end() {
    let (stream, mut channel) = tokio::io::duplex(10);
    let agent = Agent::new(stream, Options::default());
    let (result, ()) = tokio::join!(agent.execute(SuspendRam, soon()), async {
        answer_a_sync_early(&mut channel).await;
        sleep(Duration::from_secs(1)).await;
        drop(channel);
    });
    let error = result.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Closed, Effect::Unknown)
    );
}

#[tokio::test(start_paused = true)]
async fn a_frozen_agent_is_told_from_a_missing_command() {
    let agent = served(Table::typical());
    let error = agent
        .execute_raw("guest-nonsense", Value::Null, soon())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(error.class(), Some("CommandNotFound"));

    assert_eq!(agent.execute(FsfreezeFreeze, soon()).await.unwrap(), 1);
    let error = agent.execute(GetHostName, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Frozen, Effect::Refused)
    );
    agent.execute(Ping, soon()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_program_is_run_to_its_end_with_its_output_cut_at_the_limits() {
    let mut polls = 0;
    let table = Table::typical()
        .on_call("guest-exec", |request| {
            assert_eq!(request.arguments, json!({
                "path": "sh", "arg": ["-c", "cat"], "input-data": "aGVsbG8=", "capture-output": true,
            }));
            vec![Act::Return(json!({ "pid": 5 }))]
        })
        .on_call("guest-exec-status", move |request| {
            assert_eq!(request.arguments, json!({ "pid": 5 }));
            polls += 1;
            let state = json!({ "exited": true, "exitcode": 3, "out-data": "aGVsbG8=", "err-data": "b29wcw==", "err-truncated": true });
            vec![Act::Return(if polls < 4 { json!({ "exited": false }) } else { state })]
        });
    let agent = served(table);
    let limits = Limits {
        stdout: 3,
        stderr: 100,
    };
    let output = agent
        .run("sh", &["-c", "cat"], b"hello", limits, soon())
        .await
        .unwrap();
    assert_eq!((output.exit_code, output.signal), (Some(3), None));
    assert!(!output.success());
    assert_eq!(
        (&*output.stdout, output.stdout_truncated),
        (&b"hel"[..], true)
    );
    assert_eq!(
        (&*output.stderr, output.stderr_truncated),
        (&b"oops"[..], true)
    );
}

#[tokio::test(start_paused = true)]
async fn a_program_that_does_not_end_or_is_forgotten_may_have_acted() {
    let started = || Table::typical().on("guest-exec", [Act::Return(json!({ "pid": 5 }))]);
    let agent = served(started().on(
        "guest-exec-status",
        [Act::Return(json!({ "exited": false }))],
    ));
    let start = Instant::now();
    let error = agent
        .run("sleep", &["99"], b"", Limits::default(), within(10))
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::StillRunning, Effect::Unknown)
    );
    assert_eq!(start.elapsed().as_secs(), 10);
    assert_eq!(
        error.to_string(),
        "cannot execute guest-exec: the program runs on as pid 5 after 10.0s"
    );

    let forgotten = Act::refuse("GenericError", "Invalid parameter 'pid'");
    let agent = served(started().on("guest-exec-status", [forgotten]));
    let error = agent
        .run("true", &[], b"", Limits::default(), soon())
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Refused, Effect::Unknown)
    );

    let missing = Act::refuse("GenericError", "No such file or directory");
    let agent = served(Table::typical().on("guest-exec", [missing]));
    let error = agent.execute(Exec::default(), soon()).await.unwrap_err();
    assert_eq!(error.effect(), Effect::Refused);
}

#[tokio::test(start_paused = true)]
async fn an_agent_can_be_wrapped_and_still_has_the_typed_calls() {
    struct ReadOnly(Agent);

    #[async_trait::async_trait]
    impl Qga for ReadOnly {
        async fn call(&self, request: agent_qga::Request) -> Result<agent_qga::Reply, Error> {
            if request.name.starts_with("guest-get-") {
                return self.0.call(request).await;
            }
            Err(Error::denied(&request.name, "it may only be asked"))
        }

        fn note(&self, signal: Signal) {
            self.0.note(signal);
        }

        async fn closed(&self) -> Closed {
            self.0.closed().await
        }
    }

    let guarded: Box<dyn Qga> = Box::new(ReadOnly(served(Table::typical())));
    let name = guarded.execute(GetHostName, soon()).await.unwrap();
    assert_eq!(name.host_name, "fake");
    let error = guarded.execute(FsfreezeFreeze, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.blame()),
        (ErrorKind::Denied, Blame::Caller)
    );
    assert_eq!(
        error.to_string(),
        "cannot execute guest-fsfreeze-freeze: denied: it may only be asked"
    );
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_fails_gives_its_reason_as_the_source() {
    struct Broken;

    impl tokio::io::AsyncRead for Broken {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            std::task::Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }
    }

    let agent = Agent::new(
        tokio::io::join(Broken, tokio::io::sink()),
        Options::default(),
    );
    let error = agent.execute(Ping, soon()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    let source = std::error::Error::source(&error).unwrap();
    let source = source.downcast_ref::<io::Error>().unwrap();
    assert_eq!(source.kind(), io::ErrorKind::ConnectionReset);
    assert!(!error.to_string().contains(&source.to_string()));
}
