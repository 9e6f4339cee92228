//! The guest's file systems and disks.

use super::Command;

plain! {
    /// The guest's mounted file systems (2.2).
    GetFsinfo = "guest-get-fsinfo" -> Vec<FileSystem>;
    /// The guest's disks and partitions (5.2).
    GetDisks = "guest-get-disks" -> Vec<DiskInfo>;
    /// What the guest's disks have done (7.1).
    GetDiskstats = "guest-get-diskstats" -> Vec<DiskStats>;
}

asked! {
    /// Gives blocks that the guest's file systems do not use back to their disks. May take long.
    Fstrim = "guest-fstrim" -> Trimmed {
        /// Leaves alone what is shorter, in bytes.
        #[serde(skip_serializing_if = "Option::is_none")]
        minimum: Option<u64>,
    }
}

answers! {
    /// A mounted file system of the guest.
    FileSystem {
        /// Its device.
        name: String,
        /// Where it is mounted.
        mountpoint: String,
        /// Such as `ext4`.
        #[serde(rename = "type")]
        kind: String,
        /// Bytes in use (3.0).
        used_bytes: Option<u64>,
        /// Bytes in all (3.0).
        total_bytes: Option<u64>,
        /// The disks it lies on.
        #[serde(default)]
        disk: Vec<Disk>,
    }

    /// A disk under a file system.
    Disk {
        /// Such as `virtio`.
        bus_type: String,
        /// Bus number.
        bus: i64,
        /// Target number.
        target: i64,
        /// Unit number.
        unit: i64,
        /// Its serial number (3.1).
        serial: Option<String>,
        /// Its device node (3.1).
        dev: Option<String>,
    }

    /// A disk or a partition.
    DiskInfo {
        /// Its device node; on Windows its path.
        name: String,
        /// Whether it is a part of another.
        partition: bool,
        /// What it lies on.
        #[serde(default)]
        dependencies: Vec<String>,
        /// Where it is plugged in.
        address: Option<Disk>,
        /// Another name for it.
        alias: Option<String>,
    }

    /// What a disk has done since the guest booted.
    DiskStats {
        /// Its name.
        name: String,
        /// Its major number.
        major: u64,
        /// Its minor number.
        minor: u64,
        /// The counters.
        stats: DiskCounters,
    }

    /// Counters of a disk, as in `/proc/diskstats`. Times are in milliseconds.
    DiskCounters {
        /// Sectors read.
        read_sectors: Option<u64>,
        /// Reads.
        read_ios: Option<u64>,
        /// Reads that were merged.
        read_merges: Option<u64>,
        /// Sectors written.
        write_sectors: Option<u64>,
        /// Writes.
        write_ios: Option<u64>,
        /// Writes that were merged.
        write_merges: Option<u64>,
        /// Sectors discarded.
        discard_sectors: Option<u64>,
        /// Discards.
        discard_ios: Option<u64>,
        /// Discards that were merged.
        discard_merges: Option<u64>,
        /// Flushes.
        flush_ios: Option<u64>,
        /// Time spent reading.
        read_ticks: Option<u64>,
        /// Time spent writing.
        write_ticks: Option<u64>,
        /// Time spent discarding.
        discard_ticks: Option<u64>,
        /// Time spent flushing.
        flush_ticks: Option<u64>,
        /// Under way now.
        ios_pgr: Option<u64>,
        /// Time in which anything was under way.
        total_ticks: Option<u64>,
        /// The same, times what was under way.
        weight_ticks: Option<u64>,
    }

    /// What was given back.
    Trimmed {
        /// By file system.
        paths: Vec<TrimmedPath>,
    }

    /// What one file system gave back.
    TrimmedPath {
        /// Where it is mounted.
        path: String,
        /// Why it gave nothing.
        error: Option<String>,
        /// How many bytes.
        trimmed: Option<i64>,
        /// What it left alone, in bytes.
        minimum: Option<i64>,
    }
}
