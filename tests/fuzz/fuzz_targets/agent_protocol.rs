//! The agent's protocol machine under every order of acts: no line is an answer that was here, even in part, before its
//! command was sent, none before the newest nonce has come back, and silence is never answered.
//!
//! Each act is a byte, its operand the next ones; bytes for the stream are prefixed with their number.
#![no_main]

use agent_qga::protocol::{Phase, Proof, Protocol, Signal, Step};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut run = Run::default();
    let mut rest = input;
    while let Some((&act, after)) = rest.split_first() {
        rest = run.act(act, after);
    }
});

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
            protocol: Protocol::new(256, 8),
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
