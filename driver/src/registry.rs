//! The domains by uuid, name and number. The one file that names dashmap: what leaves it is a counted handle, never a
//! map guard (R5).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use uuid::Uuid;

use crate::domain::Inner;

/// All domains of a driver.
#[derive(Default)]
pub(crate) struct Registry {
    domains: DashMap<Uuid, Arc<Inner>>,
    names: DashMap<String, Uuid>,
    ids: DashMap<u64, Uuid>,
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
                self.ids.insert(id, uuid);
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
        let uuid = *self.ids.get(&id)?;
        self.by_uuid(uuid)
    }

    /// Takes that very domain out; a later one of the same uuid stays.
    pub(crate) fn remove(&self, domain: &Arc<Inner>) {
        if self
            .domains
            .remove_if(&domain.uuid, |_, found| Arc::ptr_eq(found, domain))
            .is_some()
        {
            self.ids.remove(&domain.id);
            self.names
                .remove_if(&*domain.name, |_, uuid| *uuid == domain.uuid);
        }
    }

    /// All domains, in the order of their numbers.
    pub(crate) fn all(&self) -> Vec<Arc<Inner>> {
        let all = self.domains.iter();
        // The numbers beside them, so that sorting does not look into each domain again and again.
        let mut all: Vec<_> = all.map(|domain| (domain.id, domain.clone())).collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all.into_iter().map(|(_, domain)| domain).collect()
    }

    /// Forgets all domains: they hold what holds this.
    pub(crate) fn clear(&self) {
        self.domains.clear();
        self.names.clear();
        self.ids.clear();
    }
}
