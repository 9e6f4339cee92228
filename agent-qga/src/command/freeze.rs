//! Freezing and thawing. [`freeze`](crate::freeze()) is the one that cannot be forgotten.

use serde::Deserialize;

use super::Command;

plain! {
    /// Whether the guest's file systems are frozen. Works while frozen.
    FsfreezeStatus = "guest-fsfreeze-status" -> FreezeState;
    /// Freezes the guest's file systems; answers how many. Nothing thaws them but
    /// [`FsfreezeThaw`] (and, on Windows, a limit of ten seconds or more).
    FsfreezeFreeze = "guest-fsfreeze-freeze" -> i64;
    /// Thaws the guest's file systems; answers how many. Works while frozen.
    FsfreezeThaw = "guest-fsfreeze-thaw" -> i64;
}

asked! {
    /// Freezes some of the guest's file systems (2.2); answers how many.
    FsfreezeFreezeList = "guest-fsfreeze-freeze-list" -> i64 {
        /// Where they are mounted.
        mountpoints: Vec<String>,
    }
}

/// Whether the guest's file systems are frozen.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FreezeState {
    /// They work as usual.
    Thawed,
    /// Writers wait, and the agent refuses most commands.
    Frozen,
    /// A state that we do not know.
    #[serde(untagged)]
    Other(String),
}
