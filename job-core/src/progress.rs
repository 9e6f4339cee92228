//! How far an async job is: rate, estimate and stall flag from the counters it reports, as plain data.
//!
//! The estimate is by the mean rate, unless the job gives its own ([`Estimate`]) or none can be given so: a job whose counter
//! has fallen back does its work in rounds, and how many there will be does not follow from how fast it is. No clock: the
//! time is handed in, in nanoseconds.

use std::time::Duration;

use crate::slots::Tick;

/// A report that came sooner than this after the last one is kept but not passed on.
/// Four a second is as much as a person or a status page can use.
const INTERVAL: Tick = 250_000_000;
/// A job whose counters stand still for this long is called stalled: longer than a migration iteration on a slow disk,
/// shorter than the patience of an operator.
const STALL: Tick = 10_000_000_000;

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// Units done, usually bytes.
    pub done: u64,
    /// Units in all as known now; 0 if unknown. It may grow (a guest that dirties its memory).
    pub total: u64,
    /// Units a second: since the job's first report, or as the job measures it.
    pub rate: f64,
    /// When it will be done, by that rate or as the job estimates it. None where that does not follow: the total is unknown,
    /// the counter has fallen back, nothing has moved for ten seconds, or the job says that it cannot say.
    pub eta: Option<Duration>,
    /// Nothing has moved for ten seconds.
    pub stalled: bool,
}

impl Progress {
    /// From 0 to 100; 0 while the total is unknown.
    #[must_use]
    pub fn percent(&self) -> f64 {
        if self.total == 0 {
            0.0
        } else {
            100.0 * (self.done.min(self.total) as f64 / self.total as f64)
        }
    }
}

/// What a job knows better than its counters tell: how fast it is now, and when it will be done.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "a job makes it")]
pub struct Estimate {
    /// Units a second.
    pub rate: f64,
    /// In how long it will be done; none if that cannot be said.
    pub eta: Option<Duration>,
}

/// The counters of one job.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tracker {
    first: Option<(Tick, u64)>,
    moved: Tick,
    told: Option<Tick>,
    done: u64,
    total: u64,
    was_complete: bool,
    /// Whether the counter fell back, so that its mean says nothing of the end.
    has_fallen: bool,
    /// The job's own, from the first one on.
    estimate: Option<Estimate>,
}

impl Tracker {
    /// Takes the counters in. Yields the picture if it is time to tell the world again.
    pub(crate) fn update(
        &mut self,
        now: Tick,
        (done, total): (u64, u64),
        estimate: Option<Estimate>,
    ) -> Option<Progress> {
        if self.first.is_none() || (done, total) != (self.done, self.total) {
            self.moved = now;
        }
        self.first.get_or_insert((now, done));
        self.has_fallen |= done < self.done;
        let last = self.estimate.map(|last| Estimate { eta: None, ..last });
        self.estimate = estimate.or(last);
        self.done = done;
        self.total = total;
        // Once: what somebody else counts may be complete again and again.
        let complete = total > 0 && done >= total && !self.was_complete;
        self.was_complete |= complete;
        let due = self
            .told
            .is_none_or(|told| now.saturating_sub(told) >= INTERVAL);
        (due || complete).then(|| {
            self.told = Some(now);
            self.picture(now).expect("counters were just taken in")
        })
    }

    /// The picture now, once something was reported.
    pub(crate) fn picture(&self, now: Tick) -> Option<Progress> {
        let (began, start) = self.first?;
        let seconds = now.saturating_sub(began) as f64 / 1e9;
        let rate = if seconds > 0.0 {
            self.done.saturating_sub(start) as f64 / seconds
        } else {
            0.0
        };
        let by_mean = || {
            let left = self.total.saturating_sub(self.done) as f64;
            let is_known = rate > 0.0 && self.total > 0 && !self.has_fallen;
            let eta = is_known.then(|| Duration::try_from_secs_f64(left / rate).ok());
            let eta = eta.flatten();
            Estimate { rate, eta }
        };
        let Estimate { rate, eta } = self.estimate.unwrap_or_else(by_mean);
        let stalled = now.saturating_sub(self.moved) >= STALL;
        Some(Progress {
            done: self.done,
            total: self.total,
            rate,
            eta: eta.filter(|_| !stalled),
            stalled,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Tick = 1_000_000_000;

    #[test]
    fn reports_are_limited_but_the_last_one_is_always_told() {
        let mut tracker = Tracker::default();
        assert!(tracker.update(0, (0, 100), None).is_some());
        assert!(tracker.update(SECOND / 10, (10, 100), None).is_none());
        assert!(tracker.update(SECOND / 4, (25, 100), None).is_some());
        assert!(tracker.update(SECOND / 3, (100, 100), None).is_some());
        assert!(tracker.update(SECOND / 3, (99, 100), None).is_none());
        assert!(
            tracker.update(SECOND / 3, (100, 100), None).is_none(),
            "once"
        );
    }

    #[test]
    fn rate_and_eta_follow_from_the_counters() {
        let mut tracker = Tracker::default();
        tracker.update(0, (0, 100), None);
        let picture = tracker
            .update(2 * SECOND, (50, 100), None)
            .expect("two seconds later");
        assert_eq!(picture.rate, 25.0);
        assert_eq!(picture.eta, Some(Duration::from_secs(2)));
        assert_eq!(picture.percent(), 50.0);
        assert!(!picture.stalled);
    }

    #[test]
    fn counters_that_stand_still_are_a_stall() {
        let mut tracker = Tracker::default();
        tracker.update(0, (5, 100), None);
        tracker.update(6 * SECOND, (5, 100), None);
        assert!(tracker.picture(11 * SECOND).expect("reported").stalled);
        tracker.update(12 * SECOND, (6, 100), None);
        assert!(!tracker.picture(13 * SECOND).expect("reported").stalled);
    }

    #[test]
    fn a_counter_that_has_fallen_back_says_nothing_of_the_end() {
        let mut tracker = Tracker::default();
        tracker.update(0, (0, 100), None);
        tracker.update(SECOND, (90, 100), None);
        assert!(tracker.picture(SECOND).expect("reported").eta.is_some());
        tracker.update(2 * SECOND, (60, 100), None);
        tracker.update(3 * SECOND, (95, 100), None);
        assert_eq!(tracker.picture(3 * SECOND).expect("reported").eta, None);
    }

    #[test]
    fn what_the_job_estimates_is_told_in_place_of_the_mean_and_never_mixed_with_it() {
        let mut tracker = Tracker::default();
        let told = |tracker: &Tracker, at| {
            let now = tracker.picture(at).expect("reported");
            (now.rate, now.eta)
        };
        let eta = Some(Duration::from_secs(7));
        tracker.update(0, (0, 100), Some(Estimate { rate: 5.0, eta }));
        assert_eq!(told(&tracker, SECOND), (5.0, eta));
        tracker.update(
            SECOND,
            (50, 100),
            Some(Estimate {
                rate: 6.0,
                eta: None,
            }),
        );
        assert_eq!(told(&tracker, SECOND), (6.0, None));
        tracker.update(2 * SECOND, (60, 100), Some(Estimate { rate: 6.0, eta }));
        assert_eq!(told(&tracker, 12 * SECOND), (6.0, None), "it stands still");
        tracker.update(13 * SECOND, (70, 100), None);
        assert_eq!(told(&tracker, 13 * SECOND), (6.0, None));
    }
}
