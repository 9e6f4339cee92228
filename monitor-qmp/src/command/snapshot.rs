//! Snapshots of the whole guest inside its images. Each is a background job: see [`QueryJobs`](super::QueryJobs).

use super::{arguments, commands};

commands! {
    SnapshotSave => "snapshot-save",
    SnapshotLoad => "snapshot-load",
    SnapshotDelete => "snapshot-delete",
}

arguments! {
    /// Saves memory and disks.
    SnapshotSave {
        /// The job's id.
        job_id: String,
        /// The snapshot's name.
        tag: String,
        /// The node that takes the memory.
        vmstate: String,
        /// The nodes to save.
        devices: Vec<String>,
    }
}

arguments! {
    /// Goes back to a snapshot.
    SnapshotLoad {
        /// The job's id.
        job_id: String,
        /// The snapshot's name.
        tag: String,
        /// The node that has the memory.
        vmstate: String,
        /// The nodes to take back.
        devices: Vec<String>,
    }
}

arguments! {
    /// Deletes a snapshot.
    SnapshotDelete {
        /// The job's id.
        job_id: String,
        /// The snapshot's name.
        tag: String,
        /// The nodes it is in.
        devices: Vec<String>,
    }
}
