//! The seam: a request value goes in, an outcome comes out, and typed calls sit on top.
//!
//! [`Qmp`] is object safe, so that a daemon can wrap a monitor (audit, allow-list, record) or
//! put a fake in its place. Nothing here knows how the bytes travel.

use std::{borrow::Cow, os::fd::OwnedFd};

use async_trait::async_trait;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::{RawValue, Value, to_raw_value};

use crate::{
    command::Command,
    error::{Closed, Error, Failure},
    event::Event,
    expect::Expected,
};

/// Until when a call may take, on tokio's clock.
pub type Deadline = tokio::time::Instant;

/// Which way a command takes through QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Lane {
    /// Through QEMU's main loop, one after the other.
    InBand,
    /// Past a stuck main loop. Few commands may; see [`Command::OOB`].
    OutOfBand,
}

/// One command to be sent.
#[derive(Debug)]
pub struct Request {
    /// The command's name.
    pub name: Cow<'static, str>,
    /// Its arguments, a JSON object, or none.
    pub arguments: Option<Box<RawValue>>,
    /// Descriptors that travel with it.
    pub fds: Vec<OwnedFd>,
    /// The way it takes.
    pub lane: Lane,
    /// When the caller stops to wait.
    pub deadline: Deadline,
}

impl Request {
    /// The request that carries `command`, in band and without descriptors.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Encode`](crate::ErrorKind::Encode): `command` does not become JSON.
    pub fn new<C: Command>(command: &C, deadline: Deadline) -> Result<Self, Error> {
        let arguments = if says_nothing(command) {
            None
        } else {
            let text = to_raw_value(command)
                .map_err(|cause| Error::new(Cow::Borrowed(C::NAME), Failure::Encode(cause)))?;
            (!matches!(text.get(), "{}" | "null")).then_some(text)
        };
        Ok(Self {
            name: Cow::Borrowed(C::NAME),
            arguments,
            fds: Vec::new(),
            lane: Lane::InBand,
            deadline,
        })
    }
}

/// Whether `command` has no arguments, found out without an allocation.
fn says_nothing<C: Command>(command: &C) -> bool {
    let mut few = [0; 4];
    // Only a type without content is worth the try: others would be serialised twice.
    size_of::<C>() == 0 && serde_json::to_writer(few.as_mut_slice(), command).is_ok()
}

/// What QEMU returned.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The value, as QEMU wrote it.
    pub value: Box<RawValue>,
    /// Its place among all that was read on this connection; see [`Event::sequence`](crate::Event::sequence).
    pub sequence: u64,
}

impl Reply {
    /// Decodes the value, in the task of whoever asks.
    ///
    /// # Errors
    ///
    /// When the value does not fit `T`.
    pub fn decode<'a, T: Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.value.get())
    }

    /// Decodes the value as the reply to `name`.
    pub(crate) fn decode_for<T: DeserializeOwned>(
        &self,
        name: impl Into<Cow<'static, str>>,
    ) -> Result<T, Error> {
        self.decode()
            .map_err(|cause| Error::new(name.into(), Failure::Decode(cause)))
    }
}

/// How a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Health {
    /// Every command is answered within its deadline.
    Ok,
    /// A command is overdue, but QEMU gives signs of life.
    Busy,
    /// A command is overdue and QEMU is silent, also out of band.
    Unresponsive,
    /// The connection ended.
    Closed,
}

/// What QEMU says on connect.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct Greeting {
    /// Its version.
    pub version: Version,
    /// What the monitor can do beyond plain QMP.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

impl Greeting {
    /// Whether QEMU offers the out-of-band lane.
    #[must_use]
    pub fn offers_oob(&self) -> bool {
        self.capabilities
            .iter()
            .any(|capability| capability == "oob")
    }
}

/// The version of a QEMU.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct Version {
    /// The release.
    pub qemu: Release,
    /// What the packager added.
    #[serde(default)]
    pub package: String,
}

/// A release, ordered by age.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Release {
    /// 10 in 10.0.2.
    pub major: u32,
    /// 0 in 10.0.2.
    pub minor: u32,
    /// 2 in 10.0.2.
    pub micro: u32,
}

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A QMP connection, or what stands in for one.
#[async_trait]
pub trait Qmp: Send + Sync {
    /// Sends `request` and waits for its answer.
    ///
    /// # Errors
    ///
    /// [`Error::kind`] tells why, [`Error::effect`] whether QEMU may have acted.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future withdraws a request that was not taken yet. One that was is not
    /// undone: its answer reaches nobody, and [`settled`](Self::settled) waits for it.
    async fn call(&self, request: Request) -> Result<Reply, Error>;

    /// Waits until no command whose caller left is outstanding.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`](crate::ErrorKind::TimedOut) and
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn settled(&self, deadline: Deadline) -> Result<(), Error>;

    /// Arms a wait for an event; [`Monitor::expect_event`](crate::Monitor::expect_event) tells
    /// how. Whoever wraps a monitor passes it on; unless overridden, waiting is refused.
    fn arm(&self, filter: Box<dyn FnMut(&Event) -> bool + Send>) -> Expected {
        drop(filter);
        Expected::never()
    }

    /// How the connection does.
    fn health(&self) -> Health;

    /// What QEMU said on connect.
    fn greeting(&self) -> &Greeting;

    /// Waits until the connection ended and says why.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn closed(&self) -> Closed;
}

impl dyn Qmp + '_ {
    /// Waits for an event that a command will cause; see
    /// [`Monitor::expect_event`](crate::Monitor::expect_event).
    pub fn expect_event(&self, filter: impl FnMut(&Event) -> bool + Send + 'static) -> Expected {
        self.arm(Box::new(filter))
    }

    /// Sends a typed command and waits for its typed reply.
    ///
    /// # Errors
    ///
    /// As [`Qmp::call`], and [`ErrorKind::Decode`](crate::ErrorKind::Decode).
    ///
    /// # Cancel safety
    ///
    /// As [`Qmp::call`].
    pub async fn execute<C: Command>(
        &self,
        command: C,
        deadline: Deadline,
    ) -> Result<C::Reply, Error> {
        self.call(Request::new(&command, deadline)?)
            .await?
            .decode_for(C::NAME)
    }

    /// Sends a typed command with descriptors riding on it.
    ///
    /// # Errors
    ///
    /// As `execute`, and
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the stream passes none.
    ///
    /// # Cancel safety
    ///
    /// As [`Qmp::call`]; the descriptors of a withdrawn request are closed.
    pub async fn execute_with_fds<C: Command>(
        &self,
        command: C,
        fds: Vec<OwnedFd>,
        deadline: Deadline,
    ) -> Result<C::Reply, Error> {
        let request = Request {
            fds,
            ..Request::new(&command, deadline)?
        };
        self.call(request).await?.decode_for(C::NAME)
    }

    /// Sends a typed command past QEMU's main loop. Compiles only for commands that may.
    ///
    /// # Errors
    ///
    /// As `execute`, and
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if QEMU offers no such lane.
    ///
    /// # Cancel safety
    ///
    /// As [`Qmp::call`].
    pub async fn execute_oob<C: Command>(
        &self,
        command: C,
        deadline: Deadline,
    ) -> Result<C::Reply, Error> {
        const { assert!(C::OOB, "this command may not run out of band") };
        let request = Request {
            lane: Lane::OutOfBand,
            ..Request::new(&command, deadline)?
        };
        self.call(request).await?.decode_for(C::NAME)
    }

    /// Sends a command by name. `arguments` is an object, or null for none.
    ///
    /// # Errors
    ///
    /// As `execute`.
    ///
    /// # Cancel safety
    ///
    /// As [`Qmp::call`].
    pub async fn execute_raw(
        &self,
        name: impl Into<Cow<'static, str>> + Send,
        arguments: Value,
        deadline: Deadline,
    ) -> Result<Value, Error> {
        let name = name.into();
        let arguments = match arguments {
            Value::Null => None,
            given => Some(
                to_raw_value(&given)
                    .map_err(|cause| Error::new(name.clone(), Failure::Encode(cause)))?,
            ),
        };
        let request = Request {
            name: name.clone(),
            arguments,
            fds: Vec::new(),
            lane: Lane::InBand,
            deadline,
        };
        self.call(request).await?.decode_for(name)
    }
}
