//! Hostile bytes from a seed, and how many of them: what the campaigns in the tests share.
//!
//! `cargo xtask fuzz hostile` runs them long and collects their figures.

use std::{env, time::Instant};

/// How long a campaign is, and where it begins.
pub(crate) struct Campaign {
    /// Few in CI, ten million when told.
    pub(crate) strings: u64,
    pub(crate) seed: u64,
    pub(crate) dice: Dice,
    pub(crate) began: Instant,
}

impl Campaign {
    pub(crate) fn told() -> Self {
        let number = |name, else_: u64| env::var(name).map_or(else_, |told| told.parse().unwrap());
        let seed = number("FAULT_SEED", 1);
        Self {
            strings: number("VMWRIGHT_HOSTILE", 50_000),
            seed,
            dice: Dice(seed),
            began: Instant::now(),
        }
    }

    /// Tells what was fed.
    pub(crate) fn ended(name: &str, fed: u64, strings: u64, began: Instant) {
        println!("{:.1} s", began.elapsed().as_secs_f64());
        println!("figure {name} {fed} strings bar >= {strings} ok");
    }
}

/// A generator that costs nothing beside what it tests: xorshift64*, as Vigna gives it.
pub(crate) struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// What replays everything from here on.
    pub(crate) fn place(&self) -> u64 {
        self.0
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.roll() >> 33).unwrap() % limit
    }

    /// A few pieces of what an agent says, some of them torn, turned over or made up.
    pub(crate) fn bytes(&mut self) -> Vec<u8> {
        const PIECES: [&[u8]; 15] = [
            b"{\"return\": {}}\n",
            b"{\"return\": {\"a\": [1, 2]}}\n",
            b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"x\"}}\n",
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"\\ud800\"}}\n",
            b"{\"return\": 1, \"error\": {}}\n",
            b"[1000000]\n",
            b"{\"ret",
            b"urn\": 1}\n",
            b"\xFF",
            b"\n",
            b" \r\n",
            b"[[[[[[[[[[",
            b"\"\\\"",
            b"\xC3",
            b"\0",
        ];
        let mut bytes = Vec::new();
        for _ in 0..=self.below(3) {
            let from = bytes.len();
            if self.below(4) == 0 {
                let length = self.below(24);
                bytes.extend((0..length).map(|_| self.roll().to_le_bytes()[7]));
            } else {
                bytes.extend(PIECES[self.below(PIECES.len())]);
            }
            let length = bytes.len() - from;
            match self.below(8) {
                0 if length > 0 => bytes.truncate(from + self.below(length)),
                1 if length > 0 => bytes[from + self.below(length)] ^= 1 << self.below(8),
                _ => {}
            }
        }
        bytes
    }
}
