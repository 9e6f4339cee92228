//! The properties on random bytes, on the committed corpus, and on as many hostile strings as one
//! has time for.

use std::{env, fs, path::Path, time::Instant};

use proptest::prelude::*;

use super::{frame, protocol};

proptest! {
    #[test]
    fn any_bytes_are_parsed_the_same_however_they_are_cut(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        json in "[{}\\[\\]\":,a\\\\1 \n]{0,300}",
    ) {
        frame(&bytes);
        frame(&[&bytes[..], json.as_bytes()].concat());
    }

    #[test]
    fn any_order_of_acts_answers_nobody_wrongly(
        acts in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        protocol(&acts);
    }
}

/// The folder of its inputs, and what runs one.
type Target = (&'static str, fn(&[u8]));

#[test]
fn the_committed_corpus_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    let targets: [Target; 2] = [
        ("monitor_frame", |input| {
            frame(input);
        }),
        ("monitor_protocol", |input| {
            protocol(input);
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
fn a_campaign_of_hostile_strings_is_parsed_the_same_however_they_are_cut() {
    let (strings, mut dice, began) = (strings(), Dice(seed()), Instant::now());
    let (mut objects, mut most) = (0, 0);
    for _ in 0..strings {
        let mut input = vec![dice.byte()];
        input.extend((0..input[0] % 8).map(|_| dice.byte() % 64));
        for _ in 0..=dice.below(6) {
            dice.speak(&mut input);
        }
        let found = frame(&input);
        objects += found as u64;
        most = most.max(found);
    }
    // A campaign of which nothing is ever an object would prove little.
    assert!(objects > strings / 4, "{objects} objects in {strings}");
    println!("{objects} objects, at most {most} in one string");
    figure("hostile-monitor-frame", strings, began);
}

#[test]
fn a_campaign_of_hostile_strings_answers_nobody_wrongly() {
    let (strings, mut dice, began) = (strings(), Dice(seed()), Instant::now());
    let (mut fed, mut answered) = (0, 0);
    let mut input = Vec::new();
    while fed < strings {
        input.clear();
        for _ in 0..dice.below(60) {
            // Acts of ours and answers that fit come as bytes below 7 modulo 8.
            input.push(dice.byte() / 8 * 8 + dice.byte() % 7);
            if dice.below(6) == 0 {
                let mut said = Vec::new();
                dice.speak(&mut said);
                said.truncate(255);
                input.extend([7, u8::try_from(said.len()).unwrap()]);
                input.extend(said);
            }
        }
        let heard = protocol(&input);
        fed += heard.strings;
        answered += heard.answered;
    }
    assert!(answered > strings / 20, "{answered} answered by {fed}");
    println!("{answered} callers answered");
    figure("hostile-monitor-protocol", fed, began);
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

    /// Something of what a QEMU says, now and then torn, turned over or made up.
    fn speak(&mut self, out: &mut Vec<u8>) {
        const PIECES: [&[u8]; 18] = [
            b"{\"return\": {}, \"id\": 1}\r\n",
            b"{\"return\": {\"a\": [1, {\"b\": \"]}\"}]}, \"id\": 2}",
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"\\ud800\"}, \"id\": 1}\r\n",
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\r\n",
            b"{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n",
            b"{\"event\": \"X\", \"data\": {}, \"new\": null}",
            b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 9, \"minor\": 0, \"micro\": 0}}}}",
            b"{\"return\": null, \"id\": \"libvirt-1\"}",
            b"{\"id\": 18446744073709551616, \"return\": 1}",
            b"{\"return\": 1, \"return\": 2, \"error\": {}}",
            b"{}",
            b"{\"a\":",
            b"}}",
            b"[[[[[[[[[[",
            b"\"\\\"",
            b"\r\n",
            b"\xFF\xC3",
            b"\0",
        ];
        let from = out.len();
        match self.below(6) {
            0 => {
                let length = self.below(24);
                out.extend((0..length).map(|_| self.byte()));
            }
            1 => {
                let length = self.below(300);
                out.extend(b"{\"long\": \"");
                out.resize(out.len() + length, b'x');
                out.extend(b"\"}");
            }
            _ => out.extend(PIECES[self.below(PIECES.len())]),
        }
        let length = out.len() - from;
        match self.below(8) {
            0 if length > 0 => out.truncate(from + self.below(length)),
            1 if length > 0 => out[from + self.below(length)] ^= 1 << self.below(8),
            _ => {}
        }
    }
}
