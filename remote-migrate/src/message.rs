//! What the two sides say to each other: five requests and the replies to them.
//!
//! These are values, not bytes: how they are framed, and over what, is the business of whoever
//! implements [`Peer`](crate::Peer). Every request may arrive late, twice or never, and every reply
//! may be lost; what makes that harmless stands in [`destination`](crate::destination).

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    control::Transfer,
    pace::Estimate,
    phase::{Cookie, Epoch, MigrationId, Owner, Phase, Reason, RunState, Side},
};

/// One question, with the migration it belongs to and the life of the source that asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Request {
    /// Which migration.
    pub migration: MigrationId,
    /// Which life of the source daemon asks.
    pub epoch: Epoch,
    /// The guest that moves.
    pub domain: Uuid,
    /// What is asked.
    pub call: Call,
    /// With `Finish`: what the guest is to do there, where that is not what `Prepare` said: somebody has paused it since.
    /// A peer that would not heed it is not asked ([`PeerError::untold`](crate::PeerError::untold)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunState>,
    /// With `Confirm`: how long the guest stood still. For people: nothing is decided by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Downtime>,
}

/// How far a migration is, as the source tells in passing. For people: nothing is decided by it, and none of it is
/// checked but that it is of a migration that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "part of the wire")]
pub struct Underway {
    /// Which one.
    pub migration: MigrationId,
    /// The source's epoch of it.
    pub epoch: Epoch,
    /// The last report of the source's host.
    pub transfer: Transfer,
    /// What the source makes of it. One that does not know how to tells nothing.
    #[serde(default)]
    pub estimate: Estimate,
}

/// How long the guest stood still: from its stop at the source to its start at the destination, each by the clock of its own
/// host, less what the two clocks are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(clippy::exhaustive_structs, reason = "a measure and its error")]
pub struct Downtime {
    /// So long.
    pub took: Duration,
    /// How far the truth may be from that, either way: as far as that of the measured clocks may.
    pub error: Duration,
}

/// What can be asked of the other side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "a new request is a new version of the protocol"
)]
pub enum Call {
    /// Make a place for this guest and say where to send it.
    Prepare(Guest),
    /// Take the guest: it is yours once you say so. The one message that gives ownership away.
    Finish,
    /// The stream of post-copy broke: say where to send the rest of the memory.
    Resume,
    /// It is decided; this becomes of your copy, and the migration may be forgotten.
    Confirm(Fate),
    /// How does it stand with you, as this side of it? Decides nothing; either side may ask at any time.
    Status(Side),
}

/// The guest as the source describes it to the destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Guest {
    /// The description, for the destination's host alone.
    pub cookie: Cookie,
    /// Whether the destination lets it run.
    pub run: RunState,
    /// Where the source daemon itself can be asked for its status later.
    pub home: Arc<str>,
}

/// What becomes of the destination's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "a copy is kept or it is not")]
pub enum Fate {
    /// It is the guest now; the source has given up its own for ever.
    Keep,
    /// It is not the guest, and never will be.
    Discard,
}

/// Where the destination waits for the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prepared {
    /// What the source's QEMU connects to; the two hosts agree on its form (a QEMU migration uri, as a rule).
    pub connect: Arc<str>,
    /// What else the source's host must know.
    pub cookie: Cookie,
}

/// An answer, with the ids of the request it answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Answer {
    /// As in the request.
    pub migration: MigrationId,
    /// As in the request.
    pub epoch: Epoch,
    /// What is said.
    pub reply: Reply,
    /// What went wrong first on the side that answers, with all its causes. For people: nothing is decided
    /// by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Reason>,
    /// With `Owned`: when the guest was let run, by the clock of the side that answers, in nanoseconds since 1970. For people,
    /// too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<i64>,
}

/// What can be answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "a new reply is a new version of the protocol"
)]
pub enum Reply {
    /// To `Prepare` or `Resume`: connect there.
    Prepared(Prepared),
    /// To `Prepare` or `Finish`: no, and never; this copy has not run and will not.
    Refused(Reason),
    /// To `Finish`: the guest is mine and was started.
    Owned,
    /// To `Finish`: I took the guest, it may have run here, and it is dead.
    Lost,
    /// To `Confirm`: understood and forgotten.
    Closed,
    /// To `Status`.
    Status(Status),
    /// Nothing is known of this migration.
    Unknown,
    /// Not decided, ask again: still loading, or the journal or the host cannot serve now.
    Busy(Reason),
    /// A later life of the source has spoken already.
    Stale {
        /// Its epoch.
        seen: Epoch,
    },
    /// What is asked contradicts what this side knows for certain. Only a wrong ruling leads here.
    Conflict,
}

/// How a migration stands on the side that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Status {
    /// Who answers.
    pub side: Side,
    /// Its phase.
    pub phase: Phase,
    /// Whom it takes for the owner.
    pub owner: Owner,
    /// What it has of the guest, where it looked.
    pub copy: Option<CopyState>,
}

impl Status {
    /// Whether the owner named here is final: nothing that can still happen changes it.
    #[must_use]
    pub fn decided(&self) -> bool {
        self.phase == Phase::Confirm
    }
}

/// What the destination has of the guest at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "a copy is in one of these states")]
pub enum CopyState {
    /// No QEMU, or one that gave up; what is known of its past stands beside it.
    Gone(Ran),
    /// A QEMU that waits for memory or reads it.
    Incoming,
    /// Its own QEMU says that all was loaded; it has not run.
    Complete,
    /// Post-copy: it has what it needs to be started, and has not run; memory is missing.
    Switched,
    /// It was started, and all of its memory is here. Also when the guest was paused afterwards.
    Started,
    /// Post-copy: it was started, and memory is missing.
    Partial,
}

/// Whether a copy that is gone ran, as the host can prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "proven, or not")]
pub enum Ran {
    /// It certainly did not.
    Never,
    /// It did, or nothing is known.
    Maybe,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_source_tells_that_estimates_nothing_is_understood() {
        let migration = MigrationId::random();
        let told = serde_json::json!({
            "migration": migration, "epoch": Epoch::FIRST,
            "transfer": {"sent": 1, "remaining": 2, "total": 3, "pass": 4, "dirty_rate": 5},
        });
        let heard: Underway = serde_json::from_value(told).unwrap();
        assert_eq!((heard.transfer.total, heard.transfer.is_still), (3, false));
        assert_eq!(heard.estimate, Estimate::default());
        let again = serde_json::to_string(&heard).unwrap();
        assert_eq!(serde_json::from_str::<Underway>(&again).unwrap(), heard);
    }
}
