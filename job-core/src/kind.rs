//! The kinds of jobs and the table of what passes beside which async job.
//!
//! Owns names and sets only; who holds what is decided in [`slots`](crate::slots). The kinds, and which of them an
//! async job lets pass, are those of libvirt's QEMU driver (its threading document and `virdomainjob.h`).

use std::fmt;

/// What a normal job is about to do. An async job's mask lets some of these pass and holds the others back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the mask table is closed: a new kind changes every row of it"
)]
#[repr(u8)]
pub enum JobKind {
    /// Reads only.
    Query = 0,
    /// Ends the guest. No mask holds it back and it goes before every other waiter.
    Destroy = 1,
    /// Stops the virtual CPUs.
    Suspend = 2,
    /// Changes the guest.
    Modify = 3,
    /// Asks QEMU to give up what the async job runs. Goes before every waiter but `Destroy`.
    Abort = 4,
    /// Tunes a running migration.
    MigrationOp = 5,
    /// Changes what a migration does not carry, so it cannot disturb one.
    ModifyMigrationSafe = 6,
}

impl JobKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Query,
        Self::Destroy,
        Self::Suspend,
        Self::Modify,
        Self::Abort,
        Self::MigrationOp,
        Self::ModifyMigrationSafe,
    ];

    /// The name used in errors, logs and snapshots.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Destroy => "destroy",
            Self::Suspend => "suspend",
            Self::Modify => "modify",
            Self::Abort => "abort",
            Self::MigrationOp => "migration-op",
            Self::ModifyMigrationSafe => "modify-migration-safe",
        }
    }
}

/// What an agent job is about to do. One agent job runs at a time, beside any normal or async job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(
    clippy::exhaustive_enums,
    reason = "each kind is a lane of the agent slot"
)]
#[repr(u8)]
pub enum AgentKind {
    /// Reads only.
    Query = 0,
    /// Changes the guest from within.
    Modify = 1,
    /// Thaws a frozen file system. Goes before every other agent job and meets no limit:
    /// whoever waits behind it may be waiting for the disk it frees.
    Thaw = 2,
}

impl AgentKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Query, Self::Modify, Self::Thaw];

    /// The name used in errors, logs and snapshots.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "agent-query",
            Self::Modify => "agent-modify",
            Self::Thaw => "agent-thaw",
        }
    }
}

/// A long operation of many monitor commands. One runs at a time and lets the kinds in its mask pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(
    clippy::exhaustive_enums,
    reason = "a restarted daemon must know each kind to recover its job"
)]
#[repr(u8)]
pub enum AsyncKind {
    /// The guest leaves for another host.
    MigrationOut = 0,
    /// The guest arrives from another host.
    MigrationIn = 1,
    /// The guest's state goes to a file and the guest ends.
    Save = 2,
    /// The guest's memory goes to a file for a post-mortem.
    Dump = 3,
    /// A snapshot of disks, memory or both.
    Snapshot = 4,
    /// QEMU is being started.
    Start = 5,
    /// Disks are copied while the guest runs.
    Backup = 6,
}

impl AsyncKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::MigrationOut,
        Self::MigrationIn,
        Self::Save,
        Self::Dump,
        Self::Snapshot,
        Self::Start,
        Self::Backup,
    ];

    /// The name used in errors, logs, snapshots and records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MigrationOut => "migration-out",
            Self::MigrationIn => "migration-in",
            Self::Save => "save",
            Self::Dump => "dump",
            Self::Snapshot => "snapshot",
            Self::Start => "start",
            Self::Backup => "backup",
        }
    }

    /// The kind of that name, as [`name`](Self::name) gives it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The normal jobs this async job lets pass unless told otherwise.
    ///
    /// A snapshot while its RAM is being saved, and one during which QEMU's main loop is taken, have masks of their own:
    /// [`KindSet::SNAPSHOT_SAVING_RAM`] and [`KindSet::DESTROY_ONLY`].
    #[must_use]
    pub const fn default_mask(self) -> KindSet {
        match self {
            Self::Save | Self::Dump | Self::Snapshot => KindSet::DEFAULT,
            Self::Start => KindSet::DESTROY_ONLY,
            Self::MigrationIn => KindSet::DESTROY_ONLY.with(JobKind::ModifyMigrationSafe),
            Self::MigrationOut => KindSet::SNAPSHOT_SAVING_RAM.with(JobKind::ModifyMigrationSafe),
            Self::Backup => KindSet::DEFAULT
                .with(JobKind::Suspend)
                .with(JobKind::Modify),
        }
    }
}

/// A set of [`JobKind`]s: the mask of an async job. It always contains [`JobKind::Destroy`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KindSet(u8);

impl KindSet {
    /// Only `Destroy` passes: QEMU is starting, or its main loop is taken.
    pub const DESTROY_ONLY: Self = Self(1 << JobKind::Destroy as u8);
    /// `Query`, `Destroy` and `Abort` pass.
    pub const DEFAULT: Self = Self::DESTROY_ONLY.with(JobKind::Query).with(JobKind::Abort);
    /// The mask of a snapshot while RAM is being saved: what a migration of its memory allows.
    pub const SNAPSHOT_SAVING_RAM: Self = Self::DEFAULT
        .with(JobKind::Suspend)
        .with(JobKind::MigrationOp);
    /// Everything passes.
    pub const ALL: Self = Self(0x7f);

    /// This set and `kind`.
    #[must_use]
    pub const fn with(self, kind: JobKind) -> Self {
        Self(self.0 | 1 << kind as u8)
    }

    /// This set without `kind`; `Destroy` stays whatever is asked.
    #[must_use]
    pub const fn without(self, kind: JobKind) -> Self {
        Self(self.0 & !(1 << kind as u8) | Self::DESTROY_ONLY.0)
    }

    /// Whether `kind` is in the set.
    #[must_use]
    pub const fn contains(self, kind: JobKind) -> bool {
        self.0 & 1 << kind as u8 != 0
    }

    /// The kinds in the set, in the order of their numbers.
    pub fn iter(self) -> impl Iterator<Item = JobKind> {
        JobKind::ALL
            .into_iter()
            .filter(move |kind| self.contains(*kind))
    }

    /// One bit a kind, by its number.
    pub(crate) const fn bits(self) -> u8 {
        self.0
    }
}

impl FromIterator<JobKind> for KindSet {
    /// The kinds given, and `Destroy`.
    fn from_iter<I: IntoIterator<Item = JobKind>>(kinds: I) -> Self {
        kinds.into_iter().fold(Self::DESTROY_ONLY, Self::with)
    }
}

impl fmt::Debug for KindSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.iter().map(JobKind::name))
            .finish()
    }
}

/// The kind of any job: what it holds and what it is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the four ways of holding a domain are the model"
)]
pub enum Kind {
    /// A normal job.
    Normal(JobKind),
    /// A step of the running async job; holds the normal slot.
    Nested,
    /// An agent job.
    Agent(AgentKind),
    /// An async job.
    Async(AsyncKind),
}

impl Kind {
    /// The name used in errors, logs and snapshots.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal(kind) => kind.name(),
            Self::Nested => "nested",
            Self::Agent(kind) => kind.name(),
            Self::Async(kind) => kind.name(),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the design, row by row, written out so that a slip in the constants shows.
    #[test]
    fn masks_are_those_of_the_table() {
        use JobKind::*;
        let row = |kind: AsyncKind| kind.default_mask().iter().collect::<Vec<_>>();
        assert_eq!(row(AsyncKind::Save), [Query, Destroy, Abort]);
        assert_eq!(row(AsyncKind::Dump), [Query, Destroy, Abort]);
        assert_eq!(row(AsyncKind::Snapshot), [Query, Destroy, Abort]);
        assert_eq!(row(AsyncKind::Start), [Destroy]);
        assert_eq!(row(AsyncKind::MigrationIn), [Destroy, ModifyMigrationSafe]);
        assert_eq!(
            row(AsyncKind::MigrationOut),
            [
                Query,
                Destroy,
                Suspend,
                Abort,
                MigrationOp,
                ModifyMigrationSafe
            ]
        );
        assert_eq!(
            row(AsyncKind::Backup),
            [Query, Destroy, Suspend, Modify, Abort]
        );
        let ram: Vec<_> = KindSet::SNAPSHOT_SAVING_RAM.iter().collect();
        assert_eq!(ram, [Query, Destroy, Suspend, Abort, MigrationOp]);
    }

    #[test]
    fn destroy_cannot_be_masked_out() {
        let mask = KindSet::ALL
            .without(JobKind::Destroy)
            .without(JobKind::Query);
        assert!(mask.contains(JobKind::Destroy));
        assert!(!mask.contains(JobKind::Query));
        assert!(KindSet::from_iter([]).contains(JobKind::Destroy));
    }

    #[test]
    fn names_lead_back_to_their_kind() {
        for kind in AsyncKind::ALL {
            assert_eq!(AsyncKind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(AsyncKind::from_name("lunch"), None);
    }
}
