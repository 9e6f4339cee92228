//! What must hold for any bytes and any order of acts, as functions that panic if it does not.
//!
//! The fuzz targets in `tests/fuzz` call these, and so do the tests below. Only they see this module: it is no part of
//! the crate otherwise.

use crate::protocol::{Phase, Proof, Protocol, Signal, Step};

/// Small, so that a fuzzer reaches it.
const MAX_MESSAGE: usize = 256;

/// The parser: an answer is the same wherever its stream was cut, is never older than its command, and no stream fills
/// the memory.
///
/// The first byte says how often the stream is cut, the next ones where; the rest is the stream. Gives the number of
/// steps it came to, so that whoever makes the bytes knows how far they got.
///
/// # Panics
///
/// When that does not hold.
#[expect(clippy::must_use_candidate, reason = "a fuzzer runs it for its panics")]
pub fn lines(input: &[u8]) -> usize {
    let Some((&cuts, rest)) = input.split_first() else {
        return 0;
    };
    let (cuts, stream) = rest.split_at(rest.len().min(usize::from(cuts % 8)));
    let whole = said(&[], stream);
    let pieces = said(cuts, stream);
    // A line that is too long is told as soon as that is known, also if a restart would have dropped it later: so only
    // what came before the first of them is the same.
    let same = [&whole, &pieces].map(|steps| {
        steps
            .iter()
            .position(|step| step.contains("TooLarge"))
            .unwrap_or(steps.len())
    });
    if whole.len() == same[0] && pieces.len() == same[1] {
        assert_eq!(whole, pieces, "cut at {cuts:?}");
    }
    let same = same[0].min(same[1]);
    assert_eq!(whole[..same], pieces[..same], "cut at {cuts:?}");
    whole.len()
}

/// What a conversation makes of a stream that begins with the right nonce, a command having been sent as soon as one
/// may be.
fn said(cuts: &[u8], stream: &[u8]) -> Vec<String> {
    let mut protocol = Protocol::new(MAX_MESSAGE, 8);
    protocol.sync(7);
    protocol.receive(b"\xFF{\"return\": 7}\n");
    assert!(matches!(protocol.step(), Some(Step::Synced)));
    assert!(protocol.step().is_none());
    protocol.sent(false);
    let mut said = Vec::new();
    let mut rest = stream;
    let cuts = cuts.iter().map(|&cut| usize::from(cut)).chain([usize::MAX]);
    for cut in cuts {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        rest = after;
        protocol.receive(piece);
        while let Some(step) = protocol.step() {
            if let Step::Answer(Ok(value)) = &step {
                let text = value.get().as_bytes();
                assert!(stream.windows(text.len()).any(|window| window == text));
                assert!(text.len() <= MAX_MESSAGE);
            }
            said.push(format!("{step:?}"));
        }
        assert_ne!(protocol.phase(), Phase::Syncing);
    }
    said
}

/// The protocol machine under every order of acts: no line is an answer that was here, even in part, before its command
/// was sent, none before the newest nonce has come back, and silence is never answered.
///
/// Each act is a byte, its operand the next ones; bytes for the stream are prefixed with their number.
///
/// # Panics
///
/// When that does not hold.
pub fn protocol(input: &[u8]) {
    let mut run = Run::default();
    let mut rest = input;
    while let Some((&act, after)) = rest.split_first() {
        rest = run.act(act, after);
    }
}

struct Run {
    protocol: Protocol,
    /// How many syncs there were; each has its number for a nonce.
    syncs: u64,
    /// All bytes since the conversation began, and where the newest command went out.
    stream: Vec<u8>,
    sent_at: usize,
    silent: bool,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            protocol: Protocol::new(MAX_MESSAGE, 8),
            syncs: 0,
            stream: Vec::new(),
            sent_at: 0,
            silent: false,
        }
    }
}

impl Run {
    fn act<'a>(&mut self, act: u8, rest: &'a [u8]) -> &'a [u8] {
        match act % 8 {
            0 => {
                self.syncs += 1;
                self.protocol.sync(self.syncs);
            }
            1 => {
                self.syncs += 1;
                self.protocol.sync_plain(self.syncs);
            }
            2 => self.protocol.lose_sync(),
            3 if self.protocol.phase() == Phase::Ready => {
                self.silent = act & 8 != 0;
                self.sent_at = self.stream.len();
                self.protocol.sent(self.silent);
            }
            3 => {}
            4 => {
                let signals = [
                    Signal::PortOpened,
                    Signal::PortClosed,
                    Signal::Reset,
                    Signal::Shutdown,
                    Signal::Suspended,
                ];
                let busy = self.protocol.phase() == Phase::Busy;
                let step = self
                    .protocol
                    .note(signals[usize::from(act / 8) % signals.len()]);
                assert!(step.is_none() || busy, "{step:?} without a command");
            }
            5 => {
                let nonce = self.syncs.saturating_sub(u64::from(act / 8) % 3);
                self.feed(format!("{{\"return\": {nonce}}}\n").as_bytes());
            }
            _ => {
                let (count, after) = rest
                    .split_first()
                    .map_or((0, rest), |(&count, after)| (usize::from(count), after));
                let (bytes, after) = after.split_at(count.min(after.len()));
                self.feed(bytes);
                return after;
            }
        }
        rest
    }

    /// Byte by byte, so that it is known in which line each step stood.
    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.stream.push(byte);
            self.protocol.receive(&[byte]);
            while let Some(step) = self.protocol.step() {
                self.check(&step);
            }
        }
    }

    fn check(&self, step: &Step) {
        let end = self.stream.len() - 1;
        let is_end = |byte: &u8| matches!(byte, b'\n' | 0xFF);
        let start = self.stream[..end]
            .iter()
            .rposition(is_end)
            .map_or(0, |at| at + 1);
        let line = &self.stream[start..end];
        let first = end - line.trim_ascii_start().len();
        match step {
            Step::Synced => {
                let text = String::from_utf8_lossy(line);
                let nonce: serde_json::Value =
                    serde_json::from_str(&text).expect("an answer is JSON");
                assert_eq!(nonce["return"], self.syncs, "an older nonce ended the sync");
            }
            Step::Answer(answer) => {
                assert!(!self.silent || answer.is_err(), "silence was answered");
                assert!(
                    first >= self.sent_at,
                    "the answer is older than its command"
                );
            }
            Step::Proven(proof) => {
                assert!(
                    self.silent && *proof == Proof::Answered,
                    "{proof:?} came out of bytes"
                );
                assert!(
                    first >= self.sent_at,
                    "the answer is older than its command"
                );
            }
            Step::Garbled(_) => assert!(end >= self.sent_at),
            Step::TryPlain => assert!(self.syncs > 0),
            Step::Interrupted(signal) => panic!("{signal:?} came out of bytes"),
        }
    }
}

#[cfg(test)]
mod tests;
