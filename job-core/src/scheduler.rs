//! The one lock around the slots of a domain: wakers, the clock, the log lines and the history.
//!
//! Decides nothing; [`slots`](crate::slots) does. No user code runs under the lock: wakers are woken, log lines written and
//! labels dropped after it is released. Knows no runtime: deadlines are futures that the callers bring.

use std::collections::VecDeque;
use std::fmt;
use std::sync::OnceLock;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::caller::Caller;
use crate::error::{BeginError, CancelError, Gone, GoneWhy, Holder};
use crate::guard::AsyncJob;
use crate::kind::{JobKind, Kind};
use crate::label::Label;
use crate::overdue::Overdue;
use crate::progress::Tracker;
use crate::slots::{
    Admission, Claim, Effects, Failure, KEPT, Key, Limits, Refusal, SlotName, Slots, Tick, Want,
};
use crate::snapshot::{
    AsyncRecord, Finished, Held as HeldPicture, Outcome, Snapshot, Waiting as WaitingPicture,
};
use crate::sync::{Arc, Mutex, lock};
use crate::token::{Stop, Token};

/// A grant that nobody picked up for this long is taken back. A task that is merely late only loses its turn for a
/// moment, since it keeps its age; a busy runtime polls within milliseconds.
pub(crate) const UNCLAIMED: Duration = Duration::from_secs(1);
/// Guards that outlive their guest lose their slots after this, so that clean-up cannot be kept waiting for ever.
pub(crate) const GRACE: Duration = Duration::from_secs(10);
/// How many finished jobs are remembered.
const HISTORY: usize = 32;

const SLOTS: [SlotName; 3] = [SlotName::Normal, SlotName::Async, SlotName::Agent];

/// One domain's jobs: who holds it and who waits. Clones share it.
///
/// Owns no guest and no connection, so it serves any daemon that must keep callers of one object apart.
#[derive(Clone)]
pub struct Scheduler(pub(crate) Arc<Shared>);

/// What every guard and waiter of a domain points to.
pub(crate) struct Shared {
    domain: Label,
    overdue: Option<Overdue>,
    inner: Mutex<Inner>,
}

struct Inner {
    slots: Slots,
    /// What the slots need not know about their holders.
    running: [Option<Running>; 3],
    /// What the slots need not know about those who wait, by key.
    pending: Vec<Option<Pending>>,
    history: VecDeque<Ended>,
    /// The last generation that ended, how and when.
    ended: Option<Box<(Gone, Tick)>>,
    /// Whether this domain is on the overdue list.
    listed: bool,
}

struct Running {
    owner: Label,
    began: Tick,
    waited: Tick,
    /// Most jobs never say anything of themselves, and ten thousand idle domains should not pay for those that do.
    told: Option<Box<Told>>,
}

/// What a job said of itself.
#[derive(Default)]
struct Told {
    phase: Option<Label>,
    command: Option<Label>,
    token: Option<Token>,
    tracker: Tracker,
    decided: bool,
}

struct Pending {
    owner: Label,
    since: Tick,
    waker: Option<Waker>,
}

struct Ended {
    id: u64,
    kind: Kind,
    owner: Label,
    generation: u64,
    waited: Tick,
    began: Tick,
    at: Tick,
    phase: Option<Label>,
    outcome: Outcome,
}

/// What is left to do once the lock is released.
#[derive(Default)]
struct After {
    wakers: [Option<Waker>; 3],
    more: Vec<Waker>,
    stops: Vec<(Token, Stop)>,
    list: bool,
}

impl Scheduler {
    /// A scheduler for the domain of that name, with default limits and no overdue list.
    #[must_use]
    pub fn new(domain: impl Into<Label>) -> Self {
        Self::build(domain.into(), Limits::default(), None)
    }

    /// A scheduler with limits of its own, which puts itself on `overdue` when a sweep has something to look after.
    #[must_use]
    pub fn with(domain: impl Into<Label>, limits: Limits, overdue: &Overdue) -> Self {
        Self::build(domain.into(), limits, Some(overdue.clone()))
    }

    fn build(domain: Label, limits: Limits, overdue: Option<Overdue>) -> Self {
        let inner = Inner {
            slots: Slots::new(limits),
            running: [const { None }; 3],
            pending: Vec::new(),
            history: VecDeque::new(),
            ended: None,
            listed: false,
        };
        Self(Arc::new(Shared {
            domain,
            overdue,
            inner: Mutex::new(inner),
        }))
    }

    /// Opens one operation's claim on the domain. `owner` is what errors and snapshots call it.
    #[must_use]
    pub fn caller(&self, owner: impl Into<Label>) -> Caller {
        Caller::open(self.0.clone(), owner.into())
    }

    /// The name of the domain.
    #[must_use]
    pub fn domain(&self) -> &Label {
        &self.0.domain
    }

    /// The generation of the guest that runs now, or will run next.
    #[must_use]
    pub fn generation(&self) -> u64 {
        lock(&self.0.inner).slots.generation()
    }

    /// Whether both are the scheduler of the same domain, not merely of domains that are called the same.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Who holds what, and who waits why.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.0.snapshot()
    }

    /// The finished jobs, oldest first; at most 32.
    #[must_use]
    pub fn history(&self) -> Vec<Finished> {
        let now = now();
        let inner = lock(&self.0.inner);
        inner
            .history
            .iter()
            .map(|ended| ended.picture(now))
            .collect()
    }

    /// Asks the job of that id to stop: fires its token. Needs no job and no mask.
    ///
    /// # Errors
    ///
    /// - [`CancelError::NotRunning`]: no job of that id runs; it may have ended by itself.
    /// - [`CancelError::TooLate`]: it is past its point of return.
    pub fn cancel(&self, id: u64, by: impl Into<Label>) -> Result<(), CancelError> {
        self.0
            .cancel(|slot_id, _| slot_id == id, by.into())
            .map(|_| ())
    }

    /// Asks whichever async job runs to stop. Yields its id.
    ///
    /// # Errors
    ///
    /// As [`cancel`](Self::cancel).
    pub fn cancel_async(&self, by: impl Into<Label>) -> Result<u64, CancelError> {
        self.0
            .cancel(|_, kind| matches!(kind, Kind::Async(_)), by.into())
    }

    /// The guest of the current generation is gone: all who wait fail, all tokens fire, old guards give no right any more.
    ///
    /// The clean-up is queued in the same instant, before anyone else can be: it is the first job of the new
    /// generation, and begins once the old guards have dropped, or were evicted after ten seconds.
    pub fn end_generation(&self, why: GoneWhy, owner: impl Into<Label>) -> Cleanup {
        self.0.end_generation(why, owner.into())
    }

    /// Removes the domain, for ever: all who wait fail as closed, and so does whoever comes later. Holders may finish.
    pub fn close(&self) {
        self.0.with(|inner, after| {
            let mut effects = Effects::default();
            inner.slots.close(&mut effects);
            inner.settle(effects, now(), after);
        });
        debug!(domain = %self.0.domain, "domain closed");
    }

    /// Takes up an async job that another daemon process had begun, as its record says.
    ///
    /// # Errors
    ///
    /// [`BeginError::Busy`] if the domain is held, [`BeginError::Closed`] if it was removed: a record is restored before
    /// the domain is shown to callers.
    pub fn restore(&self, record: AsyncRecord) -> Result<AsyncJob, BeginError> {
        lock(&self.0.inner)
            .slots
            .skip_ids(record.id.saturating_sub(1));
        let job = self
            .caller(record.owner)
            .try_begin_async_with(record.kind, record.mask)?;
        job.restore(record.phase, record.decided);
        Ok(job)
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler")
            .field("domain", &self.0.domain)
            .field("snapshot", &self.snapshot())
            .finish()
    }
}

/// The place of the clean-up after a guest that is gone, already at the head of the queue.
#[must_use = "dropping it gives the place away, and nobody cleans up"]
#[derive(Debug)]
pub struct Cleanup {
    waiting: Result<Result<Held, Waiting>, BeginError>,
}

impl Cleanup {
    /// Begins the clean-up as a `Destroy` job.
    ///
    /// # Errors
    ///
    /// As [`Caller::begin`]; [`BeginError::Gone`] if the next generation ended as well meanwhile.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe, but the place is lost: the next clean-up has to queue.
    pub async fn begin(self, deadline: impl Future<Output = ()>) -> Result<crate::Job, BeginError> {
        match self.waiting? {
            Ok(held) => Ok(crate::guard::job(held)),
            Err(waiting) => crate::caller::wait(waiting, deadline)
                .await
                .map(crate::guard::job),
        }
    }
}

/// A granted slot; ends on drop.
#[expect(
    unnameable_types,
    reason = "what the sealed guard trait hands out; only this crate may name it"
)]
pub struct Held {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: u64,
    pub(crate) generation: u64,
    pub(crate) name: SlotName,
    pub(crate) outcome: Option<Outcome>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {} of \"{}\"", self.id, self.shared.domain)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or_else(|| {
            if std::thread::panicking() {
                Outcome::Panicked
            } else {
                Outcome::Dropped
            }
        });
        self.shared.release(self.name, self.id, outcome);
    }
}

/// A place in the queue; leaves it on drop.
#[derive(Debug)]
pub(crate) struct Waiting {
    shared: Arc<Shared>,
    id: u64,
    want: Want,
    since: Tick,
    key: Option<Key>,
    waker: Option<Waker>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Shared").field(&self.domain).finish()
    }
}

impl Waiting {
    /// Looks whether the turn came, and leaves the waker if not.
    pub(crate) fn poll(&mut self, waker: &Waker) -> Poll<Result<Held, BeginError>> {
        // Cloned before the lock is taken: a waker is somebody else's code.
        let fresh = match &self.waker {
            Some(known) if known.will_wake(waker) => None,
            _ => Some(waker.clone()),
        };
        let key = self.key.expect("a place is polled until it is ready");
        let now = now();
        let (claim, old) = self.shared.with(|inner, after| {
            let mut effects = Effects::default();
            let claim = inner.slots.claim(key, now, &mut effects);
            inner.settle(effects, now, after);
            let old = match claim {
                Claim::Waiting => {
                    let place = inner.pending[key as usize]
                        .as_mut()
                        .expect("a waiter is pending");
                    fresh.clone().map(|fresh| place.waker.replace(fresh))
                }
                Claim::Granted { .. } | Claim::Failed(_) => {
                    self.key = None;
                    Some(inner.forget(key).and_then(|pending| pending.waker))
                }
            };
            (claim, old)
        });
        drop(old);
        if fresh.is_some() {
            self.waker = fresh;
        }
        match claim {
            Claim::Waiting => Poll::Pending,
            Claim::Granted { generation } => {
                let waited = Duration::from_nanos(now.saturating_sub(self.since));
                debug!(domain = %self.shared.domain, job = self.id, kind = %self.want.kind(), ?waited, "job granted");
                let (shared, id) = (self.shared.clone(), self.id);
                Poll::Ready(Ok(Held {
                    shared,
                    id,
                    generation,
                    name: self.want.slot(),
                    outcome: None,
                }))
            }
            Claim::Failed(failure) => Poll::Ready(Err(self.shared.failure(failure, self.want))),
        }
    }

    /// The deadline came: names who was in the way. The place is left when `self` drops.
    pub(crate) fn timed_out(&self) -> BeginError {
        let now = now();
        let waited = Duration::from_nanos(now.saturating_sub(self.since));
        let holder = lock(&self.shared.inner).blocker(self.want, now);
        debug!(domain = %self.shared.domain, job = self.id, kind = %self.want.kind(), ?waited, "job timed out");
        BeginError::TimedOut {
            wanted: self.want.kind(),
            waited,
            holder,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let now = now();
        let pending = self.shared.with(|inner, after| {
            let mut effects = Effects::default();
            inner.slots.withdraw(key, now, &mut effects);
            inner.settle(effects, now, after);
            inner.forget(key)
        });
        drop(pending);
        debug!(domain = %self.shared.domain, job = self.id, kind = %self.want.kind(), "waiter left");
    }
}

impl Shared {
    /// Runs `f` under the lock, and what it left to do after it.
    fn with<R>(self: &Arc<Self>, f: impl FnOnce(&mut Inner, &mut After) -> R) -> R {
        let mut after = After::default();
        let result = {
            let mut inner = lock(&self.inner);
            let result = f(&mut inner, &mut after);
            if self.overdue.is_some() && !inner.listed && inner.slots.has_overdue() {
                inner.listed = true;
                after.list = true;
            }
            result
        };
        if let (true, Some(overdue)) = (after.list, &self.overdue) {
            overdue.add(self);
        }
        for (token, stop) in after.stops {
            token.fire(stop);
        }
        for waker in after.wakers.into_iter().flatten().chain(after.more) {
            waker.wake();
        }
        result
    }

    /// Asks for a job: granted at once, or a place in the queue.
    pub(crate) fn request(
        self: &Arc<Self>,
        want: Want,
        owner: Label,
        flow: u64,
    ) -> Result<Result<Held, Waiting>, BeginError> {
        let now = now();
        let answer = self.with(|inner, after| {
            inner.reclaim(now, after);
            inner.admit(want, &owner, flow, now)
        });
        self.admitted(answer?, want, &owner, now)
    }

    /// Asks for a job that must be free now.
    pub(crate) fn try_request(
        self: &Arc<Self>,
        want: Want,
        owner: Label,
        flow: u64,
    ) -> Result<Held, BeginError> {
        let now = now();
        let answer = self.with(|inner, after| {
            inner.reclaim(now, after);
            if inner.slots.is_closed() || inner.slots.could_start(want) {
                inner.admit(want, &owner, flow, now)
            } else {
                Err(BeginError::Busy {
                    wanted: want.kind(),
                    holder: inner.blocker(want, now),
                })
            }
        });
        self.admitted(answer?, want, &owner, now)?
            .map_err(|waiting| BeginError::Busy {
                wanted: want.kind(),
                holder: lock(&self.inner).blocker(waiting.want, now),
            })
    }

    fn admitted(
        self: &Arc<Self>,
        (id, generation, admission): (u64, u64, Admission),
        want: Want,
        owner: &Label,
        now: Tick,
    ) -> Result<Result<Held, Waiting>, BeginError> {
        let shared = self.clone();
        match admission {
            Admission::Granted => {
                debug!(domain = %self.domain, job = id, kind = %want.kind(), owner = %owner, "job granted");
                Ok(Ok(Held {
                    shared,
                    id,
                    generation,
                    name: want.slot(),
                    outcome: None,
                }))
            }
            Admission::Queued(key) => {
                debug!(domain = %self.domain, job = id, kind = %want.kind(), owner = %owner, "job waits");
                Ok(Err(Waiting {
                    shared,
                    id,
                    want,
                    since: now,
                    key: Some(key),
                    waker: None,
                }))
            }
        }
    }

    fn release(self: &Arc<Self>, name: SlotName, id: u64, outcome: Outcome) {
        let now = now();
        let panicked = outcome == Outcome::Panicked;
        let told = self.with(|inner, after| {
            let slot = inner.slots.slot(name).filter(|slot| slot.id == id)?;
            let (kind, generation) = (slot.want.kind(), slot.generation);
            let Running {
                owner,
                began,
                waited,
                mut told,
            } = inner.running[name as usize].take()?;
            let mut effects = Effects::default();
            inner.slots.release(name, id, now, &mut effects);
            inner.settle(effects, now, after);
            inner.reclaim(now, after);
            if kind != Kind::Nested {
                let phase = told.as_mut().and_then(|told| told.phase.take());
                inner.remember(Ended {
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

    pub(crate) fn set_mask(self: &Arc<Self>, id: u64, mask: crate::KindSet) {
        let now = now();
        self.with(|inner, after| {
            let mut effects = Effects::default();
            inner.slots.set_mask(id, mask, now, &mut effects);
            inner.settle(effects, now, after);
        });
    }

    fn end_generation(self: &Arc<Self>, why: GoneWhy, owner: Label) -> Cleanup {
        let now = now();
        let answer = self.with(|inner, after| {
            let generation = inner.slots.generation();
            let stop = Stop::Gone {
                generation,
                why: why.clone(),
            };
            inner.ended = Some(Box::new((
                Gone {
                    generation,
                    why: why.clone(),
                },
                now,
            )));
            let mut effects = Effects::default();
            inner.slots.end_generation(&mut effects);
            inner.settle(effects, now, after);
            let tokens = inner
                .running
                .iter()
                .flatten()
                .filter_map(|running| running.told.as_ref()?.token.clone());
            after
                .stops
                .extend(tokens.map(|token| (token, stop.clone())));
            inner.admit(
                Want::Normal(JobKind::Destroy),
                &owner,
                crate::Flow::new().id(),
                now,
            )
        });
        debug!(domain = %self.domain, %why, "generation ended");
        let want = Want::Normal(JobKind::Destroy);
        Cleanup {
            waiting: answer.and_then(|admitted| self.admitted(admitted, want, &owner, now)),
        }
    }

    fn cancel(
        self: &Arc<Self>,
        pick: impl Fn(u64, Kind) -> bool,
        by: Label,
    ) -> Result<u64, CancelError> {
        self.with(|inner, after| {
            for name in SLOTS {
                let Some(slot) = inner
                    .slots
                    .slot(name)
                    .filter(|slot| pick(slot.id, slot.want.kind()))
                else {
                    continue;
                };
                let id = slot.id;
                let Some(running) = &mut inner.running[name as usize] else {
                    continue;
                };
                let told = running.told.get_or_insert_default();
                if told.decided {
                    return Err(CancelError::TooLate {
                        phase: told.phase.clone(),
                    });
                }
                let token = told.token.get_or_insert_with(Token::new).clone();
                after.stops.push((token, Stop::Cancelled(by)));
                return Ok(id);
            }
            Err(CancelError::NotRunning)
        })
    }

    /// Whether a guard of `generation` still gives a right.
    pub(crate) fn check(&self, generation: u64) -> Result<(), Gone> {
        let inner = lock(&self.inner);
        if inner.slots.generation() == generation {
            Ok(())
        } else {
            Err(inner.gone(generation))
        }
    }

    pub(crate) fn token(self: &Arc<Self>, name: SlotName, id: u64, generation: u64) -> Token {
        let (token, late) = self.with(|inner, _| {
            let late = (inner.slots.generation() != generation).then(|| inner.gone(generation));
            let token = match inner.told(name, id) {
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
        self.with(|inner, _| inner.told(name, id).map(change));
    }

    pub(crate) fn report(
        self: &Arc<Self>,
        name: SlotName,
        id: u64,
        done: u64,
        total: u64,
    ) -> Option<crate::Progress> {
        let now = now();
        self.with(|inner, _| {
            inner
                .told(name, id)
                .and_then(|told| told.tracker.update(now, done, total))
        })
    }

    pub(crate) fn record(&self, id: u64) -> Option<AsyncRecord> {
        let inner = lock(&self.inner);
        let slot = inner
            .slots
            .slot(SlotName::Async)
            .filter(|slot| slot.id == id)?;
        let Want::Async(kind, mask) = slot.want else {
            return None;
        };
        let running = inner.running[SlotName::Async as usize].as_ref()?;
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

    pub(crate) fn owner(&self, name: SlotName, id: u64) -> Option<Label> {
        let inner = lock(&self.inner);
        inner.slots.slot(name).filter(|slot| slot.id == id)?;
        inner.running[name as usize]
            .as_ref()
            .map(|running| running.owner.clone())
    }

    /// The flow of a holder, which its nested steps inherit.
    pub(crate) fn flow(&self, name: SlotName, id: u64) -> u64 {
        let inner = lock(&self.inner);
        inner
            .slots
            .slot(name)
            .filter(|slot| slot.id == id)
            .map_or(0, |slot| slot.flow)
    }

    /// One look of the timer: takes back what nobody picked up, evicts what outlived its guest. Answers whether to come again.
    pub(crate) fn sweep(self: &Arc<Self>) -> bool {
        let now = now();
        let (reclaimed, evicted, again) = self.with(|inner, after| {
            let reclaimed = inner.reclaim(now, after);
            let grace = GRACE.as_nanos() as Tick;
            let is_due = inner
                .ended
                .as_ref()
                .is_some_and(|ended| now.saturating_sub(ended.1) >= grace);
            let evicted = if is_due { inner.evict(now, after) } else { 0 };
            let again = inner.slots.has_overdue();
            inner.listed = again;
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

    fn failure(&self, failure: Failure, want: Want) -> BeginError {
        match failure {
            Failure::Closed => BeginError::Closed,
            Failure::WouldDeadlock(held) => BeginError::WouldDeadlock {
                wanted: want.kind(),
                held,
            },
            Failure::Gone => {
                let inner = lock(&self.inner);
                inner.gone(inner.slots.generation() - 1).into()
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let now = now();
        let inner = lock(&self.inner);
        let mut places = [0; 3];
        let waiting = inner
            .slots
            .queue()
            .into_iter()
            .filter_map(|(key, id, want)| {
                let pending = inner.pending.get(key as usize)?.as_ref()?;
                let place = &mut places[want.slot() as usize];
                *place += 1;
                Some(WaitingPicture {
                    id,
                    kind: want.kind(),
                    owner: pending.owner.clone(),
                    waited: Duration::from_nanos(now.saturating_sub(pending.since)),
                    place: *place,
                    blocked_by: inner.blocker(want, now),
                })
            });
        Snapshot {
            waiting: waiting.collect(),
            generation: inner.slots.generation(),
            closed: inner.slots.is_closed(),
            mask: inner.slots.mask(),
            normal: inner.held(SlotName::Normal, now),
            asynchronous: inner.held(SlotName::Async, now),
            agent: inner.held(SlotName::Agent, now),
        }
    }
}

impl Inner {
    /// Lets `want` in: held now, or pending.
    fn admit(
        &mut self,
        want: Want,
        owner: &Label,
        flow: u64,
        now: Tick,
    ) -> Result<(u64, u64, Admission), BeginError> {
        match self.slots.request(want, flow) {
            Ok((id, admission)) => {
                match admission {
                    Admission::Granted => {
                        let running = Running {
                            owner: owner.clone(),
                            began: now,
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
            Err(refusal) => Err(match refusal {
                Refusal::Closed => BeginError::Closed,
                Refusal::WouldDeadlock(held) => BeginError::WouldDeadlock {
                    wanted: want.kind(),
                    held,
                },
                Refusal::Gone => self.gone(self.slots.generation().saturating_sub(1)).into(),
                Refusal::QueueFull { waiting } => BeginError::QueueFull {
                    wanted: want.kind(),
                    waiting: waiting as usize,
                    holder: self.blocker(want, now),
                },
            }),
        }
    }

    /// Follows what the slots did: who holds now, whom to wake.
    fn settle(&mut self, effects: Effects, now: Tick, after: &mut After) {
        for name in SLOTS {
            let index = name as usize;
            if let Some(key) = effects.granted[index]
                && let Some(pending) = &mut self.pending[key as usize]
            {
                let waited = now.saturating_sub(pending.since);
                let owner = pending.owner.clone();
                self.running[index] = Some(Running {
                    owner,
                    began: now,
                    waited,
                    told: None,
                });
                after.wakers[index] = pending.waker.take();
            } else if self.slots.slot(name).is_none() {
                self.running[index] = None;
            }
        }
        for key in effects.failed {
            if let Some(pending) = &mut self.pending[key as usize] {
                after.more.extend(pending.waker.take());
            }
        }
    }

    /// Takes back grants that nobody picked up in time. Costs three comparisons where there are none.
    fn reclaim(&mut self, now: Tick, after: &mut After) -> u32 {
        let Some(limit) = now.checked_sub(UNCLAIMED.as_nanos() as Tick) else {
            return 0;
        };
        let mut effects = Effects::default();
        let taken = self.slots.reclaim(limit, now, &mut effects);
        if taken > 0 {
            // A second grant of one slot in one call must not lose the waker of the first.
            after
                .more
                .extend(after.wakers.iter_mut().filter_map(Option::take));
            self.settle(effects, now, after);
        }
        taken
    }

    fn evict(&mut self, now: Tick, after: &mut After) -> usize {
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
                    began: running.began,
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

    fn remember(&mut self, ended: Ended) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(ended);
    }

    fn forget(&mut self, key: Key) -> Option<Pending> {
        let pending = self.pending[key as usize].take();
        if self.slots.is_quiet() && self.pending.len() > KEPT {
            self.pending = Vec::new();
        }
        pending
    }

    fn told(&mut self, name: SlotName, id: u64) -> Option<&mut Told> {
        self.slots.slot(name).filter(|slot| slot.id == id)?;
        Some(
            self.running[name as usize]
                .as_mut()?
                .told
                .get_or_insert_default(),
        )
    }

    fn gone(&self, generation: u64) -> Gone {
        let why = self
            .ended
            .as_ref()
            .map_or(GoneWhy::Died("unknown".into()), |ended| ended.0.why.clone());
        Gone { generation, why }
    }

    fn blocker(&self, want: Want, now: Tick) -> Option<Holder> {
        Some(self.held(self.slots.blocker(want)?, now)?.holder)
    }

    fn held(&self, name: SlotName, now: Tick) -> Option<HeldPicture> {
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
                held: Duration::from_nanos(now.saturating_sub(running.began)),
            },
            waited: Duration::from_nanos(running.waited),
            progress: told.and_then(|told| told.tracker.picture(now)),
            claimed: slot.is_claimed(),
            generation: slot.generation,
        })
    }
}

impl Ended {
    fn picture(&self, now: Tick) -> Finished {
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

/// Nanoseconds since the first look at the clock.
fn now() -> Tick {
    static BASE: OnceLock<Instant> = OnceLock::new();
    BASE.get_or_init(Instant::now).elapsed().as_nanos() as Tick
}
