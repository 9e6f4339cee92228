//! Why a job was not granted, and why a granted one cannot go on. Nothing else in this crate can fail.

use std::fmt;
use std::time::Duration;

use crate::kind::Kind;
use crate::label::Label;

/// Why a job was not granted. The domain is unchanged in every case.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BeginError {
    /// The deadline came first.
    TimedOut {
        /// What was asked for.
        wanted: Kind,
        /// For how long the caller had waited.
        waited: Duration,
        /// Who had the domain at that moment; nobody, if only the caller's own lateness was in the way.
        holder: Option<Box<Holder>>,
    },
    /// A try-begin found the domain taken.
    Busy {
        /// What was asked for.
        wanted: Kind,
        /// Who has it.
        holder: Option<Box<Holder>>,
    },
    /// As many callers of this class wait already as the limits allow.
    QueueFull {
        /// What was asked for.
        wanted: Kind,
        /// How many wait.
        waiting: usize,
        /// Who has the domain meanwhile.
        holder: Option<Box<Holder>>,
    },
    /// The wait could never end, or the two jobs must not be held together: the same flow holds the other one.
    WouldDeadlock {
        /// What was asked for.
        wanted: Kind,
        /// What the caller's own flow holds.
        held: Kind,
    },
    /// The guest of this generation ended before the job was granted.
    Gone {
        /// The generation that ended.
        generation: u64,
        /// How it ended.
        why: GoneWhy,
    },
    /// The domain was removed, for ever.
    Closed,
    /// A scheduler that wraps this one said no (see [`Jobs`](crate::Jobs)).
    Refused {
        /// What was asked for.
        wanted: Kind,
        /// Its reason.
        reason: Label,
    },
}

/// Who has the domain: what an error and a status page tell of the job in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// The job's stable id.
    pub id: u64,
    /// What kind of job it is.
    pub kind: Kind,
    /// Who opened it.
    pub owner: Label,
    /// The phase it said it is in.
    pub phase: Option<Label>,
    /// The command it said it waits for.
    pub command: Option<Label>,
    /// For how long it has been running.
    pub held: Duration,
}

/// How the guest of a generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GoneWhy {
    /// The guest shut itself down, or was asked to.
    ShutDown,
    /// Somebody destroyed it.
    Destroyed,
    /// QEMU ended by itself; how, as far as it is known.
    Died(Label),
    /// It was let go: another host, or another daemon, has it now.
    Left(Label),
}

impl fmt::Display for GoneWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ShutDown => f.write_str("the guest shut down"),
            Self::Destroyed => f.write_str("the guest was destroyed"),
            Self::Died(how) | Self::Left(how) => f.write_str(how),
        }
    }
}

/// The guest this guard belongs to is gone. The guard may still be dropped or ended; it gives no right any more.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gone {
    /// The generation that ended.
    pub generation: u64,
    /// How it ended.
    pub why: GoneWhy,
}

impl From<Gone> for BeginError {
    fn from(Gone { generation, why }: Gone) -> Self {
        Self::Gone { generation, why }
    }
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {} is gone: {}", self.generation, self.why)
    }
}

impl std::error::Error for Gone {}

/// Why a job could not be asked to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CancelError {
    /// No job of that id, or no async job at all, runs here. It may have ended by itself.
    NotRunning,
    /// It is past the point of return and will be finished.
    TooLate {
        /// The phase it is in.
        phase: Option<Label>,
    },
}

impl fmt::Display for CancelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRunning => f.write_str("cannot cancel: no such job is running"),
            Self::TooLate { phase } => {
                f.write_str("cannot cancel: the job is past its point of return")?;
                phase
                    .as_ref()
                    .map_or(Ok(()), |phase| write!(f, " ({phase})"))
            }
        }
    }
}

impl std::error::Error for CancelError {}

impl fmt::Display for Holder {
    /// `migration-out (perform, 4m12s, in "migrate") for "migrate"`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.kind)?;
        if let Some(phase) = &self.phase {
            write!(f, "{phase}, ")?;
        }
        write!(f, "{}", Rough(self.held))?;
        if let Some(command) = &self.command {
            write!(f, ", in \"{command}\"")?;
        }
        write!(f, ") for \"{}\"", self.owner)
    }
}

impl fmt::Display for BeginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held_by = |f: &mut fmt::Formatter<'_>, holder: &Option<Box<Holder>>| match holder {
            Some(holder) => write!(f, ", held by {holder}"),
            None => Ok(()),
        };
        match self {
            Self::TimedOut {
                wanted,
                waited,
                holder,
            } => {
                write!(f, "cannot begin {wanted} job: waited {}", Rough(*waited))?;
                held_by(f, holder)
            }
            Self::Busy { wanted, holder } => {
                write!(f, "cannot begin {wanted} job: the domain is busy")?;
                held_by(f, holder)
            }
            Self::QueueFull {
                wanted,
                waiting,
                holder,
            } => {
                write!(
                    f,
                    "cannot begin {wanted} job: {waiting} callers wait already"
                )?;
                held_by(f, holder)
            }
            Self::WouldDeadlock { wanted, held } => {
                write!(
                    f,
                    "cannot begin {wanted} job: its own flow holds the {held} job"
                )
            }
            Self::Gone { generation, why } => write!(
                f,
                "cannot begin job: generation {generation} is gone: {why}"
            ),
            Self::Closed => f.write_str("cannot begin job: the domain was removed"),
            Self::Refused { wanted, reason } => write!(f, "cannot begin {wanted} job: {reason}"),
        }
    }
}

impl std::error::Error for BeginError {}

/// A duration as a person says it: `4m12s`, `30s`, `1.5s`, `12ms`.
pub(crate) struct Rough(pub(crate) Duration);

impl fmt::Display for Rough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            0 => write!(f, "{}ms", self.0.as_millis()),
            1..10 => write!(f, "{}.{}s", seconds, self.0.subsec_millis() / 100),
            10..60 => write!(f, "{seconds}s"),
            60..3600 => write!(f, "{}m{:02}s", seconds / 60, seconds % 60),
            _ => write!(f, "{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind::{AsyncKind, JobKind};

    #[test]
    fn a_timeout_names_the_holder_its_phase_and_its_age() {
        let error = BeginError::TimedOut {
            wanted: Kind::Normal(JobKind::Modify),
            waited: Duration::from_secs(30),
            holder: Some(Box::new(Holder {
                id: 7,
                kind: Kind::Async(AsyncKind::MigrationOut),
                owner: "migrate".into(),
                phase: Some("perform".into()),
                command: None,
                held: Duration::from_secs(252),
            })),
        };
        assert_eq!(
            error.to_string(),
            "cannot begin modify job: waited 30s, held by migration-out (perform, 4m12s) for \"migrate\""
        );
    }
}
