//! Conversations with a scripted QEMU, message by message.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use monitor_qmp::{
    Blame, Closed, Effect, ErrorClass, ErrorKind, Event, EventSink, Health, Monitor, NoFds, Notice,
    Options, Qmp, QmpEvent, command::*, events,
};
use serde_json::json;
use tests::{
    fake_qemu::{Answers, FakeQemu},
    fault::{Faults, Faulty},
};
use tokio::{io::AsyncWriteExt as _, time::Instant};

use crate::support::{scripted, scripted_with, soon};

mod support;

/// A sink that keeps what it is told, as text.
#[derive(Clone, Default)]
struct Diary(Arc<Mutex<Vec<String>>>);

impl Diary {
    fn entries(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    fn write(&self, entry: String) {
        self.0.lock().unwrap().push(entry);
    }
}

impl EventSink for Diary {
    fn event(&mut self, event: Event) {
        self.write(event.name);
    }

    fn health(&mut self, health: Health) {
        self.write(format!("{health:?}"));
    }

    fn closed(&mut self, why: &Closed) {
        self.write(why.to_string());
    }
}

#[tokio::test]
async fn replies_reach_their_own_callers_in_any_order() {
    let (monitor, mut qemu) = scripted().await;
    let both = async {
        tokio::join!(
            monitor.execute(QueryName, soon()),
            monitor.execute(QueryUuid, soon()),
            monitor.execute_oob(QueryYank, soon()),
        )
    };
    let peer = async {
        let yank = qemu.expect("query-yank").await;
        let name = qemu.expect("query-name").await;
        let uuid = qemu.expect("query-uuid").await;
        assert!(yank.oob && !name.oob);
        qemu.reply(&uuid, json!({"UUID": "u"})).await;
        qemu.reply(
            &yank,
            json!([{"type": "migration"}, {"type": "novelty", "x": 1}]),
        )
        .await;
        qemu.reply(&name, json!({"name": "n"})).await;
    };
    let ((name, uuid, yank), ()) = tokio::join!(both, peer);
    assert_eq!(name.unwrap().name.as_deref(), Some("n"));
    assert_eq!(uuid.unwrap().uuid, "u");
    assert_eq!(
        yank.unwrap(),
        [YankInstance::Migration, YankInstance::Other]
    );
}

#[tokio::test]
async fn requests_are_short_and_only_the_first_of_several_goes_without_an_id() {
    let (monitor, mut qemu) = scripted().await;
    let ask = || monitor.execute(QueryStatus, soon());
    let (first, second, texts) = tokio::join!(ask(), ask(), async {
        let mut texts = Vec::new();
        let asked = [
            qemu.expect("query-status").await,
            qemu.expect("query-status").await,
        ];
        for (asked, is_running) in asked.iter().zip([true, false]) {
            let status = if is_running { "running" } else { "paused" };
            let value = json!({"running": is_running, "status": status});
            qemu.reply(asked, value).await;
            texts.push(asked.text.clone());
        }
        texts
    });
    assert_eq!(
        texts,
        [
            r#"{"execute":"query-status"}"#,
            r#"{"execute":"query-status","id":2}"#
        ]
    );
    assert!(first.unwrap().running && !second.unwrap().running);
}

#[tokio::test]
async fn negotiation_asks_for_the_lane_only_if_it_is_offered() {
    let (client, mut qemu) = FakeQemu::over_memory();
    let connect = Monitor::connect(NoFds(client), Options::default(), (), soon());
    let (monitor, asked) = tokio::join!(connect, qemu.negotiate(true));
    assert_eq!(asked.arguments, json!({"enable": ["oob"]}));
    assert!(monitor.unwrap().has_oob());

    let (client, mut qemu) = FakeQemu::over_memory();
    let connect = Monitor::connect(NoFds(client), Options::default(), (), soon());
    let (monitor, asked) = tokio::join!(connect, qemu.negotiate(false));
    assert!(asked.arguments.is_null());
    let error = monitor
        .unwrap()
        .execute_oob(QueryYank, soon())
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unsupported, Effect::None)
    );
}

#[tokio::test]
async fn events_may_come_before_the_greeting() {
    let diary = Diary::default();
    let (client, mut qemu) = FakeQemu::over_memory();
    let connect = Monitor::connect(NoFds(client), Options::default(), diary.clone(), soon());
    let (monitor, ()) = tokio::join!(connect, async {
        qemu.event("RESUME", json!({})).await;
        qemu.negotiate(true).await;
    });
    assert_eq!(
        monitor.unwrap().greeting().version.qemu.to_string(),
        "7.2.22"
    );
    assert_eq!(diary.entries(), ["RESUME"]);
}

#[tokio::test]
async fn a_late_reply_to_a_former_client_answers_nobody() {
    let (client, mut qemu) = FakeQemu::over_memory();
    let connect = Monitor::connect(NoFds(client), Options::default(), (), soon());
    let (monitor, ()) = tokio::join!(connect, async {
        qemu.greet(true).await;
        let asked = qemu.expect("qmp_capabilities").await;
        qemu.send(&json!({"return": {"former": true}, "id": 1}))
            .await;
        // It may have been asked without an id.
        qemu.send(&json!({"return": {"former": true}})).await;
        qemu.error_without_id("GenericError", "of the former").await;
        qemu.reply(&asked, json!({})).await;
    });
    let counters = monitor.unwrap().counters();
    assert_eq!((counters.unknown, counters.unattributed), (2, 1));
}

#[tokio::test]
async fn what_is_no_qmp_is_shown() {
    for (sent, shown) in [
        (
            "SSH-2.0-\x07OpenSSH\r\n",
            r#"got "SSH-2.0-\x07OpenSSH\r\n""#,
        ),
        ("{\"hello\":1}", r#"got "{\"hello\":1}""#),
        ("{\"QMP\":", r#"got "{\"QMP\":""#),
    ] {
        let (client, mut qemu) = FakeQemu::over_memory();
        let connect = Monitor::connect(NoFds(client), Options::default(), (), soon());
        let (monitor, ()) = tokio::join!(connect, async {
            qemu.raw(sent).await;
            qemu.die();
        });
        let error = monitor.unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::NotQmp, Effect::None)
        );
        assert!(error.to_string().ends_with(shown), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_does_not_greet_ends_by_the_deadline() {
    let (client, _qemu) = FakeQemu::over_memory();
    let deadline = Instant::now() + Duration::from_secs(5);
    let error = Monitor::connect(NoFds(client), Options::default(), (), deadline)
        .await
        .unwrap_err();
    assert_eq!(Instant::now(), deadline);
    assert_eq!(error.kind(), ErrorKind::NotQmp);
    assert!(error.to_string().contains("waited 5.0s"), "{error}");
}

#[tokio::test]
async fn an_early_end_says_that_it_was_the_end() {
    let (client, qemu) = FakeQemu::over_memory();
    qemu.die();
    let error = Monitor::connect(NoFds(client), Options::default(), (), soon())
        .await
        .unwrap_err();
    assert!(
        matches!(error.why_closed(), Some(Closed::EndOfStream)),
        "{error}"
    );
}

#[tokio::test]
async fn a_reply_comes_after_the_events_before_it() {
    let diary = Diary::default();
    let (monitor, mut qemu) = scripted_with(true, diary.clone()).await;
    let (stopped, ()) = tokio::join!(
        async {
            monitor.execute(Stop, soon()).await.unwrap();
            diary.entries()
        },
        async {
            let asked = qemu.expect("stop").await;
            // All in one piece, so that only the order inside it can tell.
            let reply = json!({"return": {}, "id": asked.id});
            let event =
                |name| json!({"event": name, "timestamp": {"seconds": 1, "microseconds": 2}});
            qemu.raw(format!("{}{}{}", event("STOP"), event("NEW_IN_11"), reply))
                .await;
        }
    );
    assert_eq!(stopped, ["STOP", "NEW_IN_11"]);
}

/// As QEMU 7.2 tells them; the guest that real QEMU is tested with has neither device.
#[tokio::test]
async fn a_guests_panic_and_its_watchdog_are_told_with_what_qemu_does_about_them() {
    let (queue, mut told) = events(8);
    let (_monitor, mut qemu) = scripted_with(true, queue).await;
    let panic = json!({"action": "pause", "info": {"type": "hyper-v", "arg1": 1}});
    qemu.event("GUEST_PANICKED", panic).await;
    qemu.event("WATCHDOG", json!({"action": "pause"})).await;
    let mut faults = Vec::new();
    for _ in 0..2 {
        match told.next().await {
            Some(Notice::Event(event)) => match event.typed() {
                QmpEvent::GuestPanicked(fault) => faults.push(("panic", fault.action)),
                QmpEvent::Watchdog(fault) => faults.push(("watchdog", fault.action)),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
    let pause = || "pause".to_owned();
    assert_eq!(faults, [("panic", pause()), ("watchdog", pause())]);
}

#[tokio::test]
async fn the_end_of_the_stream_fails_every_caller_with_the_reason() {
    let diary = Diary::default();
    let (monitor, mut qemu) = scripted_with(true, diary.clone()).await;
    let calls = (0..10).map(|_| monitor.execute(QueryStatus, soon()));
    let (outcomes, ()) = tokio::join!(futures::future::join_all(calls), async {
        for _ in 0..7 {
            qemu.expect("query-status").await;
        }
        qemu.die();
    });
    let effects: Vec<_> = outcomes
        .iter()
        .map(|o| o.as_ref().unwrap_err().effect())
        .collect();
    assert_eq!(effects[..7], [Effect::Unknown; 7], "sent");
    assert_eq!(effects[7..], [Effect::None; 3], "held back by the window");
    let error = outcomes[0].as_ref().unwrap_err();
    assert_eq!(
        (error.kind(), error.blame()),
        (ErrorKind::Closed, Blame::Peer)
    );
    assert_eq!(
        error.to_string(),
        "cannot run query-status: sent and not answered: QEMU closed the connection"
    );
    assert!(matches!(monitor.closed().await, Closed::EndOfStream));
    assert_eq!(monitor.health(), Health::Closed);
    assert_eq!(diary.entries(), ["QEMU closed the connection"]);
    let after = monitor.execute(QueryStatus, soon()).await.unwrap_err();
    assert_eq!(
        (after.kind(), after.effect()),
        (ErrorKind::Closed, Effect::None)
    );
}

#[tokio::test]
async fn garbage_ends_the_connection_with_a_typed_reason() {
    for garbage in ["nonsense", "{\"return\":tru}", "[1]"] {
        let (monitor, mut qemu) = scripted().await;
        qemu.raw(garbage).await;
        let why = monitor.closed().await;
        assert!(matches!(&why, Closed::Violation(_)), "{why}");
        qemu.expect_end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_reply_reaches_nobody_and_shifts_nothing() {
    let (monitor, mut qemu) = scripted().await;
    let deadline = Instant::now() + Duration::from_secs(1);
    let (late, asked) = tokio::join!(
        monitor.execute(QueryName, deadline),
        qemu.expect("query-name"),
    );
    let error = late.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown)
    );
    assert_eq!(
        error.to_string(),
        "cannot run query-name: waited 1.0s, sent and not answered"
    );

    let (next, ()) = tokio::join!(monitor.execute(QueryName, soon()), async {
        qemu.reply_to("query-yank", json!([])).await;
        let second = qemu.expect("query-name").await;
        qemu.reply(&asked, json!({"name": "old"})).await;
        qemu.reply(&asked, json!({"name": "older"})).await;
        qemu.reply(&second, json!({"name": "new"})).await;
    });
    assert_eq!(next.unwrap().name.as_deref(), Some("new"));
    assert_eq!(
        (monitor.counters().late, monitor.counters().unknown),
        (1, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_command_that_was_held_back_leaves_no_trace() {
    let (monitor, mut qemu) = scripted().await;
    let deadline = Instant::now() + Duration::from_secs(1);
    let full = (0..7).map(|_| monitor.execute(QueryStatus, soon()));
    let (_, outcome, ()) = tokio::join!(
        futures::future::join_all(full),
        async {
            tokio::task::yield_now().await;
            monitor.execute(Quit, deadline).await
        },
        async {
            let mut asked = Vec::new();
            for _ in 0..7 {
                asked.push(qemu.expect("query-status").await);
            }
            qemu.expect("query-yank").await;
            for asked in &asked {
                qemu.reply(asked, json!({"running": true, "status": "running"}))
                    .await;
            }
        }
    );
    let error = outcome.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::None)
    );
    assert_eq!(qemu.seen().commands, 9, "quit was never sent");
}

#[tokio::test]
async fn the_window_leaves_room_for_a_rescue() {
    let (monitor, mut qemu) = scripted().await;
    let calls = (0..20).map(|_| monitor.execute(QueryStatus, soon()));
    let rescue = async {
        tokio::task::yield_now().await;
        monitor
            .execute_oob(
                Yank {
                    instances: vec![YankInstance::Migration],
                },
                soon(),
            )
            .await
    };
    let (outcomes, rescued, ()) = tokio::join!(futures::future::join_all(calls), rescue, async {
        let mut asked = Vec::new();
        for _ in 0..7 {
            asked.push(qemu.expect("query-status").await);
        }
        qemu.reply_to("yank", json!({})).await;
        while let Some(oldest) = (!asked.is_empty()).then(|| asked.remove(0)) {
            qemu.reply(&oldest, json!({"running": true, "status": "running"}))
                .await;
            if qemu.seen().commands < 22 {
                asked.push(qemu.expect("query-status").await);
            }
        }
    });
    rescued.unwrap();
    assert!(outcomes.iter().all(Result::is_ok));
}

#[tokio::test]
async fn settled_waits_for_what_departed_callers_left_behind() {
    let (monitor, mut qemu) = scripted().await;
    monitor.settled(soon()).await.unwrap();
    let asked = tokio::select! {
        _ = monitor.execute(Stop, soon()) => panic!("nobody answered"),
        asked = qemu.expect("stop") => asked,
    };
    let now = Instant::now();
    let error = monitor.settled(now).await.unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("1 commands whose callers left still run"),
        "{error}"
    );
    assert_eq!(error.effect(), Effect::None);
    let (settled, ()) = tokio::join!(monitor.settled(soon()), qemu.reply(&asked, json!({})));
    settled.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_overdue_qemu_is_busy_if_it_answers_out_of_band() {
    let diary = Diary::default();
    let (monitor, mut qemu) = scripted_with(true, diary.clone()).await;
    let deadline = Instant::now() + Duration::from_secs(3);
    let (outcome, asked) = tokio::join!(monitor.execute(Cont, deadline), qemu.expect("cont"));
    outcome.unwrap_err();
    assert_eq!(monitor.health(), Health::Busy);
    let probe = qemu.expect("query-yank").await;
    assert!(probe.oob);
    qemu.reply(&probe, json!([])).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(monitor.health(), Health::Busy);
    qemu.reply(&asked, json!({})).await;
    monitor.settled(soon()).await.unwrap();
    assert_eq!(monitor.health(), Health::Ok);
    qemu.event("STOP", json!({})).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(diary.entries(), ["Busy", "Ok", "STOP"]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_qemu_is_unresponsive_until_it_says_anything() {
    for oob in [true, false] {
        let (monitor, mut qemu) = scripted_with(oob, ()).await;
        let deadline = Instant::now() + Duration::from_secs(3);
        let (outcome, asked) = tokio::join!(monitor.execute(Cont, deadline), qemu.expect("cont"));
        outcome.unwrap_err();
        let probe = if oob {
            Some(qemu.expect("query-yank").await)
        } else {
            None
        };
        tokio::time::sleep(Duration::from_millis(999)).await;
        assert_eq!(monitor.health(), Health::Busy);
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert_eq!(monitor.health(), Health::Unresponsive);

        qemu.event("RTC_CHANGE", json!({"offset": 1})).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(
            monitor.health(),
            Health::Busy,
            "it lives, but still owes an answer"
        );
        qemu.reply(&asked, json!({})).await;
        if let Some(probe) = probe {
            qemu.reply(&probe, json!([])).await;
        }
        monitor.settled(soon()).await.unwrap();
        assert_eq!(monitor.health(), Health::Ok);
    }
}

#[tokio::test]
async fn an_error_without_id_belongs_to_the_one_command_in_flight() {
    let (monitor, mut qemu) = scripted().await;
    let (outcome, ()) = tokio::join!(monitor.execute(Stop, soon()), async {
        qemu.expect("stop").await;
        qemu.error_without_id("GenericError", "JSON parse error")
            .await;
    });
    let error = outcome.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Refused, Effect::Refused)
    );
    assert_eq!(error.desc(), Some("JSON parse error"));
}

#[tokio::test]
async fn an_error_without_id_belongs_to_the_one_that_was_sent_without() {
    let (monitor, mut qemu) = scripted().await;
    let both = async { tokio::join!(monitor.execute(Stop, soon()), monitor.execute(Cont, soon())) };
    let ((stop, cont), ()) = tokio::join!(both, async {
        qemu.expect("stop").await;
        let asked = qemu.expect("cont").await;
        qemu.error_without_id("GenericError", "not now").await;
        qemu.reply(&asked, json!({})).await;
    });
    assert_eq!(stop.unwrap_err().effect(), Effect::Refused);
    cont.unwrap();
    assert_eq!(monitor.counters().unattributed, 0);
}

#[tokio::test]
async fn an_error_without_id_fails_all_in_flight_and_is_settled_by_a_fence() {
    let (monitor, mut qemu) = scripted().await;
    let all = async {
        tokio::join!(
            monitor.execute(QueryUuid, soon()),
            monitor.execute(Stop, soon()),
            monitor.execute(Cont, soon())
        )
    };
    let ((first, stop, cont), asked) = tokio::join!(all, async {
        // The one without an id is over when the error comes.
        let first = qemu.expect("query-uuid").await;
        let asked = qemu.expect("stop").await;
        qemu.expect("cont").await;
        qemu.reply(&first, json!({"UUID": "u"})).await;
        qemu.error_without_id("GenericError", "which?").await;
        asked
    });
    first.unwrap();
    for outcome in [stop, cont] {
        let error = outcome.unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::Unattributed, Effect::Unknown)
        );
    }
    // QEMU answers one of the two; that the other is over is proved by a command behind both.
    let fence = qemu.expect("query-version").await;
    qemu.reply(&asked, json!({})).await;
    let (settled, ()) = tokio::join!(monitor.settled(soon()), async {
        tokio::task::yield_now().await;
        qemu.reply(&fence, json!({})).await;
    });
    settled.unwrap();
    assert_eq!(monitor.counters().unattributed, 1);
}

#[tokio::test]
async fn a_refusal_keeps_class_and_text() {
    let (monitor, mut qemu) = scripted().await;
    for (class, expected) in [
        ("DeviceNotFound", ErrorClass::DeviceNotFound),
        ("NewClass", ErrorClass::Other("NewClass".to_owned())),
    ] {
        let (outcome, ()) = tokio::join!(monitor.execute(DeviceDel::new("d"), soon()), async {
            let asked = qemu.expect("device_del").await;
            assert_eq!(asked.arguments, json!({"id": "d"}));
            qemu.refuse(&asked, class, "Device 'd' not found").await;
        });
        let error = outcome.unwrap_err();
        assert_eq!(error.class(), Some(&expected));
        assert_eq!(error.command(), Some("device_del"));
        assert!(
            error.to_string().contains("Device 'd' not found"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_reply_of_another_shape_was_still_done() {
    let (monitor, mut qemu) = scripted().await;
    let (outcome, ()) = tokio::join!(
        monitor.execute(QueryUuid, soon()),
        qemu.reply_to("query-uuid", json!({"UUID": 5})),
    );
    let error = outcome.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Decode, Effect::Done)
    );
    let raw = async {
        monitor
            .execute_raw("query-uuid", json!(null), soon())
            .await
            .unwrap()
    };
    let (value, ()) = tokio::join!(raw, qemu.reply_to("query-uuid", json!({"UUID": 5})));
    assert_eq!(value, json!({"UUID": 5}));
}

#[tokio::test]
async fn the_last_handle_frees_the_monitor() {
    let (monitor, mut qemu) = scripted().await;
    let other = monitor.clone();
    drop(monitor);
    let (outcome, ()) = tokio::join!(
        other.execute(QueryName, soon()),
        qemu.reply_to("query-name", json!({})),
    );
    outcome.unwrap();
    drop(other);
    qemu.expect_end().await;
}

#[tokio::test]
async fn close_ends_the_calls_of_every_handle() {
    let (monitor, mut qemu) = scripted().await;
    let (outcome, ()) = tokio::join!(monitor.execute(Stop, soon()), async {
        qemu.expect("stop").await;
        monitor.close();
    });
    assert!(matches!(
        outcome.unwrap_err().why_closed(),
        Some(Closed::Local)
    ));
    qemu.expect_end().await;
}

#[tokio::test]
async fn last_words_are_read_after_writing_failed() {
    let diary = Diary::default();
    let (client, mut qemu) = FakeQemu::over_memory();
    let wire = NoFds(Faulty::new(client, Faults::seeded(1).cut_writes_after(130)));
    let connect = Monitor::connect(wire, Options::default(), diary.clone(), soon());
    let (monitor, _) = tokio::join!(connect, qemu.negotiate(true));
    let monitor = monitor.unwrap();
    let (outcome, ()) = tokio::join!(monitor.execute(Quit, soon()), async {
        let asked = qemu.expect("quit").await;
        let bytes = usize::try_from(qemu.seen().bytes).unwrap();
        assert!(bytes < 130, "the limit is to be met by the next command");
        let next = monitor.execute(HumanMonitorCommand::new("x".repeat(100)), soon());
        let (failed, ()) = tokio::join!(next, async {
            tokio::task::yield_now().await;
            qemu.event(
                "SHUTDOWN",
                json!({"guest": false, "reason": "host-qmp-quit"}),
            )
            .await;
            qemu.reply(&asked, json!({})).await;
            qemu.die();
        });
        assert_eq!(failed.unwrap_err().effect(), Effect::Unknown);
    });
    outcome.unwrap();
    assert_eq!(diary.entries(), ["SHUTDOWN", "QEMU closed the connection"]);
}

#[tokio::test]
async fn a_sink_that_panics_fails_the_callers_instead_of_hanging_them() {
    struct Brittle;
    impl EventSink for Brittle {
        fn event(&mut self, _: Event) {
            panic!("as told");
        }
        fn closed(&mut self, _: &Closed) {}
    }
    let (monitor, mut qemu) = scripted_with(true, Brittle).await;
    let (outcome, ()) = tokio::join!(monitor.execute(Stop, soon()), async {
        qemu.expect("stop").await;
        qemu.event("STOP", json!({})).await;
    });
    assert!(matches!(
        outcome.unwrap_err().why_closed(),
        Some(Closed::Abandoned)
    ));
}

#[tokio::test]
async fn descriptors_travel_with_their_command_once_and_one_set_at_a_time() {
    let (client, mut qemu) = FakeQemu::over_unix().unwrap();
    let connect = Monitor::connect(client, Options::default(), (), soon());
    let (monitor, _) = tokio::join!(connect, qemu.negotiate(true));
    let monitor = monitor.unwrap();
    let file = || std::fs::File::open("/dev/null").unwrap().into();
    let named = |name: &str| Getfd {
        fdname: name.to_owned(),
    };
    let calls = async {
        tokio::join!(
            monitor.execute(QueryName, soon()),
            monitor.execute_with_fds(named("a"), vec![file()], soon()),
            monitor.execute_with_fds(named("b"), vec![file(), file()], soon()),
            monitor.execute(QueryUuid, soon()),
        )
    };
    let ((_, first, second, _), ()) = tokio::join!(calls, async {
        let name = qemu.expect("query-name").await;
        assert!(name.fds.is_empty());
        let first = qemu.expect("getfd").await;
        assert_eq!(
            (first.arguments["fdname"].as_str(), first.fds.len()),
            (Some("a"), 1)
        );
        qemu.reply(&name, json!({})).await;
        tokio::select! {
            biased;
            early = qemu.next() => panic!("{early:?} came while a descriptor was under way"),
            () = async { for _ in 0..100 { tokio::task::yield_now().await } } => {}
        }
        qemu.reply(&first, json!({})).await;
        let second = qemu.expect("getfd").await;
        assert_eq!(second.fds.len(), 2);
        let uuid = qemu.expect("query-uuid").await;
        assert!(uuid.fds.is_empty());
        qemu.reply(&second, json!({})).await;
        qemu.reply(&uuid, json!({"UUID": ""})).await;
    });
    first.unwrap();
    second.unwrap();
    assert_eq!(qemu.seen().fds, 3);
}

#[tokio::test]
async fn a_stream_that_passes_no_descriptors_says_so() {
    let (monitor, _qemu) = scripted().await;
    let fd = std::fs::File::open("/dev/null").unwrap().into();
    let outcome = monitor
        .execute_with_fds(
            Getfd {
                fdname: "a".to_owned(),
            },
            vec![fd],
            soon(),
        )
        .await;
    let error = outcome.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unsupported, Effect::None)
    );
}

#[tokio::test(start_paused = true)]
async fn any_chunking_and_any_delay_carry_the_same_conversation() {
    for seed in 0..30 {
        let (client, qemu) = FakeQemu::over_memory();
        let faults = Faults::seeded(seed)
            .split(1 + seed as usize % 5)
            .delay(Duration::from_millis(3));
        let wire = NoFds(Faulty::new(client, faults));
        let served = tokio::spawn(qemu.serve(Answers::new()));
        let deadline = Instant::now() + Duration::from_secs(600);
        let monitor = Monitor::connect(wire, Options::default(), (), deadline)
            .await
            .unwrap();
        let calls = (0..20).map(|_| monitor.execute(QueryStatus, deadline));
        for outcome in futures::future::join_all(calls).await {
            assert_eq!(outcome.unwrap().status, RunState::Running);
        }
        drop(monitor);
        assert_eq!(served.await.unwrap().commands, 21);
    }
}

#[tokio::test]
async fn a_cut_at_any_byte_ends_in_an_error_and_never_in_a_wrong_answer() {
    let (mut cut, mut done) = (0, false);
    while !done {
        let (client, qemu) = FakeQemu::over_memory();
        tokio::spawn(qemu.serve(Answers::new()));
        let wire = NoFds(Faulty::new(
            client,
            Faults::seeded(cut).cut_reads_after(cut),
        ));
        let outcome = async {
            let monitor = Monitor::connect(wire, Options::default(), (), soon()).await?;
            monitor.execute(QueryStatus, soon()).await
        };
        match outcome.await {
            Ok(status) => done = status.running,
            Err(error) => assert!(
                matches!(error.kind(), ErrorKind::Closed | ErrorKind::NotQmp),
                "cut at {cut}: {error}"
            ),
        }
        cut += 1;
    }
    assert!(cut > 200, "the conversation is longer than {cut} bytes");
}

#[tokio::test]
async fn calls_work_through_the_trait_object() {
    let (monitor, mut qemu) = scripted().await;
    let qmp: Arc<dyn Qmp> = Arc::new(monitor);
    let (status, ()) = tokio::join!(
        qmp.execute(QueryStatus, soon()),
        qemu.reply_to(
            "query-status",
            json!({"running": false, "status": "paused"})
        ),
    );
    assert_eq!(status.unwrap().status, RunState::Paused);
    let (_, ()) = tokio::join!(qmp.execute_oob(QueryYank, soon()), async {
        assert!(qemu.expect("query-yank").await.oob);
        qemu.die();
    });
    assert!(matches!(qmp.closed().await, Closed::EndOfStream));
}

#[tokio::test]
async fn a_stream_of_events_has_its_end_as_its_last_item() {
    let (queue, mut stream) = events(16);
    let (monitor, mut qemu) = scripted_with(true, queue).await;
    qemu.event("RTC_CHANGE", json!({"offset": -3})).await;
    qemu.event("BLOCK_JOB_PENDING", json!({"type": "commit", "id": "j"}))
        .await;
    qemu.event("STOP", json!({"odd": 1})).await;
    qemu.die();
    let mut seen = Vec::new();
    while let Some(notice) = stream.next().await {
        seen.push(notice);
    }
    let [
        Notice::Event(clock),
        Notice::Event(pending),
        Notice::Event(stop),
        Notice::Closed(Closed::EndOfStream),
    ] = &seen[..]
    else {
        panic!("{seen:?}")
    };
    assert!(matches!(clock.typed(), QmpEvent::RtcChange(-3)));
    assert!(matches!(pending.typed(), QmpEvent::BlockJobPending(job) if job.device == "j"));
    assert!(matches!(stop.typed(), QmpEvent::Stop));
    assert!(clock.timestamp < stop.timestamp && clock.sequence < stop.sequence);
    drop(monitor);
}

#[tokio::test]
async fn a_runtime_that_shuts_down_leaves_no_caller_behind() {
    let other = std::thread::spawn(|| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let made = runtime.block_on(scripted());
        // Dropped here, with the monitor's task in it.
        made
    });
    let (monitor, _qemu) = other.join().unwrap();
    assert!(matches!(monitor.closed().await, Closed::Abandoned));
}

#[tokio::test]
async fn a_deadline_in_the_past_sends_nothing() {
    let (monitor, mut qemu) = scripted().await;
    let error = monitor.execute(Quit, Instant::now()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::None)
    );
    drop(monitor);
    qemu.expect_end().await;
}

#[tokio::test]
async fn a_peer_that_floods_without_reading_costs_no_more_than_one_message() {
    let (mut peer, client) = tokio::io::duplex(1 << 20);
    let mut options = Options::default();
    options.limits.size = 1 << 16;
    let flood = async {
        let _ = peer.write_all(b"{\"QMP\":\"").await;
        while peer.write_all(&[b'x'; 4096]).await.is_ok() {}
    };
    let (outcome, ()) = tokio::join!(Monitor::connect(NoFds(client), options, (), soon()), flood);
    let error = outcome.unwrap_err();
    assert!(
        error.to_string().contains("longer than 65536 bytes"),
        "{error}"
    );
}
