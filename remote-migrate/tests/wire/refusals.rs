//! Peers that speak wrongly, on purpose or not: each is refused with its own error, and nothing is started.

use std::{error::Error as _, time::Duration};

use remote_migrate::{
    Answer, Call, Effect, Epoch, Peer as _, PeerError, Reply, Request, Side,
    wire::{
        WireError, frame,
        message::{FaultKind, Hello, Message},
        session::SessionError,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    time::Instant,
};
use uuid::Uuid;

use crate::{
    ends::{Played, Served, options, peer_over, serve},
    rig::{Fails, Link, Rig, Where},
};

/// What the serving side makes of it, what it tells the other side, and that no host was called.
async fn refused(rig: &Rig, mut stranger: Played, served: Served) -> (SessionError, FaultKind) {
    let fault = stranger.fault().await;
    drop(stranger);
    assert_eq!(rig.calls(), 0, "a host was called");
    assert!(rig.forgotten().await && rig.runs() == Where::Source);
    match served.await.unwrap() {
        Err(WireError::Session(error)) => {
            assert_eq!(error.fault(), Some(fault.clone()));
            (error, fault.kind)
        }
        other => panic!("{other:?}"),
    }
}

fn ends(rig: &Rig) -> (DuplexStream, Served) {
    serve(rig.destination())
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_not_next_to_ours_is_refused_and_both_are_named() {
    for theirs in [0, 3, u16::MAX] {
        let rig = Rig::new();
        let (near, served) = ends(&rig);
        let mut stranger = Played::new(near);
        let hello = Hello {
            version: theirs,
            ..Hello::ours()
        };
        stranger.say(&Message::Hello(hello)).await;
        let (error, kind) = refused(&rig, stranger, served).await;
        assert_eq!(error, SessionError::Version { ours: 1, theirs });
        assert_eq!(kind, FaultKind::Version);
    }
}

#[tokio::test(start_paused = true)]
async fn a_newer_version_speaks_ours() {
    let rig = Rig::new();
    let (near, _served) = ends(&rig);
    let mut peer = Played::new(near);
    let hello = Hello {
        version: 2,
        ..Hello::ours()
    };
    peer.say(&Message::Hello(hello)).await;
    peer.hear().await;
    peer.ask(1, rig.request(Call::Finish)).await;
    assert_eq!(peer.answer().await.reply, Reply::Unknown);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_message_is_refused() {
    let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
    for text in [
        "",
        "{}",
        "[]",
        "null",
        "\u{1}",
        "{\"hello\":7}",
        "{\"pray\":{}}",
        "{\"hello\":{\"magic\":\"vmwright-migrate\",\"version\":70000}}",
        &deep,
    ] {
        let rig = Rig::new();
        let (near, served) = ends(&rig);
        let mut stranger = Played::new(near);
        stranger.say_text(text).await;
        let (error, kind) = refused(&rig, stranger, served).await;
        assert!(matches!(error, SessionError::Malformed(_)), "{error}");
        assert_eq!(kind, FaultKind::Malformed);
    }
}

#[tokio::test(start_paused = true)]
async fn another_protocol_is_refused() {
    let rig = Rig::new();
    let (near, served) = ends(&rig);
    let mut stranger = Played::new(near);
    let hello = Hello {
        magic: "vmwright-backup".to_owned(),
        ..Hello::ours()
    };
    stranger.say(&Message::Hello(hello)).await;
    let (error, _) = refused(&rig, stranger, served).await;
    assert_eq!(error, SessionError::NotAPeer);

    // Its first four bytes are a length beyond all limits.
    let (near, served) = ends(&rig);
    let mut stranger = Played::new(near);
    stranger.say_bytes(b"GET / HTTP/1.1\r\n\r\n").await;
    let (error, _) = refused(&rig, stranger, served).await;
    assert!(matches!(error, SessionError::TooLong(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_frame_of_4_gib_is_refused_before_and_after_the_hello() {
    for greets in [false, true] {
        let rig = Rig::new();
        let (near, served) = ends(&rig);
        let mut stranger = match greets {
            true => Played::greeted(near).await,
            false => Played::new(near),
        };
        stranger.say_bytes(&u32::MAX.to_be_bytes()).await;
        let (error, kind) = refused(&rig, stranger, served).await;
        let limit = if greets {
            frame::LIMIT
        } else {
            frame::FIRST_LIMIT
        };
        let length = 4_294_967_295;
        assert_eq!(error, frame::TooLong { length, limit }.into());
        assert_eq!(kind, FaultKind::TooLong);
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_never_ends_is_given_up_however_it_trickles() {
    let rig = Rig::new();
    let (near, served) = ends(&rig);
    let mut stranger = Played::greeted(near).await;
    let began = Instant::now();
    let of = 1 << 20;
    stranger
        .say_bytes(&u32::try_from(of).unwrap().to_be_bytes())
        .await;
    let (mut reads, mut writes) = tokio::io::split(stranger.stream);
    let trickle = async {
        while writes.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let mut heard = Vec::new();
    let (_, read) = tokio::join!(trickle, reads.read_to_end(&mut heard));
    read.unwrap();
    let silence = options().silence;
    assert!(began.elapsed() < 2 * silence, "{:?}", began.elapsed());
    match served.await.unwrap() {
        Err(WireError::Session(SessionError::Unfinished {
            have,
            of: announced,
            after,
        })) => {
            assert_eq!((announced, after), (of + frame::HEAD, silence));
            assert!(have < 200, "{have} bytes");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(rig.calls(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_that_says_nothing_is_given_up() {
    let rig = Rig::new();
    let (near, served) = ends(&rig);
    let (error, kind) = refused(&rig, Played::new(near), served).await;
    let after = options().silence;
    assert_eq!(error, SessionError::Silent { after });
    assert_eq!(kind, FaultKind::Silent);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_asks_and_never_listens_is_given_up() {
    let rig = Rig::new();
    let (near, served) = ends(&rig);
    let mut deaf = Played::greeted(near).await;
    let mut pings = 0;
    let flood = async {
        for id in 1.. {
            let text = serde_json::to_string(&Message::Ping { id, underway: None }).unwrap();
            let mut out = bytes::BytesMut::new();
            frame::encode(text.as_bytes(), &mut out).unwrap();
            if deaf.stream.write_all(&out).await.is_err() {
                break;
            }
            pings = id;
        }
    };
    let (_, served) = tokio::join!(flood, served);
    assert!(matches!(
        served.unwrap(),
        Err(WireError::Session(SessionError::Silent { .. }))
    ));
    // What fits into two buffers of 64 KiB between the two, and the one that is waiting to be sent.
    assert!(pings < 20_000, "{pings} were taken");
}

#[tokio::test(start_paused = true)]
async fn a_request_before_the_hello_is_refused() {
    let rig = Rig::new();
    let (near, served) = ends(&rig);
    let mut stranger = Played::new(near);
    stranger.ask(1, rig.request(Link::prepare())).await;
    let (error, kind) = refused(&rig, stranger, served).await;
    assert_eq!(error, SessionError::OutOfTurn { what: "request" });
    assert_eq!(kind, FaultKind::OutOfTurn);
}

#[tokio::test(start_paused = true)]
async fn messages_that_come_when_they_may_not_are_refused() {
    let rig = Rig::new();
    let answer = Answer {
        migration: rig.id(),
        epoch: Epoch::FIRST,
        reply: Reply::Owned,
        trouble: None,
        resumed: None,
    };
    for (message, what) in [
        (Message::Hello(Hello::ours()), "hello"),
        (Message::Answer { id: 1, answer }, "answer"),
    ] {
        let (near, served) = ends(&rig);
        let mut stranger = Played::greeted(near).await;
        stranger.say(&message).await;
        let (error, _) = refused(&rig, stranger, served).await;
        assert_eq!(error, SessionError::OutOfTurn { what });
    }
    for (message, what, id, expected) in [
        (
            Message::Ping {
                id: 2,
                underway: None,
            },
            "ping",
            2,
            1,
        ),
        (Message::Pong { id: 9, clock: None }, "pong", 9, 1),
    ] {
        let (near, served) = ends(&rig);
        let mut stranger = Played::greeted(near).await;
        stranger.say(&message).await;
        let (error, _) = refused(&rig, stranger, served).await;
        assert_eq!(error, SessionError::Misnumbered { what, id, expected });
    }
}

#[tokio::test(start_paused = true)]
async fn a_doubled_request_is_served_once_and_refused_once() {
    let rig = Rig::new();
    let (near, served) = ends(&rig);
    let mut stranger = Played::greeted(near).await;
    let request = Message::Request {
        id: 1,
        within_ms: 9_000,
        request: rig.request(Link::prepare()),
    };
    stranger.say(&request).await;
    assert!(matches!(stranger.answer().await.reply, Reply::Prepared(_)));
    stranger.say(&request).await;
    assert_eq!(stranger.fault().await.kind, FaultKind::OutOfTurn);
    drop(stranger);
    let error = served.await.unwrap().unwrap_err();
    let (what, id, expected) = ("request", 1, 2);
    let misnumbered = SessionError::Misnumbered { what, id, expected };
    assert!(matches!(error, WireError::Session(error) if error == misnumbered));
    assert_eq!(rig.prepares(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_second_request_while_one_is_served_is_refused() {
    let rig = Rig::new();
    rig.fail(Fails::PrepareHangs);
    let (near, served) = ends(&rig);
    let mut stranger = Played::greeted(near).await;
    stranger.ask(1, rig.request(Link::prepare())).await;
    rig.reached(Fails::PrepareHangs).await;
    let other = Request {
        migration: remote_migrate::MigrationId::random(),
        ..rig.request(Link::prepare())
    };
    stranger.ask(2, other).await;
    assert_eq!(stranger.fault().await.kind, FaultKind::OutOfTurn);
    drop(stranger);
    assert!(served.await.unwrap().is_err());
    assert_eq!(rig.calls(), 1, "the second never reached a host");
}

#[tokio::test(start_paused = true)]
async fn a_request_for_an_unknown_migration_is_answered_so_and_touches_no_host() {
    let rig = Rig::new();
    let (near, _served) = ends(&rig);
    let mut stranger = Played::greeted(near).await;
    for (id, call) in [
        Call::Finish,
        Call::Status(Side::Destination),
        Call::Status(Side::Source),
    ]
    .into_iter()
    .enumerate()
    {
        stranger.ask(id as u64 + 1, rig.request(call)).await;
        assert_eq!(stranger.answer().await.reply, Reply::Unknown);
    }
    assert_eq!(rig.calls(), 0);
    assert!(rig.forgotten().await);
}

#[tokio::test(start_paused = true)]
async fn a_lie_about_epoch_domain_or_migration_starts_nothing() {
    let rig = Rig::new();
    let (near, _served) = ends(&rig);
    let mut stranger = Played::greeted(near).await;
    let epoch = Epoch::FIRST.next();
    let prepare = Request {
        epoch,
        ..rig.request(Link::prepare())
    };
    stranger.ask(1, prepare.clone()).await;
    assert!(matches!(stranger.answer().await.reply, Reply::Prepared(_)));
    let before = rig.calls();

    let stale = rig.request(Call::Finish);
    let other_domain = Request {
        domain: Uuid::from_u128(1),
        call: Call::Finish,
        ..prepare.clone()
    };
    let other_migration = Request {
        migration: remote_migrate::MigrationId::random(),
        call: Call::Finish,
        ..prepare.clone()
    };
    let stolen = Request {
        migration: remote_migrate::MigrationId::random(),
        ..prepare
    };
    for (id, request, reply) in [
        (2, stale, Reply::Stale { seen: epoch }),
        (3, other_domain, Reply::Conflict),
        (4, other_migration, Reply::Unknown),
    ] {
        stranger.ask(id, request).await;
        assert_eq!(stranger.answer().await.reply, reply);
    }
    stranger.ask(5, stolen).await;
    assert!(matches!(stranger.answer().await.reply, Reply::Refused(_)));
    assert_eq!(
        (rig.calls(), rig.starts()),
        (before, 0),
        "a host was called"
    );
}

#[tokio::test(start_paused = true)]
async fn an_epoch_before_the_first_is_refused() {
    let rig = Rig::new();
    let (near, served) = ends(&rig);
    let mut stranger = Played::greeted(near).await;
    let mut request = serde_json::to_value(rig.request(Link::prepare())).unwrap();
    request["epoch"] = 0.into();
    let lie = serde_json::json!({"request": {"id": 1, "within_ms": 9, "request": request}});
    stranger.say_text(&lie.to_string()).await;
    let (error, kind) = refused(&rig, stranger, served).await;
    assert!(matches!(error, SessionError::NoEpoch { .. }), "{error}");
    assert_eq!(kind, FaultKind::Mismatch);
}

/// A peer that is played by the test, and asked once.
async fn asked(rig: &Rig, answer: impl AsyncFnOnce(Played)) -> PeerError {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let peer = peer_over(near);
    let deadline = Instant::now() + Duration::from_secs(60);
    let (answer, ()) = tokio::join!(peer.ask(rig.request(Link::prepare()), deadline), async {
        answer(Played::greeted(far).await).await;
    });
    answer.unwrap_err()
}

fn session_error(error: &PeerError) -> &SessionError {
    let Some(WireError::Session(error)) = error.source().and_then(|cause| cause.downcast_ref())
    else {
        panic!("{error:?}");
    };
    error
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_something_else_is_refused() {
    let rig = Rig::new();
    let right = Answer {
        migration: rig.id(),
        epoch: Epoch::FIRST,
        reply: Reply::Closed,
        trouble: None,
        resumed: None,
    };
    let epoch = Answer {
        epoch: Epoch::FIRST.next(),
        ..right.clone()
    };
    let migration = Answer {
        migration: remote_migrate::MigrationId::random(),
        ..right.clone()
    };
    for (id, answer, kind) in [
        (1, epoch, FaultKind::Mismatch),
        (1, migration, FaultKind::Mismatch),
        (2, right, FaultKind::OutOfTurn),
    ] {
        let error = asked(&rig, async |mut liar| {
            liar.hear().await;
            liar.say(&Message::Answer { id, answer }).await;
            assert_eq!(liar.fault().await.kind, kind);
        })
        .await;
        assert_eq!(error.effect(), Effect::Unknown);
        assert_eq!(session_error(&error).fault().unwrap().kind, kind);
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_falls_silent_ends_the_waiting_long_before_the_deadline() {
    let rig = Rig::new();
    let began = Instant::now();
    let error = asked(&rig, async |mut silent| {
        silent.hear_any().await;
        silent.hear_any().await;
        while silent.hear_any().await.is_some() {}
    })
    .await;
    let after = options().silence;
    assert_eq!(session_error(&error), &SessionError::Silent { after });
    assert_eq!(error.effect(), Effect::Unknown);
    assert!(began.elapsed() < 2 * after);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_works_for_long_is_not_silent() {
    let rig = Rig::new();
    rig.fail(Fails::PrepareHangs);
    let (near, _served) = ends(&rig);
    let peer = peer_over(near);
    let within = 4 * options().silence;
    let deadline = Instant::now() + within;
    let answer = peer.ask(rig.request(Link::prepare()), deadline).await;
    match answer {
        Ok(answer) => assert!(matches!(answer.reply, Reply::Busy(_) | Reply::Refused(_))),
        Err(error) => {
            let cause = error.source().unwrap().downcast_ref();
            assert!(matches!(cause, Some(WireError::NoAnswer)), "{error:?}");
        }
    }
    assert!(Instant::now() + Duration::from_secs(1) >= deadline);
}

#[tokio::test(start_paused = true)]
async fn a_fault_of_the_other_side_is_told_in_its_own_words() {
    let rig = Rig::new();
    let text = remote_migrate::Reason::new("start guest: no memory: out of it");
    let fault = remote_migrate::wire::message::Fault {
        kind: FaultKind::Internal,
        text,
    };
    let error = asked(&rig, async |mut peer| {
        peer.hear().await;
        peer.say(&Message::Fault(fault.clone())).await;
    })
    .await;
    assert_eq!(session_error(&error), &SessionError::Fault(fault.clone()));
    let chain = remote_migrate::Reason::of(&error);
    assert!(chain.as_str().ends_with(fault.text.as_str()), "{chain}");
}

#[tokio::test(start_paused = true)]
async fn a_request_too_long_for_a_frame_is_not_sent() {
    let rig = Rig::new();
    let (near, _served) = ends(&rig);
    let peer = peer_over(near);
    let Call::Prepare(mut guest) = Link::prepare() else {
        unreachable!("it is one");
    };
    guest.home = "x".repeat(frame::LIMIT).into();
    let deadline = Instant::now() + Duration::from_secs(60);
    let error = peer
        .ask(rig.request(Call::Prepare(guest)), deadline)
        .await
        .unwrap_err();
    assert_eq!(error.effect(), Effect::None);
    assert!(matches!(session_error(&error), SessionError::TooLong(_)));
    assert_eq!(rig.calls(), 0);
}

#[test]
fn the_largest_cookie_fits_into_a_frame_however_it_is_escaped() {
    let cookie = remote_migrate::Cookie::new("\u{1}".repeat(remote_migrate::Cookie::MAX)).unwrap();
    let Call::Prepare(mut guest) = Link::prepare() else {
        unreachable!("it is one");
    };
    guest.cookie = cookie;
    let request = Request {
        migration: remote_migrate::MigrationId::random(),
        epoch: Epoch::FIRST,
        domain: Uuid::nil(),
        call: Call::Prepare(guest),
        run: None,
        downtime: None,
    };
    let payload = serde_json::to_vec(&Message::Request {
        id: u64::MAX,
        within_ms: u64::MAX,
        request,
    });
    let mut out = bytes::BytesMut::new();
    assert!(frame::encode(&payload.unwrap(), &mut out).is_ok());
}
