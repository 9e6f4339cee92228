//! A few callers around one domain's slots, with the specification beside them: what they can do next, and doing it.
//!
//! Callers do what the types allow: one job each, parts only of an async job one holds, one part at a time, and no end
//! of the async job before that of its part.

use std::num::NonZeroU64;

use crate::kind::{AgentKind, AsyncKind, JobKind, KindSet};
use crate::model::{Answer, Ask, Caps, Mask, Model, No, Ticket};
use crate::slots::{
    Admission, Claim, Effects, Failure, Key, Limits, Refusal, SlotName, Slots, Want,
};

const SLOTS: [SlotName; 3] = [SlotName::Normal, SlotName::Async, SlotName::Agent];
/// The flow of those callers that are parts of one operation.
const SHARED: u64 = 1;

/// Who plays, and what they may ask for.
pub(crate) struct Cast {
    pub(crate) name: &'static str,
    pub(crate) callers: usize,
    pub(crate) normal: Vec<JobKind>,
    pub(crate) agent: Vec<AgentKind>,
    pub(crate) asyncs: Vec<(AsyncKind, Mask)>,
    /// What an async job may change its mask to.
    pub(crate) masks: Vec<Mask>,
    pub(crate) limits: Limits,
}

#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) slots: Slots,
    pub(crate) model: Model,
    pub(crate) callers: Vec<Caller>,
    now: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Caller {
    pub(crate) main: Place,
    /// What it does under its async job.
    pub(crate) part: Place,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Place {
    #[default]
    Idle,
    Waits(Key, Ticket),
    Holds(Ticket, SlotName),
}

/// What one caller, or somebody above them all, can do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Ask(u8, Which, bool),
    AskPart(u8, Option<AgentKind>),
    Look(u8, bool),
    Leave(u8, bool),
    End(u8, bool),
    SetMask(u8, u8),
    /// All grants nobody looked at, or only the oldest.
    TakeBack(bool),
    EndGeneration,
    Evict,
    Close,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Which {
    Normal(JobKind),
    Agent(AgentKind),
    /// By its place in the cast.
    Async(u8),
}

/// What the slots told of one call: those they granted or failed beside the one who called.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) moved: Vec<Ticket>,
}

impl World {
    pub(crate) fn new(cast: &Cast) -> Self {
        let Limits {
            normal,
            asynchronous,
            agent,
        } = cast.limits;
        Self {
            slots: Slots::new(cast.limits),
            model: Model::new(Caps {
                normal,
                asynchronous,
                agent,
            }),
            callers: vec![Caller::default(); cast.callers],
            now: 0,
        }
    }

    /// All that can happen next. Of several idle callers one is enough: they differ by name only.
    pub(crate) fn steps(&self, cast: &Cast) -> Vec<Step> {
        let mut steps = vec![Step::EndGeneration, Step::Evict];
        if !self.slots.is_closed() {
            steps.push(Step::Close);
        }
        if self.model.holders.iter().any(|holder| !holder.claimed) {
            steps.extend([Step::TakeBack(true), Step::TakeBack(false)]);
        }
        let mut is_first_idle = true;
        for (caller, index) in self.callers.iter().zip(0..) {
            let is_alone = matches!(caller.part, Place::Idle);
            match caller.main {
                Place::Idle if is_first_idle => {
                    is_first_idle = false;
                    let normal = cast.normal.iter().map(|kind| Which::Normal(*kind));
                    let agent = cast.agent.iter().map(|kind| Which::Agent(*kind));
                    let asyncs = (0..).zip(&cast.asyncs).map(|(at, _)| Which::Async(at));
                    for which in normal.chain(agent).chain(asyncs) {
                        steps.extend([
                            Step::Ask(index, which, false),
                            Step::Ask(index, which, true),
                        ]);
                    }
                }
                Place::Idle => {}
                Place::Waits(..) => {
                    steps.extend([Step::Look(index, false), Step::Leave(index, false)]);
                }
                Place::Holds(_, name) => {
                    if is_alone {
                        steps.push(Step::End(index, false));
                    }
                    if name == SlotName::Async {
                        if is_alone {
                            let parts = cast.agent.iter().copied().map(Some).chain([None]);
                            steps.extend(parts.map(|part| Step::AskPart(index, part)));
                        }
                        let masks = (0..).zip(&cast.masks);
                        steps.extend(masks.map(|(mask, _)| Step::SetMask(index, mask)));
                    }
                }
            }
            match caller.part {
                Place::Idle => {}
                Place::Waits(..) => {
                    steps.extend([Step::Look(index, true), Step::Leave(index, true)]);
                }
                Place::Holds(..) => steps.push(Step::End(index, true)),
            }
        }
        steps
    }

    /// Does it on both sides and compares all that shows.
    pub(crate) fn play(&mut self, cast: &Cast, step: Step) -> Result<Told, String> {
        self.now += 1;
        let now = self.now;
        let mut effects = Effects::default();
        let keys = self.keys();
        match step {
            Step::Ask(index, which, shared) => {
                let flow = shared.then_some(SHARED);
                let ask = match which {
                    Which::Normal(kind) => Ask::Normal(kind),
                    Which::Agent(kind) => Ask::Agent(kind, None),
                    Which::Async(at) => {
                        let (kind, mask) = cast.asyncs[usize::from(at)];
                        Ask::Async(kind, mask)
                    }
                };
                self.callers[usize::from(index)].main = self.ask(ask, flow)?;
            }
            Step::AskPart(index, part) => {
                let Place::Holds(parent, _) = self.callers[usize::from(index)].main else {
                    return Err("only a holder has parts".into());
                };
                let holder = self.model.holders.iter().find(|one| one.ticket == parent);
                let flow = holder.map(|holder| holder.flow);
                let ask = part.map_or(Ask::Nested(parent), |kind| Ask::Agent(kind, Some(parent)));
                self.callers[usize::from(index)].part = self.ask(ask, flow)?;
            }
            Step::Look(index, part) => {
                let Place::Waits(key, ticket) = *self.place(index, part) else {
                    return Err("only a waiter looks".into());
                };
                let name = self.slot_of(ticket);
                let mut claim = self.slots.claim(key);
                if claim == Claim::Asleep {
                    self.slots.rouse(key, now, &mut effects);
                    claim = self.slots.claim(key);
                }
                let ours = match claim {
                    Claim::Granted { generation, .. } => {
                        same("generation", generation, self.model.generation)?;
                        Some(Ok(()))
                    }
                    Claim::Waiting => None,
                    Claim::Asleep => return Err("one that was roused sleeps".into()),
                    Claim::Failed(failure) => Some(Err(no(failure))),
                };
                same("answer", ours, self.model.look(ticket, now))?;
                *self.place(index, part) = match ours {
                    None => Place::Waits(key, ticket),
                    Some(Ok(())) => Place::Holds(ticket, name.ok_or("a holder has a slot")?),
                    Some(Err(_)) => Place::Idle,
                };
            }
            Step::Leave(index, part) => {
                let Place::Waits(key, ticket) = std::mem::take(self.place(index, part)) else {
                    return Err("only a waiter leaves".into());
                };
                self.slots.withdraw(key, now, &mut effects);
                self.model.leave(ticket, now);
            }
            Step::End(index, part) => {
                let Place::Holds(ticket, name) = std::mem::take(self.place(index, part)) else {
                    return Err("only a holder ends".into());
                };
                let held = self.model.holders.iter().any(|one| one.ticket == ticket);
                let ended = self.slots.release(name, ticket, now, &mut effects);
                same("whether it still held", ended, held)?;
                self.model.end(ticket, now);
            }
            Step::SetMask(index, mask) => {
                let Place::Holds(ticket, _) = *self.place(index, false) else {
                    return Err("only a holder has a mask".into());
                };
                let mask = cast.masks[usize::from(mask)];
                let set = mask.kinds().collect();
                self.slots.set_mask(ticket, set, now, &mut effects);
                self.model.set_mask(ticket, mask, now);
            }
            Step::TakeBack(all) => {
                let unseen = self.model.holders.iter().filter(|one| !one.claimed);
                let oldest = unseen.map(|one| one.since).min();
                let limit = if all { now } else { oldest.unwrap_or(0) };
                let taken = self.slots.reclaim(limit, now, &mut effects);
                same("taken back", taken, self.model.take_back(limit, now))?;
            }
            Step::EndGeneration => {
                self.slots.end_generation(&mut effects);
                self.model.end_generation();
            }
            Step::Evict => {
                let ours = self.slots.evict(now, &mut effects);
                let mut ours: Vec<_> = ours.iter().flatten().map(|slot| slot.id).collect();
                let mut theirs = self.model.evict(now);
                ours.sort_unstable();
                theirs.sort_unstable();
                same("evicted", ours, theirs)?;
            }
            Step::Close => {
                self.slots.close(&mut effects);
                self.model.close();
            }
        }
        let ticket = |key: Key| {
            let known = keys.iter().find(|(other, _)| *other == key);
            known
                .map(|(_, ticket)| *ticket)
                .ok_or("moved a key nobody has")
        };
        let moved = effects.granted.into_iter().flatten().chain(effects.failed);
        let told = Told {
            moved: moved.map(ticket).collect::<Result<_, _>>()?,
        };
        self.agree()?;
        Ok(told)
    }

    fn ask(&mut self, ask: Ask, flow: Option<u64>) -> Result<Place, String> {
        let could_start = self.slots.could_start(want(ask));
        let ours = self.slots.request(want(ask), flow, self.now);
        if let Ok((_, admission)) = &ours {
            let at_once = *admission == Admission::Granted;
            same("could start", could_start, at_once)?;
        }
        let (place, shown) = match ours {
            Ok((id, Admission::Granted)) => (Place::Holds(id, want(ask).slot()), Answer::Held(id)),
            Ok((id, Admission::Queued(key))) => (Place::Waits(key, id), Answer::Waits(id)),
            Err(refusal) => (
                Place::Idle,
                Answer::Refused(match refusal {
                    Refusal::QueueFull { waiting } => No::Full(waiting),
                    Refusal::WouldDeadlock(kind) => No::WouldDeadlock(kind),
                    Refusal::Gone => No::Gone,
                    Refusal::Closed => No::Closed,
                }),
            ),
        };
        same("answer", shown, self.model.request(ask, flow, self.now))?;
        Ok(place)
    }

    /// Everything that can be seen of the slots is as the specification has it.
    fn agree(&self) -> Result<(), String> {
        for name in SLOTS {
            let ours = self.slots.slot(name).map(|slot| {
                let stale = slot.generation != self.slots.generation();
                (
                    slot.id,
                    slot.flow,
                    slot.want,
                    stale,
                    slot.is_claimed(),
                    slot.granted,
                )
            });
            let theirs = self
                .model
                .holders
                .iter()
                .find(|one| want(one.ask).slot() == name)
                .map(|one| {
                    let want = want(one.ask);
                    (
                        one.ticket,
                        one.flow,
                        want,
                        one.stale,
                        one.claimed,
                        one.since,
                    )
                });
            same("holder", ours, theirs)?;
        }
        let mut theirs: Vec<_> = self.model.waiters.iter().collect();
        theirs.sort_by_key(|one| one.place());
        let theirs: Vec<_> = theirs
            .iter()
            .map(|one| (one.ticket, want(one.ask)))
            .collect();
        let ours: Vec<_> = self
            .slots
            .queue()
            .into_iter()
            .map(|(_, id, want)| (id, want))
            .collect();
        same("queue", ours, theirs)?;
        same("generation", self.slots.generation(), self.model.generation)?;
        same("closed", self.slots.is_closed(), self.model.closed)?;
        let is_due = |one: &crate::model::Holder| !one.claimed || one.stale;
        let overdue = self.model.holders.iter().any(is_due);
        same("overdue", self.slots.has_overdue(), overdue)?;
        same("quiet", self.slots.is_quiet(), self.keys().is_empty())
    }

    /// Who has which key.
    pub(crate) fn keys(&self) -> Vec<(Key, Ticket)> {
        let places = self.callers.iter().flat_map(|one| [one.main, one.part]);
        places
            .filter_map(|place| match place {
                Place::Waits(key, ticket) => Some((key, ticket)),
                Place::Idle | Place::Holds(..) => None,
            })
            .collect()
    }

    fn place(&mut self, index: u8, part: bool) -> &mut Place {
        let caller = &mut self.callers[usize::from(index)];
        if part {
            &mut caller.part
        } else {
            &mut caller.main
        }
    }

    /// The slot of one who waits or holds.
    fn slot_of(&self, ticket: Ticket) -> Option<SlotName> {
        let waits = self.model.waiters.iter().map(|one| (one.ticket, one.ask));
        let holds = self.model.holders.iter().map(|one| (one.ticket, one.ask));
        let (_, ask) = waits.chain(holds).find(|(other, _)| *other == ticket)?;
        Some(want(ask).slot())
    }

    /// The state without names: what each caller has, tickets and times as ranks, in an order of its own.
    pub(crate) fn canonical(&self) -> Vec<u8> {
        let model = &self.model;
        let mut tickets: Vec<_> = model.waiters.iter().map(|one| one.ticket).collect();
        let unseen = model.holders.iter().filter(|one| !one.claimed);
        tickets.extend(unseen.clone().map(|one| one.ticket));
        tickets.sort_unstable();
        let mut times: Vec<_> = unseen.map(|one| one.since).collect();
        times.sort_unstable();
        times.dedup();
        let rank = |list: &[u64], value| {
            list.iter()
                .position(|one| *one == value)
                .map_or(99, |at| at as u8)
        };
        let describe = |place: Place, out: &mut Vec<u8>| {
            let (Place::Waits(_, ticket) | Place::Holds(ticket, _)) = place else {
                out.push(0);
                return;
            };
            if let Some(one) = model.waiters.iter().find(|one| one.ticket == ticket) {
                out.extend([
                    1,
                    u8::from(one.asleep),
                    u8::from(one.flow == SHARED),
                    rank(&tickets, ticket),
                ]);
                encode(one.ask, out);
            } else if let Some(one) = model.holders.iter().find(|one| one.ticket == ticket) {
                let flags = u8::from(one.claimed) | u8::from(one.stale) << 1;
                let (turn, since) = if one.claimed {
                    (99, 99)
                } else {
                    (rank(&tickets, ticket), rank(&times, one.since))
                };
                out.extend([2, flags, u8::from(one.flow == SHARED), turn, since]);
                encode(one.ask, out);
            } else if let Some((_, why)) = model.failed.iter().find(|one| one.0 == ticket) {
                out.extend([
                    3,
                    match why {
                        No::Closed => 0,
                        No::Gone => 1,
                        No::WouldDeadlock(_) => 2,
                        No::Full(_) => 3,
                    },
                ]);
            } else {
                // Its slot was taken from it; the guard lives on.
                out.push(4);
            }
        };
        let mut callers: Vec<Vec<u8>> = self
            .callers
            .iter()
            .map(|caller| {
                let mut out = Vec::with_capacity(24);
                describe(caller.main, &mut out);
                describe(caller.part, &mut out);
                out
            })
            .collect();
        callers.sort_unstable();
        let mut out = vec![u8::from(model.closed)];
        for caller in callers {
            out.push(caller.len() as u8);
            out.extend(caller);
        }
        out
    }
}

/// What is asked of the slots for what is asked of the specification.
pub(crate) fn want(ask: Ask) -> Want {
    match ask {
        Ask::Normal(kind) => Want::Normal(kind),
        Ask::Nested(parent) => Want::Nested(parent),
        Ask::Agent(kind, within) => Want::Agent {
            kind,
            within: within.and_then(NonZeroU64::new),
        },
        Ask::Async(kind, mask) => Want::Async(kind, mask.kinds().collect::<KindSet>()),
    }
}

fn encode(ask: Ask, out: &mut Vec<u8>) {
    match ask {
        Ask::Normal(kind) => out.extend([0, kind as u8]),
        Ask::Nested(_) => out.push(1),
        Ask::Agent(kind, parent) => out.extend([2, kind as u8, u8::from(parent.is_some())]),
        Ask::Async(kind, mask) => {
            let bits = mask.kinds().fold(0, |bits, kind| bits | 1 << kind as u8);
            out.extend([3, kind as u8, bits]);
        }
    }
}

fn no(failure: Failure) -> No {
    match failure {
        Failure::Gone => No::Gone,
        Failure::Closed => No::Closed,
        Failure::WouldDeadlock(kind) => No::WouldDeadlock(kind),
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, ours: T, theirs: T) -> Result<(), String> {
    if ours == theirs {
        Ok(())
    } else {
        Err(format!("{what}: {ours:?}, by the specification {theirs:?}"))
    }
}
