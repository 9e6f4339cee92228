//! The domains by uuid, name and number. The one file that names dashmap: what leaves it is a counted handle, never a
//! map guard (R5).

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use uuid::Uuid;

use crate::domain::Inner;

/// So many domains are taken from the list at a time: whoever adds or removes one waits for no more than these.
const PIECE: usize = 128;

/// All domains of a driver.
#[derive(Default)]
pub(crate) struct Registry {
    domains: DashMap<Uuid, Arc<Inner>>,
    names: DashMap<String, Uuid>,
    /// In the order in which they became known, which is that of every list: sorting ten thousand for each takes longer
    /// than to look at them (measured).
    ids: RwLock<BTreeMap<u64, Arc<Inner>>>,
    last: AtomicU64,
}

/// What keeps a domain out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Name,
    Uuid,
}

impl Registry {
    /// Adds the domain that `make` makes with the number it is given, unless its name or uuid is taken.
    pub(crate) fn insert(
        &self,
        name: &str,
        uuid: Uuid,
        make: impl FnOnce(u64) -> Arc<Inner>,
    ) -> Result<Arc<Inner>, Taken> {
        // Made before any shard is locked: it runs code of the daemon's author.
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let domain = make(id);
        // The name is reserved first and given back if the uuid is taken, so that both change as one for every reader:
        // a name without a domain is not found.
        match self.names.entry(name.to_owned()) {
            Entry::Occupied(_) => return Err(Taken::Name),
            Entry::Vacant(place) => drop(place.insert(uuid)),
        }
        match self.domains.entry(uuid) {
            Entry::Occupied(_) => {
                self.names.remove(name);
                Err(Taken::Uuid)
            }
            Entry::Vacant(place) => {
                place.insert(domain.clone());
                self.with_ids(|ids| ids.insert(id, domain.clone()));
                Ok(domain)
            }
        }
    }

    pub(crate) fn by_uuid(&self, uuid: Uuid) -> Option<Arc<Inner>> {
        self.domains.get(&uuid).map(|domain| domain.clone())
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<Arc<Inner>> {
        let uuid = *self.names.get(name)?;
        self.by_uuid(uuid)
    }

    pub(crate) fn by_id(&self, id: u64) -> Option<Arc<Inner>> {
        let ids = self.ids.read().unwrap_or_else(PoisonError::into_inner);
        ids.get(&id).cloned()
    }

    /// Takes that very domain out; a later one of the same uuid stays.
    pub(crate) fn remove(&self, domain: &Arc<Inner>) {
        if self
            .domains
            .remove_if(&domain.uuid, |_, found| Arc::ptr_eq(found, domain))
            .is_some()
        {
            self.with_ids(|ids| ids.remove(&domain.id));
            self.names
                .remove_if(&*domain.name, |_, uuid| *uuid == domain.uuid);
        }
    }

    /// Looks at all domains, in the order of their numbers. No lock is held while it looks; one that comes or goes meanwhile
    /// is looked at or not.
    pub(crate) fn for_each(&self, mut look: impl FnMut(Arc<Inner>)) {
        let mut piece = Vec::with_capacity(PIECE);
        let mut last = Bound::Unbounded;
        loop {
            let ids = self.ids.read().unwrap_or_else(PoisonError::into_inner);
            let next = ids.range((last, Bound::Unbounded)).take(PIECE);
            piece.extend(next.map(|(_, domain)| domain.clone()));
            drop(ids);
            let Some(domain) = piece.last() else {
                return;
            };
            last = Bound::Excluded(domain.id);
            piece.drain(..).for_each(&mut look);
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        let ids = self.ids.read().unwrap_or_else(PoisonError::into_inner);
        ids.len()
    }

    /// All domains, in the order of their numbers.
    pub(crate) fn all(&self) -> Vec<Arc<Inner>> {
        let mut all = Vec::with_capacity(self.len());
        self.for_each(|domain| all.push(domain));
        all
    }

    /// Forgets all domains: they hold what holds this.
    pub(crate) fn clear(&self) {
        self.domains.clear();
        self.names.clear();
        // The last one may hold all others' last handles: they are dropped after the lock.
        drop(self.with_ids(std::mem::take));
    }

    fn with_ids<R>(&self, change: impl FnOnce(&mut BTreeMap<u64, Arc<Inner>>) -> R) -> R {
        // Every change is one insert or remove, so a poisoned map is still whole.
        change(&mut self.ids.write().unwrap_or_else(PoisonError::into_inner))
    }
}
