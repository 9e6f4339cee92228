//! When a guest that leaves is stopped for the last of its memory. Pure: how far QEMU says it is in, what to do next out.
//!
//! QEMU would stop it by itself as soon as all that is left can be sent within the longest downtime. Then it also lets the
//! guest run by itself where it takes the migration for failed, and nobody can prove afterwards that it did not. A guest that
//! was stopped from outside it leaves alone. So QEMU is told of a downtime that hardly any guest comes to ([`LEAST`]), and
//! the guest is stopped from here, by the same measure.
//!
//! ```text
//!  a pass ─► too much is left ◄─► it fits ─► nothing slows QEMU ───────────────► stop
//!              │                     └─ it keeps to a bandwidth ─► it sleeps ─► just before it wakes: stop
//!              ▼
//!            just before the pass ends: stop on trial ─► all is through, or the rest fits: that was the stop
//!                                           └─► too much is left: the guest runs on
//! ```
//!
//! Of a bandwidth QEMU sends a tenth of a second's share at once and sleeps for the rest of that, and nothing wakes it (7.2,
//! `migration_rate_limit`): a guest that is stopped at any moment stands still for the rest of the sleep for nothing, 50 ms
//! on average. The sleep shows in that nothing is sent, and it ends a tenth of a second after the one before. While it is
//! awake, and all that is left is within the share of this turn, it would not sleep before the end: that is as good a moment,
//! and the last before QEMU's own stop.
//!
//! How much a guest wrote during a pass nobody knows before that has ended, and if it is little, the next pass is over, and
//! the guest stopped by QEMU, before an answer of QEMU's can be read here. So it is stopped on trial before that, for some
//! milliseconds. One that was let run again [so often](TRIALS) is left alone until what is left fits.
//!
//! What is left to QEMU: a guest that is allowed next to no downtime, and memory of which the last moves faster than can be
//! asked, since much of it is empty, since all has moved before QEMU's turns are known, in a few tenths of a second, or since
//! the host is too busy.

use std::time::Duration;

/// What QEMU is told of the longest downtime. With 0 it would stop the guest at the end of the first pass, with all that was
/// written meanwhile still to be sent.
pub(super) const LEAST: Duration = Duration::from_millis(1);

/// How often QEMU is asked how far it is, where none of its events comes first.
pub(super) const POLL: Duration = Duration::from_millis(100);
/// The same, to see it fall asleep and wake.
const FINE: Duration = Duration::from_millis(3);
/// From one of its wakes to the next (QEMU, `BUFFER_DELAY`).
const TURN: Duration = Duration::from_millis(100);
/// So long before all that is left fits its turns are learned.
const NEAR: Duration = Duration::from_millis(300);
/// So long before it wakes the guest is stopped at the least.
const LEAD: Duration = Duration::from_millis(4);
/// How often a guest is stopped on trial: each time its disks are brought to rest.
const TRIALS: u8 = 3;
/// How long after its pass was to end a trial is over at the latest: QEMU may take all of a turn for its share.
const LATE: Duration = TURN;
/// A stop that takes longer waits for the guest's disks, and is not made on trial again.
const SLOW: Duration = Duration::from_millis(50);
/// Between the first two looks at a pass.
const SOON: Duration = Duration::from_millis(20);

/// What a migration that leaves is held to. Both may change while it is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Bytes a second; 0 is no limit.
    pub(super) bandwidth: u64,
    /// How long the guest may stand still for the last of its memory.
    pub(super) downtime: Duration,
}

/// How far it is, by QEMU's word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) pass: u64,
    /// Bytes.
    pub(super) sent: u64,
    /// Bytes.
    pub(super) remaining: u64,
    /// Bytes a second that the guest writes anew, over the passes before.
    pub(super) dirty_rate: u64,
    /// Bytes a second that were sent last; 0 before anything is measured.
    pub(super) rate: u64,
    /// How long QEMU took to say so.
    pub(super) took: Duration,
}

impl Seen {
    /// So long before it wakes, or a pass ends, the guest is stopped: two commands and their answers, and the errors of two
    /// timers.
    fn lead(&self) -> Duration {
        (self.took * 3 / 2).clamp(LEAD, TURN / 4)
    }
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// QEMU is asked again after so long, or once it tells of anything.
    Ask(Duration),
    /// The guest is stopped after so long, if QEMU tells of nothing before.
    Stop(Duration),
    /// The same, and it may run on after that: [`Switchover::on_trial`] says. Meanwhile QEMU keeps to so many bytes a second.
    Try(Duration, u64),
}

/// What is to be done about a guest that was stopped on trial, and whose migration is not about to end yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trial {
    /// QEMU is asked again after so long, or once it tells of anything.
    Ask(Duration),
    /// What is left fits: it stays as it is.
    Keep,
    /// Too much is left, or what is left does not go now: it runs on.
    LetRun,
}

/// What was seen so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Switchover {
    /// The pass, and when it was met.
    pass: Option<(u64, Duration)>,
    /// How QEMU keeps to a bandwidth, since the end is near.
    turns: Option<Turns>,
    /// How much was left of the pass when it was measured last.
    ebb: Option<(Duration, u64)>,
    trials: u8,
    trial: Option<Proposed>,
}

/// A trial that was proposed.
#[derive(Clone, Copy, Debug)]
struct Proposed {
    pass: u64,
    /// When the pass goes on to its end.
    ends: Duration,
}

impl Switchover {
    /// What is to be done about one that runs for so long, and is so far.
    pub(super) fn look(&mut self, at: Duration, seen: Seen, bounds: Bounds) -> Next {
        let (bytes, left) = self.left(at, seen);
        // What the guest wrote in the first pass nobody knows before the second.
        let fits = seen.pass > 1 && left <= bounds.downtime;
        // Within a fifth: what holds it up is the bandwidth, and not the link.
        let is_capped = bounds.bandwidth > 0 && seen.rate >= bounds.bandwidth / 5 * 4;
        if !is_capped {
            self.turns = None;
            return self.look_at_a_stream(at, seen, bounds, fits);
        }
        if left > bounds.downtime.saturating_add(NEAR) {
            self.turns = None;
            return Next::Ask(POLL);
        }
        let (lead, may_try) = (seen.lead(), self.may_try(seen, bounds));
        let turns = self.turns.get_or_insert_with(|| Turns::new(at, seen.sent));
        // A little before it wakes, to see when exactly it does.
        let rests = |wakes: Duration| wakes.saturating_sub(at + lead + 2 * FINE).max(FINE);
        match turns.look(at, seen.sent, share(bounds.bandwidth)) {
            Turn::Stalled => Next::Ask(POLL),
            Turn::Unknown => Next::Ask(FINE),
            Turn::None => self.look_at_a_stream(at, seen, bounds, fits),
            Turn::Wakes(_) if fits && turns.has_room(seen.sent, bytes, bounds.bandwidth) => {
                Next::Stop(Duration::ZERO)
            }
            Turn::Wakes(wakes) if fits && wakes >= at + lead => Next::Stop(wakes - lead - at),
            Turn::Wakes(wakes) if !fits && may_try => {
                let (is_asleep, share) = (turns.is_asleep, share(bounds.bandwidth));
                // A little more than that may go in a turn.
                let ends = |share: f64| seen.remaining as f64 <= share * 9.0 / 8.0;
                match is_asleep {
                    true if ends(share) => self.propose(at, seen, bounds, wakes),
                    false if ends(share - turns.sent(seen.sent)) => {
                        self.propose(at, seen, bounds, at)
                    }
                    // Nobody knows how much that will be when it falls asleep.
                    false if ends(2.0 * share) => Next::Ask(FINE),
                    _ => Next::Ask(rests(wakes)),
                }
            }
            Turn::Wakes(wakes) => Next::Ask(rests(wakes)),
        }
    }

    /// The same of one whose QEMU does not sleep.
    fn look_at_a_stream(&mut self, at: Duration, seen: Seen, bounds: Bounds, fits: bool) -> Next {
        if fits {
            return Next::Stop(Duration::ZERO);
        }
        if !self.may_try(seen, bounds) {
            return Next::Ask(POLL);
        }
        let (since, had) = *self.ebb.get_or_insert((at, seen.remaining));
        if at < since + FINE {
            return Next::Ask(SOON);
        }
        self.ebb = Some((at, seen.remaining));
        let pace = had.saturating_sub(seen.remaining) as f64 / (at - since).as_secs_f64();
        let ends = seen.remaining as f64 / pace;
        let ends = Duration::try_from_secs_f64(ends).unwrap_or(Duration::MAX);
        // It may be faster in the end.
        match ends.saturating_sub(seen.lead()) / 2 {
            after if after > FINE + seen.took.min(SOON) => Next::Ask(after.min(POLL)),
            _ => self.propose(at, seen, bounds, at + ends),
        }
    }

    /// A trial, just before the pass goes on to its end. All that fits is to go then, so that nobody stands still for a sleep.
    fn propose(&mut self, at: Duration, seen: Seen, bounds: Bounds, ends: Duration) -> Next {
        let pass = seen.pass;
        self.trial = Some(Proposed { pass, ends });
        let fits = bounds.bandwidth as f64 * bounds.downtime.as_secs_f64();
        let most = seen.remaining as f64 + fits;
        // Beside what was sent in this turn.
        let bandwidth = match bounds.bandwidth {
            0 => 0,
            least => least.saturating_add((most / TURN.as_secs_f64()) as u64),
        };
        Next::Try(ends.saturating_sub(at + seen.lead()), bandwidth)
    }

    /// A trial stands still for longer than so short a downtime, and only so many are made.
    fn may_try(&self, seen: Seen, bounds: Bounds) -> bool {
        self.trials < TRIALS && bounds.downtime >= 2 * seen.lead()
    }

    /// The guest was stopped as [proposed](Next::Try), which took so long.
    pub(super) fn tried(&mut self, took: Duration) {
        self.trials = match took > SLOW {
            true => TRIALS,
            false => self.trials + 1,
        };
    }

    /// What is to be done about a guest that was stopped as [proposed](Next::Try).
    pub(super) fn on_trial(&mut self, at: Duration, seen: Seen, bounds: Bounds) -> Trial {
        let (_, left) = self.left(at, seen);
        if let Some(turns) = &mut self.turns {
            turns.look(at, seen.sent, share(bounds.bandwidth));
        }
        match self.trial {
            Some(proposed) if seen.pass > proposed.pass => match left <= bounds.downtime {
                true => Trial::Keep,
                false => Trial::LetRun,
            },
            Some(proposed) if at <= proposed.ends + LATE.min(bounds.downtime) => Trial::Ask(FINE),
            _ => Trial::LetRun,
        }
    }

    /// Bytes, what the guest wrote since this pass began among them, and how long they take.
    fn left(&mut self, at: Duration, seen: Seen) -> (f64, Duration) {
        let (_, began) = match self.pass {
            Some((pass, began)) if pass == seen.pass => (pass, began),
            _ => {
                self.ebb = None;
                *self.pass.insert((seen.pass, at))
            }
        };
        let written = seen.dirty_rate as f64 * at.saturating_sub(began).as_secs_f64();
        let bytes = seen.remaining as f64 + written;
        let left = Duration::try_from_secs_f64(bytes / seen.rate as f64);
        (bytes, left.unwrap_or(Duration::MAX))
    }
}

/// Bytes that QEMU sends in a turn.
fn share(bandwidth: u64) -> f64 {
    bandwidth as f64 * TURN.as_secs_f64()
}

/// When QEMU sleeps and wakes, from how much it has sent.
#[derive(Clone, Copy, Debug)]
struct Turns {
    /// When it was seen asleep last, or looked at first.
    since: Duration,
    /// When it was seen to have sent more.
    moved: Duration,
    /// When so much had been sent.
    last: (Duration, u64),
    is_asleep: bool,
    /// What had been sent when it woke last.
    woke_with: u64,
    /// When it wakes next.
    wakes: Option<Duration>,
}

/// What is known of its turns.
enum Turn {
    Unknown,
    /// Nothing is sent at all.
    Stalled,
    /// It does not sleep.
    None,
    Wakes(Duration),
}

impl Turns {
    fn new(at: Duration, sent: u64) -> Self {
        Self {
            since: at,
            moved: at,
            last: (at, sent),
            is_asleep: false,
            woke_with: sent,
            wakes: None,
        }
    }

    /// Bytes that were sent since it woke.
    fn sent(&self, sent: u64) -> f64 {
        sent.saturating_sub(self.woke_with) as f64
    }

    /// Whether so many bytes more are within its share of this turn, less what it may count otherwise.
    fn has_room(&self, sent: u64, left: f64, bandwidth: u64) -> bool {
        self.sent(sent) + left <= share(bandwidth) * 15.0 / 16.0
    }

    /// A share is so many bytes. One that stands still for some milliseconds with its share not sent may wait for its link.
    fn look(&mut self, at: Duration, sent: u64, share: f64) -> Turn {
        let (before, had_sent) = std::mem::replace(&mut self.last, (at, sent));
        let has_sent_its_share = self.wakes.is_some() && self.sent(sent) >= share * 7.0 / 8.0;
        if at > before && sent == had_sent {
            if has_sent_its_share || at.saturating_sub(self.moved) >= TURN / 4 {
                self.is_asleep = true;
                self.since = at;
            }
        } else if std::mem::take(&mut self.is_asleep) {
            // It woke after it was looked at last, and not before it was to.
            let woke = self.wakes.map_or(before, |wakes| before.max(wakes));
            self.wakes = Some(woke.min(at) + TURN);
            self.woke_with = had_sent;
        }
        if sent != had_sent {
            self.moved = at;
        }
        match self.wakes {
            _ if at.saturating_sub(self.moved) > 2 * TURN => Turn::Stalled,
            Some(wakes) if at < wakes + TURN / 2 => Turn::Wakes(wakes),
            _ if at.saturating_sub(self.since) > 2 * TURN => Turn::None,
            _ => Turn::Unknown,
        }
    }
}

#[cfg(test)]
mod tests;
