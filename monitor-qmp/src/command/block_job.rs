//! Jobs that copy disks while the guest runs.

use super::{arguments, commands, open_enum};

commands! {
    BlockdevMirror => "blockdev-mirror",
    BlockdevBackup => "blockdev-backup",
    BlockCommit => "block-commit",
    BlockStream => "block-stream",
    BlockJobCancel => "block-job-cancel",
    BlockJobSetSpeed => "block-job-set-speed",
    BlockJobPause => "block-job-pause",
    BlockJobResume => "block-job-resume",
}

open_enum! {
    /// What is copied.
    pub enum SyncMode {
        Top = "top",
        Full = "full",
        None = "none",
        Incremental = "incremental",
        Bitmap = "bitmap",
    }
}

open_enum! {
    /// What is done about an I/O error.
    pub enum OnError {
        Report = "report",
        Ignore = "ignore",
        NoSpace = "enospc",
        Stop = "stop",
        Auto = "auto",
    }
}

arguments! {
    /// Copies a node to another and keeps both equal until completed.
    BlockdevMirror {
        /// The node or device to copy.
        device: String,
        /// The node to copy to.
        target: String,
        /// What of it.
        sync: SyncMode,
    } optional {
        /// The job's id.
        job_id: String,
        /// The node whose place the copy takes at the end.
        replaces: String,
        /// Bytes a second at most.
        speed: u64,
        /// Bytes that are copied together.
        granularity: u32,
        /// Bytes under way at most.
        buf_size: u64,
        /// About errors of the node.
        on_source_error: OnError,
        /// About errors of the target.
        on_target_error: OnError,
        /// The name of the node that does it.
        filter_node_name: String,
        /// `background`, or `write-blocking` to catch up with a busy guest.
        copy_mode: String,
        /// Whether it ends without `job-finalize`.
        auto_finalize: bool,
        /// Whether it is forgotten without `job-dismiss`.
        auto_dismiss: bool,
    }
}

arguments! {
    /// Copies a node as it is now to another.
    BlockdevBackup {
        /// The node or device to copy.
        device: String,
        /// The node to copy to.
        target: String,
        /// What of it.
        sync: SyncMode,
    } optional {
        /// The job's id.
        job_id: String,
        /// Bytes a second at most.
        speed: u64,
        /// The bitmap that tells what changed.
        bitmap: String,
        /// What becomes of the bitmap: `on-success`, `never` or `always` cleared.
        bitmap_mode: String,
        /// Whether the copy is compressed.
        compress: bool,
        /// About errors of the node.
        on_source_error: OnError,
        /// About errors of the target.
        on_target_error: OnError,
        /// The name of the node that does it.
        filter_node_name: String,
        /// Whether it ends without `job-finalize`.
        auto_finalize: bool,
        /// Whether it is forgotten without `job-dismiss`.
        auto_dismiss: bool,
    }
}

arguments! {
    /// Writes overlays back into the image behind them.
    BlockCommit {
        /// The node or device at the top.
        device: String,
    } optional {
        /// The job's id.
        job_id: String,
        /// The node to write to; the lowest if none is given.
        base_node: String,
        /// The highest node to write back; the active one if none is given.
        top_node: String,
        /// What the node above is told that is behind it.
        backing_file: String,
        /// Bytes a second at most.
        speed: u64,
        /// About errors.
        on_error: OnError,
        /// The name of the node that does it.
        filter_node_name: String,
        /// Whether it ends without `job-finalize`.
        auto_finalize: bool,
        /// Whether it is forgotten without `job-dismiss`.
        auto_dismiss: bool,
    }
}

arguments! {
    /// Copies what is behind an image into it.
    BlockStream {
        /// The node or device.
        device: String,
    } optional {
        /// The job's id.
        job_id: String,
        /// The node that stays behind it.
        base_node: String,
        /// The lowest node that is copied.
        bottom: String,
        /// What the image is told that is behind it.
        backing_file: String,
        /// Bytes a second at most.
        speed: u64,
        /// About errors.
        on_error: OnError,
        /// The name of the node that does it.
        filter_node_name: String,
        /// Whether it ends without `job-finalize`.
        auto_finalize: bool,
        /// Whether it is forgotten without `job-dismiss`.
        auto_dismiss: bool,
    }
}

arguments! {
    /// Asks a block job to stop. A mirror that is ready leaves a whole copy unless forced.
    BlockJobCancel {
        /// The job's id.
        device: String,
    } optional {
        /// Whether a mirror leaves its copy as it is.
        force: bool,
    }
}

arguments! {
    /// Limits a block job.
    BlockJobSetSpeed {
        /// The job's id.
        device: String,
        /// Bytes a second at most; 0 is no limit.
        speed: u64,
    }
}

arguments! {
    /// Pauses a block job.
    BlockJobPause {
        /// The job's id.
        device: String,
    }
}

arguments! {
    /// Lets a paused block job go on.
    BlockJobResume {
        /// The job's id.
        device: String,
    }
}
