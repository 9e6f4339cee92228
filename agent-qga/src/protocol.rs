//! The conversation with an agent: when it is in sync, and which line answers what.
//!
//! Pure: no stream, clock, task or randomness. Bytes and nonces are handed in, [`Step`]s come out,
//! so a test, a fuzzer or another event loop can drive it.
//!
//! ```text
//!            sync(nonce)            the nonce            sent()
//!    Lost ───────────────► Syncing ───────────► Ready ───────────► Busy
//!     ▲                       │                   │ ▲    one line   │
//!     │      lose_sync()      │     unasked bytes │ └───────────────┤
//!     └───────────────────────┴───────────────────┴─────────────────┘
//! ```
//!
//! An agent answers in order and its answers carry nothing that tells them apart. So a line counts
//! as an answer only in `Busy`, and `Busy` is entered only through an unguessable nonce that came
//! back after everything older. Invariants, held by the tests below whatever bytes come:
//!
//! 1. No line is an answer that was, even in part, here before its command was sent.
//! 2. Between a lost sync and the return of the newest nonce no line is an answer.
//! 3. Memory is bounded by the largest message allowed.

use std::fmt;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::frame::{Frame, Framer, RESTART, deeper_than};

/// The agent's name for a command it does not have, will not do, or will not do while frozen.
pub const COMMAND_NOT_FOUND: &str = "CommandNotFound";

/// What the owner of the monitor saw, handed in because the agent's stream does not tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Signal {
    /// Somebody in the guest opened the port (`VSERPORT_CHANGE`): a new session.
    PortOpened,
    /// Nobody in the guest has the port open any more (`VSERPORT_CHANGE`).
    PortClosed,
    /// The machine was reset (`RESET`).
    Reset,
    /// The guest shut down (`SHUTDOWN`), or its QEMU is about to exit.
    Shutdown,
    /// The guest went to sleep (`SUSPEND`, `SUSPEND_DISK`).
    Suspended,
}

/// What ended a command whose success is silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Proof {
    /// The monitor saw the guest shut down. Also the end of a reboot under `-no-reboot`.
    Shutdown,
    /// The monitor saw the machine reset.
    Reset,
    /// The monitor saw the guest go to sleep.
    Suspended,
    /// The channel ended, as it does when QEMU exits.
    Closed,
    /// The agent said so itself, although its schema says that it never does.
    Answered,
}

/// An error as the agent sent it. Text of the guest, not made fit to be shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Refusal {
    /// Such as `GenericError` or `CommandNotFound`.
    pub class: String,
    /// For people.
    pub desc: String,
}

/// Why a line cannot be an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "the three limits of a line")]
pub enum Garbled {
    /// Neither a result nor an error in JSON.
    Malformed,
    /// Longer than allowed.
    TooLarge,
    /// Nested deeper than allowed.
    TooDeep,
}

/// What came of the bytes so far.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "a driver of the protocol must handle every step"
)]
pub enum Step {
    /// The nonce came back. Whether a command may go out now, [`Protocol::phase`] tells once all
    /// steps are taken: more bytes may stand behind the nonce.
    Synced,
    /// The agent has no delimited sync: go on with [`Protocol::sync_plain`].
    TryPlain,
    /// The answer to the command under way.
    Answer(Result<Box<RawValue>, Refusal>),
    /// The command under way got a line that is no answer. Sync is lost.
    Garbled(Garbled),
    /// A silent command has done what it does. Sync is lost.
    Proven(Proof),
    /// The session of the command under way is over, its answer will not come. Sync is lost.
    Interrupted(Signal),
}

/// How far the conversation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed: the four states of the diagram"
)]
pub enum Phase {
    /// Unknown bytes may be on their way: sync before the next command.
    Lost,
    /// A nonce was sent and has not come back.
    Syncing,
    /// Nothing is on its way: a command may go out.
    Ready,
    /// One command was sent and has no answer.
    Busy,
}

/// One conversation, from the first byte of a connection to its last.
#[derive(Debug)]
pub struct Protocol {
    frames: Framer,
    state: State,
    max_message: usize,
    max_depth: usize,
    /// Bytes since somebody last waited for some.
    unasked: usize,
    /// Lines that answered nothing.
    skipped: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Lost,
    Syncing { nonce: u64, plain: bool },
    Ready,
    Busy { silent: bool },
}

impl Protocol {
    /// A conversation that is not in sync yet, with the largest and deepest answer it accepts.
    #[must_use]
    pub const fn new(max_message: usize, max_depth: usize) -> Self {
        Self {
            frames: Framer::new(max_message),
            state: State::Lost,
            max_message,
            max_depth,
            unasked: 0,
            skipped: 0,
        }
    }

    /// How far the conversation is.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        match self.state {
            State::Lost => Phase::Lost,
            State::Syncing { .. } => Phase::Syncing,
            State::Ready => Phase::Ready,
            State::Busy { .. } => Phase::Busy,
        }
    }

    /// Lines that answered nothing and were dropped.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Whether more bytes are worth reading now.
    ///
    /// Not once a message's worth came that nobody asked for: then let the guest's own buffers
    /// fill, until somebody asks again.
    #[must_use]
    pub const fn wants_bytes(&self) -> bool {
        self.is_asking() || self.unasked <= self.max_message
    }

    /// Begins a delimited sync, to be written whole before anything else. `nonce` must not have
    /// been used before; its lower 63 bits count, for the agent's integers are signed.
    pub fn sync(&mut self, nonce: u64) -> Vec<u8> {
        self.begin_sync(nonce, false)
    }

    /// As [`sync`](Self::sync), for an agent that has `guest-sync` only.
    pub fn sync_plain(&mut self, nonce: u64) -> Vec<u8> {
        self.begin_sync(nonce, true)
    }

    /// Says that the first byte of a command goes out, and whether its success is silence.
    ///
    /// # Panics
    ///
    /// If the phase is not [`Phase::Ready`]: the answer could not be told from another.
    pub fn sent(&mut self, silent: bool) {
        assert!(
            matches!(self.state, State::Ready),
            "a command may go out only when the conversation is in sync, it is {:?}",
            self.state
        );
        self.unasked = 0;
        self.state = State::Busy { silent };
    }

    /// Gives up on whatever is under way: an answer that still comes will be nobody's.
    pub const fn lose_sync(&mut self) {
        self.state = State::Lost;
    }

    /// Takes in what the monitor saw.
    pub fn note(&mut self, signal: Signal) -> Option<Step> {
        let (silent, busy) = match self.state {
            State::Busy { silent } => (silent, true),
            _ => (false, false),
        };
        let proof = match signal {
            Signal::Shutdown => Some(Proof::Shutdown),
            Signal::Reset => Some(Proof::Reset),
            Signal::Suspended => Some(Proof::Suspended),
            Signal::PortOpened | Signal::PortClosed => None,
        };
        match proof {
            Some(proof) if silent => {
                self.state = State::Lost;
                Some(Step::Proven(proof))
            }
            // An agent goes to rest before its guest does; the proof is still to come.
            None if silent => None,
            // A sleeper keeps its memory, and with it the conversation.
            _ if signal == Signal::Suspended => None,
            _ => {
                self.state = State::Lost;
                busy.then_some(Step::Interrupted(signal))
            }
        }
    }

    /// Takes in bytes. Call [`step`](Self::step) until it has no more before the next bytes.
    pub fn receive(&mut self, bytes: &[u8]) {
        if !self.is_asking() {
            self.unasked = self.unasked.saturating_add(bytes.len());
        }
        self.frames.push(bytes);
    }

    /// What came of the bytes taken in, one step at a time.
    pub fn step(&mut self) -> Option<Step> {
        while let Some(frame) = self.frames.next() {
            let line = Line::read(frame, self.max_depth);
            match (self.state, line) {
                (_, Line::Blank) => {}
                (State::Syncing { nonce, .. }, Line::Return(value)) if is_nonce(value, nonce) => {
                    self.state = State::Ready;
                    return Some(Step::Synced);
                }
                // It may be a late answer to something older. Asking the other way is right even
                // then, since from here on only the newest nonce counts.
                (State::Syncing { plain: false, .. }, Line::Error(refusal))
                    if refusal.class == COMMAND_NOT_FOUND =>
                {
                    return Some(Step::TryPlain);
                }
                (State::Busy { silent }, Line::Return(value)) => {
                    self.state = State::Ready;
                    return Some(if silent {
                        self.state = State::Lost;
                        Step::Proven(Proof::Answered)
                    } else {
                        Step::Answer(Ok(value.to_owned()))
                    });
                }
                (State::Busy { .. }, Line::Error(refusal)) => {
                    self.state = State::Ready;
                    return Some(Step::Answer(Err(refusal)));
                }
                (State::Busy { .. }, Line::Garbled(garbled)) => {
                    self.state = State::Lost;
                    return Some(Step::Garbled(garbled));
                }
                // Nobody asked, so more of the kind may follow.
                (State::Ready | State::Lost, _) => {
                    self.state = State::Lost;
                    self.skipped += 1;
                }
                // The error about the stray 0xFF, and answers to what others asked before.
                (State::Syncing { .. }, _) => self.skipped += 1,
            }
        }
        if matches!(self.state, State::Ready) && self.frames.has_partial() {
            self.state = State::Lost;
        }
        None
    }

    /// Whether somebody waits for bytes.
    const fn is_asking(&self) -> bool {
        matches!(self.state, State::Syncing { .. } | State::Busy { .. })
    }

    fn begin_sync(&mut self, nonce: u64, plain: bool) -> Vec<u8> {
        let nonce = nonce & i64::MAX.unsigned_abs();
        let name = if plain {
            "guest-sync"
        } else {
            "guest-sync-delimited"
        };
        self.unasked = 0;
        self.state = State::Syncing { nonce, plain };
        // The 0xFF ends half a request that an earlier client, or an earlier call, left behind.
        let mut bytes = vec![RESTART];
        bytes.extend_from_slice(
            format!("{{\"execute\":\"{name}\",\"arguments\":{{\"id\":{nonce}}}}}\n").as_bytes(),
        );
        bytes
    }
}

impl Proof {
    /// As a typed command reads it.
    pub(crate) const fn as_json(self) -> &'static str {
        match self {
            Self::Shutdown => "\"shutdown\"",
            Self::Reset => "\"reset\"",
            Self::Suspended => "\"suspended\"",
            Self::Closed => "\"closed\"",
            Self::Answered => "\"answered\"",
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PortOpened => "the agent started anew",
            Self::PortClosed => "the agent closed its port",
            Self::Reset => "the guest was reset",
            Self::Shutdown => "the guest shut down",
            Self::Suspended => "the guest went to sleep",
        })
    }
}

impl fmt::Display for Garbled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "the answer is not one of an agent",
            Self::TooLarge => "the answer is longer than allowed",
            Self::TooDeep => "the answer is nested deeper than allowed",
        })
    }
}

/// A line as far as the conversation cares.
enum Line<'a> {
    Blank,
    Return(&'a RawValue),
    Error(Refusal),
    Garbled(Garbled),
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default, rename = "return", deserialize_with = "present")]
    value: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

impl<'a> Line<'a> {
    fn read(frame: Frame<'a>, max_depth: usize) -> Self {
        let line = match frame {
            Frame::TooLarge => return Self::Garbled(Garbled::TooLarge),
            Frame::Line(line) if line.trim_ascii().is_empty() => return Self::Blank,
            Frame::Line(line) => line,
        };
        if deeper_than(line, max_depth) {
            return Self::Garbled(Garbled::TooDeep);
        }
        match object(line) {
            Some(Envelope {
                value: Some(value),
                error: None,
            }) => Self::Return(value),
            Some(Envelope {
                value: None,
                error: Some(error),
            }) => object(error.get().as_bytes())
                .map_or(Self::Garbled(Garbled::Malformed), Self::Error),
            _ => Self::Garbled(Garbled::Malformed),
        }
    }
}

/// Reads an object. What serde derives would take an array of its members as well.
fn object<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Option<T> {
    let is_object = text.trim_ascii_start().starts_with(b"{");
    is_object
        .then(|| serde_json::from_slice(text).ok())
        .flatten()
}

/// Keeps `null` apart from "not there".
fn present<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

fn is_nonce(value: &RawValue, nonce: u64) -> bool {
    value.get().parse() == Ok(nonce)
}

#[cfg(test)]
mod tests;
