//! The one lock of a domain, the clock and the log lines.
//!
//! Decides nothing; [`slots`](crate::slots) does. No user code runs under the lock: wakers are woken, signals fired and
//! log lines written after it is released. Knows no runtime: deadlines are futures that the callers bring.

use std::fmt;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tracing::{debug, warn};

use crate::error::{BeginError, CancelError, Gone, GoneWhy};
use crate::held::{Held, Waiting};
use crate::kind::{JobKind, Kind, KindSet};
use crate::label::Label;
use crate::ledger::{After, Ended, Ledger, Running, SLOTS, Told};
use crate::overdue::Overdue;
use crate::slots::{Admission, Effects, Failure, SlotName, Tick, Want};
use crate::snapshot::{AsyncRecord, Outcome, Snapshot, Waiting as WaitingPicture};
use crate::sync::{Arc, Mutex, lock};
use crate::token::{Stop, Token};

/// Guards that outlive their guest lose their slots after this, so that clean-up cannot be kept waiting for ever.
const GRACE: Duration = Duration::from_secs(10);

/// The answer to a request: a slot, a place in the queue, or no.
pub(crate) type Admitted = Result<Result<Held, Waiting>, BeginError>;

/// What every guard and waiter of a domain points to.
pub(crate) struct Shared {
    pub(crate) domain: Label,
    pub(crate) overdue: Option<Overdue>,
    pub(crate) ledger: Mutex<Ledger>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Shared").field(&self.domain).finish()
    }
}

impl Shared {
    /// Runs `f` under the lock, and what it left to do after it.
    pub(crate) fn with<R>(self: &Arc<Self>, f: impl FnOnce(&mut Ledger, &mut After) -> R) -> R {
        let mut after = After::default();
        let mut ledger = lock(&self.ledger);
        let result = f(&mut ledger, &mut after);
        let overdue = self
            .overdue
            .as_ref()
            .filter(|_| !ledger.listed && ledger.slots.has_overdue());
        ledger.listed |= overdue.is_some();
        drop(ledger);
        if let Some(overdue) = overdue {
            overdue.add(self);
        }
        if !after.is_empty() {
            after.run();
        }
        result
    }

    /// Asks for a job: granted at once, or a place in the queue.
    pub(crate) fn request(
        self: Arc<Self>,
        want: Want,
        owner: Label,
        flow: Option<u64>,
    ) -> Admitted {
        let now = now();
        let answer = self.with(|ledger, after| ledger.admit(want, &owner, flow, now, after));
        self.admitted(answer.map_err(|error| *error)?, want, &owner, now)
    }

    /// Asks for a part of an async job: same owner, same flow.
    pub(crate) fn request_part(self: &Arc<Self>, want: Want) -> Admitted {
        let now = now();
        let (answer, owner) = self.with(|ledger, after| {
            let running = ledger.running[SlotName::Async as usize].as_ref();
            let owner = running.map_or_else(|| "async".into(), |running| running.owner.clone());
            let slot = ledger.slots.slot(SlotName::Async);
            let flow = slot
                .filter(|slot| want.parent() == Some(slot.id))
                .map(|slot| slot.flow);
            (ledger.admit(want, &owner, flow, now, after), owner)
        });
        let answer = answer.map_err(|error| *error)?;
        self.clone().admitted(answer, want, &owner, now)
    }

    /// Asks for a job that must be free now.
    pub(crate) fn try_request(
        self: Arc<Self>,
        want: Want,
        owner: Label,
        flow: Option<u64>,
    ) -> Result<Held, BeginError> {
        let now = now();
        let answer = self.with(|ledger, after| {
            ledger.reclaim(now, after);
            if ledger.slots.is_closed() || ledger.slots.could_start(want) {
                ledger.admit(want, &owner, flow, now, after)
            } else {
                Err(Box::new(BeginError::Busy {
                    wanted: want.kind(),
                    holder: ledger.blocker(want, now).map(Box::new),
                }))
            }
        });
        let answer = answer.map_err(|error| *error)?;
        let admitted = self.admitted(answer, want, &owner, now)?;
        Ok(admitted.unwrap_or_else(|_| unreachable!("what could start was granted")))
    }

    fn admitted(
        self: Arc<Self>,
        (id, generation, admission): (u64, u64, Admission),
        want: Want,
        owner: &Label,
        now: Tick,
    ) -> Admitted {
        match admission {
            Admission::Granted => {
                debug!(domain = %self.domain, job = id, kind = %want.kind(), owner = %owner, "job granted");
                Ok(Ok(Held {
                    shared: self,
                    id,
                    generation,
                    name: want.slot(),
                    kind: want.kind(),
                    outcome: None,
                }))
            }
            Admission::Queued(key) => {
                debug!(domain = %self.domain, job = id, kind = %want.kind(), owner = %owner, "job waits");
                Ok(Err(Waiting::new(self, id, want, now, key)))
            }
        }
    }

    pub(crate) fn release(self: &Arc<Self>, name: SlotName, id: u64, outcome: Outcome) {
        let now = now();
        let panicked = outcome == Outcome::Panicked;
        let told = self.with(|ledger, after| {
            let slot = ledger.slots.slot(name).filter(|slot| slot.id == id)?;
            let (kind, generation, began) = (slot.want.kind(), slot.generation, slot.granted);
            let Running {
                owner,
                waited,
                mut told,
            } = ledger.running[name as usize].take()?;
            let mut effects = Effects::default();
            ledger.slots.release(name, id, now, &mut effects);
            if !ledger.slots.is_quiet() {
                ledger.settle(effects, now, after);
                ledger.reclaim(now, after);
            }
            if kind != Kind::Nested {
                let phase = told.as_mut().and_then(|told| told.phase.take());
                ledger.remember(Ended {
                    id,
                    kind,
                    owner,
                    generation,
                    waited,
                    began,
                    at: now,
                    phase,
                    outcome,
                });
            }
            told
        });
        drop(told);
        if panicked {
            warn!(domain = %self.domain, job = id, "job ended by a panic");
        } else {
            debug!(domain = %self.domain, job = id, "job ended");
        }
    }

    pub(crate) fn set_mask(self: &Arc<Self>, id: u64, mask: KindSet) {
        let now = now();
        self.with(|ledger, after| {
            let mut effects = Effects::default();
            ledger.slots.set_mask(id, mask, now, &mut effects);
            ledger.settle(effects, now, after);
        });
    }

    pub(crate) fn end_generation(self: &Arc<Self>, why: GoneWhy, owner: Label) -> Admitted {
        let now = now();
        let answer = self.with(|ledger, after| {
            let generation = ledger.slots.generation();
            let stop = Stop::Gone {
                generation,
                why: why.clone(),
            };
            ledger.ended = Some(Box::new((
                Gone {
                    generation,
                    why: why.clone(),
                },
                now,
            )));
            let mut effects = Effects::default();
            ledger.slots.end_generation(&mut effects);
            ledger.settle(effects, now, after);
            let tokens = ledger
                .running
                .iter()
                .flatten()
                .filter_map(|running| running.told.as_ref()?.token.clone());
            for token in tokens {
                after.fire(token, stop.clone());
            }
            ledger.admit(Want::Normal(JobKind::Destroy), &owner, None, now, after)
        });
        debug!(domain = %self.domain, %why, "generation ended");
        let want = Want::Normal(JobKind::Destroy);
        let answer = answer.map_err(|error| *error)?;
        self.clone().admitted(answer, want, &owner, now)
    }

    pub(crate) fn cancel(
        self: &Arc<Self>,
        pick: impl Fn(u64, Kind) -> bool,
        by: Label,
    ) -> Result<u64, CancelError> {
        self.with(|ledger, after| {
            for name in SLOTS {
                let Some(slot) = ledger
                    .slots
                    .slot(name)
                    .filter(|slot| pick(slot.id, slot.want.kind()))
                else {
                    continue;
                };
                let id = slot.id;
                let Some(running) = &mut ledger.running[name as usize] else {
                    continue;
                };
                let told = running.told.get_or_insert_default();
                if told.decided {
                    return Err(CancelError::TooLate {
                        phase: told.phase.clone(),
                    });
                }
                let token = told.token.get_or_insert_with(Token::new).clone();
                after.fire(token, Stop::Cancelled(by));
                return Ok(id);
            }
            Err(CancelError::NotRunning)
        })
    }

    /// Whether a guard of `generation` still gives a right.
    pub(crate) fn check(&self, generation: u64) -> Result<(), Gone> {
        let ledger = lock(&self.ledger);
        if ledger.slots.generation() == generation {
            Ok(())
        } else {
            Err(ledger.gone(generation))
        }
    }

    pub(crate) fn token(self: &Arc<Self>, name: SlotName, id: u64, generation: u64) -> Token {
        let (token, late) = self.with(|ledger, _| {
            let late = (ledger.slots.generation() != generation).then(|| ledger.gone(generation));
            let token = match ledger.told(name, id) {
                Some(told) => told.token.get_or_insert_with(Token::new).clone(),
                None => Token::new(),
            };
            (token, late)
        });
        if let Some(Gone { generation, why }) = late {
            token.fire(Stop::Gone { generation, why });
        }
        token
    }

    pub(crate) fn tell_command(self: &Arc<Self>, name: SlotName, id: u64, command: Option<Label>) {
        self.tell(name, id, |told| told.command = command);
    }

    pub(crate) fn tell_phase(self: &Arc<Self>, name: SlotName, id: u64, phase: Option<Label>) {
        if let Some(phase) = &phase {
            debug!(domain = %self.domain, job = id, phase = %phase, "job phase");
        }
        self.tell(name, id, |told| told.phase = phase);
    }

    pub(crate) fn decide(self: &Arc<Self>, name: SlotName, id: u64) {
        self.tell(name, id, |told| told.decided = true);
    }

    fn tell(self: &Arc<Self>, name: SlotName, id: u64, change: impl FnOnce(&mut Told)) {
        self.with(|ledger, _| ledger.told(name, id).map(change));
    }

    pub(crate) fn report(
        self: &Arc<Self>,
        name: SlotName,
        id: u64,
        counters: (u64, u64),
        estimate: Option<crate::Estimate>,
    ) -> Option<crate::Progress> {
        let now = now();
        self.with(|ledger, _| {
            ledger
                .told(name, id)
                .and_then(|told| told.tracker.update(now, counters, estimate))
        })
    }

    pub(crate) fn record(&self, id: u64) -> Option<AsyncRecord> {
        let ledger = lock(&self.ledger);
        let slot = ledger
            .slots
            .slot(SlotName::Async)
            .filter(|slot| slot.id == id)?;
        let Want::Async(kind, mask) = slot.want else {
            return None;
        };
        let running = ledger.running[SlotName::Async as usize].as_ref()?;
        let phase = running.told.as_ref().and_then(|told| told.phase.clone());
        let decided = running.told.as_ref().is_some_and(|told| told.decided);
        Some(AsyncRecord {
            id,
            kind,
            mask,
            owner: running.owner.clone(),
            phase,
            decided,
        })
    }

    /// One look of the timer: takes back what nobody picked up, evicts what outlived its guest. Answers whether to come again.
    pub(crate) fn sweep(self: &Arc<Self>) -> bool {
        let now = now();
        let (reclaimed, evicted, again) = self.with(|ledger, after| {
            let reclaimed = ledger.reclaim(now, after);
            let grace = GRACE.as_nanos() as Tick;
            let is_due = ledger
                .ended
                .as_ref()
                .is_some_and(|ended| now.saturating_sub(ended.1) >= grace);
            let evicted = if is_due { ledger.evict(now, after) } else { 0 };
            let again = ledger.slots.has_overdue();
            ledger.listed = again;
            (reclaimed, evicted, again)
        });
        if reclaimed > 0 {
            warn!(domain = %self.domain, reclaimed, "a grant was not picked up and went to the next waiter");
        }
        if evicted > 0 {
            warn!(domain = %self.domain, evicted, "guards outlived their guest and lost their slots");
        }
        again
    }

    pub(crate) fn failure(&self, failure: Failure, want: Want) -> BeginError {
        match failure {
            Failure::Closed => BeginError::Closed,
            Failure::WouldDeadlock(held) => BeginError::WouldDeadlock {
                wanted: want.kind(),
                held,
            },
            Failure::Gone => {
                let ledger = lock(&self.ledger);
                ledger.gone(ledger.slots.generation() - 1).into()
            }
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let now = now();
        let ledger = lock(&self.ledger);
        let mut places = [0; 3];
        let waiting = ledger
            .slots
            .queue()
            .into_iter()
            .filter_map(|(key, id, want)| {
                let pending = ledger.pending.get(key as usize)?.as_ref()?;
                let place = &mut places[want.slot() as usize];
                *place += 1;
                Some(WaitingPicture {
                    id,
                    kind: want.kind(),
                    owner: pending.owner.clone(),
                    waited: Duration::from_nanos(now.saturating_sub(pending.since)),
                    place: *place,
                    blocked_by: ledger.blocker(want, now),
                })
            });
        Snapshot {
            waiting: waiting.collect(),
            generation: ledger.slots.generation(),
            closed: ledger.slots.is_closed(),
            mask: ledger.slots.mask(),
            normal: ledger.held(SlotName::Normal, now),
            asynchronous: ledger.held(SlotName::Async, now),
            agent: ledger.held(SlotName::Agent, now),
        }
    }
}

/// Nanoseconds of the kernel's monotonic clock as of its last tick (4 ms at 250 Hz).
///
/// Two exact looks at the clock were 39 % of what a job costs, and no person asks who held a domain to the microsecond.
pub(crate) fn now() -> Tick {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    now.tv_sec as Tick * 1_000_000_000 + now.tv_nsec as Tick
}
