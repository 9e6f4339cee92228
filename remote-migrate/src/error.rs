//! How a migration failed: in which phase, on which side, whose fault it is, and who owns the guest now.
//!
//! The last is the one that matters at three in the morning, so every error answers it.

use std::{error::Error as StdError, fmt};

use crate::phase::{MigrationId, Owner, Phase, Reason, Side};

/// A migration that did not end with the guest at the destination.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    migration: MigrationId,
    phase: Phase,
    side: Side,
    kind: ErrorKind,
    owner: Owner,
    settled: bool,
    /// By side: source, destination.
    chains: [Option<Reason>; 2],
    cause: Option<Box<dyn StdError + Send + Sync>>,
}

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An earlier migration of the same guest is not settled yet.
    Unsettled,
    /// Nothing is known of this migration.
    NotFound,
    /// It was asked to turn back, and did.
    Cancelled,
    /// It was asked to turn back when it could not any more.
    TooLate,
    /// The host here could not do its step, or not by its deadline.
    Host,
    /// The other side refused.
    Refused,
    /// The other side could not be reached, or did not answer in time.
    Silent,
    /// The other side is too old to be told that the guest was paused on its way.
    TooOld,
    /// The journal could not be written or read.
    Journal,
    /// The guest was offered, and whether it was taken is not known: stopped here, perhaps running
    /// there. `recover` asks again; an operator may rule.
    InDoubt,
    /// An operator ruled that the other side, which did not answer, has not got it.
    Ruled,
    /// What an operator ruled was not done: it cannot be, or not now. The cause says which.
    NotRuled,
    /// The last complete copy was killed from outside.
    Lost,
    /// A later life of this daemon has taken the migration up.
    Superseded,
    /// Both sides claim the guest. Only a wrong ruling leads here.
    Conflict,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blame {
    /// Whoever asked: for a second migration, for a cancel, for one that does not exist.
    Caller,
    /// The host of this side.
    Host(Side),
    /// The connection, or a daemon that is down.
    Link,
    /// The disk under the journal of this side.
    Journal(Side),
    /// An operator's ruling that was not true.
    Operator,
}

impl Error {
    pub(crate) fn new(
        migration: MigrationId,
        (side, phase): (Side, Phase),
        kind: ErrorKind,
        owner: Owner,
    ) -> Self {
        let inner = Inner {
            migration,
            phase,
            side,
            kind,
            owner,
            settled: true,
            chains: [None, None],
            cause: None,
        };
        Self(Box::new(inner))
    }

    pub(crate) fn settled(mut self, settled: bool) -> Self {
        self.0.settled = settled;
        self
    }

    pub(crate) fn chains(mut self, source: Option<Reason>, destination: Option<Reason>) -> Self {
        self.0.chains = [source, destination];
        self
    }

    pub(crate) fn cause(mut self, cause: Option<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.cause = cause;
        self
    }

    /// Which migration.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        self.0.migration
    }

    /// In which phase the first thing went wrong.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.0.phase
    }

    /// On which side the first thing went wrong.
    #[must_use]
    pub fn side(&self) -> Side {
        self.0.side
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whose fault it is.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self.0.kind {
            ErrorKind::Unsettled
            | ErrorKind::NotFound
            | ErrorKind::Cancelled
            | ErrorKind::NotRuled
            | ErrorKind::TooLate => Blame::Caller,
            ErrorKind::Host | ErrorKind::Refused | ErrorKind::TooOld | ErrorKind::Lost => {
                Blame::Host(self.0.side)
            }
            ErrorKind::Silent | ErrorKind::InDoubt | ErrorKind::Ruled | ErrorKind::Superseded => {
                Blame::Link
            }
            ErrorKind::Journal => Blame::Journal(self.0.side),
            ErrorKind::Conflict => Blame::Operator,
        }
    }

    /// What went wrong first on this side, with all its causes, in the words of that side. Also where it
    /// only followed from what went wrong on the other: a QEMU that lost its stream, and one that said why.
    #[must_use]
    pub fn chain(&self, side: Side) -> Option<&Reason> {
        self.0.chains[usize::from(side == Side::Destination)].as_ref()
    }

    /// Who owns the guest now, as far as this side knows.
    #[must_use]
    pub fn owner_now(&self) -> Owner {
        self.0.owner
    }

    /// Whether both sides are through with it. If not, the journal still has the migration, and
    /// [`recover`](crate::recover()) is to be called when the peer is back.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.0.settled
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.0.kind {
            ErrorKind::Unsettled => "an earlier migration of this guest is not settled",
            ErrorKind::NotFound => "nothing is known of it",
            ErrorKind::Cancelled => "it was cancelled",
            ErrorKind::TooLate => "it is too late to cancel",
            ErrorKind::Host => "the host failed",
            ErrorKind::Refused => "the other side refused",
            ErrorKind::Silent => "the other side is silent",
            ErrorKind::TooOld => "the other side is too old",
            ErrorKind::Journal => "the journal failed",
            ErrorKind::InDoubt => "whether the guest was taken is not known",
            ErrorKind::Ruled => "an operator ruled in place of the other side",
            ErrorKind::NotRuled => "what was ruled was not done",
            ErrorKind::Lost => "the last complete copy was killed",
            ErrorKind::Superseded => "a later life of the daemon works on it",
            ErrorKind::Conflict => "both sides claim the guest",
        };
        write!(
            f,
            "migrate {}: {what} ({} phase, {} side), guest's owner is now: {}",
            self.0.migration, self.0.phase, self.0.side, self.0.owner
        )?;
        f.write_str(if self.0.settled { "" } else { ", not settled" })?;
        // What went wrong on the side of the cause is the cause, which `source` tells.
        let other = match self.0.side {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        };
        let cause = self.0.cause.as_ref().map(|cause| Reason::of(&**cause));
        match self.chain(other) {
            chain if chain == cause.as_ref() => Ok(()),
            Some(chain) => write!(f, "; the {other} says: {chain}"),
            None => Ok(()),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .cause
            .as_deref()
            .map(|cause| cause as &(dyn StdError + 'static))
    }
}
