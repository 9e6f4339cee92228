//! What can go wrong with a command, what it may have done, and why a connection ended.
//!
//! Knows nothing of sockets or ids. Every fact a message prints is kept as data, so that a
//! caller decides by [`ErrorKind`], [`Effect`] and [`Blame`], never by text.

use std::{borrow::Cow, error, fmt, io, sync::Arc, time::Duration};

/// Why a command did not end with its reply.
///
/// Small on the way through: the facts are boxed.
#[derive(Debug)]
pub struct Error(Box<Facts>);

#[derive(Debug)]
struct Facts {
    command: Option<Cow<'static, str>>,
    failure: Failure,
}

/// The reasons, with what was measured.
#[derive(Debug)]
pub(crate) enum Failure {
    Refused {
        class: ErrorClass,
        desc: String,
    },
    Unattributed {
        class: ErrorClass,
        desc: String,
        among: usize,
    },
    TimedOut {
        waited: Duration,
        sent: bool,
    },
    /// Asked about afterwards: the command did nothing.
    NotDone(Box<Self>),
    Unsettled {
        waited: Duration,
        orphans: usize,
    },
    NoEvent {
        waited: Duration,
    },
    NoGreeting {
        waited: Duration,
    },
    NotQmp {
        seen: String,
    },
    Closed {
        why: Closed,
        sent: bool,
    },
    Encode(serde_json::Error),
    ArgumentsNotObject,
    Decode(serde_json::Error),
    Unsupported(&'static str),
}

/// What kind of failure an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// QEMU answered with an error; see [`Error::class`] and [`Error::desc`].
    Refused,
    /// QEMU sent an error without an id while several commands were in flight: it belongs to
    /// one of them, and nothing tells to which.
    Unattributed,
    /// The deadline came first.
    TimedOut,
    /// The connection is closed, or closed while the command was under way.
    Closed,
    /// The peer does not speak QMP, or did not greet in time.
    NotQmp,
    /// The arguments could not be turned into a JSON object.
    Encode,
    /// QEMU did what was asked, but its reply does not fit the expected type.
    Decode,
    /// This connection cannot do that: no out-of-band lane, or no descriptors.
    Unsupported,
}

/// What a failed command may have done. It decides whether a retry is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Effect {
    /// No byte of it left this process.
    None,
    /// QEMU received it and answered with an error.
    Refused,
    /// It was sent and no answer came: it may have happened, or may yet happen.
    Unknown,
    /// QEMU confirmed it; only the reply could not be read.
    Done,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blame {
    /// The caller asked for something that cannot be asked here.
    Caller,
    /// QEMU refused, hangs, died, or broke the protocol.
    Peer,
    /// The stream between us and QEMU failed.
    Link,
}

/// The class of an error that QEMU answered with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorClass {
    /// Everything that has no class of its own; only the text tells more.
    GenericError,
    /// No such command, or not available now.
    CommandNotFound,
    /// The device is not active.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
    /// KVM lacks a capability that is needed.
    KvmMissingCap,
    /// A class that this crate does not know.
    Other(String),
}

/// Why a connection ended. The first reason wins and never changes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Closed {
    /// The peer closed the stream: QEMU quit, died, or dropped us.
    EndOfStream,
    /// Reading or writing failed.
    Failed(Arc<io::Error>),
    /// The peer sent what is not QMP; the text says what.
    Violation(Arc<str>),
    /// [`Monitor::close`](crate::Monitor::close) was called or the last handle was dropped.
    Local,
    /// The task that served the connection ended early: its runtime shut down, or the event
    /// sink panicked.
    Abandoned,
}

impl Failure {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { .. } => ErrorKind::Refused,
            Self::Unattributed { .. } => ErrorKind::Unattributed,
            Self::TimedOut { .. } | Self::Unsettled { .. } | Self::NoEvent { .. } => {
                ErrorKind::TimedOut
            }
            Self::NoGreeting { .. } | Self::NotQmp { .. } => ErrorKind::NotQmp,
            Self::NotDone(first) => first.kind(),
            Self::Closed { .. } => ErrorKind::Closed,
            Self::Encode(_) | Self::ArgumentsNotObject => ErrorKind::Encode,
            Self::Decode(_) => ErrorKind::Decode,
            Self::Unsupported(_) => ErrorKind::Unsupported,
        }
    }
}

impl Error {
    pub(crate) fn new(command: impl Into<Option<Cow<'static, str>>>, failure: Failure) -> Self {
        Self(Box::new(Facts {
            command: command.into(),
            failure,
        }))
    }

    /// An error as QEMU would answer it; for fakes and for wrappers that refuse.
    #[must_use]
    pub fn refused(
        command: impl Into<Cow<'static, str>>,
        class: ErrorClass,
        desc: impl Into<String>,
    ) -> Self {
        Self::new(
            command.into(),
            Failure::Refused {
                class,
                desc: desc.into(),
            },
        )
    }

    /// A deadline that came after `waited`; `sent` tells whether QEMU may have the command.
    #[must_use]
    pub fn timed_out(command: impl Into<Cow<'static, str>>, waited: Duration, sent: bool) -> Self {
        Self::new(command.into(), Failure::TimedOut { waited, sent })
    }

    /// A connection that is closed; `sent` tells whether QEMU may have the command.
    #[must_use]
    pub fn closed(command: impl Into<Cow<'static, str>>, why: Closed, sent: bool) -> Self {
        Self::new(command.into(), Failure::Closed { why, sent })
    }

    /// The same, once it was found out that the command did nothing.
    pub(crate) fn without_effect(mut self) -> Self {
        let first = std::mem::replace(&mut self.0.failure, Failure::ArgumentsNotObject);
        self.0.failure = Failure::NotDone(Box::new(first));
        self
    }

    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.failure.kind()
    }

    /// What the command may have done to the guest.
    #[must_use]
    pub fn effect(&self) -> Effect {
        match self.0.failure {
            Failure::Refused { .. } => Effect::Refused,
            Failure::Unattributed { .. }
            | Failure::TimedOut { sent: true, .. }
            | Failure::Closed { sent: true, .. } => Effect::Unknown,
            Failure::Decode(_) => Effect::Done,
            Failure::TimedOut { sent: false, .. }
            | Failure::Closed { sent: false, .. }
            | Failure::NotDone(_)
            | Failure::Unsettled { .. }
            | Failure::NoEvent { .. }
            | Failure::NoGreeting { .. }
            | Failure::NotQmp { .. }
            | Failure::Encode(_)
            | Failure::ArgumentsNotObject
            | Failure::Unsupported(_) => Effect::None,
        }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match &self.0.failure {
            Failure::Encode(_)
            | Failure::ArgumentsNotObject
            | Failure::Unsupported(_)
            | Failure::Closed {
                why: Closed::Local | Closed::Abandoned,
                ..
            } => Blame::Caller,
            Failure::Closed {
                why: Closed::Failed(_),
                ..
            } => Blame::Link,
            _ => Blame::Peer,
        }
    }

    /// The name of the command, where one was meant.
    #[must_use]
    pub fn command(&self) -> Option<&str> {
        self.0.command.as_deref()
    }

    /// The class QEMU gave, if QEMU answered with an error.
    #[must_use]
    pub fn class(&self) -> Option<&ErrorClass> {
        match &self.0.failure {
            Failure::Refused { class, .. } | Failure::Unattributed { class, .. } => Some(class),
            _ => None,
        }
    }

    /// QEMU's own words, if QEMU answered with an error.
    #[must_use]
    pub fn desc(&self) -> Option<&str> {
        match &self.0.failure {
            Failure::Refused { desc, .. } | Failure::Unattributed { desc, .. } => Some(desc),
            _ => None,
        }
    }

    /// Why the connection ended, if that is what failed the command.
    #[must_use]
    pub fn why_closed(&self) -> Option<&Closed> {
        match &self.0.failure {
            Failure::Closed { why, .. } => Some(why),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.command {
            Some(command) => write!(f, "cannot run {command}: ")?,
            None => f.write_str("cannot use the monitor: ")?,
        }
        match &self.0.failure {
            Failure::Refused { class, desc } => write!(f, "QEMU refused it: {desc} ({class})"),
            Failure::Unattributed { class, desc, among } => write!(
                f,
                "QEMU refused one of {among} commands in flight without saying which: {desc} ({class})"
            ),
            Failure::TimedOut { waited, sent: true } => {
                write!(f, "waited {waited:.1?}, sent and not answered")
            }
            Failure::TimedOut {
                waited,
                sent: false,
            } => {
                write!(
                    f,
                    "waited {waited:.1?}, never sent because earlier commands hold the line"
                )
            }
            Failure::NotDone(_) => f.write_str("it was not answered, and was found not done"),
            Failure::Unsettled { waited, orphans } => write!(
                f,
                "waited {waited:.1?}, {orphans} commands whose callers left still run"
            ),
            Failure::NoEvent { waited } => {
                write!(f, "waited {waited:.1?}, the expected event did not come")
            }
            Failure::NoGreeting { waited } => write!(
                f,
                "waited {waited:.1?} for a greeting; another client may hold this socket, or it is no QMP socket"
            ),
            Failure::NotQmp { seen } => write!(f, "expected a QMP greeting, got \"{seen}\""),
            Failure::Closed { why, sent: true } => write!(f, "sent and not answered: {why}"),
            Failure::Closed { why, sent: false } => write!(f, "not sent: {why}"),
            Failure::Encode(_) => f.write_str("its arguments do not become JSON"),
            Failure::ArgumentsNotObject => f.write_str("its arguments are not a JSON object"),
            Failure::Decode(_) => f.write_str("done, but the reply does not fit its type"),
            Failure::Unsupported(what) => f.write_str(what),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match &self.0.failure {
            Failure::Encode(cause) | Failure::Decode(cause) => Some(cause),
            Failure::Closed { why, .. } => error::Error::source(why),
            _ => None,
        }
    }
}

impl ErrorClass {
    pub(crate) fn from_wire(name: &str) -> Self {
        match name {
            "GenericError" => Self::GenericError,
            "CommandNotFound" => Self::CommandNotFound,
            "DeviceNotActive" => Self::DeviceNotActive,
            "DeviceNotFound" => Self::DeviceNotFound,
            "KVMMissingCap" => Self::KvmMissingCap,
            other => Self::Other(other.to_owned()),
        }
    }

    /// The name on the wire.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::KvmMissingCap => "KVMMissingCap",
            Self::Other(name) => name,
        }
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EndOfStream => f.write_str("QEMU closed the connection"),
            Self::Failed(_) => f.write_str("the connection failed"),
            Self::Violation(what) => write!(f, "QEMU broke the protocol: {what}"),
            Self::Local => f.write_str("the monitor was closed on this side"),
            Self::Abandoned => f.write_str("the monitor's task ended early"),
        }
    }
}

impl error::Error for Closed {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Self::Failed(cause) => Some(cause.as_ref()),
            _ => None,
        }
    }
}
