//! Descriptors handed to QEMU. The adding ones are sent with
//! [`execute_with_fds`](crate::Monitor::execute_with_fds).

use serde::{Deserialize, Serialize};

use super::commands;

commands! {
    Getfd => "getfd",
    Closefd => "closefd",
    AddFd => "add-fd" -> AddedFd,
    RemoveFd => "remove-fd",
    QueryFdsets => "query-fdsets" -> Vec<FdSet>,
}

/// Gives the descriptor on this message a name, for one use as `fd:NAME`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Getfd {
    /// The name. One of the same name is replaced.
    pub fdname: String,
}

/// Closes a named descriptor.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Closefd {
    /// The name.
    pub fdname: String,
}

/// Puts the descriptor on this message into a set, for use as `/dev/fdset/ID`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct AddFd {
    /// The set; a new one if none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fdset_id: Option<u64>,
    /// A note that [`QueryFdsets`] gives back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opaque: Option<String>,
}

/// Reply of [`AddFd`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct AddedFd {
    /// The set it is in.
    pub fdset_id: u64,
    /// Its number inside QEMU.
    pub fd: i64,
}

/// Takes a descriptor, or all, out of a set.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct RemoveFd {
    /// The set.
    pub fdset_id: u64,
    /// The descriptor's number inside QEMU; all if none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i64>,
}

impl RemoveFd {
    /// All descriptors of a set.
    #[must_use]
    pub fn all(fdset_id: u64) -> Self {
        Self { fdset_id, fd: None }
    }
}

/// The sets of descriptors.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryFdsets;

/// One of [`QueryFdsets`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct FdSet {
    /// Its number.
    pub fdset_id: u64,
    /// What is in it.
    pub fds: Vec<FdInSet>,
}

/// A descriptor in a [`FdSet`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct FdInSet {
    /// Its number inside QEMU.
    pub fd: i64,
    /// The note it was added with.
    pub opaque: Option<String>,
}
