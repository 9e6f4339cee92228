//! Events as QEMU sends them, and where they go. Typed views of them are in `kinds`,
//! what each is about in `subject`.
//!
//! Knows nothing of the connection. An event that this crate does not know, or whose data has
//! an unexpected shape, stays whole as [`QmpEvent::Other`].

use std::time::{Duration, SystemTime};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::{error::Closed, qmp::Health};

mod kinds;
mod subject;

pub(crate) use self::kinds::ALL;
pub use self::kinds::*;
pub use self::subject::Subject;

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name, as `STOP`.
    pub name: String,
    /// What it carries, as QEMU wrote it.
    pub data: Option<Box<RawValue>>,
    /// When it happened, by QEMU's clock.
    pub timestamp: Timestamp,
    /// Its place among all that was read on this connection, replies included: what has a
    /// smaller number was on the wire before.
    pub sequence: u64,
}

/// QEMU's clock at an event: Unix time, or -1 where the host had no time to give.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// And millionths beyond them.
    pub microseconds: i64,
}

impl Timestamp {
    /// As a time of this host's clock, unless QEMU had none to give.
    #[must_use]
    pub fn to_system_time(self) -> Option<SystemTime> {
        let seconds = Duration::from_secs(self.seconds.try_into().ok()?);
        let rest = Duration::from_micros(self.microseconds.try_into().ok()?);
        SystemTime::UNIX_EPOCH
            .checked_add(seconds)?
            .checked_add(rest)
    }
}

impl Default for Timestamp {
    fn default() -> Self {
        Self {
            seconds: -1,
            microseconds: -1,
        }
    }
}

/// Where the events of a connection go.
///
/// Called by the connection's one reader in the order of the wire, and before any later reply
/// is handed over: when a command's caller goes on, every event that QEMU sent before the
/// reply was applied. Must not block: nothing else is read meanwhile.
pub trait EventSink: Send + 'static {
    /// An event came.
    fn event(&mut self, event: Event);

    /// The connection's health changed. Does nothing unless overridden.
    fn health(&mut self, health: Health) {
        let _ = health;
    }

    /// A reply came after its caller had left. Does nothing unless overridden.
    fn late(&mut self) {}

    /// The connection ended. Called once, last, and before any waiting caller learns of it;
    /// never for a connection that could not be made.
    fn closed(&mut self, why: &Closed);
}

/// Drops every event.
impl EventSink for () {
    fn event(&mut self, _: Event) {}

    fn closed(&mut self, _: &Closed) {}
}

impl Event {
    /// The typed view. [`QmpEvent::Other`] if the event is unknown or its data are.
    #[must_use]
    pub fn typed(&self) -> QmpEvent {
        QmpEvent::of(self).unwrap_or(QmpEvent::Other)
    }

    /// Decodes what it carries.
    ///
    /// # Errors
    ///
    /// When it carries nothing, or something that does not fit `T`.
    pub fn decode<'a, T: Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.data.as_ref().map_or("null", |data| data.get()))
    }

    pub(crate) fn data<T: DeserializeOwned>(&self) -> Option<T> {
        self.decode().ok()
    }
}
