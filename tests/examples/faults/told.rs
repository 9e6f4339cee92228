//! What a campaign is told, and what follows from it: which runs, and what is random in each. Both campaigns take it so.

use std::ops::Range;

use fastrand::Rng;

pub(crate) struct Told {
    runs: Option<u64>,
    pub(crate) seed: u64,
    from: u64,
    pub(crate) is_short: bool,
}

impl Told {
    /// `--runs N --seed S --from K --short`, each of which may be left out.
    pub(crate) fn by(arguments: &[String]) -> Result<Self, String> {
        let number = |name: &str| match arguments.iter().position(|word| word == name) {
            None => Ok(None),
            Some(place) => {
                let value = arguments.get(place + 1).and_then(|word| word.parse().ok());
                value
                    .map(Some)
                    .ok_or_else(|| format!("{name} takes a number"))
            }
        };
        Ok(Self {
            runs: number("--runs")?,
            seed: number("--seed")?.unwrap_or(1),
            from: number("--from")?.unwrap_or(0),
            is_short: arguments.iter().any(|word| word == "--short"),
        })
    }

    /// The runs there are to do, where a campaign of this form has so many.
    pub(crate) fn runs(&self, all: u64) -> Result<Range<u64>, String> {
        let (from, end) = (self.from, self.runs.unwrap_or(all));
        if from > end {
            return Err(format!("it cannot go on from run {from} of {end}"));
        }
        Ok(from..end)
    }

    /// All that is random in a run.
    pub(crate) fn random(&self, run: u64) -> Rng {
        Rng::with_seed(self.seed.wrapping_mul(0x9e37_79b9).wrapping_add(run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(words: &str) -> Result<Told, String> {
        let words: Vec<_> = words.split_whitespace().map(str::to_owned).collect();
        Told::by(&words)
    }

    fn runs(words: &str) -> Result<Range<u64>, String> {
        told(words)?.runs(200)
    }

    #[test]
    fn a_campaign_is_whole_and_of_seed_1_unless_it_is_told_otherwise() {
        let what = |words| told(words).map(|told| (told.seed, told.is_short));
        assert_eq!((runs(""), what("")), (Ok(0..200), Ok((1, false))));
        let words = "--short --seed 7 --from 3 --runs 9";
        assert_eq!((runs(words), what(words)), (Ok(3..9), Ok((7, true))));
    }

    #[test]
    fn no_number_and_a_beginning_past_the_end_are_refused() {
        for words in ["--seed", "--runs many", "--from 3 --runs 2", "--from 201"] {
            assert!(runs(words).is_err(), "{words}");
        }
        assert_eq!(runs("--from 2 --runs 2"), Ok(2..2));
    }

    #[test]
    fn what_is_random_follows_from_the_seed_and_the_run() {
        let first = |words, run| told(words).map(|told| told.random(run).u64(..));
        assert_eq!(first("--seed 7", 3), first("--seed 7 --short", 3));
        assert_ne!(first("--seed 7", 3), first("--seed 7", 4));
        assert_ne!(first("--seed 7", 3), first("--seed 8", 3));
    }
}
