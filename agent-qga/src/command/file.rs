//! Files in the guest, by handle. [`GuestFile`](crate::GuestFile) closes its own.

use serde::Serialize;

use super::{Command, Empty};

asked! {
    /// Opens a file. The handle it answers stays open until it is closed or the agent ends.
    FileOpen = "guest-file-open" -> i64 {
        /// Its path.
        path: String,
        /// As for `fopen`, such as `r`, `w+` or `a`; `r` if `None`.
        #[serde(skip_serializing_if = "Option::is_none")]
        mode: Option<String>,
    }

    /// Closes a file.
    FileClose = "guest-file-close" -> Empty {
        /// As [`FileOpen`] answered.
        handle: i64,
    }

    /// Reads from a file.
    FileRead = "guest-file-read" -> FileChunk {
        /// As [`FileOpen`] answered.
        handle: i64,
        /// How many bytes at most, up to 48 MiB; 4096 if `None`.
        #[serde(skip_serializing_if = "Option::is_none")]
        count: Option<u64>,
    }

    /// Writes to a file.
    FileWrite = "guest-file-write" -> FileWritten {
        /// As [`FileOpen`] answered.
        handle: i64,
        /// The bytes, in base64.
        buf_b64: String,
        /// How many of them; all if `None`.
        #[serde(skip_serializing_if = "Option::is_none")]
        count: Option<u64>,
    }

    /// Goes to another place in a file.
    FileSeek = "guest-file-seek" -> FilePosition {
        /// As [`FileOpen`] answered.
        handle: i64,
        /// How far.
        offset: i64,
        /// From where.
        whence: Whence,
    }

    /// Has the guest write what it holds back of a file.
    FileFlush = "guest-file-flush" -> Empty {
        /// As [`FileOpen`] answered.
        handle: i64,
    }
}

/// From where a place in a file is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(
    clippy::exhaustive_enums,
    reason = "a file has a beginning, an end and a place"
)]
pub enum Whence {
    /// From the beginning.
    Set,
    /// From the place where it is.
    Cur,
    /// From the end.
    End,
}

answers! {
    /// What was read.
    FileChunk {
        /// How many bytes.
        count: u64,
        /// The bytes, in base64.
        #[serde(rename = "buf-b64")]
        buf_b64: String,
        /// Whether the end of the file was met.
        eof: bool,
    }

    /// What was written.
    FileWritten {
        /// How many bytes.
        count: u64,
        /// Whether the end of the file was met.
        #[serde(default)]
        eof: bool,
    }

    /// Where in the file it is now.
    FilePosition {
        /// From the beginning, in bytes.
        position: i64,
        /// Whether that is the end.
        #[serde(default)]
        eof: bool,
    }
}
