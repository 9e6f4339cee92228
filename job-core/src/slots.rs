//! Who holds the domain and who waits for it, as plain data.
//!
//! No lock, clock or waker lives here; [`Scheduler`](crate::Scheduler) owns those and hands the time in as a number.
//! Every transition reports the waiters it granted or failed, so a test can walk all states.
//!
//! ```text
//!  normal  one holder; each nested step of the async job takes it too
//!  async   one holder; lets only the kinds in its mask pass
//!  agent   one holder; independent, so a silent guest blocks nobody else
//! ```
//!
//! Invariants, each checked after every transition of `tests/walk.rs`:
//! 1. Nothing is granted that the table forbids: one holder a slot, beside an async job what its mask lets pass and its
//!    own parts, no async job beside a normal one.
//! 2. A waiter that could be granted is granted before the call returns.
//! 3. Among the eligible waiters `Destroy` and `Thaw` go first, then `Abort`, then the oldest. One whose grant was taken
//!    back keeps its age.
//! 4. A closed domain has no waiters and grants nothing.
//! 5. One flow holds one job, and beside its async job one part of it.
//! 6. Beside a normal or async job of an ended generation no normal or async job of the new one runs.
//! 7. Who stops waiting without having asked is told, by the call that did it: no wake-up is lost.
//! 8. `Destroy` is reachable: it goes next once those that hold the domain end, are taken back or evicted.
//! 9. A held slot belongs to a guard, or to a waiter that may still claim it.

use std::num::NonZeroU64;

use crate::kind::{AgentKind, AsyncKind, JobKind, Kind, KindSet};

/// Names one waiter until it claims or withdraws.
pub(crate) type Key = u32;
/// Nanoseconds of the scheduler's clock.
pub(crate) type Tick = u64;

const NONE: Key = Key::MAX;

/// What a caller asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Want {
    Normal(JobKind),
    /// A step of the async job of that id.
    Nested(u64),
    /// An agent job; `within` names the async job that takes it for a moment.
    Agent {
        kind: AgentKind,
        within: Option<NonZeroU64>,
    },
    Async(AsyncKind, KindSet),
}

impl Want {
    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::Normal(kind) => Kind::Normal(kind),
            Self::Nested(_) => Kind::Nested,
            Self::Agent { kind, .. } => Kind::Agent(kind),
            Self::Async(kind, _) => Kind::Async(kind),
        }
    }

    const fn lane(self) -> usize {
        match self {
            Self::Normal(kind) => kind as usize,
            Self::Nested(_) => lane::NESTED,
            Self::Async(..) => lane::ASYNC,
            Self::Agent {
                kind: AgentKind::Thaw,
                ..
            } => lane::THAW,
            Self::Agent { .. } => lane::AGENT,
        }
    }

    pub(crate) const fn slot(self) -> SlotName {
        match self {
            Self::Normal(_) | Self::Nested(_) => SlotName::Normal,
            Self::Agent { .. } => SlotName::Agent,
            Self::Async(..) => SlotName::Async,
        }
    }

    /// The async job this request is a part of.
    pub(crate) fn parent(self) -> Option<u64> {
        match self {
            Self::Nested(parent) => Some(parent),
            Self::Agent { within, .. } => within.map(NonZeroU64::get),
            Self::Normal(_) | Self::Async(..) => None,
        }
    }
}

/// The lanes beside the seven of the normal kinds, whose numbers are the kinds' own.
mod lane {
    pub(super) const NESTED: usize = 7;
    pub(super) const ASYNC: usize = 8;
    pub(super) const AGENT: usize = 9;
    pub(super) const THAW: usize = 10;
    pub(super) const COUNT: usize = 11;
}

const NORMAL_LANES: u16 = 0x7f;

/// The three things one can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum SlotName {
    Normal = 0,
    Async = 1,
    Agent = 2,
}

/// How many may wait, by class, so that a silent agent's backlog never uses up the monitor's places.
///
/// `Destroy`, `Abort`, nested steps and thaw meet no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..Limits::default()`"
)]
pub struct Limits {
    /// Waiting normal jobs.
    pub normal: u32,
    /// Waiting async jobs.
    pub asynchronous: u32,
    /// Waiting agent jobs.
    pub agent: u32,
}

impl Default for Limits {
    /// 256 normal, 16 async and 64 agent jobs: more than any one guest's callers reach before something is wrong,
    /// and little enough that a guest that hangs does not collect the whole daemon's tasks.
    fn default() -> Self {
        Self {
            normal: 256,
            asynchronous: 16,
            agent: 64,
        }
    }
}

/// Why a waiter was failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Failure {
    /// Its generation ended.
    Gone,
    Closed,
    /// Its own flow came to hold that.
    WouldDeadlock(Kind),
}

/// Why a request was refused at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Refusal {
    QueueFull {
        waiting: u32,
    },
    WouldDeadlock(Kind),
    /// The generation of the async job it belongs to ended.
    Gone,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Admission {
    Granted,
    Queued(Key),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Claim {
    Granted {
        generation: u64,
        /// When its turn came.
        granted: Tick,
    },
    Waiting,
    /// Its grant was taken back; it waits again once it is [roused](Slots::rouse).
    Asleep,
    Failed(Failure),
}

/// The waiters a transition moved. At most one grant a slot; failures are rare and may be many.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    pub(crate) granted: [Option<Key>; 3],
    pub(crate) failed: Vec<Key>,
}

/// One held slot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) id: u64,
    pub(crate) flow: u64,
    pub(crate) want: Want,
    pub(crate) generation: u64,
    /// The waiter that has not picked its grant up yet, else [`NONE`].
    unclaimed: Key,
    /// When it was granted.
    pub(crate) granted: Tick,
}

impl Slot {
    pub(crate) fn is_claimed(&self) -> bool {
        self.unclaimed == NONE
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Free,
    Queued,
    /// Holds a slot it has not picked up.
    Granted,
    /// Its grant was taken back; it queues again when it is polled.
    Asleep,
    Failed(Failure),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Waiter {
    id: u64,
    flow: u64,
    want: Want,
    state: State,
    prev: Key,
    next: Key,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Lane {
    head: Key,
    tail: Key,
}

impl Lane {
    const EMPTY: Self = Self {
        head: NONE,
        tail: NONE,
    };
}

/// The whole state of one domain's scheduler.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slots {
    held: [Option<Slot>; 3],
    /// Empty while nobody waits, as `waiters` is: most of ten thousand domains are idle.
    lanes: Vec<Lane>,
    /// One bit a lane that has waiters.
    busy: u16,
    closed: bool,
    waiting: [u32; 3],
    limits: Limits,
    waiters: Vec<Waiter>,
    free: Key,
    /// How many of `waiters` are in use.
    live: u32,
    next_id: u64,
    generation: u64,
}

impl Slots {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            held: [const { None }; 3],
            lanes: Vec::new(),
            busy: 0,
            closed: false,
            waiting: [0; 3],
            limits,
            waiters: Vec::new(),
            free: NONE,
            live: 0,
            next_id: 1,
            generation: 1,
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn slot(&self, name: SlotName) -> Option<&Slot> {
        self.held[name as usize].as_ref()
    }

    /// The mask of the running async job.
    pub(crate) fn mask(&self) -> Option<KindSet> {
        match self.slot(SlotName::Async)?.want {
            Want::Async(_, mask) => Some(mask),
            _ => None,
        }
    }

    /// Keeps ids unique across a restart: none at or below `used` is given out again. Ids are tickets too: the lower
    /// one asked earlier.
    pub(crate) fn skip_ids(&mut self, used: u64) {
        self.next_id = self.next_id.max(used + 1);
    }

    /// Asks for `want`. Granted at once, or queued under a key the caller must claim or withdraw. Without a `flow` it is
    /// one of its own, which holds nothing yet.
    pub(crate) fn request(
        &mut self,
        want: Want,
        flow: Option<u64>,
        now: Tick,
    ) -> Result<(u64, Admission), Refusal> {
        if self.closed {
            return Err(Refusal::Closed);
        }
        if want.parent().is_some_and(|parent| !self.runs(parent)) {
            return Err(Refusal::Gone);
        }
        if let Some(held) = flow.and_then(|flow| self.conflict(want, flow)) {
            return Err(Refusal::WouldDeadlock(held));
        }
        let id = self.next_id;
        // Handed-in flows count from below, ids from above: they never meet.
        let flow = flow.unwrap_or(!id);
        if self.open() & 1 << want.lane() != 0 {
            self.next_id += 1;
            self.hold(id, flow, want, NONE, now);
            return Ok((id, Admission::Granted));
        }
        let class = want.slot() as usize;
        if self.is_limited(want) && self.waiting[class] >= self.limit(want.slot()) {
            return Err(Refusal::QueueFull {
                waiting: self.waiting[class],
            });
        }
        self.next_id += 1;
        let key = self.insert(Waiter {
            id,
            flow,
            want,
            state: State::Queued,
            prev: NONE,
            next: NONE,
        });
        self.link(key);
        Ok((id, Admission::Queued(key)))
    }

    /// Whether `want` would be granted at once.
    pub(crate) fn could_start(&self, want: Want) -> bool {
        !self.closed && self.open() & 1 << want.lane() != 0
    }

    /// A waiter looks whether its turn came.
    pub(crate) fn claim(&mut self, key: Key) -> Claim {
        match self.waiter(key).state {
            State::Granted => {
                let name = self.waiter(key).want.slot();
                self.remove(key);
                let slot = self.held[name as usize]
                    .as_mut()
                    .expect("a granted waiter's slot is held for it");
                slot.unclaimed = NONE;
                Claim::Granted {
                    generation: slot.generation,
                    granted: slot.granted,
                }
            }
            State::Failed(failure) => {
                self.remove(key);
                Claim::Failed(failure)
            }
            State::Queued => Claim::Waiting,
            State::Asleep => Claim::Asleep,
            State::Free => unreachable!("a waiter keeps its key until it claims or withdraws"),
        }
    }

    /// A waiter whose grant was taken back queues again, before those that came after it.
    pub(crate) fn rouse(&mut self, key: Key, now: Tick, effects: &mut Effects) {
        self.waiter_mut(key).state = State::Queued;
        self.link(key);
        self.pump(now, effects);
    }

    /// A waiter leaves. A grant it has not picked up goes to the next.
    pub(crate) fn withdraw(&mut self, key: Key, now: Tick, effects: &mut Effects) {
        match self.waiter(key).state {
            State::Queued => self.unlink(key),
            State::Granted => self.held[self.waiter(key).want.slot() as usize] = None,
            State::Asleep | State::Failed(_) => {}
            State::Free => unreachable!("a waiter keeps its key until it claims or withdraws"),
        }
        self.remove(key);
        self.pump(now, effects);
    }

    /// The holder of that id ends. Answers whether it still held the slot.
    pub(crate) fn release(
        &mut self,
        name: SlotName,
        id: u64,
        now: Tick,
        effects: &mut Effects,
    ) -> bool {
        let held = &mut self.held[name as usize];
        let is_holder = held.as_ref().is_some_and(|slot| slot.id == id);
        if is_holder {
            *held = None;
            self.pump(now, effects);
        }
        is_holder
    }

    /// Changes what passes beside the async job of that id. Widening grants at once; narrowing touches no granted job.
    pub(crate) fn set_mask(&mut self, id: u64, mask: KindSet, now: Tick, effects: &mut Effects) {
        if let Some(slot) = self.held[SlotName::Async as usize]
            .as_mut()
            .filter(|slot| slot.id == id)
            && let Want::Async(kind, _) = slot.want
        {
            slot.want = Want::Async(kind, mask);
            self.pump(now, effects);
        }
    }

    /// Takes back grants made at or before `limit` that nobody picked up. Their waiters sleep until they are polled.
    pub(crate) fn reclaim(&mut self, limit: Tick, now: Tick, effects: &mut Effects) -> u32 {
        let mut taken = 0;
        for index in 0..self.held.len() {
            if let Some(slot) = &self.held[index]
                && !slot.is_claimed()
                && slot.granted <= limit
            {
                let key = slot.unclaimed;
                self.held[index] = None;
                self.waiter_mut(key).state = State::Asleep;
                taken += 1;
            }
        }
        if taken > 0 {
            self.pump(now, effects);
        }
        taken
    }

    /// The guest of this generation is gone: all who wait fail; holders keep their slots until they end or are evicted.
    pub(crate) fn end_generation(&mut self, effects: &mut Effects) -> u64 {
        self.fail_waiters(Failure::Gone, effects);
        self.generation += 1;
        self.generation
    }

    /// The domain is removed, for ever.
    pub(crate) fn close(&mut self, effects: &mut Effects) {
        self.fail_waiters(Failure::Closed, effects);
        self.closed = true;
    }

    /// Takes the slots that guards of ended generations still hold and passes them on. Yields what was taken.
    pub(crate) fn evict(&mut self, now: Tick, effects: &mut Effects) -> [Option<Slot>; 3] {
        let generation = self.generation;
        let taken = self
            .held
            .each_mut()
            .map(|held| held.take_if(|slot| slot.generation != generation));
        self.pump(now, effects);
        taken
    }

    /// Whether a sweep has something to look after: a grant nobody picked up, or a holder of an ended generation.
    pub(crate) fn has_overdue(&self) -> bool {
        self.held
            .iter()
            .flatten()
            .any(|slot| !slot.is_claimed() || slot.generation != self.generation)
    }

    /// Those who wait, as (key, id, want), in the order in which they would go if all were eligible.
    pub(crate) fn queue(&self) -> Vec<(Key, u64, Want)> {
        let mut queue: Vec<_> = (0..)
            .zip(&self.waiters)
            .filter(|(_, waiter)| matches!(waiter.state, State::Queued | State::Asleep))
            .map(|(key, waiter)| (key, waiter.id, waiter.want))
            .collect();
        queue.sort_by_key(|&(_, id, want)| (rank(want.lane()), id));
        queue
    }

    /// What keeps `want` waiting now.
    pub(crate) fn blocker(&self, want: Want) -> Option<SlotName> {
        let masked = match want {
            Want::Normal(kind) => self.mask().is_some_and(|mask| !mask.contains(kind)),
            Want::Async(..) => self.slot(SlotName::Async).is_some(),
            Want::Nested(_) | Want::Agent { .. } => false,
        };
        let stale = |name| {
            self.slot(name)
                .is_some_and(|slot| slot.generation != self.generation)
        };
        let own = want.slot();
        let nested = matches!(
            self.slot(SlotName::Normal),
            Some(Slot {
                want: Want::Nested(_),
                ..
            })
        );
        if masked || (own != SlotName::Agent && (stale(SlotName::Async) || nested)) {
            Some(SlotName::Async)
        } else if own == SlotName::Agent {
            self.slot(SlotName::Agent).map(|_| SlotName::Agent)
        } else {
            self.slot(SlotName::Normal).map(|_| SlotName::Normal)
        }
    }

    /// One bit a lane whose head could be granted now.
    fn open(&self) -> u16 {
        let [normal, asynchronous, agent] = &self.held;
        let mut open = 0;
        if normal.is_none() {
            open |= match asynchronous {
                None => NORMAL_LANES | 1 << lane::ASYNC,
                // Nothing of the new generation runs beside what is left of the old one.
                Some(slot) if slot.generation != self.generation => 0,
                Some(_) => {
                    let mask = self.mask().unwrap_or(KindSet::DESTROY_ONLY);
                    u16::from(mask.bits()) | 1 << lane::NESTED
                }
            };
        }
        if agent.is_none() {
            open |= 1 << lane::AGENT | 1 << lane::THAW;
        }
        open
    }

    /// What the flow holds that forbids it to hold `want` too (R8, R10).
    fn conflict(&self, want: Want, flow: u64) -> Option<Kind> {
        self.held
            .iter()
            .flatten()
            .filter(|slot| slot.flow == flow)
            .find(|slot| want.parent() != Some(slot.id))
            .map(|slot| slot.want.kind())
    }

    fn runs(&self, id: u64) -> bool {
        self.slot(SlotName::Async)
            .is_some_and(|slot| slot.id == id && slot.generation == self.generation)
    }

    /// Grants until nobody who waits could start.
    fn pump(&mut self, now: Tick, effects: &mut Effects) {
        while !self.closed
            && let Some(key) = self.next_eligible()
        {
            self.unlink(key);
            let Waiter { id, flow, want, .. } = *self.waiter(key);
            if let Some(held) = self.conflict(want, flow) {
                self.waiter_mut(key).state = State::Failed(Failure::WouldDeadlock(held));
                effects.failed.push(key);
            } else {
                self.waiter_mut(key).state = State::Granted;
                self.hold(id, flow, want, key, now);
                effects.granted[want.slot() as usize] = Some(key);
            }
        }
    }

    /// The waiter that goes next: first by rank, then by age.
    fn next_eligible(&self) -> Option<Key> {
        if self.busy == 0 {
            return None;
        }
        let mut eligible = self.open() & self.busy;
        let mut best: Option<((u8, u64), Key)> = None;
        while eligible != 0 {
            let lane = eligible.trailing_zeros() as usize;
            eligible &= eligible - 1;
            let head = self.lanes[lane].head;
            let place = (rank(lane), self.waiter(head).id);
            if best.is_none_or(|(first, _)| place < first) {
                best = Some((place, head));
            }
        }
        best.map(|(_, key)| key)
    }

    fn hold(&mut self, id: u64, flow: u64, want: Want, unclaimed: Key, granted: Tick) {
        let slot = Slot {
            id,
            flow,
            want,
            generation: self.generation,
            unclaimed,
            granted,
        };
        self.held[want.slot() as usize] = Some(slot);
    }

    fn fail_waiters(&mut self, failure: Failure, effects: &mut Effects) {
        for held in &mut self.held {
            // Nobody has seen this grant, so there is no guard to wait for.
            held.take_if(|slot| !slot.is_claimed());
        }
        for (key, waiter) in (0..).zip(&mut self.waiters) {
            if matches!(waiter.state, State::Queued | State::Granted | State::Asleep) {
                waiter.state = State::Failed(failure);
                waiter.prev = NONE;
                waiter.next = NONE;
                effects.failed.push(key);
            }
        }
        self.lanes = Vec::new();
        self.busy = 0;
        self.waiting = [0; 3];
    }

    fn is_limited(&self, want: Want) -> bool {
        !matches!(
            want,
            Want::Normal(JobKind::Destroy | JobKind::Abort)
                | Want::Nested(_)
                | Want::Agent {
                    kind: AgentKind::Thaw,
                    ..
                }
        )
    }

    fn limit(&self, class: SlotName) -> u32 {
        match class {
            SlotName::Normal => self.limits.normal,
            SlotName::Async => self.limits.asynchronous,
            SlotName::Agent => self.limits.agent,
        }
    }

    fn waiter(&self, key: Key) -> &Waiter {
        &self.waiters[key as usize]
    }

    fn waiter_mut(&mut self, key: Key) -> &mut Waiter {
        &mut self.waiters[key as usize]
    }

    fn insert(&mut self, waiter: Waiter) -> Key {
        self.live += 1;
        if self.free == NONE {
            self.waiters.push(waiter);
            return self.waiters.len() as Key - 1;
        }
        let key = self.free;
        self.free = self.waiter(key).next;
        *self.waiter_mut(key) = waiter;
        key
    }

    fn remove(&mut self, key: Key) {
        let free = self.free;
        let waiter = self.waiter_mut(key);
        waiter.state = State::Free;
        waiter.prev = NONE;
        waiter.next = free;
        self.free = key;
        self.live -= 1;
        if self.live == 0 {
            self.waiters = Vec::new();
            self.lanes = Vec::new();
            self.free = NONE;
        }
    }

    /// Whether no key is in use, so that what is kept beside each waiter may be dropped as well.
    pub(crate) fn is_quiet(&self) -> bool {
        self.live == 0
    }

    /// Puts a waiter into its lane by its id: at the tail, unless it comes back from sleep.
    fn link(&mut self, key: Key) {
        let Waiter { id, want, .. } = *self.waiter(key);
        let lane = want.lane();
        if self.lanes.is_empty() {
            self.lanes = vec![Lane::EMPTY; lane::COUNT];
        }
        let tail = self.lanes[lane].tail;
        let (prev, next) = if tail == NONE || self.waiter(tail).id < id {
            (tail, NONE)
        } else {
            // Only other sleepers can be older than one that was at the head: the walk is short.
            let mut next = self.lanes[lane].head;
            while self.waiter(next).id < id {
                next = self.waiter(next).next;
            }
            (self.waiter(next).prev, next)
        };
        let waiter = self.waiter_mut(key);
        waiter.prev = prev;
        waiter.next = next;
        match prev {
            NONE => self.lanes[lane].head = key,
            prev => self.waiter_mut(prev).next = key,
        }
        match next {
            NONE => self.lanes[lane].tail = key,
            next => self.waiter_mut(next).prev = key,
        }
        self.busy |= 1 << lane;
        self.waiting[want.slot() as usize] += 1;
    }

    fn unlink(&mut self, key: Key) {
        let Waiter {
            want, prev, next, ..
        } = *self.waiter(key);
        let lane = want.lane();
        match prev {
            NONE => self.lanes[lane].head = next,
            prev => self.waiter_mut(prev).next = next,
        }
        match next {
            NONE => self.lanes[lane].tail = prev,
            next => self.waiter_mut(next).prev = prev,
        }
        if self.lanes[lane].head == NONE {
            self.busy &= !(1 << lane);
        }
        self.waiting[want.slot() as usize] -= 1;
    }
}

/// Whose turn comes before age is asked.
const fn rank(lane: usize) -> u8 {
    if lane == JobKind::Destroy as usize || lane == lane::THAW {
        0
    } else if lane == JobKind::Abort as usize {
        1
    } else {
        2
    }
}
