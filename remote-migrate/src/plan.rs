//! What a caller asks of a migration, and what it is told at the end. Values without behaviour.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;

use crate::{
    message::Downtime,
    phase::{MigrationId, Owner},
};

/// What is to be moved, and how long each part of it may take.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) migration: MigrationId,
    pub(crate) domain: Uuid,
    pub(crate) peer: Arc<str>,
    pub(crate) home: Arc<str>,
    pub(crate) limits: Limits,
}

impl Plan {
    /// Moves this guest.
    #[must_use]
    pub fn new(domain: Uuid) -> Self {
        Self {
            migration: MigrationId::random(),
            domain,
            peer: "".into(),
            home: "".into(),
            limits: Limits::default(),
        }
    }

    /// Under this id, instead of a random one.
    #[must_use]
    pub fn migration(mut self, migration: MigrationId) -> Self {
        self.migration = migration;
        self
    }

    /// Where the destination daemon is reached. Only kept in the journal, for whoever recovers.
    #[must_use]
    pub fn peer(mut self, address: impl Into<Arc<str>>) -> Self {
        self.peer = address.into();
        self
    }

    /// Where this daemon is reached. Kept in the destination's journal, so that it can ask back.
    #[must_use]
    pub fn home(mut self, address: impl Into<Arc<str>>) -> Self {
        self.home = address.into();
        self
    }

    /// With other limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Under which id.
    #[must_use]
    pub fn id(&self) -> MigrationId {
        self.migration
    }
}

/// How long each part may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The source's description of the guest. 30 s, as for any job of a domain.
    pub begin: Duration,
    /// The destination's answer to `Prepare`. 60 s: a QEMU is started.
    pub prepare: Duration,
    /// Moving the memory. 1 h: what is slower needs a policy, which then gives its own limit.
    pub perform: Duration,
    /// The destination's answer to `Finish`. 60 s: the last of the memory is read, the guest started.
    pub finish: Duration,
    /// The host's last step, and the destination's answer to `Confirm`. 30 s.
    pub confirm: Duration,
    /// A look at the guest, a question for the status, one write to the journal. 10 s.
    pub look: Duration,
    /// The pause before something is tried again. 0.5 s.
    pub pause: Duration,
    /// How long trying again goes on, in all, before the call ends unsettled or in doubt. 60 s.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            begin: Duration::from_secs(30),
            prepare: Duration::from_secs(60),
            perform: Duration::from_secs(3600),
            finish: Duration::from_secs(60),
            confirm: Duration::from_secs(30),
            look: Duration::from_secs(10),
            pause: Duration::from_millis(500),
            patience: Duration::from_secs(60),
        }
    }
}

/// A migration with a known end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Which one.
    pub migration: MigrationId,
    /// Who owns the guest: never in doubt here.
    pub owner: Owner,
    /// Whether both sides are through with it. If not, [`recover`](crate::recover()) is to be called later; the owner
    /// stays.
    pub settled: bool,
    /// How long this call took.
    pub took: Duration,
    /// How long the guest stood still, if it moved in this call and both hosts and the distance of their clocks are known.
    pub downtime: Option<Downtime>,
}
