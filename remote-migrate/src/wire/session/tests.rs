//! Every short conversation with a peer that says anything, and pairs of peers that behave.

use uuid::Uuid;

use super::*;
use crate::{
    control::Transfer,
    message::{Call, Downtime, Reply},
    pace::{Estimate, Eta},
    phase::Side,
    wire::message::{Fault, FaultKind},
};

const BEAT: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(15);

fn at(seconds: u64) -> Now {
    Now {
        elapsed: Duration::from_secs(seconds),
        wall: 0,
    }
}

fn terms(version: u16) -> Terms {
    Terms {
        hello: Hello {
            version,
            ..Hello::ours()
        },
        beat: BEAT,
        silence: SILENCE,
    }
}

fn session(role: Role) -> Session {
    Session::new(role, terms(1), at(0))
}

fn hello(version: u16) -> Message {
    Message::Hello(terms(version).hello)
}

fn id(number: u128) -> MigrationId {
    MigrationId::from_uuid(Uuid::from_u128(number))
}

fn request(migration: u128) -> Request {
    Request {
        migration: id(migration),
        epoch: Epoch::FIRST,
        domain: Uuid::nil(),
        call: Call::Status(Side::Destination),
        run: None,
        downtime: None,
    }
}

fn asked(id: u64, migration: u128) -> Message {
    Message::Request {
        id,
        within_ms: 9,
        request: request(migration),
    }
}

fn reply(migration: u128, epoch: Epoch) -> Answer {
    Answer {
        migration: id(migration),
        epoch,
        reply: Reply::Unknown,
        trouble: None,
        resumed: None,
    }
}

fn answered(id: u64, migration: u128, epoch: Epoch) -> Message {
    Message::Answer {
        id,
        answer: reply(migration, epoch),
    }
}

fn ping(id: u64) -> Message {
    Message::Ping { id, underway: None }
}

const UNDERWAY: Underway = Underway {
    migration: MigrationId::from_uuid(Uuid::nil()),
    epoch: Epoch::FIRST,
    transfer: Transfer {
        sent: 1,
        remaining: 2,
        total: 3,
        pass: 4,
        dirty_rate: 5,
        is_still: true,
    },
    estimate: Estimate {
        rate: 6,
        pass_left: Some(Duration::from_secs(7)),
        eta: Eta::In(Duration::from_secs(8)),
    },
};

/// The last of what it has to say.
fn last_of(session: &mut Session) -> Option<Message> {
    std::iter::from_fn(|| session.outgoing()).last()
}

/// A greeting of one that knows all that this version does, or all but that.
fn hello_with(feature: &str, knows: bool) -> Message {
    let mut hello = terms(1).hello;
    if !knows {
        hello.features.remove(feature);
    }
    Message::Hello(hello)
}

fn fault() -> Message {
    Message::Fault(Fault {
        kind: FaultKind::Internal,
        text: Reason::new("no"),
    })
}

/// All that a peer may say, right or wrong.
fn alphabet() -> Vec<Message> {
    vec![
        hello(0),
        hello(1),
        hello(2),
        hello(3),
        asked(1, 7),
        asked(2, 8),
        answered(1, 7, Epoch::FIRST),
        answered(1, 8, Epoch::FIRST),
        answered(1, 7, Epoch::FIRST.next()),
        answered(2, 7, Epoch::FIRST),
        ping(1),
        Message::Ping {
            id: 1,
            underway: Some(UNDERWAY),
        },
        ping(2),
        Message::Pong { id: 1, clock: None },
        fault(),
    ]
}

/// What the laws need to know of a conversation so far.
#[derive(Clone, Default)]
struct Told {
    open: bool,
    /// Requests handed up, in order, and whether the last is answered.
    requests: Vec<Request>,
    answered: bool,
    answers: usize,
}

struct Walk {
    conversations: usize,
    opened: usize,
    served: usize,
    answered: usize,
}

impl Walk {
    fn go(&mut self, session: &Session, told: &Told, left: usize) {
        self.conversations += 1;
        if left == 0 {
            return;
        }
        for message in alphabet() {
            let (mut session, mut told) = (session.clone(), told.clone());
            while session.outgoing().is_some() {}
            let Ok(event) = session.message(message.clone(), at(0)) else {
                assert!(
                    session.out.is_empty(),
                    "{message:?} was answered and refused"
                );
                continue;
            };
            assert!(session.out.len() <= 1, "{message:?} was answered twice");
            match event {
                Some(Event::Open) => {
                    assert!(!told.open, "opened twice");
                    self.opened += 1;
                    told.open = true;
                    if session.role == Role::Asks {
                        session.ask(request(7), SILENCE).unwrap();
                        assert!(session.ask(request(8), SILENCE).is_err(), "two at a time");
                    }
                }
                Some(Event::Request { request, .. }) => {
                    assert!(told.open && session.role == Role::Answers);
                    assert!(told.requests.is_empty() || told.answered, "two at a time");
                    assert!(!told.requests.contains(&request), "served twice");
                    self.served += 1;
                    told.requests.push(request);
                    told.answered = false;
                }
                Some(Event::Answer(answer)) => {
                    assert!(told.open && session.role == Role::Asks);
                    assert_eq!(answer, reply(7, Epoch::FIRST), "not what was asked");
                    told.answers += 1;
                    assert_eq!(told.answers, 1, "answered twice");
                    self.answered += 1;
                }
                Some(Event::Underway(_)) => {
                    assert!(told.open && session.role == Role::Answers);
                }
                Some(Event::Beat) | None => assert!(told.open),
            }
            self.go(&session, &told, left - 1);
            // The same, with the request answered first.
            if !told.answered && !told.requests.is_empty() {
                session.answer(reply(7, Epoch::FIRST)).unwrap();
                told.answered = true;
                self.go(&session, &told, left - 1);
            }
        }
    }
}

#[test]
fn in_every_short_conversation_only_what_fits_is_handed_up() {
    for role in [Role::Asks, Role::Answers] {
        let mut walk = Walk {
            conversations: 0,
            opened: 0,
            served: 0,
            answered: 0,
        };
        walk.go(&session(role), &Told::default(), 8);
        println!("{role:?}: {} conversations", walk.conversations);
        let handed_up = match role {
            Role::Asks => walk.answered,
            Role::Answers => walk.served,
        };
        assert!(
            walk.opened >= 2 && handed_up >= 4,
            "the walk has lost its reach"
        );
    }
}

#[test]
fn neighbouring_versions_speak_the_older_and_others_refuse_each_other_naming_both() {
    for ours in 1..5 {
        for theirs in 0..6 {
            let mut session = Session::new(Role::Answers, terms(ours), at(0));
            match session.message(hello(theirs), at(0)) {
                Ok(event) => {
                    assert_eq!(event, Some(Event::Open));
                    let agreed = session.agreed().unwrap();
                    assert_eq!(agreed.version, ours.min(theirs));
                    assert!(ours.abs_diff(theirs) <= 1);
                }
                Err(error) => {
                    assert_eq!(error, SessionError::Version { ours, theirs });
                    let text = error.fault().unwrap().text;
                    assert!(text.as_str().contains(&format!("version {theirs} ")));
                    assert!(text.as_str().contains(&format!("version {ours} ")));
                }
            }
        }
    }
}

#[test]
fn a_feature_is_used_only_if_both_sides_name_it() {
    for (theirs, shown) in [(true, true), (false, false)] {
        let mut session = session(Role::Answers);
        let mut hello = terms(1).hello;
        hello.features.insert("teleport".to_owned());
        if !theirs {
            hello.features.remove(CLOCK);
        }
        session.message(Message::Hello(hello), at(0)).unwrap();
        assert_eq!(session.agreed().unwrap().features.contains(CLOCK), shown);
        assert!(!session.agreed().unwrap().features.contains("teleport"));
        session.message(ping(1), at(0)).unwrap();
        let pong = last_of(&mut session);
        let clock = shown.then_some(0);
        assert_eq!(pong, Some(Message::Pong { id: 1, clock }));
    }
}

#[test]
fn the_standstill_is_told_only_to_a_side_that_knows_of_it() {
    let downtime = Downtime {
        took: Duration::from_millis(7),
        error: Duration::from_millis(1),
    };
    for knows in [true, false] {
        let hello = hello_with(DOWNTIME, knows);
        let mut asks = session(Role::Asks);
        asks.message(hello.clone(), at(0)).unwrap();
        let mut told = request(1);
        told.downtime = Some(downtime);
        asks.ask(told, Duration::from_millis(1)).unwrap();
        let Some(Message::Request { request: sent, .. }) = last_of(&mut asks) else {
            panic!("no request");
        };
        assert_eq!(sent.downtime, knows.then_some(downtime));

        let mut answers = session(Role::Answers);
        answers.message(hello, at(0)).unwrap();
        answers.message(asked(1, 1), at(0)).unwrap();
        let mut owned = reply(1, Epoch::FIRST);
        owned.resumed = Some(9);
        answers.answer(owned).unwrap();
        let Some(Message::Answer { answer: sent, .. }) = last_of(&mut answers) else {
            panic!("no answer");
        };
        assert_eq!(sent.resumed, knows.then_some(9));
    }
}

#[test]
fn how_far_a_migration_is_is_told_by_the_next_ping_to_a_side_that_knows_of_it() {
    for knows in [true, false] {
        let hello = hello_with(PROGRESS, knows);
        let mut asks = session(Role::Asks);
        asks.tell(UNDERWAY);
        asks.message(hello.clone(), at(0)).unwrap();
        let mut sent: Vec<Message> = std::iter::from_fn(|| asks.outgoing()).collect();
        let told = Message::Ping {
            id: 1,
            underway: knows.then_some(UNDERWAY),
        };
        assert_eq!(sent.pop(), Some(told.clone()));
        asks.message(Message::Pong { id: 1, clock: None }, at(0))
            .unwrap();
        asks.tick(at(1), None).unwrap();
        let next = last_of(&mut asks);
        assert_eq!(next, Some(ping(2)), "it is told once");

        // Whatever this side says it knows, the other one may say it all the same.
        let mut answers = session(Role::Answers);
        answers.message(hello, at(0)).unwrap();
        let heard = answers.message(told, at(0)).unwrap();
        assert_eq!(heard, knows.then_some(Event::Underway(UNDERWAY)));
    }
}

#[test]
fn what_there_is_to_tell_is_not_kept_for_a_whole_beat_and_no_more_often_than_at_first() {
    let mut asks = session(Role::Asks);
    asks.message(hello(1), at(0)).unwrap();
    for id in 1..=BURST + 1 {
        asks.tick(at(id), None).unwrap();
        asks.message(Message::Pong { id, clock: None }, at(id))
            .unwrap();
    }
    let last = Duration::from_secs(BURST + 1);
    assert_eq!(asks.wake(), last + BEAT);
    for _ in 0..3 {
        asks.tell(UNDERWAY);
        assert_eq!(asks.wake(), last + BEAT / BRISK);
    }
    asks.tick(at(BURST + 2), None).unwrap();
    let told = Message::Ping {
        id: BURST + 2,
        underway: Some(UNDERWAY),
    };
    assert_eq!(last_of(&mut asks), Some(told));
    assert_eq!(asks.next_ping, Duration::from_secs(BURST + 2) + BEAT);
}

/// Epochs that no source is ever in: before the first, and past all that it could have counted to.
fn no_epochs() -> [Epoch; 3] {
    [0, (1 << 32) + 1, u64::MAX].map(|number| serde_json::from_value(number.into()).unwrap())
}

#[test]
fn what_is_told_of_an_epoch_that_no_source_is_in_is_refused() {
    for epoch in no_epochs() {
        let mut session = session(Role::Answers);
        session.message(hello(1), at(0)).unwrap();
        let told = Message::Ping {
            id: 1,
            underway: Some(Underway { epoch, ..UNDERWAY }),
        };
        let refused = session.message(told, at(0)).unwrap_err();
        assert_eq!(refused, SessionError::NoEpoch { epoch });
    }
}

#[test]
fn a_request_of_an_epoch_that_no_source_is_in_is_refused() {
    for epoch in no_epochs() {
        let mut session = session(Role::Answers);
        session.message(hello(1), at(0)).unwrap();
        let request = Message::Request {
            id: 1,
            within_ms: 1,
            request: Request {
                epoch,
                ..request(7)
            },
        };
        assert_eq!(
            session.message(request, at(0)),
            Err(SessionError::NoEpoch { epoch })
        );
    }
}

#[test]
fn a_silent_peer_is_given_up_at_the_limit_and_not_before() {
    let mut session = session(Role::Asks);
    assert_eq!(session.wake(), SILENCE);
    session.message(hello(1), at(1)).unwrap();
    // The first ping is out, and is never answered.
    assert_eq!(session.wake(), SILENCE + Duration::from_secs(1));
    assert_eq!(session.tick(at(15), None), Ok(()));
    let after = SILENCE;
    assert_eq!(
        session.tick(at(16), None),
        Err(SessionError::Silent { after })
    );
}

#[test]
fn a_peer_that_speaks_but_never_answers_a_ping_is_given_up_too() {
    let mut session = session(Role::Asks);
    session.message(hello(1), at(0)).unwrap();
    for beat in 1..15 {
        session.message(ping(beat), at(beat)).unwrap();
        assert_eq!(session.tick(at(beat), None), Ok(()));
    }
    session.message(ping(15), at(15)).unwrap();
    assert!(session.tick(at(15), None).is_err());
}

#[test]
fn a_frame_that_never_ends_is_told_from_silence() {
    let mut session = session(Role::Answers);
    let ended = session.tick(at(15), Some((5, 100)));
    let after = SILENCE;
    assert_eq!(
        ended,
        Err(SessionError::Unfinished {
            have: 5,
            of: 100,
            after
        })
    );
}

#[test]
fn two_peers_beat_for_ever_and_know_each_others_clock() {
    let mut here = session(Role::Asks);
    let mut there = session(Role::Answers);
    for tick in 0..600_u64 {
        let elapsed = Duration::from_millis(100 * tick);
        let now = Now { elapsed, wall: 0 };
        // Their clock is seven seconds ahead, and a message takes no time.
        let later = Now {
            wall: 7_000_000_000,
            ..now
        };
        here.tick(now, None).unwrap();
        there.tick(later, None).unwrap();
        loop {
            let to_there = here.outgoing();
            let to_here = there.outgoing();
            if to_there.is_none() && to_here.is_none() {
                break;
            }
            if let Some(message) = to_there {
                there.message(message, later).unwrap();
            }
            if let Some(message) = to_here {
                here.message(message, now).unwrap();
            }
        }
    }
    assert_eq!(here.clock().unwrap().nanos, 7_000_000_000);
    assert_eq!(there.clock().unwrap().nanos, -7_000_000_000);
    // One at once and eight every 0.4 s (a sixteenth of five seconds, at ticks of 0.1 s), until 3.2 s; then
    // one every five seconds.
    assert_eq!(here.pings, 1 + BURST + 11);
}

#[test]
fn silence_shorter_than_two_beats_is_lengthened() {
    let hasty = Terms {
        silence: Duration::ZERO,
        ..terms(1)
    };
    assert_eq!(Session::new(Role::Asks, hasty, at(0)).wake(), 2 * BEAT);
    let endless = Terms {
        silence: Duration::MAX,
        beat: Duration::MAX,
        ..terms(1)
    };
    assert_eq!(
        Session::new(Role::Asks, endless, at(9)).wake(),
        Duration::MAX
    );
}
