//! What a run of the source came to, and what went wrong on the way. Values; nothing is decided here.

use std::error::Error as StdError;

use crate::{
    error::{Error, ErrorKind},
    phase::{Owner, Phase, Reason, Side},
    plan::Report,
};

pub(super) type Cause = Box<dyn StdError + Send + Sync>;

/// The first thing that went wrong; what follows from it is not the cause.
pub(super) struct Trouble {
    pub(super) phase: Phase,
    pub(super) side: Side,
    pub(super) kind: ErrorKind,
    pub(super) cause: Option<Cause>,
}

/// What went wrong first on each side, with all its causes, in the words of that side.
#[derive(Default)]
pub(super) struct Chains {
    pub(super) source: Option<Reason>,
    pub(super) destination: Option<Reason>,
}

pub(super) struct Concluded {
    pub(super) report: Report,
    pub(super) trouble: Option<Trouble>,
    pub(super) chains: Chains,
}

impl Concluded {
    /// What a caller that wanted the guest moved is told.
    pub(super) fn moved(self) -> Result<Report, Error> {
        let report = self.report;
        if report.owner == Owner::Destination {
            return Ok(report);
        }
        let trouble = self
            .trouble
            .expect("a guest stays only because something went wrong");
        let at = (trouble.side, trouble.phase);
        let Chains {
            source,
            destination,
        } = self.chains;
        Err(Error::new(report.migration, at, trouble.kind, report.owner)
            .settled(report.settled)
            .chains(source, destination)
            .cause(trouble.cause))
    }
}
