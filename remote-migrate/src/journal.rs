//! What each side must not forget, and the trait that keeps it.
//!
//! A record is written *before* what it announces is done. These writes decide ownership:
//!
//! | side | stage | is on disk before |
//! |---|---|---|
//! | source | `HandingOver` | the last of the memory goes, and `Finish` is sent: from here on a daemon that finds it so may not resume by itself |
//! | source | `Switching` | post-copy begins: from here on a guest that is stopped is not resumed |
//! | source | `HandingOverHalf` | as `HandingOver`, after `Switching` |
//! | source | `Kept` | the guest is resumed |
//! | source | `Kept`, ended | another migration of the guest begins while this one is still to be told |
//! | source | `PostCopy` | the source serves the rest of the memory: its copy is needed and is not the guest |
//! | source | `Released` | the source's copy is killed |
//! | source | `Lost`, ended | the guest may be started anew while the destination is still to be told |
//! | destination | `Prepared` | `Prepare` is answered, so that "unknown" later means a lost journal |
//! | destination | `Starting` | the guest is started: from here on it belongs to the destination |
//! | destination | `Refused` | `Finish` is answered with a refusal: this copy never runs |
//!
//! The record goes when the other side has answered that it is decided there too. This file knows
//! no disk: the daemon brings its own [`Journal`].

use std::{
    collections::BTreeMap,
    error::Error as StdError,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    message::{CopyState, Prepared, Status},
    phase::{Epoch, MigrationId, Owner, Phase, Reason, RunState, Side},
};

/// What one side remembers of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "a migration has two sides")]
pub enum Record {
    /// As the source.
    Source(SourceRecord),
    /// As the destination.
    Destination(DestinationRecord),
}

impl Record {
    /// Which migration.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        match self {
            Self::Source(record) => record.migration,
            Self::Destination(record) => record.migration,
        }
    }

    /// Which side wrote it. With the migration, the key of the record.
    #[must_use]
    pub fn side(&self) -> Side {
        match self {
            Self::Source(_) => Side::Source,
            Self::Destination(_) => Side::Destination,
        }
    }

    /// Which guest.
    #[must_use]
    pub fn domain(&self) -> Uuid {
        match self {
            Self::Source(record) => record.domain,
            Self::Destination(record) => record.domain,
        }
    }

    /// Whom this side takes for the owner.
    #[must_use]
    pub fn owner(&self) -> Owner {
        match self {
            Self::Source(record) => record.stage.owner(),
            Self::Destination(record) => record.stage.owner(),
        }
    }

    /// Whether start, autostart and restore must refuse the domain while this record stands.
    ///
    /// On the source everything refuses but a guest that was kept for certain, since a restarted
    /// host may find that the destination has the only complete copy; and one that is lost for certain, which has nothing to
    /// wait for. On the destination everything refuses but a guest that was taken.
    #[must_use]
    pub fn refuses_start(&self) -> bool {
        match self {
            Self::Source(record) => {
                !matches!(record.stage, SourceStage::Kept { .. }) && !record.stage.only_tells()
            }
            Self::Destination(record) => record.stage != DestinationStage::Owned,
        }
    }

    /// Whether another migration of the guest must not begin while this record stands: what it says could still end the
    /// guest here, or let it run, while the other one has it in doubt.
    #[must_use]
    pub fn refuses_migration(&self) -> bool {
        match self {
            Self::Source(record) => !record.stage.only_tells(),
            Self::Destination(_) => self.refuses_start(),
        }
    }
}

/// What the source remembers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Which migration.
    pub migration: MigrationId,
    /// Which guest.
    pub domain: Uuid,
    /// Which life of this daemon works on it.
    pub epoch: Epoch,
    /// Whether the guest is let run by whoever ends up with it.
    pub run: RunState,
    /// Where the destination daemon is reached; its meaning is the daemon's own.
    pub peer: Arc<str>,
    /// How far it came.
    pub stage: SourceStage,
}

/// How far the source came.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "recovery must know every stage")]
pub enum SourceStage {
    /// The guest is being described; nobody else knows.
    Begin,
    /// The destination may have been asked to prepare.
    Prepare,
    /// Memory is moving, or all but the last of it has moved; the source owns the guest.
    Perform,
    /// Post-copy may have begun: the guest is stopped then, and its memory is in two halves. It was not
    /// offered yet.
    Switching,
    /// The guest is stopped, and all of its memory may have moved. `Finish` may have been sent: the destination may own the
    /// guest. Earlier versions wrote this after `Switching`, too.
    HandingOver,
    /// The same after `Switching`: it may need memory that is here still.
    HandingOverHalf,
    /// The destination owns the guest, and may need memory that is here still.
    PostCopy,
    /// The source keeps the guest, for good.
    Kept {
        /// Whether the destination must still be told.
        tell: bool,
        /// Whether the migration has ended here: the guest runs again if it ran. From then on this record does nothing to
        /// the guest, which may be on its way to somebody else.
        #[serde(default)]
        ended: bool,
    },
    /// The destination owns the guest, for good.
    Released,
    /// No complete copy is left; only remains are to be cleared.
    Lost {
        /// Whether the destination must still be told.
        tell: bool,
        /// Whether it is known that the destination has nothing of it that may run. If not, an operator there may have let it
        /// run, since what is here is dead: then the answer is that both claim it, and the guest is there.
        #[serde(default)]
        nowhere: bool,
        /// Whether the remains are cleared, and it is [nowhere](Self::Lost::nowhere). From then on this record does nothing
        /// to the guest, which may have been started anew from its disks.
        #[serde(default)]
        ended: bool,
    },
}

impl SourceStage {
    /// The phase this stage is part of.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self {
            Self::Begin => Phase::Begin,
            Self::Prepare => Phase::Prepare,
            Self::Perform | Self::Switching => Phase::Perform,
            Self::HandingOver | Self::HandingOverHalf | Self::PostCopy => Phase::Finish,
            Self::Kept { .. } | Self::Released | Self::Lost { .. } => Phase::Confirm,
        }
    }

    /// Whether post-copy may have begun, and memory that the destination needs may be here still.
    #[must_use]
    pub fn may_be_halved(&self) -> bool {
        matches!(
            self,
            Self::Switching | Self::HandingOverHalf | Self::PostCopy
        )
    }

    /// Whether nothing is left to be done here: the destination is to be told, and no more.
    #[must_use]
    pub fn only_tells(&self) -> bool {
        matches!(
            self,
            Self::Kept { ended: true, .. } | Self::Lost { ended: true, .. }
        )
    }

    /// Who owns the guest at this stage.
    #[must_use]
    pub fn owner(&self) -> Owner {
        match self {
            Self::Begin | Self::Prepare | Self::Perform | Self::Switching | Self::Kept { .. } => {
                Owner::Source
            }
            Self::HandingOver | Self::HandingOverHalf => Owner::InDoubt,
            Self::PostCopy | Self::Released => Owner::Destination,
            Self::Lost { .. } => Owner::Nobody,
        }
    }

    /// What the source tells a destination that asks.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            side: Side::Source,
            phase: self.phase(),
            owner: self.owner(),
            copy: None,
        }
    }
}

/// What the destination remembers, the answers it must be able to repeat among it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DestinationRecord {
    /// Which migration.
    pub migration: MigrationId,
    /// Which guest.
    pub domain: Uuid,
    /// The highest epoch of the source met so far.
    pub epoch: Epoch,
    /// Whether the guest is let run once it is taken.
    pub run: RunState,
    /// Where the source daemon can be asked.
    pub home: Arc<str>,
    /// The answer to `Prepare`, once there is one.
    pub prepared: Option<Prepared>,
    /// How far it came.
    pub stage: DestinationStage,
}

/// How far the destination came.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "recovery must know every stage")]
pub enum DestinationStage {
    /// A QEMU is being made; nobody was told where it waits.
    Preparing,
    /// It waits, loads or has loaded; the source owns the guest.
    Prepared,
    /// The destination owns the guest and is about to start it.
    Starting,
    /// It was started.
    Owned,
    /// This copy never runs.
    Refused {
        /// Why not, for the source.
        why: Reason,
        /// Whether the copy may be complete; then it is kept until the source is known to own the guest.
        complete: bool,
    },
    /// It was taken, may have run, and is dead.
    Lost,
}

impl DestinationStage {
    /// The phase this stage is part of. `Confirm` means decided.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self {
            Self::Preparing => Phase::Prepare,
            Self::Prepared => Phase::Perform,
            Self::Starting => Phase::Finish,
            Self::Owned | Self::Refused { .. } | Self::Lost => Phase::Confirm,
        }
    }

    /// Who owns the guest at this stage, as far as the destination can know.
    #[must_use]
    pub fn owner(&self) -> Owner {
        match self {
            Self::Preparing | Self::Prepared | Self::Refused { .. } => Owner::Source,
            Self::Starting | Self::Owned => Owner::Destination,
            Self::Lost => Owner::Nobody,
        }
    }

    /// What the destination tells a source that asks.
    #[must_use]
    pub fn status(&self, copy: CopyState) -> Status {
        Status {
            side: Side::Destination,
            phase: self.phase(),
            owner: self.owner(),
            copy: Some(copy),
        }
    }
}

/// Where records outlive the daemon, and the host.
///
/// An implementation keeps one record per migration and side. It should reserve room for the whole
/// life of a record when it is first stored, so that a full disk refuses at Begin or Prepare, where
/// that costs nothing, and not at the hand-over, where it leaves the guest in doubt.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Replaces the record of this migration and side, as a whole, and returns when it would
    /// survive a loss of power.
    ///
    /// # Errors
    ///
    /// The record is there or its predecessor is, whole in either case; the caller assumes the worse.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the old or the new record. Stores of one record take effect in the
    /// order of the calls, also when an earlier future was dropped.
    async fn store(&self, record: &Record) -> Result<(), JournalError>;

    /// The record of this migration and side.
    ///
    /// # Errors
    ///
    /// It cannot be read. That is not the same as its absence.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing changes.
    async fn load(
        &self,
        migration: MigrationId,
        side: Side,
    ) -> Result<Option<Record>, JournalError>;

    /// All records, for a daemon that starts.
    ///
    /// # Errors
    ///
    /// As for [`Journal::load`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing changes.
    async fn list(&self) -> Result<Vec<Record>, JournalError>;

    /// Forgets a record; one that is not there is forgotten already.
    ///
    /// # Errors
    ///
    /// The record may still be there.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the record or not.
    async fn remove(&self, migration: MigrationId, side: Side) -> Result<(), JournalError>;
}

/// The journal could not do it.
#[derive(Debug, thiserror::Error)]
#[error("use migration journal")]
pub struct JournalError(#[source] Box<dyn StdError + Send + Sync>);

impl JournalError {
    /// A failure with this cause.
    #[must_use]
    pub fn new(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(cause.into())
    }
}

/// A journal that lives as long as the process, for tests and for daemons that accept that.
///
/// A clone is another handle to the same records.
#[derive(Clone, Debug, Default)]
pub struct MemoryJournal {
    records: Arc<Mutex<BTreeMap<(MigrationId, Side), Record>>>,
}

impl MemoryJournal {
    /// A journal without records.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn with<R>(&self, change: impl FnOnce(&mut BTreeMap<(MigrationId, Side), Record>) -> R) -> R {
        // Every change is one insert or remove, so a poisoned map is still whole.
        change(&mut self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Journal for MemoryJournal {
    async fn store(&self, record: &Record) -> Result<(), JournalError> {
        self.with(|all| all.insert((record.migration(), record.side()), record.clone()));
        Ok(())
    }

    async fn load(
        &self,
        migration: MigrationId,
        side: Side,
    ) -> Result<Option<Record>, JournalError> {
        Ok(self.with(|all| all.get(&(migration, side)).cloned()))
    }

    async fn list(&self) -> Result<Vec<Record>, JournalError> {
        Ok(self.with(|all| all.values().cloned().collect()))
    }

    async fn remove(&self, migration: MigrationId, side: Side) -> Result<(), JournalError> {
        self.with(|all| all.remove(&(migration, side)));
        Ok(())
    }
}
