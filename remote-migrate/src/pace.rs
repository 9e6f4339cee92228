//! How fast a guest's memory moves, and when all of it will have, from what its host reports one time after another.
//!
//! Pure: when a report was made is handed in with it. [`Meter`](crate::Meter) holds the clock.
//!
//! While it runs the guest writes again what was sent already, so memory is gone over in passes, each beginning with what was
//! written during the one before. If those shrink like a geometric series, by the factor *q*, then what follows this one is
//! `began * q / (1 - q)`, and the estimate is the rest of this one and that, divided by the rate. (`remaining / (rate - dirty
//! rate)` is the same where a pass begins, and comes to nothing where it ends.) What makes it a trap, as seen of QEMU 7.2:
//!
//! - In the first pass the dirty rate reads 0: it is not measured yet.
//! - A page counts once in a pass, however often it was written. Over a long pass the dirty rate is therefore far below what
//!   the guest writes, and it comes up to the rate from below, never past it, if all of it is written anew each time: 200
//!   MB/s of writes to 64 MiB, sent at 20 MB/s, read as 9 and then as 19.5 MB/s.
//!
//! So the series has to be seen before it is believed: an estimate needs a pass that began with less than the one before it
//! (the first, which is all memory, is none), and none is given where what dirties faster from pass to pass would not converge
//! if it went on like that. What is as good as known not to converge is told as that.
//!
//! The end comes a little sooner than estimated: the last of it, as much as moves within the longest downtime, is sent while
//! the guest stands still.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::Transfer;

/// What the rate is measured over. QEMU sends in bursts of a tenth of a second.
const WINDOW: Duration = Duration::from_secs(2);
/// Before so much has passed nothing is called measured.
const LEAST: Duration = Duration::from_millis(500);
/// Reports that follow sooner are not kept.
const STEP: Duration = Duration::from_millis(100);
/// Passes that shrink by less than an eighth are within the errors of these measures, and as good as none that shrink: five
/// of them do not halve what is left.
const BARELY: f64 = 7.0 / 8.0;

/// When all of a guest's memory will have moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "it is part of the wire, where a new one is a new feature"
)]
pub enum Eta {
    /// Nobody can say: too little is measured yet, or nothing moves.
    #[default]
    Unknown,
    /// Never, if nothing changes: the guest writes as fast as its memory is sent.
    DoesNotConverge,
    /// In about so long, if guest and link go on as they do.
    In(Duration),
}

impl Eta {
    /// So long, if it can be said.
    #[must_use]
    pub fn left(self) -> Option<Duration> {
        match self {
            Self::In(left) => Some(left),
            Self::Unknown | Self::DoesNotConverge => None,
        }
    }
}

/// What follows from how the memory has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "part of the wire")]
pub struct Estimate {
    /// Bytes sent a second, over the last two seconds; 0 while nothing is measured, or nothing moves.
    pub rate: u64,
    /// When this pass is through at that rate; sooner where memory is empty, which takes no sending. The guest may have
    /// written so much by then that another follows.
    pub pass_left: Option<Duration>,
    /// When all is through.
    pub eta: Eta,
}

/// A pass over the memory, as it began.
#[derive(Clone, Copy, Debug)]
struct Pass {
    number: u64,
    remaining: u64,
    /// As measured over the passes before.
    dirty_rate: u64,
}

/// What is kept of the reports on one stream.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// When so much was sent, by age; the first may lie before the window.
    sent: VecDeque<(Duration, u64)>,
    this: Option<Pass>,
    /// The one before, if it was another than the first.
    before: Option<Pass>,
}

impl Pace {
    /// Takes in what was reported at that time, counted from any moment that stays the same.
    pub fn look(&mut self, at: Duration, transfer: Transfer) -> Estimate {
        let is_another = self.sent.back().is_some_and(|last| transfer.sent < last.1)
            || self.this.is_some_and(|this| transfer.pass < this.number);
        if is_another {
            *self = Self::default();
        }
        self.turn(transfer);
        let rate = self.rate(at, transfer.sent);
        Estimate {
            rate,
            pass_left: (rate > 0)
                .then(|| after(transfer.remaining as f64 / rate as f64))
                .flatten(),
            eta: self.eta(rate, transfer),
        }
    }

    fn turn(&mut self, transfer: Transfer) {
        if self.this.is_none_or(|this| this.number != transfer.pass) {
            self.before = self.this.filter(|this| this.number > 1);
            self.this = Some(Pass {
                number: transfer.pass,
                remaining: transfer.remaining,
                dirty_rate: transfer.dirty_rate,
            });
        }
    }

    fn rate(&mut self, at: Duration, sent: u64) -> u64 {
        let is_due = |last: &(Duration, u64)| at.saturating_sub(last.0) >= STEP;
        if self.sent.back().is_none_or(is_due) {
            self.sent.push_back((at, sent));
        }
        let has_left = |next: &(Duration, u64)| at.saturating_sub(next.0) >= WINDOW;
        while self.sent.get(1).is_some_and(has_left) {
            self.sent.pop_front();
        }
        let (since, before) = self.sent.front().copied().unwrap_or((at, sent));
        let span = at.saturating_sub(since);
        if span < LEAST {
            return 0;
        }
        (sent.saturating_sub(before) as f64 / span.as_secs_f64()) as u64
    }

    fn eta(&self, rate: u64, transfer: Transfer) -> Eta {
        if rate == 0 {
            return Eta::Unknown;
        }
        let (rate, remaining) = (rate as f64, transfer.remaining as f64);
        let after = |bytes: f64| after(bytes / rate).map_or(Eta::DoesNotConverge, Eta::In);
        if transfer.is_still {
            return after(remaining);
        }
        let dirties = transfer.dirty_rate as f64 / rate;
        if dirties >= BARELY {
            return Eta::DoesNotConverge;
        }
        let (Some(this), Some(before)) = (self.this, self.before) else {
            return Eta::Unknown;
        };
        let seen = ratio(this.remaining, before.remaining);
        let faster = ratio(this.dirty_rate, before.dirty_rate).max(1.0);
        if seen.max(dirties * faster) >= BARELY {
            return Eta::Unknown;
        }
        let shrinks_to = seen.max(dirties);
        after(remaining + this.remaining as f64 * shrinks_to / (1.0 - shrinks_to))
    }
}

/// What is as large as one of nothing has not changed.
fn ratio(now: u64, before: u64) -> f64 {
    if before == 0 {
        1.0
    } else {
        now as f64 / before as f64
    }
}

fn after(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Of 256 MiB.
    fn report(pass: u64, sent: u64, remaining: u64, dirty_rate: u64) -> Transfer {
        Transfer {
            sent: sent * MIB,
            remaining: remaining * MIB,
            total: 256 * MIB,
            pass,
            dirty_rate: dirty_rate * MIB,
            is_still: false,
        }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// The estimates after reports that are a second apart.
    fn estimates(reports: &[Transfer]) -> Vec<Estimate> {
        let mut pace = Pace::default();
        let times = (0..).map(seconds);
        let looks = times.zip(reports).map(|(at, now)| pace.look(at, *now));
        looks.collect()
    }

    fn etas(reports: &[Transfer]) -> Vec<Eta> {
        estimates(reports).iter().map(|now| now.eta).collect()
    }

    #[test]
    fn the_first_pass_ends_in_time_and_what_comes_after_it_is_unknown() {
        let told = estimates(&[report(1, 0, 256, 0), report(1, 20, 236, 0)]);
        assert_eq!(told[0], Estimate::default());
        assert_eq!(told[1].rate, 20 * MIB);
        assert_eq!(told[1].pass_left, Some(Duration::from_millis(11_800)));
        assert_eq!(told[1].eta, Eta::Unknown);
    }

    #[test]
    fn passes_that_shrink_add_up_like_a_geometric_series() {
        // 100 MiB/s, of which 50 are written anew: each pass begins with half of the one before.
        let told = etas(&[
            report(1, 0, 256, 0),
            report(1, 100, 156, 0),
            report(2, 200, 128, 50),
            report(3, 300, 64, 50),
            report(3, 400, 40, 50),
        ]);
        assert_eq!(told[..3], [Eta::Unknown; 3], "one pass is no series");
        // 64 + 32 + 16 + .. = 128 MiB, and then 40 + 32 + 16 + .. = 104.
        let after = |millis| Eta::In(Duration::from_millis(millis));
        assert_eq!(told[3..], [after(1280), after(1040)]);
    }

    /// As seen of QEMU 7.2: 64 MiB written at 200 MB/s and sent at 20, and then at 100.
    #[test]
    fn memory_that_is_written_over_and_over_has_no_end_until_it_is_sent_faster() {
        let told = etas(&[
            report(1, 100, 40, 0),
            report(1, 120, 20, 0),
            report(2, 140, 64, 9),
            report(2, 160, 44, 9),
            report(3, 180, 63, 19),
            report(3, 200, 43, 19),
        ]);
        assert_eq!(told[..4], [Eta::Unknown; 4]);
        assert_eq!(told[4..], [Eta::DoesNotConverge; 2]);
        let mut pace = Pace::default();
        for (at, sent) in [(0, 160), (1, 180), (2, 200)] {
            pace.look(seconds(at), report(2, sent, 63, 9));
        }
        let mut look = |at, now| pace.look(seconds(at), now).eta;
        assert_eq!(look(3, report(3, 220, 62, 19)), Eta::DoesNotConverge);
        assert_eq!(
            look(5, report(3, 420, 50, 19)),
            Eta::Unknown,
            "what it writes in so short a pass is not known yet"
        );
        // It began with half of the last one: 31 + 15.5 + .. = 62 MiB.
        let left = Eta::In(Duration::from_millis(620));
        assert_eq!(look(7, report(4, 620, 31, 40)), left);
    }

    #[test]
    fn what_is_written_faster_from_pass_to_pass_goes_on_like_that() {
        let told = |dirty_rate| {
            let last = etas(&[
                report(1, 0, 256, 0),
                report(2, 100, 100, 30),
                report(3, 200, 70, dirty_rate),
            ]);
            last[2]
        };
        assert_eq!(told(70), Eta::Unknown, "163 of 100 MiB/s come next");
        assert_eq!(told(35), Eta::In(Duration::from_nanos(2_333_333_333)));
        assert_eq!(told(90), Eta::DoesNotConverge);
    }

    #[test]
    fn a_guest_that_stands_still_is_sent_to_its_end() {
        let still = |sent, remaining| Transfer {
            is_still: true,
            ..report(1, sent, remaining, 0)
        };
        let told = etas(&[still(0, 256), still(32, 224)]);
        assert_eq!(told, [Eta::Unknown, Eta::In(seconds(7))]);
    }

    #[test]
    fn a_stream_that_moves_nothing_for_two_seconds_has_no_rate_and_one_that_begins_anew_has_none_yet()
     {
        let told = estimates(&[
            report(3, 100, 40, 0),
            report(3, 120, 20, 0),
            report(3, 120, 20, 0),
            report(3, 120, 20, 0),
            report(3, 150, 10, 0),
            report(1, 0, 256, 0),
        ]);
        let rates: Vec<_> = told.iter().map(|now| now.rate / MIB).collect();
        assert_eq!(rates, [0, 20, 10, 0, 15, 0]);
        assert_eq!(told[3], Estimate::default());
        assert_eq!(told[5], Estimate::default());
    }

    #[test]
    fn memory_that_need_not_be_sent_is_a_share_of_all() {
        assert_eq!(report(1, 0, 256, 0).percent(), 0.0);
        assert_eq!(report(2, 300, 64, 9).percent(), 75.0);
        assert_eq!(report(2, 300, 300, 9).percent(), 0.0, "more than all");
        assert_eq!(Transfer::default().percent(), 0.0);
    }

    fn any_report() -> impl Strategy<Value = (u64, Transfer)> {
        // Numbers as QEMU may say them, and some that it must not.
        let number = || prop_oneof![0..1u64 << 40, Just(0), any::<u64>()];
        let bytes = (number(), number(), number(), number());
        (0..5000u64, bytes, 0..5u64, any::<bool>()).prop_map(|(millis, bytes, pass, is_still)| {
            let (sent, remaining, total, dirty_rate) = bytes;
            let transfer = Transfer {
                sent,
                remaining,
                total,
                pass,
                dirty_rate,
                is_still,
            };
            (millis, transfer)
        })
    }

    /// A guest that writes over `hot` bytes, so many a second, while its memory is sent: the passes that follow, a look each
    /// tenth of a second.
    fn simulated(hot: f64, writes: f64, rate: f64) -> Vec<(Duration, Transfer)> {
        let (mut reports, mut pass, mut sent, mut now) = (Vec::new(), 1, 0.0, 0.0);
        let (mut remaining, mut dirty_rate) = (hot * 4.0, 0.0);
        while reports.len() < 2000 && remaining > rate * 0.02 {
            let lasts = remaining / rate;
            for tenth in 0..=(lasts * 10.0) as u64 {
                let gone = rate * tenth as f64 / 10.0;
                let at = Duration::from_secs_f64(now + tenth as f64 / 10.0);
                let transfer = Transfer {
                    sent: (sent + gone) as u64,
                    remaining: (remaining - gone) as u64,
                    total: (hot * 4.0) as u64,
                    pass,
                    dirty_rate: dirty_rate as u64,
                    is_still: false,
                };
                reports.push((at, transfer));
            }
            sent += remaining;
            now += lasts;
            remaining = (writes * lasts).min(hot);
            dirty_rate = remaining / lasts;
            pass += 1;
        }
        reports
    }

    proptest! {
        #[test]
        fn whatever_is_reported_no_figure_is_absurd(reports in prop::collection::vec(any_report(), 1..40)) {
            let (mut pace, mut at) = (Pace::default(), Duration::ZERO);
            for (millis, now) in reports {
                at += Duration::from_millis(millis);
                let told = pace.look(at, now);
                prop_assert!((0.0..=100.0).contains(&now.percent()));
                prop_assert_eq!(told.pass_left.is_some(), told.rate > 0);
                if let Eta::In(left) = told.eta {
                    prop_assert!(now.is_still || now.dirty_rate < told.rate, "{:?} of {:?}", told, now);
                    prop_assert!(told.pass_left.is_some_and(|pass| pass <= left), "{:?}", told);
                    prop_assert!(now.is_still || now.pass > 2);
                }
            }
        }

        #[test]
        fn a_guest_that_writes_as_fast_as_can_be_sent_never_shows_an_end(
            lasts in 1.0..10.0, rate in 1e6..1e9, faster in 1.0..100.0,
        ) {
            let mut pace = Pace::default();
            for (at, now) in simulated(rate * lasts, rate * faster, rate) {
                let told = pace.look(at, now).eta;
                prop_assert_eq!(told.left(), None);
                prop_assert!(told == Eta::DoesNotConverge || now.pass < 4 || at.as_secs() < 4);
            }
        }

        #[test]
        fn one_that_writes_slower_shows_an_end_that_comes(
            lasts in 1.0..10.0, rate in 1e6..1e9, slower in 0.05..0.8,
        ) {
            let reports = simulated(rate * lasts, rate * slower, rate);
            let over = reports.last().unwrap().0;
            let mut pace = Pace::default();
            for (at, now) in reports {
                let told = pace.look(at, now).eta;
                prop_assert_ne!(told, Eta::DoesNotConverge);
                prop_assert!(told.left().is_some() || now.pass < 4 || at.as_secs() < 4);
                if let Some(left) = told.left() {
                    // What the guest writes in the end is sent while it stands still.
                    let (left, truth) = (left.as_secs_f64(), (over - at).as_secs_f64());
                    prop_assert!((left - truth).abs() < 0.25 * truth + 0.2, "{left} s told, {truth} s taken");
                }
            }
        }
    }
}
