//! When a guest that leaves is stopped for the last of its memory. Pure: how far QEMU says it is in, what to do next out.
//!
//! QEMU would stop it by itself as soon as all that is left can be sent within the longest downtime. Then it also lets the
//! guest run by itself where it takes the migration for failed, and nobody can prove afterwards that it did not. A guest that
//! was stopped from outside it leaves alone. So QEMU is told of a downtime that hardly any guest comes to ([`LEAST`]), and
//! the guest is stopped from here, by the same measure.
//!
//! ```text
//!  pass 1 ─► too much is left ◄─► it fits ─► nothing slows QEMU ──────────────► stop
//!                                    │ it keeps to a bandwidth
//!                                    ▼
//!                                 is it asleep? ─► when does it wake? ─► just before it does: stop
//! ```
//!
//! Of a bandwidth QEMU sends a tenth of a second's share at once and sleeps for the rest of that, and nothing wakes it (7.2,
//! `migration_rate_limit`): a guest that is stopped at any moment stands still for the rest of the sleep for nothing, 50 ms
//! on average. The sleep shows in that nothing is sent, and it ends a tenth of a second after the one before. While it is
//! awake, and all that is left is within the share of this turn, it would not sleep before the end: that is as good a moment,
//! and the last before QEMU's own stop.
//!
//! QEMU stops a guest first, all the same, of which less is left than is sent before an answer of QEMU's can be read here: one
//! that writes next to nothing, or, on a host that is busy, one whose second pass is through in the turn in which the first
//! ends. What closes that is not built: to stop it just before the turn in which the first pass ends, to look at what is left,
//! and to let it run on if that is too much.

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
/// So long before it wakes the guest is stopped: two commands and their answers, and the errors of two timers.
const LEAD: Duration = Duration::from_millis(4);

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
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// QEMU is asked again after so long, or once it tells of anything.
    Ask(Duration),
    /// The guest is stopped after so long, if QEMU tells of nothing before.
    Stop(Duration),
}

/// What was seen so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Switchover {
    /// The pass, and when it was met.
    pass: Option<(u64, Duration)>,
    /// How QEMU keeps to a bandwidth, since the end is near.
    turns: Option<Turns>,
}

impl Switchover {
    /// What is to be done about one that runs for so long, and is so far.
    pub(super) fn look(&mut self, at: Duration, seen: Seen, bounds: Bounds) -> Next {
        if self.pass.is_none_or(|(pass, _)| pass != seen.pass) {
            self.pass = Some((seen.pass, at));
        }
        let bytes = self.left(at, seen);
        let left = Duration::try_from_secs_f64(bytes / seen.rate as f64).unwrap_or(Duration::MAX);
        // What the guest wrote in the first pass nobody knows before the second.
        let fits = seen.pass > 1 && left <= bounds.downtime;
        // Within a fifth: what holds it up is the bandwidth, and not the link.
        let is_capped = bounds.bandwidth > 0 && seen.rate >= bounds.bandwidth / 5 * 4;
        if !is_capped || left > bounds.downtime.saturating_add(NEAR) {
            self.turns = None;
            return match fits {
                true => Next::Stop(Duration::ZERO),
                false => Next::Ask(POLL),
            };
        }
        let turns = self.turns.get_or_insert_with(|| Turns::new(at, seen.sent));
        match turns.look(at, seen.sent) {
            Turn::Stalled => Next::Ask(POLL),
            Turn::Unknown => Next::Ask(FINE),
            Turn::None if fits => Next::Stop(Duration::ZERO),
            Turn::None => Next::Ask(POLL),
            Turn::Wakes(_) if fits && turns.has_room(seen.sent, bytes, bounds.bandwidth) => {
                Next::Stop(Duration::ZERO)
            }
            Turn::Wakes(wakes) if fits && wakes >= at + LEAD => Next::Stop(wakes - LEAD - at),
            // Until then, to see when exactly it does.
            Turn::Wakes(wakes) => Next::Ask(wakes.saturating_sub(at).max(FINE)),
        }
    }

    /// Bytes, what the guest wrote since this pass began among them.
    fn left(&self, at: Duration, seen: Seen) -> f64 {
        let began = self.pass.map_or(at, |(_, began)| began);
        let written = seen.dirty_rate as f64 * at.saturating_sub(began).as_secs_f64();
        seen.remaining as f64 + written
    }
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

    /// Whether so many bytes more are within its share of this turn, less what it may count otherwise.
    fn has_room(&self, sent: u64, left: f64, bandwidth: u64) -> bool {
        let share = bandwidth as f64 * TURN.as_secs_f64();
        sent.saturating_sub(self.woke_with) as f64 + left <= share * 15.0 / 16.0
    }

    fn look(&mut self, at: Duration, sent: u64) -> Turn {
        let (before, had_sent) = std::mem::replace(&mut self.last, (at, sent));
        let is_due = self.wakes.is_some_and(|wakes| at >= wakes);
        if at > before && sent == had_sent {
            self.is_asleep = true;
            self.since = at;
        } else if std::mem::take(&mut self.is_asleep) || is_due {
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
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MS: Duration = Duration::from_millis(1);

    const BOUNDS: Bounds = Bounds {
        bandwidth: 20 * MIB,
        downtime: Duration::from_millis(300),
    };

    /// What a QEMU has sent that keeps to 20 MiB/s: 2 MiB in the first 4 ms of each turn, which is a little too long, as its
    /// own are.
    fn sent(at: Duration, phase: Duration) -> u64 {
        let turn = (TURN + MS / 2).as_micros() as u64;
        let at = (at + TURN - phase).as_micros() as u64;
        2 * MIB * (at / turn) + 2 * MIB * (at % turn).min(4000) / 4000
    }

    /// How long from `at` until it wakes.
    fn sleeps(at: Duration, phase: Duration) -> Duration {
        let turn = (TURN + MS / 2).as_micros();
        let within = (at + TURN - phase).as_micros() % turn;
        Duration::from_micros((turn - within) as u64)
    }

    fn seen(remaining: u64) -> Seen {
        Seen {
            pass: 2,
            sent: 0,
            remaining,
            dirty_rate: MIB,
            rate: 20 * MIB,
        }
    }

    /// When the guest is stopped of which so much is left, beside what is sent from `from` on.
    fn stopped(from: Duration, left: u64, phase: Duration) -> Duration {
        let mut switchover = Switchover::default();
        let is_first = |at| sent(at, phase) < left + sent(from, phase);
        let mut at = from;
        loop {
            let moved = sent(at, phase);
            let seen = match is_first(at) {
                true => Seen {
                    pass: 1,
                    ..seen(left + sent(from, phase) - moved)
                },
                false => seen(MIB),
            };
            match switchover.look(
                at,
                Seen {
                    sent: moved,
                    ..seen
                },
                BOUNDS,
            ) {
                Next::Ask(after) => {
                    let until = at + after;
                    let had = is_first(at);
                    // QEMU tells of a new pass. A question takes a while, too.
                    while at < until && is_first(at) == had {
                        at += MS / 2;
                    }
                    at += MS / 2;
                }
                Next::Stop(after) => return at + after,
            }
        }
    }

    #[test]
    fn a_guest_is_stopped_just_before_qemu_wakes_wherever_it_is_met() {
        for phase in 0..100 {
            for left in [0, 3 * MIB, 30 * MIB] {
                let phase = phase * MS;
                let stopped = stopped(777 * MS, left, phase);
                let early = sleeps(stopped, phase);
                let what = format!("{phase:?}, {left}: stopped {early:?} before");
                // Or while it is awake.
                let is_awake = early > TURN - 4 * MS;
                assert!(
                    is_awake || early >= LEAD && early <= LEAD + 2 * FINE,
                    "{what}"
                );
            }
        }
    }

    #[test]
    fn whose_end_was_near_is_stopped_at_the_next_turn() {
        for phase in 0..100 {
            let left = 30 * MIB;
            let stopped = stopped(777 * MS, left, phase * MS);
            // Fifteen turns for that.
            let ends = 777 * MS + 15 * (TURN + MS / 2);
            assert!(stopped < ends + TURN + 10 * MS, "{phase}: {stopped:?}");
        }
    }

    #[test]
    fn while_it_is_awake_and_has_room_for_all_that_is_left_there_is_no_better_moment() {
        // Asleep, and awake for 1 ms of 4: a quarter of its share is sent.
        let looks = |left| {
            let mut switchover = Switchover::default();
            let mut next = Next::Ask(FINE);
            for (at, sent) in [(90, 0), (93, 0), (101, MIB / 2)] {
                let seen = Seen {
                    sent: 100 * MIB + sent,
                    ..seen(left)
                };
                next = switchover.look(at * MS, seen, BOUNDS);
            }
            next
        };
        assert_eq!(looks(MIB), Next::Stop(Duration::ZERO));
        assert!(matches!(looks(3 * MIB / 2), Next::Stop(after) if after > TURN / 2));
    }

    #[test]
    fn without_a_bandwidth_that_slows_it_the_guest_is_stopped_at_once() {
        for bandwidth in [0, 400 * MIB] {
            let bounds = Bounds {
                bandwidth,
                ..BOUNDS
            };
            let next = Switchover::default().look(MS, seen(MIB), bounds);
            assert_eq!(next, Next::Stop(Duration::ZERO));
        }
    }

    #[test]
    fn a_stream_that_never_sleeps_is_not_waited_for() {
        let mut switchover = Switchover::default();
        let mut at = Duration::ZERO;
        loop {
            let seen = Seen {
                sent: at.as_micros() as u64 * 20,
                ..seen(MIB)
            };
            match switchover.look(at, seen, BOUNDS) {
                Next::Ask(after) => at += after,
                Next::Stop(after) => break assert_eq!(after, Duration::ZERO),
            }
        }
        assert!(at <= 2 * TURN + 2 * FINE, "{at:?}");
    }

    #[test]
    fn nothing_is_stopped_whose_rest_takes_longer_than_the_guest_may_stand_still() {
        let free = Bounds {
            bandwidth: 0,
            ..BOUNDS
        };
        let stops = |seen| Switchover::default().look(MS, seen, free) != Next::Ask(POLL);
        assert!(stops(seen(6 * MIB)));
        assert!(!stops(seen(6 * MIB + 1)));
        // In the first pass nobody knows what is left.
        assert!(!stops(Seen {
            pass: 1,
            ..seen(MIB)
        }));
        assert!(!stops(Seen {
            rate: 0,
            ..seen(MIB)
        }));
        // What it wrote since the pass began is left as well.
        let mut later = Switchover::default();
        assert_eq!(later.look(MS, seen(7 * MIB), free), Next::Ask(POLL));
        let at = Duration::from_secs(1) + MS;
        assert_eq!(
            later.look(at, seen(5 * MIB), free),
            Next::Stop(Duration::ZERO)
        );
        assert_eq!(later.look(at, seen(5 * MIB + 1), free), Next::Ask(POLL));
    }

    #[test]
    fn a_guest_that_writes_more_again_is_left_to_run() {
        let mut switchover = Switchover::default();
        assert_eq!(switchover.look(MS, seen(MIB), BOUNDS), Next::Ask(FINE));
        let more = Seen {
            pass: 3,
            ..seen(60 * MIB)
        };
        assert_eq!(switchover.look(4 * MS, more, BOUNDS), Next::Ask(POLL));
    }
}
