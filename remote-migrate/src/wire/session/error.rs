//! Why a session is over, and what the other side is told of it.

use std::time::Duration;

use crate::{
    phase::{Epoch, MigrationId, Reason},
    wire::{
        frame::TooLong,
        message::{Fault, FaultKind},
    },
};

/// Why a session is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The other side found something wrong; in its own words.
    #[error("peer reports a fault")]
    Fault(#[source] Fault),
    /// It speaks another protocol.
    #[error("greet peer: it is no migration peer")]
    NotAPeer,
    /// It is too old, too new, or both are.
    #[error(
        "greet peer: it speaks version {theirs} and the one before, this side speaks version {ours} and the one before"
    )]
    Version {
        /// The newest version here.
        ours: u16,
        /// The newest version there.
        theirs: u16,
    },
    /// It announced a frame that is longer than may be, or this side was to send one.
    #[error("pass frame on")]
    TooLong(#[from] TooLong),
    /// A frame is no message.
    #[error("read message of peer: {0}")]
    Malformed(Reason),
    /// A message came when it may not.
    #[error("take {what} of peer: it is out of turn")]
    OutOfTurn {
        /// Which.
        what: &'static str,
    },
    /// A message came with another number than the next one: twice, late, or after a gap.
    #[error("take {what} {id} of peer: {expected} is expected")]
    Misnumbered {
        /// Which.
        what: &'static str,
        /// Its number.
        id: u64,
        /// What it should be.
        expected: u64,
    },
    /// An answer belongs to another migration or epoch than its request.
    #[error(
        "match answer of peer: it names migration {migration} in epoch {epoch}, which was not asked about"
    )]
    Mismatch {
        /// The migration it names.
        migration: MigrationId,
        /// The epoch it names.
        epoch: Epoch,
    },
    /// A request names an epoch that no source is ever in.
    #[error("take request of peer: no source is in epoch {epoch}")]
    NoEpoch {
        /// That one.
        epoch: Epoch,
    },
    /// A request is not sent: the other side is too old to heed that the guest was paused since it was described.
    #[error("ask peer to take a guest that was paused meanwhile: it is too old to heed that")]
    Untold,
    /// Nothing was heard, or no ping answered.
    #[error("hear peer: it was silent for {after:?}")]
    Silent {
        /// For how long.
        after: Duration,
    },
    /// A frame began and did not end.
    #[error("read frame of peer: {have} of {of} bytes came in {after:?}")]
    Unfinished {
        /// What came of it.
        have: usize,
        /// What it announced.
        of: usize,
        /// Since the last whole frame.
        after: Duration,
    },
}

impl SessionError {
    /// What the other side is told of it; nothing, if it said so itself.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        let kind = match self {
            Self::Fault(_) | Self::Untold => return None,
            Self::NotAPeer | Self::Malformed(_) => FaultKind::Malformed,
            Self::Version { .. } => FaultKind::Version,
            Self::TooLong(_) => FaultKind::TooLong,
            Self::OutOfTurn { .. } | Self::Misnumbered { .. } => FaultKind::OutOfTurn,
            Self::Mismatch { .. } | Self::NoEpoch { .. } => FaultKind::Mismatch,
            Self::Silent { .. } | Self::Unfinished { .. } => FaultKind::Silent,
        };
        let text = Reason::of(self);
        Some(Fault { kind, text })
    }
}
