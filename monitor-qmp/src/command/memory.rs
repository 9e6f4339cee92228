//! The guest's memory: its size, its modules, and a look into it.

use serde::Deserialize;

use super::{arguments, commands, plain};

commands! {
    QueryMemorySizeSummary => "query-memory-size-summary" -> MemorySizeSummary,
    QueryMemoryDevices => "query-memory-devices" -> Vec<MemoryDevice>,
    Memsave => "memsave",
    Pmemsave => "pmemsave",
}

plain! {
    /// How much memory there is.
    QueryMemorySizeSummary,
    /// The memory modules.
    QueryMemoryDevices,
}

/// Reply of [`QueryMemorySizeSummary`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MemorySizeSummary {
    /// Bytes the guest began with.
    pub base_memory: u64,
    /// Bytes plugged in since; absent where that cannot be.
    pub plugged_memory: Option<u64>,
}

/// One of [`QueryMemoryDevices`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryDevice {
    /// Its kind, as `dimm` or `virtio-mem`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What is known of it.
    pub data: MemoryDeviceInfo,
}

/// What is known of a [`MemoryDevice`]; what its kind does not have is absent.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MemoryDeviceInfo {
    /// Its id.
    pub id: Option<String>,
    /// Bytes it has now.
    pub size: u64,
    /// Where a DIMM begins.
    pub addr: Option<u64>,
    /// Where a virtio device begins.
    pub memaddr: Option<u64>,
    /// The slot of a DIMM.
    pub slot: Option<i64>,
    /// The NUMA node.
    pub node: Option<i64>,
    /// The memory backend.
    pub memdev: Option<String>,
    /// Bytes that virtio-mem is asked to have.
    pub requested_size: Option<u64>,
    /// Bytes that virtio-mem can have.
    pub max_size: Option<u64>,
    /// The step of virtio-mem.
    pub block_size: Option<u64>,
    /// Whether a DIMM came while the guest ran.
    pub hotplugged: Option<bool>,
    /// Whether a DIMM can be taken out again.
    pub hotpluggable: Option<bool>,
}

arguments! {
    /// Saves memory at an address of a virtual CPU to a file.
    Memsave {
        /// Where it begins.
        val: u64,
        /// Bytes.
        size: u64,
        /// The file, as QEMU sees it.
        filename: String,
    } optional {
        /// The CPU; the first if none is given.
        cpu_index: u32,
    }
}

arguments! {
    /// Saves memory at a physical address to a file.
    Pmemsave {
        /// Where it begins.
        val: u64,
        /// Bytes.
        size: u64,
        /// The file, as QEMU sees it.
        filename: String,
    }
}
