//! Which migrations are in hand, each with the one place its machine is in, and which guests they move.
//!
//! The lock is held for a moment at a time, never across a wait. Memory is bounded whatever a peer asks.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use uuid::Uuid;

use crate::{
    destination::DestinationMachine,
    message::Request,
    phase::{MigrationId, Reason},
};

/// Migrations in hand at once. More guests than that do not arrive at one host at one time; a peer that
/// makes ids up must not fill the memory.
const MAX_LIVE: usize = 1024;

/// Finished migrations whose last word is kept for requests that come late.
const MAX_OVER: usize = 256;

/// Where one migration is worked on, by one at a time.
pub(super) type Place = Arc<tokio::sync::Mutex<Seat>>;

#[derive(Default)]
pub(super) struct Seat {
    /// Empty until loaded, while at work, and after a panic: then the journal says how it stands.
    pub(super) machine: Option<DestinationMachine>,
    /// What went wrong first.
    pub(super) trouble: Option<Reason>,
}

#[derive(Default)]
pub(super) struct Slots(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    live: HashMap<MigrationId, Slot>,
    /// Oldest first; each has a slot too.
    over: VecDeque<MigrationId>,
}

struct Slot {
    machine: Place,
    /// The guest that this migration brings in.
    claims: Option<Uuid>,
}

impl Slots {
    /// The migration's place, made if there is none and room for one.
    pub(super) fn place(&self, migration: MigrationId) -> Option<Place> {
        self.with(|slots| {
            if let Some(slot) = slots.live.get(&migration) {
                return Some(Arc::clone(&slot.machine));
            }
            (slots.live.len() < MAX_LIVE + MAX_OVER).then(|| {
                let machine = Place::default();
                let slot = Slot {
                    machine: Arc::clone(&machine),
                    claims: None,
                };
                slots.live.insert(migration, slot);
                machine
            })
        })
    }

    /// Marks the guest as moved by this migration, unless another one moves it.
    pub(super) fn claim(&self, request: &Request) -> bool {
        self.with(|slots| {
            let taken = slots.live.iter().any(|(migration, slot)| {
                *migration != request.migration && slot.claims == Some(request.domain)
            });
            if let Some(slot) = slots.live.get_mut(&request.migration).filter(|_| !taken) {
                slot.claims = Some(request.domain);
            }
            !taken
        })
    }

    /// Gives a place up that nobody else holds and nothing is remembered in.
    pub(super) fn leave(&self, migration: MigrationId, place: Place) {
        // `place` is dropped under the lock as well: of two that leave at once, the second is alone.
        self.with(move |slots| {
            let (known, over) = match place.try_lock() {
                Ok(seat) => seat.machine.as_ref().map_or((false, false), |machine| {
                    (machine.record().is_some(), machine.is_over())
                }),
                // Somebody else is at work, and leaves later.
                Err(_) => return,
            };
            let alone = Arc::strong_count(&place) == 2;
            if !known && alone {
                if let Some(slot) = slots.live.get_mut(&migration) {
                    slot.claims = None;
                }
                if !over {
                    slots.live.remove(&migration);
                }
            }
            if over && !slots.over.contains(&migration) {
                slots.over.push_back(migration);
            }
            if slots.over.len() > MAX_OVER
                && let Some(oldest) = slots.over.pop_front()
            {
                let idle = |slot: &Slot| Arc::strong_count(&slot.machine) == 1;
                if slots.live.get(&oldest).is_some_and(idle) {
                    slots.live.remove(&oldest);
                } else {
                    slots.over.push_back(oldest);
                }
            }
        });
    }

    fn with<R>(&self, change: impl FnOnce(&mut Inner) -> R) -> R {
        // No user code runs under this lock, and each change is whole at every step.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_makes_ids_up_finds_a_limit_and_leaves_no_trace() {
        let slots = Slots::default();
        let held: Vec<_> = (0..MAX_LIVE + MAX_OVER)
            .map(|_| MigrationId::random())
            .map(|id| (id, slots.place(id).unwrap()))
            .collect();
        assert!(slots.place(MigrationId::random()).is_none());
        for (id, place) in held {
            slots.leave(id, place);
        }
        slots.with(|slots| assert!(slots.live.is_empty()));
    }
}
