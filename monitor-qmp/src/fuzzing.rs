//! What must hold for any bytes and any order of acts, as functions that panic if it does not.
//!
//! The fuzz targets in `tests/fuzz` call these, and so do the tests below. Only they see this
//! module: it is no part of the crate otherwise.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use crate::{
    error::Closed,
    frame::{Decoder, FrameError, Limits},
    message::{self, Id, Message},
    protocol::{Addressee, Departure, Order, Protocol, WINDOW},
    qmp::Lane,
};

/// Small, so that a fuzzer reaches them.
const LIMITS: Limits = Limits {
    size: 256,
    depth: 16,
};

/// What the parser may hold under these limits: room for a read beside the longest message.
const MOST_ROOM: usize = 32 * 1024;

/// The parser: the objects are the same however the stream is cut, they are all of the stream
/// that was read, and none is beyond the limits.
///
/// The first byte says how often the stream is cut, the next ones where. Gives the number of
/// objects, so that whoever makes the bytes knows how far they got.
///
/// # Panics
///
/// When that does not hold.
#[expect(clippy::must_use_candidate, reason = "a fuzzer runs it for its panics")]
pub fn frame(input: &[u8]) -> usize {
    let Some((&count, rest)) = input.split_first() else {
        return 0;
    };
    let (cuts, stream) = rest.split_at(rest.len().min(usize::from(count % 8)));
    let (whole, end) = objects(&[], stream);
    let (pieces, end_in_pieces) = objects(cuts, stream);
    assert_eq!(whole, pieces, "cut at {cuts:?}");
    assert_eq!(end.is_err(), end_in_pieces.is_err(), "cut at {cuts:?}");

    let mut left = stream;
    for object in &whole {
        assert!(object.len() <= LIMITS.size);
        left = left
            .trim_ascii_start()
            .strip_prefix(object.as_slice())
            .expect("they follow one another");
        // Whatever it is: it is told apart without a panic.
        let _ = Message::parse(object);
    }
    if let Ok(unfinished) = end {
        assert!(
            unfinished <= LIMITS.size,
            "more is kept than one message may have"
        );
    }
    whole.len()
}

/// The whole objects of a stream, and how much is kept of one that is not, or why it ended.
fn objects(cuts: &[u8], stream: &[u8]) -> (Vec<Vec<u8>>, Result<usize, FrameError>) {
    let mut decoder = Decoder::new(LIMITS);
    let mut found = Vec::new();
    let mut rest = stream;
    for cut in cuts.iter().map(|cut| usize::from(*cut)).chain([usize::MAX]) {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        rest = after;
        decoder.space().extend_from_slice(piece);
        loop {
            match decoder.next() {
                Ok(Some(object)) => found.push(object.to_vec()),
                Ok(None) => break,
                Err(error) => return (found, Err(error)),
            }
        }
    }
    let unfinished = decoder.unfinished().len();
    let room = decoder.space().capacity();
    assert!(room <= MOST_ROOM, "{room} bytes for {unfinished}");
    (found, Ok(unfinished))
}

/// The protocol machine under every order of acts, and QEMU's bytes straight into it: a caller
/// gets one end at most, and only by its own id or by an error that names none.
///
/// Each act is a byte; bytes from QEMU are prefixed with their number.
///
/// # Panics
///
/// When that does not hold.
#[expect(clippy::must_use_candidate, reason = "a fuzzer runs it for its panics")]
pub fn protocol(input: &[u8]) -> Heard {
    let mut run = Run::new();
    let mut rest = input;
    while let Some((&act, after)) = rest.split_first() {
        rest = run.act(act, after);
    }
    run.close()
}

/// How far the bytes of a run got.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heard {
    /// Byte strings that QEMU said while the connection stood.
    pub strings: u64,
    /// Callers that got an answer or an error of QEMU.
    pub answered: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Is {
    Queued,
    Sent,
    Over,
}

struct Run {
    protocol: Protocol<u32>,
    decoder: Decoder,
    broken: bool,
    heard: Heard,
    submitted: u32,
    /// By id: who waits, and where the command is.
    calls: BTreeMap<u64, (u32, Is)>,
    /// Those that wait to be sent out of band.
    urgent: BTreeSet<u64>,
    /// The last that was sent without an id.
    unnamed: Option<u64>,
}

impl Run {
    fn new() -> Self {
        let mut protocol = Protocol::new(1 << 40);
        protocol.negotiated(true);
        Self {
            protocol,
            decoder: Decoder::new(LIMITS),
            broken: false,
            heard: Heard::default(),
            submitted: 0,
            calls: BTreeMap::new(),
            urgent: BTreeSet::new(),
            unnamed: None,
        }
    }

    fn act<'a>(&mut self, act: u8, rest: &'a [u8]) -> &'a [u8] {
        let operand = usize::from(act / 8);
        match act % 8 {
            0 | 1 => self.submit(act % 8 == 1),
            2 => self.send(),
            3 => self.depart(operand),
            4 => {
                if let Some(probe) = self.protocol.running_probe() {
                    self.protocol.probe_ended(probe);
                }
            }
            5 => {
                let id = self.calls.keys().nth_back(operand).copied().unwrap_or(7);
                if self.unnamed == Some(id) {
                    self.receive(b"{\"return\":{}}\n");
                } else {
                    self.receive(format!("{{\"return\":{{}},\"id\":{id}}}\n").as_bytes());
                }
            }
            6 => self.receive(b"{\"error\":{\"class\":\"GenericError\",\"desc\":\"\"}}\n"),
            _ => {
                let (count, after) = rest
                    .split_first()
                    .map_or((0, rest), |(count, after)| (usize::from(*count), after));
                let (bytes, after) = after.split_at(count.min(after.len()));
                self.receive(bytes);
                return after;
            }
        }
        let health = self.protocol.health();
        assert!(self.protocol.orphans() <= 2 * WINDOW + 1, "{health:?}");
        rest
    }

    fn submit(&mut self, oob: bool) {
        let lane = if oob { Lane::OutOfBand } else { Lane::InBand };
        let line = message::begin("stop", lane, None::<&()>).expect("a plain name becomes JSON");
        let order = Order {
            name: Cow::Borrowed("stop"),
            line,
            fds: Vec::new(),
            lane,
            waiter: self.submitted,
        };
        let id = self.protocol.submit(order).expect("it is open");
        let before = self.calls.insert(id, (self.submitted, Is::Queued));
        assert!(before.is_none(), "the id {id} was used twice");
        if oob {
            self.urgent.insert(id);
        }
        self.submitted += 1;
    }

    fn send(&mut self) {
        let mut out = Vec::new();
        if self.protocol.next_message(&mut out, true).is_none() {
            return;
        }
        let sent: serde_json::Value = serde_json::from_slice(&out).expect("a request is JSON");
        let id = match sent.get("id") {
            Some(id) => id.as_u64().expect("an id is a number"),
            // One that the protocol asks on its own.
            None if sent["execute"] != "stop" => return,
            None => {
                let mut calls = self.calls.iter();
                let first =
                    calls.find(|(id, (_, is))| *is == Is::Queued && !self.urgent.contains(id));
                let (&id, _) = first.expect("only what was submitted is sent");
                self.unnamed = Some(id);
                id
            }
        };
        if let Some((_, is)) = self.calls.get_mut(&id) {
            assert_eq!(
                *is,
                Is::Queued,
                "{id} was sent twice or after its caller left"
            );
            *is = Is::Sent;
        }
    }

    fn depart(&mut self, which: usize) {
        let Some((&id, (waiter, is))) = self.calls.iter_mut().nth_back(which) else {
            return;
        };
        let expected = match is {
            Is::Queued => Departure::Withdrawn(*waiter),
            Is::Sent => Departure::Orphaned(*waiter),
            Is::Over => Departure::Ended,
        };
        *is = Is::Over;
        assert_eq!(self.protocol.depart(id, which.is_multiple_of(2)), expected);
    }

    fn receive(&mut self, bytes: &[u8]) {
        if self.broken {
            return;
        }
        self.heard.strings += 1;
        self.decoder.space().extend_from_slice(bytes);
        loop {
            let (id, refused) = match self.decoder.next().map(|text| text.map(Message::parse)) {
                Ok(None) => return,
                Ok(Some(Ok(Message::Return { id, .. }))) => (id, false),
                Ok(Some(Ok(Message::Error { id, .. }))) => (id, true),
                Ok(Some(Ok(_))) => continue,
                Ok(Some(Err(_))) | Err(_) => {
                    self.broken = true;
                    return;
                }
            };
            self.protocol.heard();
            let reached = match self.protocol.reply(id, refused) {
                Addressee::One(one) => vec![one],
                Addressee::All(all) => all,
                Addressee::Nobody => Vec::new(),
            };
            for waiter in reached {
                let call = self.calls.iter_mut().find(|(_, (of, _))| *of == waiter);
                let (own, (_, is)) = call.expect("whoever is reached has called");
                assert_eq!(*is, Is::Sent, "{waiter} was answered out of turn");
                let fits = match id {
                    Id::Number(id) => id == *own && self.unnamed != Some(id),
                    Id::Missing => refused || self.unnamed == Some(*own),
                    Id::Foreign => false,
                };
                assert!(fits, "{waiter} was answered by {id:?}");
                *is = Is::Over;
                self.heard.answered += 1;
            }
        }
    }

    /// Whoever still waits learns of the end, and whether QEMU may have the command.
    fn close(mut self) -> Heard {
        let mut left = self.protocol.close(Closed::EndOfStream);
        left.sort_unstable();
        let calls = self.calls.into_values().filter(|(_, is)| *is != Is::Over);
        let expected: Vec<_> = calls.map(|(waiter, is)| (waiter, is == Is::Sent)).collect();
        assert_eq!(left, expected);
        self.heard
    }
}

#[cfg(test)]
mod tests;
