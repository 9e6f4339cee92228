//! How far an async job is: rate, estimate and stall flag from the counters it reports, as plain data.
//!
//! No clock: the time is handed in, in nanoseconds.

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
    /// Units a second since the job's first report.
    pub rate: f64,
    /// When it would be done at that rate.
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
            100.0 * self.done.min(self.total) as f64 / self.total as f64
        }
    }
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
}

impl Tracker {
    /// Takes the counters in. Yields the picture if it is time to tell the world again.
    pub(crate) fn update(&mut self, now: Tick, done: u64, total: u64) -> Option<Progress> {
        if self.first.is_none() || (done, total) != (self.done, self.total) {
            self.moved = now;
        }
        self.first.get_or_insert((now, done));
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
        let left = self.total.saturating_sub(self.done) as f64;
        let eta = (rate > 0.0 && self.total > 0)
            .then(|| left / rate)
            .and_then(|s| Duration::try_from_secs_f64(s).ok());
        let stalled = now.saturating_sub(self.moved) >= STALL;
        Some(Progress {
            done: self.done,
            total: self.total,
            rate,
            eta,
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
        assert!(tracker.update(0, 0, 100).is_some());
        assert!(tracker.update(SECOND / 10, 10, 100).is_none());
        assert!(tracker.update(SECOND / 4, 25, 100).is_some());
        assert!(tracker.update(SECOND / 3, 100, 100).is_some());
        assert!(tracker.update(SECOND / 3, 99, 100).is_none());
        assert!(tracker.update(SECOND / 3, 100, 100).is_none(), "once");
    }

    #[test]
    fn rate_and_eta_follow_from_the_counters() {
        let mut tracker = Tracker::default();
        tracker.update(0, 0, 100);
        let picture = tracker
            .update(2 * SECOND, 50, 100)
            .expect("two seconds later");
        assert_eq!(picture.rate, 25.0);
        assert_eq!(picture.eta, Some(Duration::from_secs(2)));
        assert_eq!(picture.percent(), 50.0);
        assert!(!picture.stalled);
    }

    #[test]
    fn counters_that_stand_still_are_a_stall() {
        let mut tracker = Tracker::default();
        tracker.update(0, 5, 100);
        tracker.update(6 * SECOND, 5, 100);
        assert!(tracker.picture(11 * SECOND).expect("reported").stalled);
        tracker.update(12 * SECOND, 6, 100);
        assert!(!tracker.picture(13 * SECOND).expect("reported").stalled);
    }
}
