//! The properties on random bytes, on the committed corpus, and on as many hostile strings as one has time for.

use std::{env, fs, path::Path, time::Instant};

use proptest::prelude::*;

use super::{frames, session};

proptest! {
    #[test]
    fn any_bytes_are_the_same_frames_however_they_are_cut(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        short in prop::collection::vec(0_u8..9, 0..64),
    ) {
        frames(&bytes);
        frames(&[&short[..], &[0, 0, 0], &bytes].concat());
    }

    #[test]
    fn any_order_of_acts_is_refused_or_answered_by_its_own_ids(
        acts in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        session(&acts);
    }
}

/// The folder of its inputs, and what runs one.
type Target = (&'static str, fn(&[u8]));

#[test]
fn the_committed_corpus_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    let targets: [Target; 2] = [
        ("migrate_frame", |input| {
            frames(input);
        }),
        ("migrate_session", |input| {
            session(input);
        }),
    ];
    for (target, run) in targets {
        let mut count = 0;
        for entry in fs::read_dir(corpus.join(target)).unwrap() {
            run(&fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 3, "{target} has {count} inputs");
    }
}

/// How many byte strings a campaign feeds: few in CI, ten million when told.
fn strings() -> u64 {
    env::var("VMWRIGHT_HOSTILE").map_or(50_000, |told| told.parse().unwrap())
}

/// Where a campaign begins; a failure names what replays it.
fn seed() -> u64 {
    env::var("FAULT_SEED").map_or(1, |told| told.parse().unwrap())
}

#[test]
fn a_campaign_of_hostile_strings_is_the_same_frames_however_it_is_cut() {
    let (strings, mut dice, began) = (strings(), Dice(seed()), Instant::now());
    let mut whole = 0;
    for _ in 0..strings {
        let mut input = vec![dice.byte()];
        input.extend((0..input[0] % 8).map(|_| dice.byte() % 64));
        for _ in 0..=dice.below(6) {
            let mut said = Vec::new();
            dice.speak(&mut said);
            // A length that is true, now and then one that is not, or beyond all limits.
            let length = u32::try_from(said.len()).unwrap();
            let length = match dice.below(16) {
                0 => length + 1,
                1 => u32::MAX >> dice.below(32),
                _ => length,
            };
            input.extend(length.to_be_bytes());
            input.extend(said);
        }
        whole += frames(&input) as u64;
    }
    // A campaign of which nothing is ever a frame would prove little.
    assert!(whole > strings / 4, "{whole} frames in {strings}");
    println!("{whole} frames");
    figure("hostile-migrate-frame", strings, began);
}

#[test]
fn a_campaign_of_hostile_strings_is_refused_or_answered_by_its_own_ids() {
    let (strings, mut dice, began) = (strings(), Dice(seed()), Instant::now());
    let (mut fed, mut handed_up) = (0, 0);
    let mut input = Vec::new();
    while fed < strings {
        input.clear();
        // One that never greets hears nothing: most do.
        input.extend([dice.byte(), dice.byte() / 8 * 8 + 4]);
        for _ in 0..dice.below(60) {
            // Acts of ours, and messages that fit, come as bytes below 7 modulo 8.
            input.push(dice.byte() / 8 * 8 + [0, 0, 1, 1, 2, 3, 5, 5, 5, 6][dice.below(10)]);
            if dice.below(12) == 0 {
                let mut said = Vec::new();
                dice.speak(&mut said);
                said.truncate(255);
                let framed = if dice.below(4) == 0 { 15 } else { 7 };
                input.extend([framed, u8::try_from(said.len()).unwrap()]);
                input.extend(said);
            }
        }
        let heard = session(&input);
        fed += heard.strings;
        handed_up += heard.handed_up;
    }
    assert!(handed_up > strings / 20, "{handed_up} handed up of {fed}");
    println!("{handed_up} requests and answers handed up");
    figure("hostile-migrate-session", fed, began);
}

/// What a campaign fed. `cargo xtask fuzz hostile` collects such lines.
fn figure(name: &str, fed: u64, began: Instant) {
    println!("seed {}, {:.1} s", seed(), began.elapsed().as_secs_f64());
    println!("figure {name} {fed} strings bar >= {} ok", strings());
}

/// A generator that costs nothing beside what it tests (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.roll() >> 33).unwrap() % limit
    }

    fn byte(&mut self) -> u8 {
        self.roll().to_le_bytes()[7]
    }

    /// Something of what a peer says, now and then torn, turned over or made up.
    fn speak(&mut self, out: &mut Vec<u8>) {
        const PIECES: [&[u8]; 16] = [
            br#"{"hello":{"magic":"vmwright-migrate","version":1,"features":["clock","run"]}}"#,
            br#"{"hello":{"magic":"vmwright-migrate","version":3}}"#,
            br#"{"hello":{"magic":"vmwright-migrate","version":70000}}"#,
            br#"{"request":{"id":1,"within_ms":9,"request":{"migration":"00000000-0000-0000-0000-000000000007","epoch":1,"domain":"00000000-0000-0000-0000-000000000007","call":"finish"}}}"#,
            br#"{"request":{"id":1,"within_ms":18446744073709551615,"request":{"migration":"00000000-0000-0000-0000-000000000007","epoch":0,"domain":"00000000-0000-0000-0000-000000000007","call":{"status":"source"}}}}"#,
            br#"{"answer":{"id":1,"answer":{"migration":"00000000-0000-0000-0000-000000000000","epoch":1,"reply":"owned"}}}"#,
            br#"{"answer":{"id":1,"answer":{"migration":"00000000-0000-0000-0000-000000000000","epoch":18446744073709551615,"reply":{"stale":{"seen":2}}}}}"#,
            br#"{"ping":{"id":1}}"#,
            br#"{"ping":{"id":2,"underway":null}}"#,
            br#"{"pong":{"id":1,"clock":-9223372036854775808}}"#,
            br#"{"fault":{"kind":"solar-flare","text":"too bright"}}"#,
            br#"{"pray":{}}"#,
            b"[[[[[[[[[[[[[[[[",
            b"{}",
            b"\xFF\xC3",
            b"",
        ];
        let from = out.len();
        if self.below(6) == 0 {
            let length = self.below(24);
            out.extend((0..length).map(|_| self.byte()));
        } else {
            out.extend(PIECES[self.below(PIECES.len())]);
        }
        let length = out.len() - from;
        match self.below(8) {
            0 if length > 0 => out.truncate(from + self.below(length)),
            1 if length > 0 => out[from + self.below(length)] ^= 1 << self.below(8),
            _ => {}
        }
    }
}
