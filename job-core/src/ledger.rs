//! What the slots need not know about holders and waiters: owners, times, wakers, phases, what has finished.
//!
//! Follows what the slots decided; decides nothing. No lock and no clock: the time is handed in.

use std::task::Waker;
use std::time::Duration;

use crate::error::{BeginError, Gone, GoneWhy, Holder};
use crate::kind::Kind;
use crate::label::Label;
use crate::progress::Tracker;
use crate::slots::{Admission, Effects, Key, Limits, Refusal, SlotName, Slots, Tick, Want};
use crate::snapshot::{Finished, Held as HeldPicture, Outcome};
use crate::token::{Stop, Token};

/// A grant that nobody picked up for this long is taken back. A task that is merely late only loses its turn for a
/// moment, since it keeps its age; a busy runtime polls within milliseconds.
const UNCLAIMED: Duration = Duration::from_secs(1);
/// How many finished jobs are remembered.
const HISTORY: u8 = 32;

pub(crate) const SLOTS: [SlotName; 3] = [SlotName::Normal, SlotName::Async, SlotName::Agent];

/// One domain's slots and what is kept beside them.
pub(crate) struct Ledger {
    pub(crate) slots: Slots,
    /// What the slots need not know about their holders.
    pub(crate) running: [Option<Running>; 3],
    /// What the slots need not know about those who wait, by key.
    pub(crate) pending: Vec<Option<Pending>>,
    /// A ring: once it is full, `oldest` is the next to be overwritten.
    history: Vec<Ended>,
    oldest: u8,
    /// The last generation that ended, how and when.
    pub(crate) ended: Option<Box<(Gone, Tick)>>,
    /// Whether this domain is on the overdue list.
    pub(crate) listed: bool,
}

pub(crate) struct Running {
    pub(crate) owner: Label,
    pub(crate) waited: Tick,
    /// Most jobs never say anything of themselves, and ten thousand idle domains should not pay for those that do.
    pub(crate) told: Option<Box<Told>>,
}

/// What a job said of itself.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) phase: Option<Label>,
    pub(crate) command: Option<Label>,
    pub(crate) token: Option<Token>,
    pub(crate) tracker: Tracker,
    pub(crate) decided: bool,
}

pub(crate) struct Pending {
    pub(crate) owner: Label,
    pub(crate) since: Tick,
    pub(crate) waker: Option<Waker>,
}

pub(crate) struct Ended {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    pub(crate) owner: Label,
    pub(crate) generation: u64,
    pub(crate) waited: Tick,
    pub(crate) began: Tick,
    pub(crate) at: Tick,
    pub(crate) phase: Option<Label>,
    pub(crate) outcome: Outcome,
}

/// What is left to do once the lock is released. Most calls leave nothing, most others one waker: neither allocates.
#[derive(Default)]
pub(crate) struct After {
    waker: Option<Waker>,
    more: Vec<Deed>,
}

enum Deed {
    Wake(Waker),
    Fire(Token, Stop),
}

impl After {
    pub(crate) fn wake(&mut self, waker: Option<Waker>) {
        match waker {
            Some(waker) if self.waker.is_none() => self.waker = Some(waker),
            Some(waker) => self.more.push(Deed::Wake(waker)),
            None => {}
        }
    }

    pub(crate) fn fire(&mut self, token: Token, stop: Stop) {
        self.more.push(Deed::Fire(token, stop));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waker.is_none() && self.more.is_empty()
    }

    /// Runs others' code: no lock may be held.
    pub(crate) fn run(self) {
        for deed in self.more {
            match deed {
                Deed::Wake(waker) => waker.wake(),
                Deed::Fire(token, stop) => token.fire(stop),
            }
        }
        if let Some(waker) = self.waker {
            waker.wake();
        }
    }
}

impl Ledger {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            slots: Slots::new(limits),
            running: [const { None }; 3],
            pending: Vec::new(),
            history: Vec::new(),
            oldest: 0,
            ended: None,
            listed: false,
        }
    }

    /// Lets `want` in: held now, or pending.
    pub(crate) fn admit(
        &mut self,
        want: Want,
        owner: &Label,
        flow: Option<u64>,
        now: Tick,
        after: &mut After,
    ) -> Result<(u64, u64, Admission), Box<BeginError>> {
        self.reclaim(now, after);
        match self.slots.request(want, flow, now) {
            Ok((id, admission)) => {
                match admission {
                    Admission::Granted => {
                        let running = Running {
                            owner: owner.clone(),
                            waited: 0,
                            told: None,
                        };
                        self.running[want.slot() as usize] = Some(running);
                    }
                    Admission::Queued(key) => {
                        let place = key as usize;
                        if self.pending.len() <= place {
                            self.pending.resize_with(place + 1, || None);
                        }
                        self.pending[place] = Some(Pending {
                            owner: owner.clone(),
                            since: now,
                            waker: None,
                        });
                    }
                }
                Ok((id, self.slots.generation(), admission))
            }
            Err(refusal) => Err(Box::new(self.refuse(refusal, want, now))),
        }
    }

    #[cold]
    fn refuse(&self, refusal: Refusal, want: Want, now: Tick) -> BeginError {
        match refusal {
            Refusal::Closed => BeginError::Closed,
            Refusal::WouldDeadlock(held) => BeginError::WouldDeadlock {
                wanted: want.kind(),
                held,
            },
            Refusal::Gone => self.gone(self.slots.generation().saturating_sub(1)).into(),
            Refusal::QueueFull { waiting } => BeginError::QueueFull {
                wanted: want.kind(),
                waiting: waiting as usize,
                holder: self.blocker(want, now).map(Box::new),
            },
        }
    }

    /// Follows what the slots did: who holds now, whom to wake.
    pub(crate) fn settle(&mut self, effects: Effects, now: Tick, after: &mut After) {
        for name in SLOTS {
            let index = name as usize;
            if let Some(key) = effects.granted[index]
                && let Some(pending) = &mut self.pending[key as usize]
            {
                let waited = now.saturating_sub(pending.since);
                let owner = pending.owner.clone();
                self.running[index] = Some(Running {
                    owner,
                    waited,
                    told: None,
                });
                after.wake(pending.waker.take());
            } else if self.slots.slot(name).is_none() {
                self.running[index] = None;
            }
        }
        for key in effects.failed {
            if let Some(pending) = &mut self.pending[key as usize] {
                after.wake(pending.waker.take());
            }
        }
    }

    /// Takes back grants that nobody picked up in time. Costs one comparison where nobody waits.
    pub(crate) fn reclaim(&mut self, now: Tick, after: &mut After) -> u32 {
        if self.slots.is_quiet() {
            return 0;
        }
        let Some(limit) = now.checked_sub(UNCLAIMED.as_nanos() as Tick) else {
            return 0;
        };
        let mut effects = Effects::default();
        let taken = self.slots.reclaim(limit, now, &mut effects);
        if taken > 0 {
            self.settle(effects, now, after);
        }
        taken
    }

    pub(crate) fn evict(&mut self, now: Tick, after: &mut After) -> usize {
        let mut running = [const { None }; 3];
        for name in SLOTS {
            running[name as usize] = self.running[name as usize].take();
        }
        let mut effects = Effects::default();
        let evicted = self.slots.evict(now, &mut effects);
        let mut count = 0;
        for (slot, running) in evicted.into_iter().zip(&mut running) {
            if let Some(slot) = slot
                && let Some(running) = running.take()
            {
                count += 1;
                self.remember(Ended {
                    id: slot.id,
                    kind: slot.want.kind(),
                    owner: running.owner,
                    generation: slot.generation,
                    waited: running.waited,
                    began: slot.granted,
                    at: now,
                    phase: running.told.and_then(|told| told.phase),
                    outcome: Outcome::Evicted,
                });
            }
        }
        for (mine, kept) in self.running.iter_mut().zip(running) {
            *mine = kept;
        }
        self.settle(effects, now, after);
        count
    }

    pub(crate) fn remember(&mut self, ended: Ended) {
        if self.history.len() < HISTORY.into() {
            self.history.push(ended);
        } else {
            self.history[usize::from(self.oldest)] = ended;
            self.oldest = (self.oldest + 1) % HISTORY;
        }
    }

    /// The finished jobs, oldest first.
    pub(crate) fn history(&self) -> impl Iterator<Item = &Ended> {
        let (newer, older) = self.history.split_at(self.oldest.into());
        older.iter().chain(newer)
    }

    pub(crate) fn forget(&mut self, key: Key) -> Option<Pending> {
        let pending = self.pending[key as usize].take();
        if self.slots.is_quiet() {
            self.pending = Vec::new();
        }
        pending
    }

    pub(crate) fn told(&mut self, name: SlotName, id: u64) -> Option<&mut Told> {
        self.slots.slot(name).filter(|slot| slot.id == id)?;
        Some(
            self.running[name as usize]
                .as_mut()?
                .told
                .get_or_insert_default(),
        )
    }

    pub(crate) fn gone(&self, generation: u64) -> Gone {
        let why = self.ended.as_ref().map_or_else(
            || GoneWhy::Died("unknown".into()),
            |ended| ended.0.why.clone(),
        );
        Gone { generation, why }
    }

    pub(crate) fn blocker(&self, want: Want, now: Tick) -> Option<Holder> {
        Some(self.held(self.slots.blocker(want)?, now)?.holder)
    }

    pub(crate) fn held(&self, name: SlotName, now: Tick) -> Option<HeldPicture> {
        let slot = self.slots.slot(name)?;
        let running = self.running[name as usize].as_ref()?;
        let told = running.told.as_deref();
        // What the step of an async job does is what the async job does.
        let command = match self.slots.slot(SlotName::Normal) {
            Some(step) if name == SlotName::Async && step.want == Want::Nested(slot.id) => self
                .running[SlotName::Normal as usize]
                .as_ref()
                .and_then(|running| running.told.as_deref()),
            _ => told,
        };
        Some(HeldPicture {
            holder: Holder {
                id: slot.id,
                kind: slot.want.kind(),
                owner: running.owner.clone(),
                phase: told.and_then(|told| told.phase.clone()),
                command: command.and_then(|told| told.command.clone()),
                held: Duration::from_nanos(now.saturating_sub(slot.granted)),
            },
            waited: Duration::from_nanos(running.waited),
            progress: told.and_then(|told| told.tracker.picture(now)),
            claimed: slot.is_claimed(),
            generation: slot.generation,
        })
    }
}

impl Ended {
    pub(crate) fn picture(&self, now: Tick) -> Finished {
        Finished {
            id: self.id,
            kind: self.kind,
            owner: self.owner.clone(),
            generation: self.generation,
            waited: Duration::from_nanos(self.waited),
            ran: Duration::from_nanos(self.at.saturating_sub(self.began)),
            age: Duration::from_nanos(now.saturating_sub(self.at)),
            phase: self.phase.clone(),
            outcome: self.outcome.clone(),
        }
    }
}
