//! What a driver counts, as a plain snapshot: jobs, commands, events, silences, what came back.
//!
//! A snapshot and not the `metrics` facade: that records into one registry of the whole process, under names and with
//! buckets that the daemon's author could not choose, and a kit must not choose for them. Whoever exports reads this once a
//! scrape and names it as they like. Each count is one addition without a lock, so it costs next to nothing, read or not.
//!
//! Knows no domain: those who count hold the [`Meter`].

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use job_core::{BeginError, Outcome};

use crate::error::Effect;

/// Buckets of a [`Histogram`]; the last one is for all that takes longer than half an hour.
const BUCKETS: usize = 32;

/// What all domains of a driver came to, since it was built.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Metrics {
    /// Jobs of operations.
    pub jobs: JobMetrics,
    /// Commands of operations to QEMU.
    pub monitor: CommandMetrics,
    /// Commands to guest agents.
    pub agent: CommandMetrics,
    /// What there is one of for each domain as well.
    pub counts: Counts,
}

/// Jobs: how long they waited, how long they were held, how they ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct JobMetrics {
    /// From asking to the grant.
    pub waited: Histogram,
    /// From the grant to the end.
    pub held: Histogram,
    /// Not granted: the deadline came first.
    pub timed_out: u64,
    /// Not granted for another reason: too many waited, the guest went, a wrapper refused.
    pub refused: u64,
    /// Done.
    pub done: u64,
    /// Failed, panicked or evicted.
    pub failed: u64,
    /// Cancelled, and undone.
    pub cancelled: u64,
    /// Ended by the end of their guest.
    pub gone: u64,
}

/// Commands by their outcome.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CommandMetrics {
    /// From the command to its end, whatever that was.
    pub took: Histogram,
    /// Answered.
    pub done: u64,
    /// Answered with an error.
    pub refused: u64,
    /// Sent, and not answered in time or at all.
    pub unknown: u64,
    /// Not sent.
    pub unsent: u64,
}

/// What is counted for each domain, and for all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Events of QEMU.
    pub events: u64,
    /// Times that a subscriber was too slow and was told so.
    pub gaps: u64,
    /// Replies that came after their caller had left.
    pub late_replies: u64,
    /// Times that QEMU was found to be silent, also out of band.
    pub silences: u64,
    /// Times that a connection was made anew, to a monitor that was lost or after this driver came back.
    pub reconnects: u64,
    /// Guests of an earlier driver that were looked at.
    pub recoveries: u64,
}

/// How many took how long, in buckets that double from a microsecond on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Histogram {
    /// How many there were in each bucket; [`bound`](Self::bound) is where it ends.
    pub buckets: [u64; BUCKETS],
    /// What they took together.
    pub sum: Duration,
}

impl Histogram {
    /// All of them.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// What those in that bucket took at most; none for the last, which has no end.
    #[must_use]
    pub fn bound(bucket: usize) -> Option<Duration> {
        let micros = 1_u64.checked_shl(u32::try_from(bucket).ok()?)?;
        (bucket + 1 < BUCKETS).then(|| Duration::from_micros(micros))
    }

    /// The bound of the bucket in which that part of them (0 to 1) is reached; none if there are none, or that is the
    /// last.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let wanted = (self.count() as f64 * part.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        let reached = self.buckets.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        Self::bound(reached?)
    }
}

#[derive(Default)]
pub(crate) struct Times {
    buckets: [AtomicU64; BUCKETS],
    micros: AtomicU64,
}

impl Times {
    fn add(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        // Of 1 µs and less the first, of 2 the second, of 3 and 4 the third.
        let bucket = (u64::BITS - micros.saturating_sub(1).leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
        self.micros.fetch_add(micros, Relaxed);
    }

    fn read(&self) -> Histogram {
        Histogram {
            buckets: std::array::from_fn(|bucket| self.buckets[bucket].load(Relaxed)),
            sum: Duration::from_micros(self.micros.load(Relaxed)),
        }
    }
}

/// What is counted of a domain, and of all.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) events: AtomicU64,
    pub(crate) gaps: AtomicU64,
    pub(crate) late_replies: AtomicU64,
    pub(crate) silences: AtomicU64,
    pub(crate) reconnects: AtomicU64,
    pub(crate) recoveries: AtomicU64,
}

impl Tally {
    pub(crate) fn read(&self) -> Counts {
        Counts {
            events: self.events.load(Relaxed),
            gaps: self.gaps.load(Relaxed),
            late_replies: self.late_replies.load(Relaxed),
            silences: self.silences.load(Relaxed),
            reconnects: self.reconnects.load(Relaxed),
            recoveries: self.recoveries.load(Relaxed),
        }
    }
}

/// Counts one.
pub(crate) fn one(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// What all operations of a driver count with.
#[derive(Default)]
pub(crate) struct Meter {
    waited: Times,
    held: Times,
    timed_out: AtomicU64,
    refused: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    gone: AtomicU64,
    pub(crate) monitor: CommandMeter,
    pub(crate) agent: CommandMeter,
    pub(crate) tally: Tally,
}

impl Meter {
    /// A job was asked for, so long ago, and this came of it.
    pub(crate) fn asked<J>(&self, waited: Duration, granted: &Result<J, BeginError>) {
        match granted {
            Ok(_) => self.waited.add(waited),
            Err(BeginError::TimedOut { .. }) => one(&self.timed_out),
            Err(_) => one(&self.refused),
        }
    }

    /// A job that was held so long ended.
    pub(crate) fn ended(&self, held: Duration, outcome: &Outcome) {
        self.held.add(held);
        one(match outcome {
            Outcome::Done => &self.done,
            Outcome::Cancelled => &self.cancelled,
            Outcome::Gone(_) => &self.gone,
            _ => &self.failed,
        });
    }

    pub(crate) fn read(&self) -> Metrics {
        Metrics {
            jobs: JobMetrics {
                waited: self.waited.read(),
                held: self.held.read(),
                timed_out: self.timed_out.load(Relaxed),
                refused: self.refused.load(Relaxed),
                done: self.done.load(Relaxed),
                failed: self.failed.load(Relaxed),
                cancelled: self.cancelled.load(Relaxed),
                gone: self.gone.load(Relaxed),
            },
            monitor: self.monitor.read(),
            agent: self.agent.read(),
            counts: self.tally.read(),
        }
    }
}

/// What is counted of commands.
#[derive(Default)]
pub(crate) struct CommandMeter {
    took: Times,
    done: AtomicU64,
    refused: AtomicU64,
    unknown: AtomicU64,
    unsent: AtomicU64,
}

impl CommandMeter {
    /// A command that took so long ended: done, or with that effect.
    pub(crate) fn ended(&self, took: Duration, failed: Option<Effect>) {
        self.took.add(took);
        one(match failed {
            None => &self.done,
            Some(Effect::Refused) => &self.refused,
            Some(Effect::Unknown) => &self.unknown,
            Some(Effect::None) => &self.unsent,
        });
    }

    fn read(&self) -> CommandMetrics {
        CommandMetrics {
            took: self.took.read(),
            done: self.done.load(Relaxed),
            refused: self.refused.load(Relaxed),
            unknown: self.unknown.load(Relaxed),
            unsent: self.unsent.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_lands_in_the_bucket_that_ends_with_it() {
        for bucket in 0..BUCKETS - 1 {
            let bound = Histogram::bound(bucket).unwrap();
            let times = Times::default();
            times.add(bound);
            times.add(bound + Duration::from_micros(1));
            let read = times.read();
            assert_eq!((read.buckets[bucket], read.buckets[bucket + 1]), (1, 1));
            assert_eq!(read.quantile(0.5), Some(bound));
        }
        let times = Times::default();
        times.add(Duration::ZERO);
        times.add(Duration::MAX);
        let read = times.read();
        assert_eq!((read.buckets[0], read.buckets[BUCKETS - 1]), (1, 1));
        assert_eq!(read.quantile(1.0), None, "it has no end");
    }

    #[test]
    fn nothing_has_no_quantile_and_all_are_counted() {
        assert_eq!(Histogram::default().quantile(0.5), None);
        let times = Times::default();
        for micros in 1..=1000 {
            times.add(Duration::from_micros(micros));
        }
        let read = times.read();
        assert_eq!(read.count(), 1000);
        assert_eq!(read.sum, Duration::from_micros(500_500));
        assert_eq!(read.quantile(0.5), Some(Duration::from_micros(512)));
        assert_eq!(read.quantile(0.99), Some(Duration::from_micros(1024)));
    }
}
