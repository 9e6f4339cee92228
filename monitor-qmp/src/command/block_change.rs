//! Disks changed under a running guest: overlays, sizes, limits, options, images made.

use serde_json::Value;

use super::{arguments, commands};

commands! {
    BlockdevSnapshot => "blockdev-snapshot",
    BlockdevCreate => "blockdev-create",
    BlockdevReopen => "blockdev-reopen",
    BlockResize => "block_resize",
    BlockSetIoThrottle => "block_set_io_throttle",
    BlockSetWriteThreshold => "block-set-write-threshold",
}

arguments! {
    /// Puts an overlay on a node: from then on the guest writes there.
    BlockdevSnapshot {
        /// The node.
        node: String,
        /// The overlay, a node of its own.
        overlay: String,
    }
}

arguments! {
    /// Makes an image. A background job.
    BlockdevCreate {
        /// The job's id.
        job_id: String,
        /// What image, an object with `driver` in it.
        options: Value,
    }
}

arguments! {
    /// Changes options of nodes that are in use (QEMU 6.1 and later).
    BlockdevReopen {
        /// The nodes with all their options, as they were added.
        options: Vec<Value>,
    }
}

arguments! {
    /// Changes the size of a disk.
    BlockResize {
        /// Bytes.
        size: u64,
    } optional {
        /// The node.
        node_name: String,
        /// Or the device.
        device: String,
    }
}

arguments! {
    /// Limits a device's I/O. 0 is no limit.
    BlockSetIoThrottle {
        /// Bytes a second.
        bps: u64,
        /// Bytes read a second.
        #[serde(rename = "bps_rd")]
        bps_rd: u64,
        /// Bytes written a second.
        #[serde(rename = "bps_wr")]
        bps_wr: u64,
        /// Requests a second.
        iops: u64,
        /// Reads a second.
        #[serde(rename = "iops_rd")]
        iops_rd: u64,
        /// Writes a second.
        #[serde(rename = "iops_wr")]
        iops_wr: u64,
    } optional {
        /// The device's id or QOM path.
        id: String,
        /// Or the backend's name.
        device: String,
        /// Bytes a second in a burst.
        #[serde(rename = "bps_max")]
        bps_max: u64,
        /// Bytes read a second in a burst.
        #[serde(rename = "bps_rd_max")]
        bps_rd_max: u64,
        /// Bytes written a second in a burst.
        #[serde(rename = "bps_wr_max")]
        bps_wr_max: u64,
        /// Requests a second in a burst.
        #[serde(rename = "iops_max")]
        iops_max: u64,
        /// Reads a second in a burst.
        #[serde(rename = "iops_rd_max")]
        iops_rd_max: u64,
        /// Writes a second in a burst.
        #[serde(rename = "iops_wr_max")]
        iops_wr_max: u64,
        /// Seconds of a burst of bytes.
        #[serde(rename = "bps_max_length")]
        bps_max_length: u64,
        /// Seconds of a burst of requests.
        #[serde(rename = "iops_max_length")]
        iops_max_length: u64,
        /// Bytes that count as one request.
        #[serde(rename = "iops_size")]
        iops_size: u64,
        /// The group that shares the limits.
        group: String,
    }
}

arguments! {
    /// Asks for one `BLOCK_WRITE_THRESHOLD` when the guest writes beyond so many bytes.
    BlockSetWriteThreshold {
        /// The node.
        node_name: String,
        /// Bytes; 0 is off.
        write_threshold: u64,
    }
}
