//! What must hold for any bytes of a peer, as functions that panic if it does not.
//!
//! The fuzz targets in `tests/fuzz` call these, and so do the tests below. Only they see this module: it is no part of
//! the crate otherwise.

use std::time::Duration;

use bytes::BytesMut;
use uuid::Uuid;

use crate::{
    message::{Answer, Call, Reply, Request, Underway},
    phase::{Epoch, MigrationId, RunState, Side},
    wire::{
        frame::{Decoder, FIRST_LIMIT, HEAD, LIMIT, TooLong, encode},
        message::{Hello, Message, RUN},
        session::{Event, Now, Role, Session, Terms},
    },
};

/// The decoder: the frames are those of a plain reading of the whole stream however it is cut, the refusal comes at the
/// length that is too long, and room is made for no more than has come.
///
/// The first byte says how often the stream is cut, the next ones where; the rest is the stream. Gives the number of
/// frames, so that whoever makes the bytes knows how far they got.
///
/// # Panics
///
/// When that does not hold.
#[expect(clippy::must_use_candidate, reason = "a fuzzer runs it for its panics")]
pub fn frames(input: &[u8]) -> usize {
    let Some((&count, rest)) = input.split_first() else {
        return 0;
    };
    let (cuts, stream) = rest.split_at(rest.len().min(usize::from(count % 8)));
    let (expected, end) = read_plainly(stream);

    let mut decoder = Decoder::new();
    let mut found = Vec::new();
    let mut refused = None;
    let mut rest = stream;
    for cut in cuts.iter().map(|cut| usize::from(*cut)).chain([usize::MAX]) {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        rest = after;
        decoder.space().extend_from_slice(piece);
        while refused.is_none() {
            match decoder.next_frame() {
                Ok(Some(frame)) => found.push(frame),
                Ok(None) => break,
                Err(error) => refused = Some(error),
            }
        }
        // A length that was only announced has cost nothing.
        let room = decoder.space().capacity();
        assert!(room <= 2 * stream.len() + 64, "{room} bytes of room");
    }
    assert_eq!(found, expected, "cut at {cuts:?}");
    assert_eq!(refused, end.err(), "cut at {cuts:?}");
    if let Ok(left) = end {
        assert_eq!(decoder.unfinished().map_or(0, |(have, _)| have), left);
    }
    for frame in &found {
        // Whatever it is: it is told apart without a panic.
        let _ = serde_json::from_slice::<Message>(frame);
    }
    found.len()
}

/// The frames of a stream that is all there, and how many bytes are left of one that is not whole, or why it ended.
fn read_plainly(mut stream: &[u8]) -> (Vec<&[u8]>, Result<usize, TooLong>) {
    let mut frames = Vec::new();
    while let Some((head, rest)) = stream.split_first_chunk::<HEAD>() {
        let limit = if frames.is_empty() {
            FIRST_LIMIT
        } else {
            LIMIT
        };
        let length = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
        if length > limit {
            return (frames, Err(TooLong { length, limit }));
        }
        let Some((frame, after)) = rest.split_at_checked(length) else {
            break;
        };
        frames.push(frame);
        stream = after;
    }
    (frames, Ok(stream.len()))
}

/// The session under every order of acts, and a peer's bytes straight into it: requests are handed up one at a time and in
/// order, answers only to what was asked and by its own ids, and whatever comes is answered by one message at most.
///
/// The first byte says which end it is; then each act is a byte, and bytes of the peer are prefixed with their number.
///
/// # Panics
///
/// When that does not hold.
#[expect(clippy::must_use_candidate, reason = "a fuzzer runs it for its panics")]
pub fn session(input: &[u8]) -> Heard {
    let Some((&end, mut rest)) = input.split_first() else {
        return Heard::default();
    };
    let role = [Role::Asks, Role::Answers][usize::from(end % 2)];
    let mut run = Run::new(role);
    while let Some((&act, after)) = rest.split_first() {
        if run.over {
            break;
        }
        rest = run.act(act, after);
    }
    run.heard
}

/// How far the bytes of a run got.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heard {
    /// Byte strings that the peer said while the connection stood.
    pub strings: u64,
    /// Requests and answers that were handed up.
    pub handed_up: u64,
}

/// What is open: which request, and of what.
#[derive(Clone, Copy, Debug)]
struct Open {
    id: u64,
    migration: MigrationId,
    epoch: Epoch,
}

struct Run {
    role: Role,
    session: Session,
    decoder: Decoder,
    now: Now,
    over: bool,
    greeted: bool,
    requests: u64,
    open: Option<Open>,
    pings: u64,
    /// Pings of this side that went out.
    own_pings: u64,
    heard: Heard,
}

impl Run {
    fn new(role: Role) -> Self {
        let now = Now::default();
        let terms = Terms {
            hello: Hello::ours(),
            beat: Duration::from_secs(5),
            silence: Duration::from_secs(15),
        };
        let mut run = Self {
            role,
            session: Session::new(role, terms, now),
            decoder: Decoder::new(),
            now,
            over: false,
            greeted: false,
            requests: 0,
            open: None,
            pings: 0,
            own_pings: 0,
            heard: Heard::default(),
        };
        assert_eq!(run.send(), 1, "a hello");
        run
    }

    fn act<'a>(&mut self, act: u8, rest: &'a [u8]) -> &'a [u8] {
        let operand = u64::from(act / 8);
        match act % 8 {
            0 => self.ask(operand),
            1 => self.answer(),
            2 => {
                self.now.elapsed += Duration::from_secs(operand);
                let unfinished = self.decoder.unfinished();
                self.over = self.session.tick(self.now, unfinished).is_err();
                assert!(self.send() <= 1);
            }
            3 => self.session.tell(Underway {
                migration: MigrationId::from_uuid(Uuid::nil()),
                epoch: Epoch::FIRST,
                transfer: Default::default(),
                estimate: Default::default(),
            }),
            4 => self.hears(&greeting(operand)),
            5 => self.hears(&self.fitting(operand)),
            6 => self.hears(&Message::Pong {
                id: self.own_pings,
                clock: Some(0),
            }),
            _ => {
                let (count, after) = rest
                    .split_first()
                    .map_or((0, rest), |(count, after)| (usize::from(*count), after));
                let (bytes, after) = after.split_at(count.min(after.len()));
                if operand.is_multiple_of(2) {
                    self.hears_text(bytes);
                } else {
                    self.hears_bytes(bytes);
                }
                return after;
            }
        }
        rest
    }

    /// This side asks; it may only if it dialled, is greeted, and has nothing open.
    fn ask(&mut self, operand: u64) {
        let is_paused = operand.is_multiple_of(5);
        let request = Request {
            migration: MigrationId::from_uuid(Uuid::from_u128(operand.into())),
            epoch: Epoch::FIRST,
            domain: Uuid::nil(),
            call: Call::Finish,
            run: is_paused.then_some(RunState::Paused),
            downtime: None,
        };
        let open = Open {
            id: self.requests + 1,
            migration: request.migration,
            epoch: request.epoch,
        };
        let agreed = self.session.agreed();
        let is_heeded = agreed.is_some_and(|agreed| agreed.features.contains(RUN));
        let may = self.role == Role::Asks
            && self.greeted
            && self.open.is_none()
            && (is_heeded || !is_paused);
        let asked = self.session.ask(request, Duration::from_secs(1));
        assert_eq!(asked.is_ok(), may, "{asked:?}");
        if may {
            (self.requests, self.open) = (open.id, Some(open));
        }
        assert_eq!(self.send(), usize::from(may));
    }

    /// This side answers; it may only if it was asked.
    fn answer(&mut self) {
        let may = self.role == Role::Answers && self.open.is_some();
        let open = self.open.unwrap_or(Open {
            id: 0,
            migration: MigrationId::from_uuid(Uuid::nil()),
            epoch: Epoch::FIRST,
        });
        let answered = self.session.answer(reply(&open));
        assert_eq!(answered.is_ok(), may, "{answered:?}");
        if may {
            self.open = None;
        }
        assert_eq!(self.send(), usize::from(may));
    }

    /// What a peer that behaves says next.
    fn fitting(&self, operand: u64) -> Message {
        match (self.role, self.open) {
            (Role::Asks, Some(open)) if operand.is_multiple_of(2) => Message::Answer {
                id: open.id,
                answer: reply(&open),
            },
            (Role::Answers, None) if operand.is_multiple_of(2) => Message::Request {
                id: self.requests + 1,
                within_ms: operand,
                request: Request {
                    migration: MigrationId::from_uuid(Uuid::from_u128(operand.into())),
                    epoch: Epoch::FIRST,
                    domain: Uuid::nil(),
                    call: Call::Status(Side::Destination),
                    run: None,
                    downtime: None,
                },
            },
            _ => Message::Ping {
                id: self.pings + 1,
                underway: None,
            },
        }
    }

    fn hears(&mut self, message: &Message) {
        let text = serde_json::to_vec(message).expect("a message is JSON");
        self.hears_text(&text);
    }

    fn hears_text(&mut self, text: &[u8]) {
        let mut framed = BytesMut::new();
        encode(text, &mut framed).expect("it is short");
        self.hears_bytes(&framed);
    }

    fn hears_bytes(&mut self, bytes: &[u8]) {
        self.heard.strings += 1;
        self.decoder.space().extend_from_slice(bytes);
        while !self.over {
            let frame = match self.decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return,
                Err(_) => {
                    self.over = true;
                    return;
                }
            };
            match serde_json::from_slice(&frame) {
                Ok(message) => self.takes(message),
                Err(_) => self.over = true,
            }
        }
    }

    fn takes(&mut self, message: Message) {
        let said = message.clone();
        match self.session.message(message, self.now) {
            Err(error) => {
                let last = error.fault();
                assert_eq!(last.is_none(), matches!(said, Message::Fault(_)), "{error}");
                self.over = true;
                return;
            }
            Ok(Some(Event::Open)) => {
                assert!(!self.greeted, "greeted twice");
                self.greeted = true;
            }
            Ok(Some(Event::Request { request, .. })) => {
                assert!(self.greeted && self.role == Role::Answers);
                assert!(self.open.is_none(), "two at a time");
                self.requests += 1;
                let is_next = matches!(said, Message::Request { id, .. } if id == self.requests);
                assert!(is_next, "{said:?}");
                assert!(request.epoch >= Epoch::FIRST);
                self.open = Some(Open {
                    id: self.requests,
                    migration: request.migration,
                    epoch: request.epoch,
                });
                self.heard.handed_up += 1;
            }
            Ok(Some(Event::Answer(answer))) => {
                let open = self.open.take().expect("somebody asked");
                assert_eq!(
                    (answer.migration, answer.epoch),
                    (open.migration, open.epoch)
                );
                let is_its_own = matches!(said, Message::Answer { id, .. } if id == open.id);
                assert!(is_its_own, "{said:?}");
                self.heard.handed_up += 1;
            }
            Ok(Some(Event::Underway(_))) => assert_eq!(self.role, Role::Answers),
            Ok(Some(Event::Beat) | None) => {}
        }
        if matches!(said, Message::Ping { .. }) {
            self.pings += 1;
        }
        assert!(self.send() <= 1, "{said:?} was answered twice");
    }

    /// How many messages go out; each fits into a frame and is read there as what it is.
    fn send(&mut self) -> usize {
        let mut count = 0;
        while let Some(message) = self.session.outgoing() {
            let text = serde_json::to_vec(&message).expect("a message is JSON");
            let read: Message = serde_json::from_slice(&text).expect("and is read as one");
            assert_eq!(read, message);
            if let Message::Ping { id, .. } = message {
                self.own_pings = id;
            }
            assert!(text.len() <= LIMIT);
            count += 1;
        }
        count
    }
}

fn reply(open: &Open) -> Answer {
    Answer {
        migration: open.migration,
        epoch: open.epoch,
        reply: Reply::Unknown,
        trouble: None,
        resumed: None,
    }
}

/// Of this version, of one beside it, or of one without features.
fn greeting(operand: u64) -> Message {
    let ours = Hello::ours();
    Message::Hello(match operand % 3 {
        0 => ours,
        1 => Hello { version: 2, ..ours },
        _ => Hello {
            features: Default::default(),
            ..ours
        },
    })
}

#[cfg(test)]
mod tests;
