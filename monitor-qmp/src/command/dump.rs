//! Dumps of the guest's memory.

use serde::{Deserialize, Serialize};

use super::{commands, open_enum, plain};

commands! {
    DumpGuestMemory => "dump-guest-memory",
    QueryDump => "query-dump" -> DumpResult,
    QueryDumpGuestMemoryCapability => "query-dump-guest-memory-capability" -> DumpCapability,
}

/// Writes the guest's memory to `protocol`, as `fd:NAME` or `file:PATH`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub struct DumpGuestMemory {
    /// Whether the guest's page tables are followed.
    pub paging: bool,
    /// Where to.
    pub protocol: String,
    /// Whether the reply comes at once; `DUMP_COMPLETED` then tells the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detach: Option<bool>,
    /// As `elf` or `kdump-zlib`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
}

impl DumpGuestMemory {
    /// A dump in the background, of physical memory.
    #[must_use]
    pub fn detached(protocol: impl Into<String>) -> Self {
        Self {
            paging: false,
            protocol: protocol.into(),
            detach: Some(true),
            format: None,
        }
    }
}

/// How the dump does.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryDump;

/// Reply of [`QueryDump`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct DumpResult {
    /// Where it is.
    pub status: DumpStatus,
    /// Bytes written.
    pub completed: u64,
    /// Bytes in all.
    pub total: u64,
}

open_enum! {
    /// Where a dump is.
    pub enum DumpStatus {
        None = "none",
        Active = "active",
        Completed = "completed",
        Failed = "failed",
    }
}

plain! {
    /// The formats a dump can have.
    QueryDumpGuestMemoryCapability,
}

/// Reply of [`QueryDumpGuestMemoryCapability`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct DumpCapability {
    /// As `elf`.
    pub formats: Vec<String>,
}
