//! What is written down of a block job, and what it leaves behind however it ends. Pure;
//! [`ops::block_jobs`](crate::ops) carries it out.
//!
//! Which file is the disk is decided by one thing only: what QEMU has at the disk when the job is over. An active commit and
//! a mirror move the disk to another file (they pivot); the guest stands still from before that until both descriptions
//! say so. So whichever file a description names has all that the guest has written, whoever dies in between.
//!
//! | how it ended | is the new file at the disk? | the disk is | the mirror's copy |
//! |---|---|---|---|
//! | in whatever way | yes | the new file, and both descriptions follow | is the disk |
//! | done, a stream or a commit of lower layers | it has none | the file it was, with fewer behind it | |
//! | cancelled, failed, unknown | no | the file it was | is removed |
//! | QEMU died | nobody can say, and it makes no difference | the file that the description names | is removed unless it is named |
//!
//! A commit that did not end has written to its base what the layers above say as well: the disk reads as before.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::guest::DiskFormat;
use crate::made::Made;
use crate::qemu_job::End;

/// What a block job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockJobKind {
    /// Writes layers back into the one behind them.
    Commit,
    /// Copies what is behind an image into it.
    Stream,
    /// Copies a disk to a new file.
    Mirror,
}

impl BlockJobKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Stream => "stream",
            Self::Mirror => "mirror",
        }
    }
}

/// When the guest goes over to the copy that a mirror makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "by itself, or when it is told: there is no third way"
)]
pub enum Pivot {
    /// As soon as the copy is whole.
    #[default]
    WhenReady,
    /// When [`BlockJob::pivot`](crate::BlockJob::pivot) says so; until then the copy follows the disk.
    OnRequest,
}

/// How a block job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockJobEnd {
    /// It did what it was begun for.
    Done,
    /// It was cancelled, and the disk is as before.
    Cancelled,
    /// It failed for this reason, and the disk is as before.
    Failed(String),
    /// The guest ended first.
    Gone,
    /// Somebody else took it off QEMU's list. The disk is as before, or the job was done.
    Unknown,
}

/// A block job that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Noted {
    /// Its id, in QEMU as well.
    pub(crate) id: String,
    /// The name of its disk.
    pub(crate) disk: String,
    pub(crate) work: Job,
    pub(crate) stage: Stage,
}

/// What it does, with what is needed to finish or undo it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Job {
    /// Of the layer that the guest writes to, if there is a file that is the disk then; else of lower ones.
    Commit {
        pivot_to: Option<(PathBuf, DiskFormat)>,
    },
    Stream,
    Mirror {
        copy: Made,
        format: DiskFormat,
        pivot: Pivot,
    },
}

/// How far it is, as far as that matters after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    /// It is begun, or about to be.
    Begun,
    /// Somebody asked it to stop.
    Cancelling,
    /// The disk moves to the new file while the guest stands still.
    Pivoting {
        /// Whether it runs then.
        was_running: bool,
    },
}

impl Noted {
    pub(crate) fn kind(&self) -> BlockJobKind {
        match self.work {
            Job::Commit { .. } => BlockJobKind::Commit,
            Job::Stream => BlockJobKind::Stream,
            Job::Mirror { .. } => BlockJobKind::Mirror,
        }
    }

    /// The file that is the disk if it pivots.
    pub(crate) fn pivots_to(&self) -> Option<(&Path, DiskFormat)> {
        match &self.work {
            Job::Commit { pivot_to } => pivot_to.as_ref().map(|(path, format)| (&**path, *format)),
            Job::Stream => None,
            Job::Mirror { copy, format, .. } => Some((&copy.path, *format)),
        }
    }

    /// Whether it is to pivot once it is ready.
    pub(crate) fn is_to_pivot(&self) -> bool {
        let is_told = match &self.work {
            Job::Commit { pivot_to } => pivot_to.is_some(),
            Job::Stream => false,
            Job::Mirror { pivot, .. } => *pivot == Pivot::WhenReady,
        };
        is_told && self.stage != Stage::Cancelling
    }

    /// The copy of a mirror.
    pub(crate) fn copy(&self) -> Option<&Made> {
        match &self.work {
            Job::Mirror { copy, .. } => Some(copy),
            Job::Commit { .. } | Job::Stream => None,
        }
    }
}

/// What is to be done when a job is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Whether both descriptions follow to the new file.
    pub(crate) follow: bool,
    /// Whether the copy goes.
    pub(crate) drop_copy: bool,
    /// Whether the guest, which stood still, runs on.
    pub(crate) run: bool,
    /// What those are told who wait.
    pub(crate) end: BlockJobEnd,
}

/// Decides what becomes of a job that is on QEMU's list no more, or ended there. `is_there` says whether the disk is the
/// new file now.
pub(crate) fn verdict(job: &Noted, end: &End, is_there: bool) -> Verdict {
    let run = matches!(job.stage, Stage::Pivoting { was_running: true });
    let moved = is_there && job.pivots_to().is_some();
    let told = match end {
        _ if moved => BlockJobEnd::Done,
        End::Done if job.pivots_to().is_some() => {
            BlockJobEnd::Failed("it ended without a move to the new file".into())
        }
        End::Done => BlockJobEnd::Done,
        End::Cancelled => BlockJobEnd::Cancelled,
        End::Failed(reason) => BlockJobEnd::Failed(reason.clone()),
        End::Unknown if job.stage == Stage::Cancelling => BlockJobEnd::Cancelled,
        End::Unknown => BlockJobEnd::Unknown,
    };
    Verdict {
        follow: moved,
        drop_copy: !moved && job.copy().is_some(),
        run,
        end: told,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs() -> Vec<Noted> {
        let base = ("/base".into(), DiskFormat::Raw);
        let mirror = |pivot| Job::Mirror {
            copy: Made::nowhere(),
            format: DiskFormat::Qcow2,
            pivot,
        };
        let works = [
            Job::Commit { pivot_to: None },
            Job::Commit {
                pivot_to: Some(base),
            },
            Job::Stream,
            mirror(Pivot::WhenReady),
            mirror(Pivot::OnRequest),
        ];
        let stages = [
            Stage::Begun,
            Stage::Cancelling,
            Stage::Pivoting { was_running: false },
            Stage::Pivoting { was_running: true },
        ];
        let all = works.iter().flat_map(|work| {
            stages.map(|stage| Noted {
                id: "j".into(),
                disk: "root".into(),
                work: work.clone(),
                stage,
            })
        });
        all.collect()
    }

    fn ends() -> [End; 4] {
        [
            End::Done,
            End::Cancelled,
            End::Failed("broken".into()),
            End::Unknown,
        ]
    }

    /// Every row there can be.
    fn rows() -> impl Iterator<Item = (Noted, End, bool, Verdict)> {
        jobs().into_iter().flat_map(|job| {
            ends().into_iter().flat_map(move |end| {
                let job = job.clone();
                [false, true].map(move |is_there| {
                    let verdict = verdict(&job, &end, is_there);
                    (job.clone(), end.clone(), is_there, verdict)
                })
            })
        })
    }

    #[test]
    fn the_file_at_the_disk_is_described_and_never_removed() {
        for (job, end, is_there, verdict) in rows() {
            let row = format!("{job:?} {end:?} {is_there} {verdict:?}");
            assert!(!(verdict.follow && verdict.drop_copy), "{row}");
            assert_eq!(
                verdict.follow,
                is_there && job.pivots_to().is_some(),
                "{row}"
            );
            if job.copy().is_some() {
                assert_eq!(verdict.drop_copy, !is_there, "{row}");
            } else {
                assert!(
                    !verdict.drop_copy,
                    "no file of the owner's is removed: {row}"
                );
            }
        }
    }

    #[test]
    fn a_guest_that_was_stopped_for_the_pivot_runs_on_and_no_other_is_started() {
        for (job, end, _, verdict) in rows() {
            let was_stopped = job.stage == Stage::Pivoting { was_running: true };
            assert_eq!(verdict.run, was_stopped, "{job:?} {end:?}");
        }
    }

    #[test]
    fn done_is_said_of_what_was_done_only() {
        for (job, end, is_there, verdict) in rows() {
            let is_done = match job.pivots_to() {
                Some(_) => is_there,
                None => end == End::Done,
            };
            assert_eq!(
                verdict.end == BlockJobEnd::Done,
                is_done,
                "{job:?} {end:?} {is_there}"
            );
        }
    }

    #[test]
    fn one_that_is_cancelled_does_not_pivot_by_itself() {
        for job in jobs() {
            if job.stage == Stage::Cancelling {
                assert!(!job.is_to_pivot(), "{job:?}");
            }
        }
    }
}
