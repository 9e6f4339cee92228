//! Disks: what there is, how it does, adding and removing nodes.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{commands, open_enum};

commands! {
    QueryBlock => "query-block" -> Vec<BlockDevice>,
    QueryNamedBlockNodes => "query-named-block-nodes" -> Vec<BlockNode>,
    QueryBlockstats => "query-blockstats" -> Vec<BlockStats>,
    BlockdevAdd => "blockdev-add",
    BlockdevDel => "blockdev-del",
}

/// The devices that have a disk.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryBlock;

/// One of [`QueryBlock`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct BlockDevice {
    /// The backend's name; empty for one made by `-blockdev`.
    pub device: String,
    /// The device's id or QOM path.
    pub qdev: Option<String>,
    /// Whether its medium can be removed.
    pub removable: bool,
    /// Whether the guest locked the medium.
    pub locked: bool,
    /// What is in it.
    pub inserted: Option<BlockNode>,
    /// Whether the tray is open.
    #[serde(rename = "tray_open")]
    pub tray_open: Option<bool>,
    /// How its I/O does.
    pub io_status: Option<IoStatus>,
}

open_enum! {
    /// How I/O does.
    pub enum IoStatus {
        Ok = "ok",
        Failed = "failed",
        NoSpace = "nospace",
    }
}

/// The nodes of the block layer.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[non_exhaustive]
pub struct QueryNamedBlockNodes {
    /// Leaves the images behind the images out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flat: Option<bool>,
}

/// A node of the block layer.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct BlockNode {
    /// Its file.
    pub file: String,
    /// Its name.
    #[serde(rename = "node-name")]
    pub node_name: Option<String>,
    /// Whether it is read-only.
    pub ro: bool,
    /// The driver, as `qcow2`.
    pub drv: String,
    /// The file behind it.
    pub backing_file: Option<String>,
    /// Its image.
    pub image: Image,
    /// Its bitmaps, those of jobs among them.
    #[serde(default, rename = "dirty-bitmaps")]
    pub dirty_bitmaps: Vec<DirtyBitmap>,
    /// An event is sent for a write beyond so many bytes; 0 is off.
    #[serde(default)]
    pub write_threshold: u64,
}

impl BlockNode {
    pub(crate) fn is(&self, node_name: &str) -> bool {
        self.node_name.as_deref() == Some(node_name)
    }
}

/// A bitmap of a [`BlockNode`]: what was written since.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirtyBitmap {
    /// Its name; a job's own have none.
    pub name: Option<String>,
    /// Bytes that count as written.
    pub count: u64,
    /// Bytes that one bit stands for.
    pub granularity: u32,
    /// Whether writes are recorded now.
    pub recording: bool,
    /// Whether a job uses it.
    pub busy: bool,
    /// Whether it is kept in the image.
    pub persistent: bool,
    /// Whether it was not put away in good order: what it says is void.
    #[serde(default)]
    pub inconsistent: bool,
}

/// The image of a [`BlockNode`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// Its file.
    pub filename: String,
    /// Its format.
    pub format: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes that it takes on the host.
    pub actual_size: Option<u64>,
    /// Snapshots inside it.
    #[serde(default)]
    pub snapshots: Vec<ImageSnapshot>,
    /// The image behind it.
    pub backing_image: Option<Box<Self>>,
}

/// A snapshot inside an [`Image`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct ImageSnapshot {
    /// Its id in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of the guest's memory and devices that are in it; 0 if they are elsewhere.
    pub vm_state_size: u64,
    /// When it was made, in seconds since 1970.
    pub date_sec: i64,
    /// And the nanoseconds beyond.
    pub date_nsec: i64,
}

/// What was read and written.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct QueryBlockstats {
    /// By node, not by device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query_nodes: Option<bool>,
}

/// One of [`QueryBlockstats`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct BlockStats {
    /// The backend's name.
    pub device: Option<String>,
    /// The device's id or QOM path.
    pub qdev: Option<String>,
    /// The node's name.
    pub node_name: Option<String>,
    /// The counters.
    pub stats: BlockCounters,
}

/// The counters of [`BlockStats`], since the device was made.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockCounters {
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Reads.
    pub rd_operations: u64,
    /// Writes.
    pub wr_operations: u64,
    /// Flushes.
    pub flush_operations: u64,
    /// Nanoseconds spent on reads.
    pub rd_total_time_ns: u64,
    /// Nanoseconds spent on writes.
    pub wr_total_time_ns: u64,
    /// Nanoseconds spent on flushes.
    pub flush_total_time_ns: u64,
    /// The highest byte written.
    pub wr_highest_offset: u64,
}

/// Adds a node.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevAdd {
    /// Its driver.
    pub driver: String,
    /// Its name.
    pub node_name: String,
    /// What the driver wants besides.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

impl BlockdevAdd {
    /// A node without options.
    #[must_use]
    pub fn new(driver: impl Into<String>, node_name: impl Into<String>) -> Self {
        Self {
            driver: driver.into(),
            node_name: node_name.into(),
            options: Map::new(),
        }
    }

    /// Adds an option.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.options.insert(name.into(), value.into());
        self
    }
}

/// Removes a node.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel {
    /// Its name.
    pub node_name: String,
}
