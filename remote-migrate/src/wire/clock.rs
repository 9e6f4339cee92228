//! How far the other side's clock is from ours, and how wrong that may be.
//!
//! As in NTP: a ping leaves at `sent` of our clock, the pong that comes back one round trip later carries
//! the other side's clock. It was read somewhere within that round trip, so taking its middle is wrong by
//! half of it at most. Pure: clocks are handed in.

use std::{collections::VecDeque, time::Duration};

use crate::message::Downtime;

/// Samples kept, as NTP's clock filter keeps them. A clock that was set is believed again after as many beats.
const SAMPLES: usize = 8;

/// The other side's clock, seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockOffset {
    /// Nanoseconds to add to our clock to get theirs.
    pub nanos: i64,
    /// How far the truth may be from that, either way: half of the round trip it was measured in.
    pub error: Duration,
}

impl ClockOffset {
    /// How long it was from an instant on our clock to one on theirs, both in nanoseconds since 1970. The
    /// truth is within [`ClockOffset::error`] of it. Negative if theirs came first.
    #[must_use]
    pub fn between(&self, ours: i64, theirs: i64) -> i128 {
        i128::from(theirs) - i128::from(self.nanos) - i128::from(ours)
    }

    /// How long a guest stood still that was stopped here and let run there, both in nanoseconds since 1970. Nothing if it
    /// came out as less than nothing by more than the error: then a clock was set meanwhile.
    #[must_use]
    pub fn downtime(&self, stopped: i64, resumed: i64) -> Option<Downtime> {
        let took = self.between(stopped, resumed);
        let error = self.error;
        if took < 0 && took.unsigned_abs() > error.as_nanos() {
            return None;
        }
        let took = u64::try_from(took.max(0)).ok()?;
        Some(Downtime {
            took: Duration::from_nanos(took),
            error,
        })
    }
}

/// The best of the last samples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ClockFilter(VecDeque<ClockOffset>);

impl ClockFilter {
    /// A ping left when our clock said `sent`; `round_trip` later its pong was here, and says `theirs`.
    pub(super) fn sample(&mut self, sent: i64, round_trip: Duration, theirs: i64) {
        let half = round_trip / 2;
        let middle = i128::from(sent) + i128::try_from(half.as_nanos()).unwrap_or(i128::MAX / 2);
        // What does not fit is no clock.
        let Ok(nanos) = i64::try_from(i128::from(theirs) - middle) else {
            return;
        };
        if self.0.len() == SAMPLES {
            self.0.pop_front();
        }
        // Half of an odd number of nanoseconds was rounded down above.
        let error = half + Duration::from_nanos(1);
        self.0.push_back(ClockOffset { nanos, error });
    }

    pub(super) fn best(&self) -> Option<ClockOffset> {
        self.0.iter().min_by_key(|sample| sample.error).copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_truth_is_within_the_error_whatever_each_way_takes(
            truth in -1_000_000_000_000_i64..1_000_000_000_000,
            ways in prop::collection::vec((0_u32..50_000_000, 0_u32..50_000_000), 1..20),
        ) {
            let mut filter = ClockFilter::default();
            let mut now = 1_700_000_000_000_000_000_i64;
            for (there, back) in ways {
                let theirs = now + i64::from(there) + truth;
                filter.sample(now, Duration::from_nanos(u64::from(there) + u64::from(back)), theirs);
                let best = filter.best().unwrap();
                let wrong = best.nanos.abs_diff(truth);
                prop_assert!(u128::from(wrong) <= best.error.as_nanos(), "{wrong} {best:?}");
                now += 1_000_000_000;
            }
        }

        #[test]
        fn no_clock_makes_it_panic(
            samples in prop::collection::vec((any::<i64>(), any::<u64>(), any::<i64>()), 0..20),
        ) {
            let mut filter = ClockFilter::default();
            for (sent, round_trip, theirs) in samples {
                filter.sample(sent, Duration::from_nanos(round_trip), theirs);
                if let Some(best) = filter.best() {
                    let _ = best.between(sent, theirs);
                }
            }
            prop_assert!(filter.0.len() <= SAMPLES);
        }
    }

    #[test]
    fn a_clock_that_was_set_is_believed_after_eight_beats() {
        let mut filter = ClockFilter::default();
        filter.sample(0, Duration::from_micros(1), 0);
        for _ in 0..SAMPLES {
            filter.sample(0, Duration::from_micros(9), 5_000_000_000);
        }
        let best = filter.best().unwrap();
        assert!(best.nanos > 4_900_000_000, "{best:?}");
    }

    #[test]
    fn downtime_is_never_negative_and_none_by_a_clock_that_was_set() {
        let offset = ClockOffset {
            nanos: 500,
            error: Duration::from_nanos(200),
        };
        let took = |stopped, resumed| {
            let downtime = offset.downtime(stopped, resumed)?;
            assert_eq!(downtime.error, offset.error);
            Some(downtime.took.as_nanos())
        };
        assert_eq!(took(1_000, 1_800), Some(300));
        assert_eq!(took(1_000, 1_500), Some(0));
        assert_eq!(took(1_000, 1_300), Some(0), "within the error");
        assert_eq!(took(1_000, 1_299), None);
        assert_eq!(took(i64::MAX, i64::MIN), None);
        assert!(took(i64::MIN, i64::MAX).is_none_or(|took| took > 0));
    }

    #[test]
    fn downtime_is_the_distance_between_two_clocks() {
        let offset = ClockOffset {
            nanos: 500,
            error: Duration::ZERO,
        };
        assert_eq!(offset.between(1_000, 1_800), 300);
        assert_eq!(offset.between(1_000, 1_400), -100);
    }
}
