//! The invariants at the head of `slots.rs`, each checked by itself and counted.
//!
//! What is looked at is the specification's lists, with which the slots were just found to agree; how the specification
//! came by them is not relied on.

use std::fmt;
use std::ops::AddAssign;

use crate::model::{Ask, Holder, Waiter, may_run};
use crate::slots::{Admission, Claim, Effects, SlotName, Want};
use crate::world::{Told, World};

const NAMES: [&str; 9] = [
    "nothing is granted that the table forbids",
    "no eligible waiter is left waiting",
    "first come, first served, but for destroy and abort",
    "nothing waits, nothing is granted after close",
    "no flow holds what must not be held together",
    "nothing new runs beside what is left of a dead guest",
    "no lost wake-up",
    "destroy is reachable",
    "no slot without an owner",
];

/// How often each was checked.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tally {
    checks: [u64; 9],
    transitions: u64,
    states: u64,
}

type Verdict = Result<(), String>;

impl Tally {
    pub(crate) fn states(&self) -> u64 {
        self.states
    }

    /// What must hold of each transition.
    pub(crate) fn transition(&mut self, before: &World, after: &World, told: &Told) -> Verdict {
        self.transitions += 1;
        let was = |ticket| before.model.holders.iter().any(|one| one.ticket == ticket);
        let new: Vec<&Holder> = after
            .model
            .holders
            .iter()
            .filter(|one| !was(one.ticket))
            .collect();

        self.check(1, new.iter().all(|one| allowed(one, &new, after)), || {
            format!("{new:?}")
        })?;
        let waiting = || after.model.waiters.iter().filter(|one| !one.asleep);
        let holders = &after.model.holders;
        let left = waiting().find(|one| !after.model.closed && may_run(holders, one.ask));
        self.check(2, left.is_none(), || format!("{left:?}"))?;
        let overtaken = new.iter().find_map(|one| overtaken(one, &new, after));
        self.check(3, overtaken.is_none(), || format!("{overtaken:?}"))?;
        let after_close = before.model.closed && !new.is_empty();
        let rest = after.model.closed
            && (!after.model.waiters.is_empty() || holders.iter().any(|one| !one.claimed));
        self.check(4, !after_close && !rest, || "after close".into())?;
        self.check(5, apart(holders), || format!("{holders:?}"))?;
        self.check(6, of_one_guest(holders), || format!("{holders:?}"))?;
        self.check(7, woken(before, after, told), || format!("told {told:?}"))
    }

    /// What must hold of each state.
    pub(crate) fn state(&mut self, world: &World) -> Verdict {
        self.states += 1;
        self.check(7, looks(world), || {
            "a waiter finds something else than it was told".into()
        })?;
        self.check(8, destroy_gets_through(world), || "destroy is stuck".into())?;
        let orphan = world.model.holders.iter().find(|one| !is_owned(one, world));
        self.check(9, orphan.is_none(), || format!("{orphan:?}"))?;
        let idle = |one: &&Waiter| world.slots.blocker(crate::world::want(one.ask)).is_none();
        let unexplained = world.model.held_back().find(idle);
        match unexplained {
            Some(one) => Err(format!("nobody is named for whom {one:?} waits")),
            None => Ok(()),
        }
    }

    fn check(&mut self, number: usize, holds: bool, what: impl FnOnce() -> String) -> Verdict {
        self.checks[number - 1] += 1;
        if holds {
            return Ok(());
        }
        let name = NAMES[number - 1];
        Err(format!("invariant {number} ({name}) is broken: {}", what()))
    }
}

/// Written from the table, the other way round than the specification: what a grant must not find.
fn allowed(granted: &Holder, new: &[&Holder], world: &World) -> bool {
    let others = world
        .model
        .holders
        .iter()
        .filter(|one| one.ticket != granted.ticket);
    others.clone().all(|other| match (granted.ask, other.ask) {
        (Ask::Agent(..), Ask::Agent(..)) | (Ask::Async(..), Ask::Async(..)) => false,
        (Ask::Agent(..), _) | (_, Ask::Agent(..)) => true,
        (Ask::Normal(kind), Ask::Async(_, mask)) => mask.lets_pass(kind),
        (Ask::Nested(parent), Ask::Async(..)) => other.ticket == parent,
        // One granted in the same instant came after it, and is looked at by itself.
        (Ask::Async(..), _) => new.contains(&other),
        _ => false,
    }) && match granted.ask {
        Ask::Nested(parent) => others.clone().any(|other| other.ticket == parent),
        _ => true,
    }
}

/// One who could have been granted instead and had the better place.
fn overtaken<'a>(granted: &Holder, new: &[&Holder], after: &'a World) -> Option<&'a Waiter> {
    let place = (granted.ask.precedence(), granted.ticket);
    // The domain as it was when this one was chosen: an async job is chosen before what passes beside it.
    let undone = |one: &Holder| {
        one.ticket == granted.ticket
            || (granted.ask.is_async() && new.iter().any(|other| other.ticket == one.ticket))
    };
    let then: Vec<Holder> = after
        .model
        .holders
        .iter()
        .filter(|one| !undone(one))
        .copied()
        .collect();
    after.model.waiters.iter().find(|one| {
        !one.asleep
            && one.place() < place
            && one.ask.is_agent() == granted.ask.is_agent()
            && may_run(&then, one.ask)
    })
}

fn apart(holders: &[Holder]) -> bool {
    let part_of = |one: &Holder, other: &Holder| one.ask.parent() == Some(other.ticket);
    holders.iter().all(|one| {
        holders.iter().all(|other| {
            one.ticket == other.ticket
                || one.flow != other.flow
                || part_of(one, other)
                || part_of(other, one)
        })
    })
}

fn of_one_guest(holders: &[Holder]) -> bool {
    let mut monitor = holders.iter().filter(|one| !one.ask.is_agent());
    let first = monitor.next();
    monitor.all(|one| first.is_some_and(|first| first.stale == one.stale))
}

/// Those who stopped waiting without having called are exactly those who were told.
fn woken(before: &World, after: &World, told: &Told) -> bool {
    let stopped = |ticket| {
        let still = after.model.waiters.iter().any(|one| one.ticket == ticket);
        let here = after.keys().iter().any(|(_, other)| *other == ticket);
        here && !still
    };
    let mut stopped: Vec<_> = before
        .model
        .waiters
        .iter()
        .map(|one| one.ticket)
        .filter(|ticket| stopped(*ticket))
        .collect();
    // A grant that was not picked up can still fail.
    let failed = |ticket| after.model.failed.iter().any(|one| one.0 == ticket);
    let unseen = before.model.holders.iter().filter(|one| !one.claimed);
    stopped.extend(
        unseen
            .map(|one| one.ticket)
            .filter(|ticket| failed(*ticket)),
    );
    // One that looked and got in at once was told twice, which does no harm.
    let mut told: Vec<_> = told
        .moved
        .iter()
        .copied()
        .filter(|ticket| after.keys().iter().any(|(_, other)| other == ticket))
        .collect();
    stopped.sort_unstable();
    told.sort_unstable();
    stopped == told
}

/// What every waiter would find if it looked now.
fn looks(world: &World) -> bool {
    let mut slots = world.slots.clone();
    world.keys().into_iter().all(|(key, ticket)| {
        if let Some(waiter) = world.model.waiters.iter().find(|one| one.ticket == ticket) {
            let expected = if waiter.asleep {
                Claim::Asleep
            } else {
                Claim::Waiting
            };
            slots.claim(key) == expected
        } else {
            let granted = world.model.holders.iter().any(|one| one.ticket == ticket);
            match slots.claim(key) {
                Claim::Granted { .. } => granted,
                Claim::Failed(_) => !granted,
                Claim::Waiting | Claim::Asleep => false,
            }
        }
    })
}

/// A destroy that comes now goes in once those in its way have ended, and none that waits goes before it but another
/// destroy.
fn destroy_gets_through(world: &World) -> bool {
    let mut slots = world.slots.clone();
    let now = u64::MAX;
    let Ok((id, admission)) = slots.request(Want::Normal(crate::kind::JobKind::Destroy), None, now)
    else {
        return slots.is_closed();
    };
    let Admission::Queued(key) = admission else {
        return true;
    };
    let is_destroy = |one: &&Waiter| one.ask.precedence() == 0 && !one.ask.is_agent();
    let ahead = world.model.waiters.iter().filter(is_destroy).count();
    for _ in 0..ahead + 2 {
        let mut effects = Effects::default();
        match slots.slot(SlotName::Normal) {
            Some(slot) if slot.id == id => {
                return matches!(slots.claim(key), Claim::Granted { .. });
            }
            Some(slot) if slot.is_claimed() => {
                let holder = slot.id;
                slots.release(SlotName::Normal, holder, now, &mut effects);
            }
            Some(_) => drop(slots.reclaim(now, now, &mut effects)),
            None => drop(slots.evict(now, &mut effects)),
        }
    }
    slots
        .slot(SlotName::Normal)
        .is_some_and(|slot| slot.id == id)
}

/// It belongs to a guard, or to one who waits and has not looked.
fn is_owned(holder: &Holder, world: &World) -> bool {
    use crate::world::Place;
    world
        .callers
        .iter()
        .flat_map(|one| [one.main, one.part])
        .any(|place| match place {
            Place::Holds(ticket, _) => ticket == holder.ticket && holder.claimed,
            Place::Waits(_, ticket) => ticket == holder.ticket && !holder.claimed,
            Place::Idle => false,
        })
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        for (mine, theirs) in self.checks.iter_mut().zip(other.checks) {
            *mine += theirs;
        }
        self.transitions += other.transitions;
        self.states += other.states;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} transitions", self.transitions)?;
        for ((name, checks), number) in NAMES.iter().zip(self.checks).zip(1..) {
            writeln!(f, "invariant {number}: {name}")?;
            writeln!(
                f,
                "figure walk-invariant-{number} {checks} checks bar > 0 ok"
            )?;
        }
        Ok(())
    }
}
