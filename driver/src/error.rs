//! Why an operation on a domain failed: what, on which domain, whose fault, and what it may have done.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use job_core::{BeginError, CancelError, ChangeError, Gone, Label};

use crate::guest::InvalidGuest;
use crate::process::Exit;

/// Why an operation failed.
///
/// `{error}` says what failed, on which domain, and the fact that matters; `{error:#}` adds the causes below it.
#[derive(Debug)]
pub struct Error(Box<Facts>);

#[derive(Debug)]
struct Facts {
    operation: Label,
    domain: Option<Label>,
    cause: Cause,
}

/// What kind of failure an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was asked makes no sense.
    Invalid,
    /// No such domain.
    NotFound,
    /// The name or uuid is taken, or the file is there already.
    Exists,
    /// The domain has no guest that could do it, or is not in a state for it.
    State,
    /// It was attached to be observed only, and this could change its guest.
    ObserveOnly,
    /// The deadline came first.
    TimedOut,
    /// A try found the domain held, or too many wait already.
    Busy,
    /// The operation would have waited for itself.
    WouldDeadlock,
    /// The guest ended, before or while it was done.
    Gone,
    /// The domain was removed.
    Closed,
    /// QEMU, the agent or a wrapper said no.
    Refused,
    /// QEMU's main loop is silent, also out of band.
    Unresponsive,
    /// Somebody asked the job to stop, and it undid what it had begun.
    Cancelled,
    /// The job is past its point of return.
    TooLate,
    /// The monitor's connection or what came over it.
    Monitor,
    /// The agent's connection or what came over it.
    Agent,
    /// A transport.
    Transport,
    /// A migration failed since one side did not believe the other's certificate, or since the stream of memory under TLS
    /// was cut; the guest's owner is named.
    Tls,
    /// A migration failed; the guest's owner is named.
    Migration,
    /// No final answer came: the guest is stopped here, and may run there.
    InDoubt,
    /// QEMU could not be started, or ended at once.
    Process,
    /// A file or another part of the system.
    Io,
    /// A file is not what it should be.
    Damaged,
    /// The operation panicked; only it is lost.
    Panicked,
    /// The driver is shutting down.
    ShuttingDown,
}

/// What a failed operation may have done. It decides whether a retry is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed by nature: not sent, refused, or nobody knows"
)]
pub enum Effect {
    /// Nothing: it was refused before it began, or undone.
    None,
    /// Nothing: whoever was asked refused.
    Refused,
    /// It may have happened, in part or in whole.
    Unknown,
}

impl From<monitor_qmp::Effect> for Effect {
    fn from(effect: monitor_qmp::Effect) -> Self {
        match effect {
            monitor_qmp::Effect::None => Self::None,
            monitor_qmp::Effect::Refused => Self::Refused,
            _ => Self::Unknown,
        }
    }
}

impl From<agent_qga::Effect> for Effect {
    fn from(effect: agent_qga::Effect) -> Self {
        match effect {
            agent_qga::Effect::None => Self::None,
            agent_qga::Effect::Refused => Self::Refused,
            agent_qga::Effect::Unknown => Self::Unknown,
        }
    }
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blame {
    /// Whoever called.
    Caller,
    /// Other jobs, or the guest's own end: a later try may work.
    Domain,
    /// The guest or its agent.
    Guest,
    /// QEMU.
    Qemu,
    /// This machine: files, processes, sockets.
    Host,
    /// This crate.
    Driver,
}

/// What happened below. Each variant's own text is in the error; what has a source of its own says it there.
#[derive(Debug)]
pub(crate) enum Cause {
    Invalid(InvalidGuest),
    BadRequest(String),
    Exists(String),
    State(String),
    ObserveOnly(String),
    Begin(Box<BeginError>),
    Cancel(CancelError),
    Change(ChangeError),
    Gone(Gone),
    TimedOut {
        what: &'static str,
        waited: Duration,
    },
    Cancelled(String),
    TooLate(String),
    Failed(String),
    /// The stream of memory to `peer`, as QEMU saw it end.
    Tls {
        peer: String,
        reason: String,
    },
    /// It may have been done: whether is found out, and it is finished or undone, once what failed does not any more.
    Unsettled(Box<Error>),
    Unresponsive,
    Monitor(monitor_qmp::Error),
    Agent(agent_qga::Error),
    Transport(transport_host::Error),
    Migrate(remote_migrate::Error),
    /// The connection to its QEMU was lost while it moved, and that is whose it is now.
    NotMoved(remote_migrate::Owner),
    Exited {
        exit: Exit,
        stderr: String,
    },
    Io {
        what: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    Damaged {
        path: PathBuf,
        reason: String,
    },
    Panicked(String),
    ShuttingDown,
}

impl Error {
    pub(crate) fn new(
        operation: impl Into<Label>,
        domain: Option<Label>,
        cause: impl Into<Cause>,
    ) -> Self {
        Self(Box::new(Facts {
            operation: operation.into(),
            domain,
            cause: cause.into(),
        }))
    }

    /// The same failure, told as one of that operation on that domain.
    pub(crate) fn told_of(mut self, operation: &Label, domain: &Label) -> Self {
        self.0.operation = operation.clone();
        self.0.domain = Some(domain.clone());
        self
    }

    /// The same failure, told as one of that operation.
    pub(crate) fn retold(mut self, operation: impl Into<Label>) -> Self {
        self.0.operation = operation.into();
        self
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        use monitor_qmp::ErrorKind as Qmp;
        match &self.0.cause {
            Cause::Invalid(_) | Cause::BadRequest(_) => ErrorKind::Invalid,
            Cause::Exists(_) => ErrorKind::Exists,
            Cause::State(_) => ErrorKind::State,
            Cause::ObserveOnly(_) => ErrorKind::ObserveOnly,
            Cause::Begin(error) => match &**error {
                BeginError::TimedOut { .. } => ErrorKind::TimedOut,
                BeginError::Busy { .. } | BeginError::QueueFull { .. } => ErrorKind::Busy,
                BeginError::WouldDeadlock { .. } => ErrorKind::WouldDeadlock,
                BeginError::Gone { .. } => ErrorKind::Gone,
                BeginError::Closed => ErrorKind::Closed,
                _ => ErrorKind::Refused,
            },
            Cause::Cancel(CancelError::TooLate { .. }) => ErrorKind::TooLate,
            Cause::Cancel(_) => ErrorKind::NotFound,
            Cause::Gone(_) | Cause::Change(ChangeError::Gone(_)) => ErrorKind::Gone,
            Cause::Change(_) => ErrorKind::Invalid,
            Cause::TimedOut { .. } => ErrorKind::TimedOut,
            Cause::Cancelled(_) => ErrorKind::Cancelled,
            Cause::TooLate(_) => ErrorKind::TooLate,
            Cause::Failed(_) => ErrorKind::Refused,
            Cause::Tls { .. } => ErrorKind::Tls,
            Cause::Unsettled(error) => error.kind(),
            Cause::Unresponsive => ErrorKind::Unresponsive,
            Cause::Monitor(error) => match error.kind() {
                Qmp::Refused => ErrorKind::Refused,
                Qmp::TimedOut => ErrorKind::TimedOut,
                _ => ErrorKind::Monitor,
            },
            Cause::Agent(error) => match error.kind() {
                agent_qga::ErrorKind::Refused | agent_qga::ErrorKind::Frozen => ErrorKind::Refused,
                agent_qga::ErrorKind::TimedOut
                | agent_qga::ErrorKind::Busy
                | agent_qga::ErrorKind::Unresponsive
                | agent_qga::ErrorKind::NotListening => ErrorKind::TimedOut,
                _ => ErrorKind::Agent,
            },
            Cause::Transport(error) => match error.kind() {
                transport_host::ErrorKind::TimedOut { .. } => ErrorKind::TimedOut,
                _ => ErrorKind::Transport,
            },
            Cause::Migrate(error) => match error.kind() {
                remote_migrate::ErrorKind::Cancelled => ErrorKind::Cancelled,
                remote_migrate::ErrorKind::InDoubt => ErrorKind::InDoubt,
                _ if is_of_tls(error) => ErrorKind::Tls,
                _ => ErrorKind::Migration,
            },
            Cause::NotMoved(_) => ErrorKind::Migration,
            Cause::Exited { .. } => ErrorKind::Process,
            Cause::Io { .. } => ErrorKind::Io,
            Cause::Damaged { .. } => ErrorKind::Damaged,
            Cause::Panicked(_) => ErrorKind::Panicked,
            Cause::ShuttingDown => ErrorKind::ShuttingDown,
        }
    }

    /// What it may have done.
    #[must_use]
    pub fn effect(&self) -> Effect {
        match &self.0.cause {
            Cause::Monitor(error) => error.effect().into(),
            Cause::Agent(error) => error.effect().into(),
            Cause::Failed(_) | Cause::Tls { .. } => Effect::Refused,
            Cause::Gone(_) | Cause::TimedOut { .. } | Cause::Panicked(_) | Cause::Unsettled(_) => {
                Effect::Unknown
            }
            Cause::Migrate(error) if error.owner_now() == remote_migrate::Owner::InDoubt => {
                Effect::Unknown
            }
            _ => Effect::None,
        }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match &self.0.cause {
            Cause::Invalid(_)
            | Cause::BadRequest(_)
            | Cause::Exists(_)
            | Cause::State(_)
            | Cause::ObserveOnly(_)
            | Cause::Cancel(_)
            | Cause::Change(_)
            | Cause::Cancelled(_)
            | Cause::TooLate(_)
            | Cause::Damaged { .. }
            | Cause::ShuttingDown => Blame::Caller,
            Cause::Begin(_) | Cause::Gone(_) | Cause::Migrate(_) | Cause::NotMoved(_) => {
                Blame::Domain
            }
            Cause::TimedOut { .. } | Cause::Agent(_) => Blame::Guest,
            Cause::Unsettled(error) => error.blame(),
            Cause::Failed(_) | Cause::Unresponsive | Cause::Monitor(_) | Cause::Exited { .. } => {
                Blame::Qemu
            }
            Cause::Transport(_) | Cause::Io { .. } | Cause::Tls { .. } => Blame::Host,
            Cause::Panicked(_) => Blame::Driver,
        }
    }

    /// The domain it happened on.
    #[must_use]
    pub fn domain(&self) -> Option<&str> {
        self.0.domain.as_deref()
    }

    /// The operation that failed.
    #[must_use]
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// Why the job was not granted, if that is what failed.
    #[must_use]
    pub fn begin(&self) -> Option<&BeginError> {
        match &self.0.cause {
            Cause::Begin(error) => Some(error),
            _ => None,
        }
    }
}

/// Whether a migration failed by what QEMU said of TLS here.
fn is_of_tls(error: &remote_migrate::Error) -> bool {
    let cause = std::error::Error::source(error);
    let host = cause.and_then(|cause| cause.downcast_ref::<remote_migrate::HostError>());
    let ours = host.and_then(|host| host.get_ref().downcast_ref::<Error>());
    ours.is_some_and(|error| error.kind() == ErrorKind::Tls)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.0.operation)?;
        if let Some(domain) = &self.0.domain {
            write!(f, " domain \"{domain}\"")?;
        }
        match &self.0.cause {
            Cause::BadRequest(text)
            | Cause::Exists(text)
            | Cause::State(text)
            | Cause::ObserveOnly(text)
            | Cause::TooLate(text)
            | Cause::Failed(text) => write!(f, ": {text}")?,
            Cause::TimedOut { what, waited } => {
                write!(f, ": waited {:.1}s for {what}", waited.as_secs_f64())?;
            }
            Cause::Tls { peer, reason } => write!(f, ": under TLS with {peer}: {reason}")?,
            Cause::Cancelled(by) => write!(f, ": {by}, and undone")?,
            Cause::Unsettled(_) => {
                f.write_str(": it may have been done, which is not settled yet")?;
            }
            Cause::NotMoved(owner) => {
                let text = "the connection to its QEMU was lost on its way, and its owner is";
                write!(f, ": {text} {owner}")?;
            }
            Cause::Unresponsive => f.write_str(": QEMU is silent, also out of band")?,
            Cause::Exited { exit, stderr } if stderr.is_empty() => {
                write!(f, ": QEMU {exit} and said nothing")?;
            }
            Cause::Exited { exit, stderr } => write!(f, ": QEMU {exit}; its last words: {stderr}")?,
            Cause::Io { what, path, .. } => write!(f, ": {what} {}", path.display())?,
            Cause::Damaged { path, reason } => write!(f, ": {} {reason}", path.display())?,
            Cause::Panicked(text) => write!(f, ": the operation panicked: {text}")?,
            Cause::ShuttingDown => f.write_str(": the driver is shutting down")?,
            Cause::Invalid(_)
            | Cause::Begin(_)
            | Cause::Cancel(_)
            | Cause::Change(_)
            | Cause::Gone(_)
            | Cause::Monitor(_)
            | Cause::Agent(_)
            | Cause::Transport(_)
            | Cause::Migrate(_) => {}
        }
        if f.alternate() {
            let mut source = std::error::Error::source(self);
            while let Some(error) = source {
                write!(f, ": {error}")?;
                source = error.source();
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.cause {
            Cause::Invalid(error) => Some(error),
            Cause::Begin(error) => Some(&**error),
            Cause::Unsettled(error) => Some(&**error),
            Cause::Cancel(error) => Some(error),
            Cause::Change(error) => Some(error),
            Cause::Gone(error) => Some(error),
            Cause::Monitor(error) => Some(error),
            Cause::Agent(error) => Some(error),
            Cause::Transport(error) => Some(error),
            Cause::Migrate(error) => Some(error),
            Cause::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// Makes `?` turn a cause into an error that the operation it happened in puts its name on.
macro_rules! causes {
    ($($variant:ident($error:ty)),* $(,)?) => { $(
        impl From<$error> for Cause {
            fn from(error: $error) -> Self {
                Self::$variant(error)
            }
        }

        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Cause::from(error).into()
            }
        }
    )* };
}

causes! {
    Invalid(InvalidGuest),
    Cancel(CancelError),
    Change(ChangeError),
    Gone(Gone),
    Monitor(monitor_qmp::Error),
    Agent(agent_qga::Error),
    Transport(transport_host::Error),
}

impl From<BeginError> for Cause {
    fn from(error: BeginError) -> Self {
        Self::Begin(Box::new(error))
    }
}

impl From<BeginError> for Error {
    fn from(error: BeginError) -> Self {
        Cause::from(error).into()
    }
}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Self {
        Self::new("run an operation", None, cause)
    }
}

/// An I/O failure with what was being done to which path.
pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Cause {
    let path = path.into();
    move |error| Cause::Io { what, path, error }
}
