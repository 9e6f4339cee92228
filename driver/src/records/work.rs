//! What an async job is at, and what is needed to finish or undo it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::guest::DiskFormat;
use crate::made::Made;

/// What an async job does, and what is needed to finish or undo it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Work {
    /// The guest is brought up.
    Start {
        /// Whether it stays paused then.
        paused: bool,
    },
    /// The guest goes into a file.
    Save {
        /// Which file.
        path: PathBuf,
        /// Which save wrote it: an older file of the same path is not this one.
        save: Uuid,
        /// Whether the guest ran before.
        was_running: bool,
    },
    /// The guest is brought up from a file.
    Restore {
        /// Which file.
        path: PathBuf,
        /// Which save wrote it.
        save: Uuid,
        /// Whether the guest runs then.
        was_running: bool,
    },
    /// The guest's memory goes into a file.
    Dump {
        /// Which file.
        file: Made,
        /// Whether all of it is there.
        is_whole: bool,
        /// Whether the guest ran before.
        was_running: bool,
    },
    /// Overlays are put on the guest's disks.
    Snapshot(Layers),
    /// A snapshot inside the guest's images is made, gone back to, or deleted.
    Inside {
        /// Which of these.
        what: Inside,
        /// What the snapshot is called.
        tag: String,
        /// Whether it is done, and only its end was not told.
        is_done: bool,
    },
    /// The guest's disks are copied.
    Backup(Copies),
    /// The guest moves to another host. The migration's journal knows how far that is.
    MigrationOut,
    /// The guest arrives from another host. The migration's journal knows how far that is.
    MigrationIn,
}

impl Work {
    /// What people call the job.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Start { .. } => "start",
            Self::Save { .. } => "save",
            Self::Restore { .. } => "restore",
            Self::Dump { .. } => "dump",
            Self::Snapshot(_) => "snapshot",
            Self::Inside { what, .. } => match what {
                Inside::Save => "snapshot-save",
                Inside::Load => "snapshot-load",
                Inside::Delete => "snapshot-delete",
            },
            Self::Backup(_) => "backup",
            Self::MigrationOut => "migration-out",
            Self::MigrationIn => "migration-in",
        }
    }
}

/// Overlays that are put on a guest's disks, all at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layers {
    /// One a disk.
    pub(crate) overlays: Vec<Layer>,
    /// The file that the guest's memory of that instant goes to.
    pub(crate) memory: Option<Memory>,
    /// Whether the guest ran before.
    pub(crate) was_running: bool,
    /// Whether its definition is to have them, too.
    pub(crate) in_definition: bool,
    /// Whether QEMU was about to put them in place: from then on they may be, and the descriptions have them. One that is
    /// not in place is empty, and as good as what is below it.
    pub(crate) is_taking: bool,
}

/// An overlay on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    /// Which disk.
    pub(crate) disk: String,
    /// What it lies on.
    pub(crate) below: PathBuf,
    /// And of which format that is.
    pub(crate) below_format: DiskFormat,
    /// The overlay's node.
    pub(crate) node: String,
    /// Its image.
    pub(crate) file: Made,
}

/// A file that a guest's memory goes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// Which file.
    pub(crate) path: PathBuf,
    /// Which save wrote it.
    pub(crate) save: Uuid,
}

/// What is done with a snapshot inside the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Inside {
    /// It is made.
    Save,
    /// The guest goes back to it.
    Load,
    /// It is deleted.
    Delete,
}

/// Copies of a guest's disks, all of one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Copies {
    /// One a disk.
    pub(crate) all: Vec<Copied>,
    /// The chain that goes on from here.
    pub(crate) chain: Option<String>,
    /// Whether what was copied stays although it is not whole.
    pub(crate) is_kept: bool,
    /// Whether all of it is copied.
    pub(crate) is_whole: bool,
}

impl Copies {
    /// QEMU's jobs.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.all.iter().map(|copy| copy.job.clone()).collect()
    }
}

/// A copy of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Copied {
    /// The node that is copied.
    pub(crate) source: String,
    /// The copy's node.
    pub(crate) node: String,
    /// QEMU's job.
    pub(crate) job: String,
    /// The copy's image.
    pub(crate) file: Made,
    /// What it and the bitmap that goes on from it are [known by](crate::marks).
    pub(crate) mark: Option<String>,
}
