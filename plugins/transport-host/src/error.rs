//! Why a transport could not be loaded or used: one error, with its kind and whose fault it is.
//!
//! Nothing was ever sent to a peer when one of these is returned, so a retry is always safe: the
//! effect is none.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use transport_abi::Mismatch;

/// What could not be done, on what, and why.
#[derive(Debug)]
pub struct Error(Box<Report>);

#[derive(Debug)]
struct Report {
    action: &'static str,
    subject: String,
    /// Which of the addresses that the subject's name resolved to.
    place: Option<String>,
    kind: ErrorKind,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Whose fault an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blame {
    /// Who asked: the target or the path is wrong, or the deadline too short.
    Caller,
    /// The peer, or the network on the way to it.
    Peer,
    /// The plugin, or how it was installed.
    Plugin,
    /// This process or its system: out of descriptors, no permission.
    System,
}

/// What an [`Error`] is about.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each variant names its fields")]
pub enum ErrorKind {
    /// The target is not `SCHEME:ADDRESS`.
    BadTarget,
    /// No transport has this scheme.
    UnknownScheme { scheme: String, known: Vec<String> },
    /// The transport does not understand the address.
    BadAddress { text: String },
    /// The transport does not do this.
    Unsupported { text: String },
    /// The host name could not be resolved.
    Unresolved,
    /// The system or the peer said no; `step` is what failed, as a verb phrase, and the source has
    /// the system's reason.
    Failed { step: String },
    /// The deadline came first. `last` is what was being waited for, after that many steps of a
    /// plugin (0: not in one).
    TimedOut {
        waited: Duration,
        steps: u32,
        last: String,
    },
    /// The plugin panicked. Only this operation is lost.
    Panicked { message: String },
    /// The plugin broke a clause of `transport_abi::contract`.
    Breach { clause: &'static str, text: String },
    /// Plugins are loaded by absolute path only.
    RelativePath,
    /// The path could not be followed; the source says why.
    Unreadable { path: PathBuf },
    /// Not a regular file.
    NotAFile { path: PathBuf },
    /// The file is not called `libtransport_STEM.so`.
    BadFileName { path: PathBuf },
    /// The file or a folder above it belongs to somebody who is neither root nor us.
    ForeignOwner {
        path: PathBuf,
        owner: u32,
        ours: u32,
    },
    /// Others may write to the file or to a folder above it.
    WritableByOthers { path: PathBuf, mode: u32 },
    /// The dynamic linker cannot load the file; the source has its words.
    NotALibrary,
    /// The library has no such symbol.
    NoSymbol { symbol: String },
    /// What is under the symbol cannot be used; both versions are in its text.
    Mismatched(Mismatch),
    /// The table's name is not the one that file and symbol promise.
    WrongName { name: String, stem: String },
    /// Another transport has this name.
    NameTaken { name: String, by: String },
}

impl Error {
    /// An error of the given kind, for those who write an in-process
    /// [`Transport`](crate::Transport).
    ///
    /// The host adds what was being done, and to what.
    #[must_use]
    pub fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Report {
            action: "use",
            subject: "a transport".to_owned(),
            place: None,
            kind,
            source: None,
        }))
    }

    /// For `map_err`: `step` (a verb and its object) failed with this error.
    pub fn io<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> Self {
        move |error| {
            Self::new(ErrorKind::Failed {
                step: step.to_owned(),
            })
            .because(error.into())
        }
    }

    pub(crate) fn breach(clause: &'static str, text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Breach {
            clause,
            text: text.into(),
        })
    }

    pub(crate) fn because(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    pub(crate) fn during(mut self, action: &'static str, subject: impl fmt::Display) -> Self {
        (self.0.action, self.0.subject) = (action, subject.to_string());
        self
    }

    pub(crate) fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.place = Some(place.to_string());
        self
    }

    /// What this is about.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The system's reason, if a system call is behind it.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        self.0
            .source
            .as_ref()?
            .downcast_ref::<io::Error>()?
            .raw_os_error()
    }

    /// Whose fault it is.
    #[must_use]
    pub fn blame(&self) -> Blame {
        use rustix::io::Errno;
        match self.kind() {
            ErrorKind::BadTarget
            | ErrorKind::UnknownScheme { .. }
            | ErrorKind::BadAddress { .. }
            | ErrorKind::Unsupported { .. }
            | ErrorKind::RelativePath
            | ErrorKind::Unreadable { .. }
            | ErrorKind::NameTaken { .. } => Blame::Caller,
            ErrorKind::Unresolved | ErrorKind::TimedOut { .. } => Blame::Peer,
            ErrorKind::Failed { .. } => match self.os_error().map(Errno::from_raw_os_error) {
                Some(
                    Errno::MFILE
                    | Errno::NFILE
                    | Errno::NOMEM
                    | Errno::NOBUFS
                    | Errno::ACCESS
                    | Errno::PERM,
                ) => Blame::System,
                Some(Errno::ADDRINUSE | Errno::ADDRNOTAVAIL | Errno::NAMETOOLONG) => Blame::Caller,
                _ => Blame::Peer,
            },
            ErrorKind::Panicked { .. }
            | ErrorKind::Breach { .. }
            | ErrorKind::NotAFile { .. }
            | ErrorKind::BadFileName { .. }
            | ErrorKind::ForeignOwner { .. }
            | ErrorKind::WritableByOthers { .. }
            | ErrorKind::NotALibrary
            | ErrorKind::NoSymbol { .. }
            | ErrorKind::Mismatched(_)
            | ErrorKind::WrongName { .. } => Blame::Plugin,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}", self.0.action, self.0.subject)?;
        if let Some(place) = &self.0.place {
            write!(f, " at {place}")?;
        }
        write!(f, ": {}", self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadTarget => f.write_str("expected SCHEME:ADDRESS, as in unix:/run/qmp.sock"),
            Self::UnknownScheme { scheme, known } if known.is_empty() => {
                write!(
                    f,
                    "no transport {scheme:?}, and none is registered; load or register one"
                )
            }
            Self::UnknownScheme { scheme, known } => {
                write!(
                    f,
                    "no transport {scheme:?} among {}; load or register it",
                    known.join(", ")
                )
            }
            Self::BadAddress { text } | Self::Unsupported { text } => f.write_str(text),
            Self::Unresolved => f.write_str("host name does not resolve"),
            Self::Failed { step } => write!(f, "failed to {step}"),
            Self::TimedOut {
                waited,
                steps,
                last,
            } => {
                write!(f, "deadline came after {waited:?}, waiting for {last}")?;
                if *steps > 0 {
                    write!(f, " after {steps} steps")
                } else {
                    Ok(())
                }
            }
            Self::Panicked { message } => write!(f, "plugin panicked: {message}"),
            Self::Breach { clause, text } => {
                write!(f, "plugin broke clause {clause} of transport-abi: {text}")
            }
            Self::RelativePath => f.write_str("path is relative; give an absolute one"),
            Self::Unreadable { path } => write!(f, "{} cannot be followed", path.display()),
            Self::NotAFile { path } => write!(f, "{} is not a regular file", path.display()),
            Self::BadFileName { path } => {
                write!(
                    f,
                    "{} is not called libtransport_NAME.so, with _ for - in NAME",
                    path.display()
                )
            }
            Self::ForeignOwner { path, owner, ours } => {
                write!(
                    f,
                    "{} is owned by uid {owner}; must be root or {ours}",
                    path.display()
                )
            }
            Self::WritableByOthers { path, mode } => {
                write!(
                    f,
                    "{} has mode {mode:04o}; must not be writable by group or others",
                    path.display()
                )
            }
            Self::NotALibrary => f.write_str("dynamic linker refuses it"),
            Self::NoSymbol { symbol } => write!(f, "it has no symbol {symbol}"),
            Self::Mismatched(mismatch) => mismatch.fmt(f),
            Self::WrongName { name, stem } => {
                write!(
                    f,
                    "table calls itself {name:?}, file and symbol say {stem:?}"
                )
            }
            Self::NameTaken { name, by } => {
                write!(f, "transport {name:?} is already there, from {by}")
            }
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match (error.kind(), error.os_error()) {
            (ErrorKind::TimedOut { .. }, _) => io::ErrorKind::TimedOut,
            (ErrorKind::BadTarget | ErrorKind::BadAddress { .. }, _) => io::ErrorKind::InvalidInput,
            (ErrorKind::Unsupported { .. }, _) => io::ErrorKind::Unsupported,
            (_, Some(code)) => Self::from_raw_os_error(code).kind(),
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
