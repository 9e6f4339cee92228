//! The guest's memory balloon.

use serde::{Deserialize, Serialize};

use super::commands;

commands! {
    QueryBalloon => "query-balloon" -> BalloonInfo,
    Balloon => "balloon",
}

/// How much memory the guest has.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryBalloon;

/// Reply of [`QueryBalloon`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonInfo {
    /// Bytes the guest has now.
    pub actual: u64,
}

/// Asks the guest to use so much memory. It takes its time; `BALLOON_CHANGE` tells.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Balloon {
    /// Bytes.
    pub value: u64,
}
