//! What the author of a plugin in Rust implements: [`Transport`], [`Dial`], [`Listen`].
//!
//! Safe code only; [`export_transport!`](crate::export_transport) turns it into the C table. Must
//! not know the raw structs.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

/// What the host asks to connect to, or to listen on.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub(crate) address: &'a str,
    pub(crate) host_minor: u32,
}

impl<'a> Request<'a> {
    /// A request for `address`, as a plugin's own tests need it.
    #[must_use]
    pub const fn new(address: &'a str) -> Self {
        Self {
            address,
            host_minor: crate::ABI_MINOR,
        }
    }

    /// What follows `name:` in the target.
    #[must_use]
    pub const fn address(&self) -> &'a str {
        self.address
    }

    /// Which additions to the ABI the host knows.
    #[must_use]
    pub const fn host_minor(&self) -> u32 {
        self.host_minor
    }
}

/// How the addresses of a transport look, and who resolves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Addressing {
    /// The host passes on what the user wrote.
    Opaque,
    /// `HOST:PORT`; the host resolves names and passes numeric addresses only, one after the other.
    HostPort,
}

/// One scheme: how to dial its addresses and how to listen on them.
///
/// There is no value of it: a plugin that has shared state keeps it in a `static`.
pub trait Transport: 'static {
    /// The scheme; see clause 1.6.
    const NAME: &'static str;
    /// How addresses look.
    const ADDRESSING: Addressing = Addressing::Opaque;
    /// A connection in the making.
    type Dial: Dial;
    /// A listener; [`CannotListen`] for a transport that only dials.
    type Listen: Listen;

    /// Starts to connect. Never blocks.
    ///
    /// # Errors
    ///
    /// The address is not understood, or the system refused at once.
    fn begin_dial(request: &Request<'_>) -> Result<Self::Dial, Failure>;

    /// Starts to listen. Never blocks.
    ///
    /// # Errors
    ///
    /// As [`begin_dial`](Self::begin_dial). A transport that does not override this does not
    /// listen.
    fn begin_listen(_request: &Request<'_>) -> Result<Self::Listen, Failure> {
        Err(Failure::unsupported("this transport does not listen"))
    }
}

/// A connection in the making. Dropping it cancels.
pub trait Dial: Send + 'static {
    /// Goes on as far as it can without blocking.
    ///
    /// Not called again after [`Step::Ready`] or an error.
    ///
    /// # Errors
    ///
    /// The connection cannot be made.
    fn step(&mut self) -> Result<Step<'_>, Failure>;
}

/// A listener. Dropping it closes it and removes what it made, if that is still its own.
pub trait Listen: Send + 'static {
    /// Goes on until peers can connect. Most listeners are bound at once and leave this alone.
    ///
    /// # Errors
    ///
    /// The listener cannot be bound; it is not called again.
    fn step(&mut self) -> Result<Step<'_, ()>, Failure> {
        Ok(Step::Ready(()))
    }

    /// Takes the next peer, or says what to wait for.
    ///
    /// # Errors
    ///
    /// That peer is lost; the listener goes on.
    fn accept(&mut self) -> Result<Step<'_>, Failure>;

    /// Where peers connect, with what the request left open filled in; see clause 10.2.
    ///
    /// # Errors
    ///
    /// The system does not say.
    fn address(&self) -> Result<String, Failure>;
}

/// The listener of a transport that has none. There is no value of it.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "has no values, and never will")]
pub enum CannotListen {}

impl Listen for CannotListen {
    fn accept(&mut self) -> Result<Step<'_>, Failure> {
        match *self {}
    }

    fn address(&self) -> Result<String, Failure> {
        match *self {}
    }
}

/// How far a step came.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the two outcomes of clause 7; a third would be a new ABI"
)]
pub enum Step<'a, T = OwnedFd> {
    /// Done. A descriptor is a connected stream socket, non-blocking and close-on-exec, and now the
    /// host's.
    Ready(T),
    /// Step again when this has come.
    Wait(Wait<'a>),
}

impl<'a, T> Step<'a, T> {
    /// Wait until `fd` can be read.
    #[must_use]
    pub const fn readable(fd: BorrowedFd<'a>) -> Self {
        Self::Wait(Wait {
            fd: Some((fd, Interest::Readable)),
            retry_after: None,
        })
    }

    /// Wait until `fd` can be written.
    #[must_use]
    pub const fn writable(fd: BorrowedFd<'a>) -> Self {
        Self::Wait(Wait {
            fd: Some((fd, Interest::Writable)),
            retry_after: None,
        })
    }

    /// Step again after `delay`: for what no descriptor signals.
    #[must_use]
    pub const fn retry_after(delay: Duration) -> Self {
        Self::Wait(Wait {
            fd: None,
            retry_after: Some(delay),
        })
    }

    /// The same, but a wait no longer than `delay`.
    #[must_use]
    pub fn at_most(mut self, delay: Duration) -> Self {
        if let Self::Wait(wait) = &mut self {
            wait.retry_after = Some(delay);
        }
        self
    }
}

/// What a step waits for: a descriptor, a time, or whichever comes first.
#[derive(Debug, Clone, Copy)]
pub struct Wait<'a> {
    pub(crate) fd: Option<(BorrowedFd<'a>, Interest)>,
    pub(crate) retry_after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interest {
    Readable,
    Writable,
}

/// Why something could not be done: which step, on what, and the system's reason if it gave one.
#[derive(Debug)]
pub struct Failure {
    kind: FailureKind,
    text: String,
    os_error: Option<i32>,
}

/// What a [`Failure`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureKind {
    /// The system or the peer said no.
    Failed,
    /// The address is not one of this transport's.
    BadAddress,
    /// This transport does not do that.
    Unsupported,
}

impl Failure {
    /// A failure that no system call is behind; `text` is the step that failed, beginning with a
    /// verb.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            kind: FailureKind::Failed,
            text: text.into(),
            os_error: None,
        }
    }

    /// The address cannot be understood; `text` says what was expected.
    #[must_use]
    pub fn bad_address(text: impl Into<String>) -> Self {
        Self {
            kind: FailureKind::BadAddress,
            ..Self::new(text)
        }
    }

    /// The transport does not do that.
    #[must_use]
    pub fn unsupported(text: impl Into<String>) -> Self {
        Self {
            kind: FailureKind::Unsupported,
            ..Self::new(text)
        }
    }

    /// For `map_err`: `step` (a verb and its object) failed with this error.
    pub fn io<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> Self {
        move |error| {
            let error = error.into();
            match error.raw_os_error() {
                Some(code) => Self {
                    os_error: Some(code),
                    ..Self::new(step)
                },
                None => Self::new(format!("{step}: {error}")),
            }
        }
    }

    /// What this is about.
    #[must_use]
    pub const fn kind(&self) -> FailureKind {
        self.kind
    }

    /// The text, without the system's reason.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The errno behind it.
    #[must_use]
    pub const fn os_error(&self) -> Option<i32> {
        self.os_error
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        match self.os_error {
            Some(code) => write!(f, ": {}", io::Error::from_raw_os_error(code)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}
