//! Jobs of QEMU's block layer that go on while the guest runs: commit, stream, mirror.
//!
//! ```text
//!  begin    written down ─► the copy's file and node ─► QEMU's job                     one normal job
//!             ⋮ followed by its events and a query now and then: no job is held
//!  ready    written down ─► the guest stops ─► pivot ─► descriptions ─► it runs on     one normal job
//!  over     what QEMU has at the disk decides ─► nodes, the copy, the record           one normal job
//! ```
//!
//! Each is followed by a task of its own, in this driver or the next. Decides nothing:
//! [`block_job`](crate::block_job) does.

mod begin;
mod handle;
mod over;
mod track;

use std::path::PathBuf;

use job_core::JobKind;

use crate::block_job::{Noted, Pivot};
use crate::devices;
use crate::domain::Domain;
use crate::error::Cause;
use crate::guest::DiskFormat;
use crate::ops::Call;
use crate::records::Work;

pub use handle::{BlockJob, BlockJobState};
pub(crate) use over::drop_copies;
pub(crate) use track::{Tracks, track_again};

/// Which layers are written back, and how fast.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..CommitOptions::default()`"
)]
pub struct CommitOptions {
    /// The highest layer that is written back; none is the one that the guest writes to. Then the guest goes over to
    /// `base` at the end, and stands still for that moment.
    pub top: Option<PathBuf>,
    /// The layer that is written to; none is the lowest.
    pub base: Option<PathBuf>,
    /// At most so many bytes a second.
    pub bandwidth: Option<u64>,
}

/// What is copied up, and how fast.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..StreamOptions::default()`"
)]
pub struct StreamOptions {
    /// The layer that stays behind the disk; none leaves nothing behind it.
    pub base: Option<PathBuf>,
    /// At most so many bytes a second.
    pub bandwidth: Option<u64>,
}

/// Where a disk is copied to, and when the guest goes over.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "plain data; checked before use")]
pub struct MirrorOptions {
    /// A file that does not exist yet.
    pub path: PathBuf,
    /// What it will be. It has all of the disk in it, whatever layers that has.
    pub format: DiskFormat,
    /// When the guest goes over to it; it stands still for that moment.
    pub pivot: Pivot,
    /// At most so many bytes a second.
    pub bandwidth: Option<u64>,
}

impl Domain {
    /// Begins to write layers of a disk back into one behind them. Begun when this returns;
    /// [`wait`](BlockJob::wait) for its end.
    ///
    /// The files of the layers that were written back are left where they are, and are of no use any more. Cancelled, failed,
    /// or if QEMU dies, the disk is the file it was, and reads as before: what was written to the base by then, the layers
    /// above say as well.
    pub fn commit_disk(&self, disk: impl Into<String>, options: CommitOptions) -> Call<BlockJob> {
        let disk = disk.into();
        self.normal("commit-disk", JobKind::Modify, move |mut op| async move {
            begin::commit(&mut op, disk, options).await
        })
    }

    /// Begins to copy what lies behind a disk's file into it. The files behind are left as they are. Cancelled, failed,
    /// or if QEMU dies, all of them lie behind it still.
    pub fn stream_disk(&self, disk: impl Into<String>, options: StreamOptions) -> Call<BlockJob> {
        let disk = disk.into();
        self.normal("stream-disk", JobKind::Modify, move |mut op| async move {
            begin::stream(&mut op, disk, options).await
        })
    }

    /// Begins to copy a disk to a new file, and keeps both equal until the guest goes over to the copy. Cancelled, failed,
    /// or if QEMU dies before that, the disk is the file it was, and the copy is removed.
    pub fn mirror_disk(&self, disk: impl Into<String>, options: MirrorOptions) -> Call<BlockJob> {
        let disk = disk.into();
        self.normal("mirror-disk", JobKind::Modify, move |mut op| async move {
            begin::mirror(&mut op, disk, options).await
        })
    }

    /// The block jobs that go on, those that an earlier driver began included. Needs no job and never waits.
    #[must_use]
    pub fn block_jobs(&self) -> Vec<BlockJob> {
        self.0.block_jobs.all(self)
    }

    /// The block job of that id, if it goes on.
    #[must_use]
    pub fn block_job(&self, id: &str) -> Option<BlockJob> {
        self.block_jobs().into_iter().find(|job| job.id() == id)
    }
}

/// Refuses what a block job at the disk excludes, or one at any disk if none is named, and names that job. A backup that
/// copies the disk excludes the same.
pub(crate) async fn refuse_beside(domain: &Domain, disk: Option<&str>) -> Result<(), Cause> {
    let Some(record) = domain.0.noted().await else {
        return Ok(());
    };
    let is_it = |job: &&Noted| disk.is_none_or(|disk| job.disk == disk);
    if let Some(job) = record.block_jobs.iter().find(is_it) {
        let (id, disk) = (&job.id, &job.disk);
        return Err(Cause::State(format!(
            "block job {id} is at disk \"{disk}\""
        )));
    }
    if let (Some(Work::Backup(copies)), Some(disk)) = (record.job.map(|job| job.work), disk)
        && let mut all = copies.all.iter()
        && let Some(copied) = all.find(|copied| devices::is_node_of(&copied.node, disk))
    {
        let job = &copied.job;
        return Err(Cause::State(format!("{job} copies disk \"{disk}\"")));
    }
    Ok(())
}
