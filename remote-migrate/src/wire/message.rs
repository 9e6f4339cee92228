//! What is in a frame: one JSON object with one member, whose name says what it is.
//!
//! Values only; when which of them may be said stands in [`session`](super::session). A member that is
//! not known is skipped, so that a later version may add some; a message that is not known is a fault.

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    message::{Answer, Request, Underway},
    phase::Reason,
};

/// The newest version spoken here.
///
/// It goes up when a side that does not know of a change would do the wrong thing: a new request, a new
/// reply, another meaning of either. What a side may ignore, or may be asked whether it can, is a feature.
pub const VERSION: u16 = 1;

/// What the first frame must say, so that a stranger on the port is told from a peer.
pub const MAGIC: &str = "vmwright-migrate";

/// Feature: a pong carries the clock of the side that sends it.
pub const CLOCK: &str = "clock";

/// Feature: an answer carries when the guest was let run, and a request how long it stood still.
pub const DOWNTIME: &str = "downtime";

/// Feature: a ping of the side that asks carries how far the migration is.
pub const PROGRESS: &str = "progress";

/// Feature: what a `Finish` says of the guest's run state is heeded. Without it a guest that was paused on its way would run.
pub const RUN: &str = "run";

/// Features that one side may name.
pub const MAX_FEATURES: usize = 64;

/// The version that two sides share, given the newest of each. A side speaks its newest version and the one
/// before it, so both sides come to the same verdict.
#[must_use]
pub const fn shared_version(ours: u16, theirs: u16) -> Option<u16> {
    let (older, newer) = if ours < theirs {
        (ours, theirs)
    } else {
        (theirs, ours)
    };
    if older >= 1 && newer - older <= 1 {
        Some(older)
    } else {
        None
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "a new message is a new version of the wire"
)]
pub enum Message {
    /// The first frame of each side.
    Hello(Hello),
    /// From the side that dialled: a question.
    Request {
        /// Counts from 1 on each connection, without gaps.
        id: u64,
        /// How long the asker waits for the answer, in milliseconds.
        within_ms: u64,
        /// The question, with its migration and epoch.
        request: Request,
    },
    /// From the side that accepted: the answer.
    Answer {
        /// As in the request.
        id: u64,
        /// The answer, with the migration and epoch of the request.
        answer: Answer,
    },
    /// Are you there? From either side.
    Ping {
        /// Counts from 1 for each side, without gaps.
        id: u64,
        /// From the side that asks: how far the migration is that it drives. Only if both have `progress`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        underway: Option<Underway>,
    },
    /// I am.
    Pong {
        /// As in the ping.
        id: u64,
        /// The clock of the side that says it, in nanoseconds since 1970. Only if both have `clock`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        clock: Option<i64>,
    },
    /// Something was wrong with what came; the connection ends.
    Fault(Fault),
}

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: String,
    /// The newest version that side speaks; it speaks the one before it as well.
    pub version: u16,
    /// What it can beyond that version. What both can is in use.
    #[serde(default)]
    pub features: BTreeSet<String>,
}

impl Hello {
    /// What this crate says.
    #[must_use]
    pub fn ours() -> Self {
        Self {
            magic: MAGIC.to_owned(),
            version: VERSION,
            features: BTreeSet::from([CLOCK, DOWNTIME, PROGRESS, RUN].map(str::to_owned)),
        }
    }
}

/// What the other side found wrong, in its words. Not to be taken for an error of this side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{kind}: {text}")]
pub struct Fault {
    /// What sort of fault.
    pub kind: FaultKind,
    /// The whole chain of causes as text.
    pub text: Reason,
}

/// The sorts of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FaultKind {
    /// Whoever connected may not.
    Forbidden,
    /// No version is shared.
    Version,
    /// A frame is longer than may be.
    TooLong,
    /// A frame is no message.
    Malformed,
    /// A message comes when it may not, or twice, or answers what nobody asked.
    OutOfTurn,
    /// An answer names another migration or epoch than its request.
    Mismatch,
    /// Nothing came for too long, or a frame never ended.
    Silent,
    /// The side that says so cannot go on.
    Internal,
    /// A sort that is not known here.
    #[serde(other)]
    Other,
}

impl std::fmt::Display for FaultKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Forbidden => "forbidden",
            Self::Version => "no shared version",
            Self::TooLong => "frame too long",
            Self::Malformed => "malformed message",
            Self::OutOfTurn => "message out of turn",
            Self::Mismatch => "mismatched answer",
            Self::Silent => "silence",
            Self::Internal => "internal",
            Self::Other => "unknown fault",
        })
    }
}

/// Milliseconds for the wire; what does not fit is as long as can be said.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_speaks_with_the_one_before_and_both_sides_agree_on_it() {
        for ours in 0..8 {
            for theirs in 0..8 {
                let shared = shared_version(ours, theirs);
                assert_eq!(shared, shared_version(theirs, ours));
                assert_eq!(
                    shared.is_some(),
                    ours > 0 && theirs > 0 && ours.abs_diff(theirs) <= 1
                );
                if let Some(shared) = shared {
                    assert_eq!(shared, ours.min(theirs));
                }
            }
        }
        assert_eq!(shared_version(u16::MAX, 0), None);
    }

    #[test]
    fn a_fault_of_a_later_version_is_still_a_fault() {
        let fault = r#"{"fault":{"kind":"solar-flare","text":"too bright","at":"noon"}}"#;
        let Message::Fault(fault) = serde_json::from_str(fault).unwrap() else {
            panic!("not a fault");
        };
        assert_eq!(fault.kind, FaultKind::Other);
        assert_eq!(fault.text.as_str(), "too bright");
    }
}
