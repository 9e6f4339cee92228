//! Background jobs of the block layer and of snapshots.

use serde::{Deserialize, Serialize};

use super::{commands, open_enum};

commands! {
    JobCancel => "job-cancel",
    JobDismiss => "job-dismiss",
    JobComplete => "job-complete",
    JobFinalize => "job-finalize",
    JobPause => "job-pause",
    JobResume => "job-resume",
    QueryJobs => "query-jobs" -> Vec<Job>,
    QueryBlockJobs => "query-block-jobs" -> Vec<BlockJobInfo>,
}

/// All jobs.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryJobs;

/// One of [`QueryJobs`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub job_type: JobType,
    /// Where it is.
    pub status: JobStatus,
    /// How far it got, in units of its own.
    pub current_progress: u64,
    /// How far it is to go; may grow.
    pub total_progress: u64,
    /// What went wrong. Concluded with an error is failed.
    pub error: Option<String>,
}

open_enum! {
    /// What a job does.
    pub enum JobType {
        Commit = "commit",
        Stream = "stream",
        Mirror = "mirror",
        Backup = "backup",
        Create = "create",
        Amend = "amend",
        SnapshotLoad = "snapshot-load",
        SnapshotSave = "snapshot-save",
        SnapshotDelete = "snapshot-delete",
    }
}

open_enum! {
    /// Where a job is.
    pub enum JobStatus {
        Undefined = "undefined",
        Created = "created",
        Running = "running",
        Paused = "paused",
        Ready = "ready",
        Standby = "standby",
        Waiting = "waiting",
        Pending = "pending",
        Aborting = "aborting",
        Concluded = "concluded",
        Null = "null",
    }
}

/// The block jobs, with what only they have.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryBlockJobs;

/// One of [`QueryBlockJobs`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// Its kind.
    #[serde(rename = "type")]
    pub job_type: JobType,
    /// Its id.
    pub device: String,
    /// How far it is to go.
    pub len: u64,
    /// How far it got.
    pub offset: u64,
    /// Whether it does I/O now.
    pub busy: bool,
    /// Whether it is paused.
    pub paused: bool,
    /// Its limit in bytes a second; 0 is none.
    pub speed: u64,
    /// Whether it may be completed.
    pub ready: bool,
    /// Where it is.
    pub status: JobStatus,
    /// What went wrong.
    pub error: Option<String>,
}

macro_rules! by_id {
    ($(#[$meta:meta])* $type:ident) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Deserialize, Serialize)]
        pub struct $type {
            /// The job's id.
            pub id: String,
        }
    };
}

by_id! {
    /// Asks a job to stop.
    JobCancel
}
by_id! {
    /// Forgets a concluded job.
    JobDismiss
}
by_id! {
    /// Lets a ready job complete.
    JobComplete
}
by_id! {
    /// Lets a pending job take effect.
    JobFinalize
}
by_id! {
    /// Pauses a job.
    JobPause
}
by_id! {
    /// Lets a paused job go on.
    JobResume
}
