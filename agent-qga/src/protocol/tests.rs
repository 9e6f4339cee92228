//! The conversation against bytes of every kind.
//!
//! The oracle works on the stream itself: it knows at which byte a command was sent and in which
//! line an answer stood, and so can tell a wrong answer without knowing how the protocol decides.

use ::tests::hostile::{Campaign, Dice};
use proptest::prelude::*;

use super::*;
use crate::hostile::{PIECES, bytes};

const MAX: usize = 256;

fn answers(protocol: &mut Protocol, bytes: &[u8]) -> Vec<Step> {
    protocol.receive(bytes);
    std::iter::from_fn(|| protocol.step()).collect()
}

fn synced() -> Protocol {
    let mut protocol = Protocol::new(MAX, 8);
    protocol.sync(7);
    let steps = answers(&mut protocol, b"\xFF{\"return\": 7}\n");
    assert!(matches!(steps[..], [Step::Synced]), "{steps:?}");
    protocol
}

#[test]
fn a_sync_request_begins_with_a_restart_and_fits_the_agents_integers() {
    let request = Protocol::new(MAX, 8).sync(u64::MAX);
    let expected =
        b"\xFF{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":9223372036854775807}}\n";
    assert_eq!(request, expected);
}

#[test]
fn the_error_about_the_restart_and_older_answers_do_not_end_a_sync() {
    let mut protocol = Protocol::new(MAX, 8);
    protocol.sync(1);
    protocol.lose_sync();
    protocol.sync(2);
    let before = b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"stray\"}}\n\xFF{\"return\": 1}\n{\"return\": {}}\nhalf";
    assert!(answers(&mut protocol, before).is_empty());
    assert_eq!(protocol.phase(), Phase::Syncing);
    assert_eq!(protocol.skipped(), 3);
    let steps = answers(&mut protocol, b"\xFF{\"return\": 2}\n");
    assert!(matches!(steps[..], [Step::Synced]), "{steps:?}");
    assert_eq!(protocol.phase(), Phase::Ready);
}

#[test]
fn a_nonce_ends_a_sync_only_as_an_answer() {
    let mut protocol = Protocol::new(MAX, 8);
    protocol.sync(1);
    assert!(answers(&mut protocol, b"[1]\n1\n{\"error\": 1}\n").is_empty());
    assert_eq!(protocol.phase(), Phase::Syncing);
}

#[test]
fn the_plain_sync_takes_over_even_if_the_refusal_was_meant_for_something_else() {
    let mut protocol = Protocol::new(MAX, 8);
    protocol.sync(1);
    let refusal = b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"\"}}\n";
    assert!(matches!(
        answers(&mut protocol, refusal)[..],
        [Step::TryPlain]
    ));
    protocol.sync_plain(2);
    // The agent did have the delimited sync: its answer is not the one to wait for any more.
    assert!(answers(&mut protocol, b"\xFF{\"return\": 1}\n").is_empty());
    assert!(answers(&mut protocol, refusal).is_empty());
    assert!(matches!(
        answers(&mut protocol, b"{\"return\": 2}\n")[..],
        [Step::Synced]
    ));
}

#[test]
fn whatever_stands_behind_an_answer_costs_the_sync() {
    for behind in ["{\"return\": {}}\n", "{\"ret", "x\n", "\n \r\n"] {
        let mut protocol = synced();
        protocol.sent(false);
        let bytes = format!("{{\"return\": {{}}}}\n{behind}");
        let steps = answers(&mut protocol, bytes.as_bytes());
        assert!(matches!(steps[..], [Step::Answer(Ok(_))]), "{steps:?}");
        let blank = behind.trim().is_empty();
        let expected = if blank { Phase::Ready } else { Phase::Lost };
        assert_eq!(protocol.phase(), expected, "behind {behind:?}");
    }
}

#[test]
fn a_line_that_is_no_answer_ends_the_command_and_the_sync() {
    let deep = format!("{{\"return\": {}{}}}\n", "[".repeat(8), "]".repeat(8));
    let long = format!("{{\"return\": \"{}\"}}\n", "x".repeat(MAX));
    let cases = [
        ("no json\n", Garbled::Malformed),
        ("{}\n", Garbled::Malformed),
        ("[]\n", Garbled::Malformed),
        ("[1]\n", Garbled::Malformed),
        ("{\"error\": [\"class\", \"desc\"]}\n", Garbled::Malformed),
        ("{\"return\": 1, \"error\": {}}\n", Garbled::Malformed),
        ("{\"return\": 1, \"return\": 2}\n", Garbled::Malformed),
        ("{\"return\": 1} {\"return\": 2}\n", Garbled::Malformed),
        ("{\"error\": \"text\"}\n", Garbled::Malformed),
        ("{\"event\": \"STOP\"}\n", Garbled::Malformed),
        (&*deep, Garbled::TooDeep),
        (&*long, Garbled::TooLarge),
    ];
    for (line, expected) in cases {
        let mut protocol = synced();
        protocol.sent(false);
        let steps = answers(&mut protocol, line.as_bytes());
        assert!(
            matches!(steps[..], [Step::Garbled(garbled)] if garbled == expected),
            "{line:?}: {steps:?}"
        );
        assert_eq!(protocol.phase(), Phase::Lost, "{line:?}");
    }
}

#[test]
fn null_is_an_answer_and_members_may_be_added() {
    let mut protocol = synced();
    protocol.sent(false);
    let steps = answers(
        &mut protocol,
        b"{\"return\": null, \"id\": 3, \"new\": []}\r\n",
    );
    assert!(matches!(&steps[..], [Step::Answer(Ok(value))] if value.get() == "null"));
}

#[test]
fn every_signal_has_its_meaning_in_every_phase() {
    use Signal::{PortClosed, PortOpened, Reset, Shutdown, Suspended};
    for signal in [PortOpened, PortClosed, Reset, Shutdown, Suspended] {
        let lives_on = signal == Suspended;

        let mut idle = synced();
        assert!(idle.note(signal).is_none());
        assert_eq!(idle.phase() == Phase::Ready, lives_on, "{signal:?}");

        let mut syncing = Protocol::new(MAX, 8);
        syncing.sync(1);
        assert!(syncing.note(signal).is_none());
        assert_eq!(syncing.phase() == Phase::Syncing, lives_on, "{signal:?}");

        let mut busy = synced();
        busy.sent(false);
        let step = busy.note(signal);
        let interrupted = matches!(step, Some(Step::Interrupted(by)) if by == signal);
        assert_eq!(interrupted, !lives_on, "{signal:?}: {step:?}");

        let mut silent = synced();
        silent.sent(true);
        let proof = match silent.note(signal) {
            None => None,
            Some(Step::Proven(proof)) => Some(proof),
            other => panic!("{signal:?}: {other:?}"),
        };
        let expected = match signal {
            Reset => Some(Proof::Reset),
            Shutdown => Some(Proof::Shutdown),
            Suspended => Some(Proof::Suspended),
            PortOpened | PortClosed => None,
        };
        assert_eq!(proof, expected, "{signal:?}");
    }
}

#[test]
fn an_idle_guest_that_talks_on_is_not_read_for_ever() {
    let mut protocol = synced();
    let mut read = 0;
    while protocol.wants_bytes() {
        answers(&mut protocol, &[b'x'; 64]);
        read += 64;
        assert!(read < 10 * MAX, "still reads after {read} bytes");
    }
    protocol.sync(9);
    assert!(protocol.wants_bytes());
}

#[derive(Clone, Debug)]
enum Act {
    Sync,
    SyncPlain,
    Lose,
    Send(bool),
    Note(Signal),
    /// The nonce handed out so many syncs ago.
    Nonce(usize),
    Bytes(Vec<u8>),
}

fn act() -> impl Strategy<Value = Act> {
    let signals = vec![
        Signal::PortOpened,
        Signal::PortClosed,
        Signal::Reset,
        Signal::Shutdown,
        Signal::Suspended,
    ];
    prop_oneof![
        3 => Just(Act::Sync),
        1 => Just(Act::SyncPlain),
        1 => Just(Act::Lose),
        6 => any::<bool>().prop_map(Act::Send),
        1 => prop::sample::select(signals).prop_map(Act::Note),
        4 => (0..3_usize).prop_map(Act::Nonce),
        6 => prop::sample::select(&PIECES[..]).prop_map(|piece| Act::Bytes(piece.to_vec())),
        2 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Act::Bytes),
        1 => (0..3 * MAX).prop_map(|length| Act::Bytes(vec![b'x'; length])),
    ]
}

/// A protocol fed byte by byte, and everything the oracle needs.
struct Run {
    protocol: Protocol,
    nonces: Vec<u64>,
    stream: Vec<u8>,
    /// Where in the stream the newest sync and the newest command went out.
    synced_at: usize,
    sent_at: usize,
    silent: bool,
}

impl Run {
    fn new() -> Self {
        Self {
            protocol: Protocol::new(MAX, 8),
            nonces: Vec::new(),
            stream: Vec::new(),
            synced_at: 0,
            sent_at: 0,
            silent: false,
        }
    }

    fn apply(&mut self, act: Act) -> Result<(), TestCaseError> {
        match act {
            Act::Sync => self.sync(false),
            Act::SyncPlain => self.sync(true),
            Act::Lose => self.protocol.lose_sync(),
            Act::Send(silent) if self.protocol.phase() == Phase::Ready => {
                self.protocol.sent(silent);
                self.sent_at = self.stream.len();
                self.silent = silent;
            }
            Act::Send(_) => {}
            Act::Note(signal) => {
                let busy = self.protocol.phase() == Phase::Busy;
                let step = self.protocol.note(signal);
                prop_assert!(step.is_none() || busy, "{step:?} without a command");
            }
            Act::Nonce(ago) => {
                if let Some(nonce) = self.nonces.iter().rev().nth(ago) {
                    self.feed(format!("\u{20}{{\"return\": {nonce}}}\n").as_bytes())?;
                }
            }
            Act::Bytes(bytes) => self.feed(&bytes)?,
        }
        Ok(())
    }

    fn sync(&mut self, plain: bool) {
        let nonce = 1_000_000 + self.nonces.len() as u64;
        self.nonces.push(nonce);
        self.synced_at = self.stream.len();
        if plain {
            self.protocol.sync_plain(nonce);
        } else {
            self.protocol.sync(nonce);
        }
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), TestCaseError> {
        for &byte in bytes {
            self.stream.push(byte);
            self.protocol.receive(&[byte]);
            while let Some(step) = self.protocol.step() {
                self.check(&step)?;
            }
            let held = self.protocol.frames.held();
            prop_assert!(held <= 8 * 1024 + 4 * MAX, "holds {held} bytes");
        }
        Ok(())
    }

    fn check(&self, step: &Step) -> Result<(), TestCaseError> {
        let end = self.stream.len() - 1;
        let restart = |byte: &u8| matches!(byte, b'\n' | 0xFF);
        let start = self.stream[..end]
            .iter()
            .rposition(restart)
            .map_or(0, |at| at + 1);
        let text = self.stream[start..end].trim_ascii();
        let first = end - self.stream[start..end].trim_ascii_start().len();
        match step {
            Step::Synced => {
                let newest = self.nonces.last().expect("a sync ends only after it began");
                let expected = format!("{{\"return\": {newest}}}");
                prop_assert_eq!(text, expected.as_bytes());
            }
            Step::Answer(answer) => {
                prop_assert!(!self.silent || answer.is_err(), "silence was answered");
                prop_assert!(
                    first >= self.sent_at,
                    "the answer is older than its command"
                );
                if let Ok(value) = answer {
                    let text = String::from_utf8_lossy(text);
                    prop_assert!(
                        text.contains(value.get()),
                        "{} is not in {text}",
                        value.get()
                    );
                }
            }
            Step::Proven(proof) => {
                prop_assert!(self.silent, "a command that is answered ended by {proof:?}");
                prop_assert!(
                    first >= self.sent_at,
                    "the answer is older than its command"
                );
            }
            // A flood is told before its end, and counts from wherever it began.
            Step::Garbled(_) => prop_assert!(end >= self.sent_at),
            Step::TryPlain => prop_assert!(end >= self.synced_at),
            Step::Interrupted(signal) => prop_assert!(false, "{signal:?} came out of bytes"),
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn no_bytes_bring_a_panic_a_wrong_answer_or_a_full_memory(acts in prop::collection::vec(act(), 0..60)) {
        let mut run = Run::new();
        for act in acts {
            run.apply(act)?;
        }
    }

    #[test]
    fn it_does_not_matter_how_the_stream_was_cut(
        pieces in prop::collection::vec(act(), 0..20),
        cuts in prop::collection::vec(0..64_usize, 0..20),
    ) {
        // Within the limits only: a line that is too long is told when that is known.
        let mut stream = b"\xFF{\"return\": 7}\n".to_vec();
        for piece in pieces {
            match piece {
                Act::Bytes(bytes) if stream.len() + bytes.len() < MAX => stream.extend(bytes),
                _ => {}
            }
        }
        let run = |cuts: &[usize]| {
            let mut protocol = Protocol::new(MAX, 8);
            protocol.sync(7);
            let mut rest = &stream[..];
            let mut said = Vec::new();
            for &cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                said.extend(answers(&mut protocol, head));
                rest = tail;
            }
            said.extend(answers(&mut protocol, rest));
            (format!("{said:?}"), protocol.skipped(), protocol.phase())
        };
        let (said, skipped, phase) = run(&cuts);
        let (said_whole, skipped_whole, phase_whole) = run(&[]);
        prop_assert_eq!(said, said_whole);
        prop_assert_eq!(skipped, skipped_whole);
        // A cut may show half a line that a restart drops later: then it is the more careful one.
        prop_assert!(phase == phase_whole || phase == Phase::Lost, "{phase:?}, whole {phase_whole:?}");
    }
}

/// The same acts and the same oracle as above, from a generator that costs nothing beside them.
#[test]
fn a_campaign_of_hostile_strings_brings_no_panic_no_wrong_answer_and_no_full_memory() {
    let mut campaign = Campaign::told();
    let (strings, seed, dice) = (campaign.strings, campaign.seed, &mut campaign.dice);
    let mut seen = Seen::default();
    let mut fed = 0_u64;
    while fed < strings {
        let before = dice.place();
        let mut run = Run::new();
        for _ in 0..dice.below(40) {
            let act = next_act(dice);
            fed += u64::from(matches!(act, Act::Bytes(_) | Act::Nonce(_)));
            seen.note(&run.protocol);
            if let Err(error) = run.apply(act) {
                panic!("seed {seed}, generator at {before:#x}: {error}");
            }
        }
        seen.skipped += run.protocol.skipped();
    }
    // A campaign that never got past the sync would prove nothing.
    assert!(
        seen.ready > strings / 100 && seen.busy > strings / 100 && seen.skipped > strings / 100,
        "{seen:?}"
    );
    println!("{seen:?}");
    campaign.ended("hostile-agent-protocol", fed);
}

#[derive(Debug, Default)]
struct Seen {
    ready: u64,
    busy: u64,
    skipped: u64,
}

impl Seen {
    fn note(&mut self, protocol: &Protocol) {
        self.ready += u64::from(protocol.phase() == Phase::Ready);
        self.busy += u64::from(protocol.phase() == Phase::Busy);
    }
}

/// What happens next in the campaign.
fn next_act(dice: &mut Dice) -> Act {
    const SIGNALS: [Signal; 5] = [
        Signal::PortOpened,
        Signal::PortClosed,
        Signal::Reset,
        Signal::Shutdown,
        Signal::Suspended,
    ];
    match dice.below(24) {
        0..3 => Act::Sync,
        3 => Act::SyncPlain,
        4 => Act::Lose,
        5..10 => Act::Send(dice.below(4) == 0),
        10 => Act::Note(SIGNALS[dice.below(SIGNALS.len())]),
        // Mostly the nonce that is waited for, else the sync would never end.
        11..16 => Act::Nonce(dice.below(8) / 6),
        16..23 => Act::Bytes(bytes(dice)),
        _ => Act::Bytes(vec![b'x'; dice.below(3 * MAX)]),
    }
}
