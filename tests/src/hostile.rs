//! Hostile bytes from a seed: what a campaign that feeds a parser or a protocol machine is made of.
//!
//! What a peer says is the campaign's own: here it is only picked, torn and turned over. The same seed makes the same bytes,
//! and every campaign tells its own.
//!
//! ```
//! use tests::hostile::Campaign;
//!
//! let mut campaign = Campaign::told();
//! for _ in 0..campaign.strings {
//!     let mut said = campaign.dice.pick(&[&b"{\"return\": {}}"[..], b"{}"]).to_vec();
//!     campaign.dice.spoil(&mut said, 0);
//!     let _ = serde_json::from_slice::<serde_json::Value>(&said); // here your parser would have read it
//! }
//! let fed = campaign.strings;
//! campaign.ended("hostile-json", fed);
//! ```

use std::{env, fs, path::Path, time::Instant};

/// How many strings if nothing is told: few enough for CI.
const FEW: u64 = 50_000;

/// How long a campaign is, and where it begins.
#[derive(Debug)]
pub struct Campaign {
    /// How many strings it is to feed.
    pub strings: u64,
    /// Where it begins; a failure names what replays it.
    pub seed: u64,
    /// What makes its strings.
    pub dice: Dice,
    began: Instant,
}

impl Campaign {
    /// As `VMWRIGHT_HOSTILE` (how many strings) and `FAULT_SEED` tell; a few strings from seed 1 else.
    ///
    /// # Panics
    ///
    /// When one of them is no number.
    #[must_use]
    pub fn told() -> Self {
        let number = |name, otherwise| {
            env::var(name).map_or(otherwise, |told| told.parse().expect("a number is told"))
        };
        let seed = number("FAULT_SEED", 1);
        Self {
            strings: number("VMWRIGHT_HOSTILE", FEW),
            seed,
            dice: Dice::new(seed),
            began: Instant::now(),
        }
    }

    /// Tells what was fed, as a figure of that name.
    pub fn ended(self, name: &str, fed: u64) {
        let Self { strings, seed, .. } = self;
        let word = if fed >= strings { "ok" } else { "short" };
        println!("seed {seed}, {:.1} s", self.began.elapsed().as_secs_f64());
        println!("figure {name} {fed} strings bar >= {strings} {word}");
    }
}

/// A generator that costs nothing beside what it tests: xorshift64*, as Vigna gives it.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same numbers for the same seed. Zero is as good as one.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // Of nothing it would make nothing for ever.
        Self(seed.max(1))
    }

    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// The seed of all that follows.
    #[must_use]
    pub fn place(&self) -> u64 {
        self.0
    }

    /// A number below `limit`.
    ///
    /// # Panics
    ///
    /// When `limit` is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        // 31 bits fit wherever a `usize` has 32.
        (self.roll() >> 33) as usize % limit
    }

    /// Any byte.
    pub fn byte(&mut self) -> u8 {
        self.roll().to_le_bytes()[7]
    }

    /// One of those.
    ///
    /// # Panics
    ///
    /// When there are none.
    pub fn pick<'a>(&mut self, pieces: &[&'a [u8]]) -> &'a [u8] {
        pieces[self.below(pieces.len())]
    }

    /// Fewer than 24 bytes, of which any may be any.
    pub fn noise(&mut self, out: &mut Vec<u8>) {
        let length = self.below(24);
        out.extend((0..length).map(|_| self.byte()));
    }

    /// Now and then tears what stands in `out` from there on, or turns a bit of it over.
    pub fn spoil(&mut self, out: &mut Vec<u8>, from: usize) {
        let length = out.len() - from;
        match self.below(8) {
            0 if length > 0 => out.truncate(from + self.below(length)),
            1 if length > 0 => out[from + self.below(length)] ^= 1 << self.below(8),
            _ => {}
        }
    }
}

/// Runs every input of the corpus that the fuzzer of this target begins with.
///
/// # Panics
///
/// When `run` does, and when there are next to none.
pub fn corpus(target: &str, mut run: impl FnMut(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut count = 0;
    for entry in fs::read_dir(folder.join(target)).expect("the target has a corpus") {
        let path = entry.expect("it can be listed").path();
        run(&fs::read(path).expect("it can be read"));
        count += 1;
    }
    assert!(count > 3, "{target} has {count} inputs");
}
