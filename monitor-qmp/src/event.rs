//! Events as QEMU sends them, where they go, and typed views of those a VM daemon needs.
//!
//! Knows nothing of the connection. An event that this crate does not know, or whose data has
//! an unexpected shape, stays whole as [`QmpEvent::Other`].

use std::time::{Duration, SystemTime};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::{
    command::{DumpResult, JobStatus, JobType, MigrationStatus, open_enum},
    error::Closed,
    qmp::Health,
};

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

    /// The connection ended. Called once, last, and before any waiting caller learns of it;
    /// never for a connection that could not be made.
    fn closed(&mut self, why: &Closed);
}

/// Drops every event.
impl EventSink for () {
    fn event(&mut self, _: Event) {}

    fn closed(&mut self, _: &Closed) {}
}

open_enum! {
    /// Why a guest was shut down or reset (QEMU 4.0 and later).
    pub enum ShutdownCause {
        None = "none",
        HostError = "host-error",
        HostQmpQuit = "host-qmp-quit",
        HostQmpSystemReset = "host-qmp-system-reset",
        HostSignal = "host-signal",
        HostUi = "host-ui",
        GuestShutdown = "guest-shutdown",
        GuestReset = "guest-reset",
        GuestPanic = "guest-panic",
        SubsystemReset = "subsystem-reset",
        SnapshotLoad = "snapshot-load",
    }
}

/// Data of `SHUTDOWN` and `RESET`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shutdown {
    /// Whether the guest asked for it.
    pub guest: bool,
    /// What caused it.
    pub reason: ShutdownCause,
}

/// Data of `GUEST_PANICKED`, `GUEST_CRASHLOADED` and `WATCHDOG`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestFault {
    /// What QEMU does about it, as `pause`.
    pub action: String,
}

/// Data of the `BLOCK_JOB_*` events.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockJob {
    /// The kind of job; `BLOCK_JOB_ERROR` does not tell.
    #[serde(rename = "type")]
    pub job_type: Option<JobType>,
    /// The job's id. `BLOCK_JOB_PENDING` calls it `id`, the others `device`.
    #[serde(alias = "id")]
    pub device: String,
    /// How far it is to go.
    #[serde(default)]
    pub len: u64,
    /// How far it got.
    #[serde(default)]
    pub offset: u64,
    /// What went wrong. `BLOCK_JOB_COMPLETED` with an error is a failure.
    pub error: Option<String>,
    /// What `BLOCK_JOB_ERROR` failed at: `read` or `write`.
    pub operation: Option<String>,
    /// What QEMU does about that.
    pub action: Option<String>,
}

/// Data of `BLOCK_IO_ERROR`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct BlockIoError {
    /// The backend's name; empty for one made by `-blockdev`.
    pub device: String,
    /// The node.
    pub node_name: Option<String>,
    /// The device's QOM path (QEMU 9.2 and later).
    pub qom_path: Option<String>,
    /// `read` or `write`.
    pub operation: String,
    /// `ignore`, `report` or `stop`.
    pub action: String,
    /// Whether the storage is full.
    #[serde(default)]
    pub nospace: bool,
    /// For people.
    #[serde(default)]
    pub reason: String,
}

/// Data of `DEVICE_DELETED` and `DEVICE_UNPLUG_GUEST_ERROR`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct DevicePath {
    /// The device's id. Inner devices have none, and their events come first.
    pub device: Option<String>,
    /// Its QOM path.
    pub path: String,
}

/// Data of `JOB_STATUS_CHANGE`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct JobChange {
    /// The job.
    pub id: String,
    /// Its new status.
    pub status: JobStatus,
}

/// Data of `VSERPORT_CHANGE`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortChange {
    /// The port's device id.
    pub id: String,
    /// Whether the guest has it open.
    pub open: bool,
}

/// Data of `DUMP_COMPLETED`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct DumpCompleted {
    /// How it ended.
    pub result: DumpResult,
    /// What went wrong.
    pub error: Option<String>,
}

/// Data of `MEMORY_DEVICE_SIZE_CHANGE`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// The device's id, if it has one.
    pub id: Option<String>,
    /// Its size in bytes now.
    pub size: u64,
    /// Its QOM path.
    pub qom_path: String,
}

/// The events a VM daemon acts on (QMP reference of QEMU 7.2 to 10.0).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum QmpEvent {
    /// The guest shut down, or QEMU is about to end.
    Shutdown(Shutdown),
    /// The power button was pressed through the monitor.
    Powerdown,
    /// The guest was reset.
    Reset(Shutdown),
    /// The virtual CPUs stopped.
    Stop,
    /// The virtual CPUs run again.
    Resume,
    /// The guest sleeps.
    Suspend,
    /// The guest hibernates; a shutdown follows.
    SuspendDisk,
    /// The guest woke up.
    Wakeup,
    /// The guest's kernel panicked.
    GuestPanicked(GuestFault),
    /// The guest's crash kernel runs.
    GuestCrashloaded(GuestFault),
    /// The watchdog fired.
    Watchdog(GuestFault),
    /// The migration's status changed (needs its capability `events`).
    Migration(MigrationStatus),
    /// A pass over the guest's memory began (needs the capability `events`).
    MigrationPass(u64),
    /// A job's status changed.
    JobStatusChange(JobChange),
    /// A block job ended; look at its `error`.
    BlockJobCompleted(BlockJob),
    /// A block job was cancelled.
    BlockJobCancelled(BlockJob),
    /// A block job met an I/O error.
    BlockJobError(BlockJob),
    /// A block job may be completed.
    BlockJobReady(BlockJob),
    /// A block job may be finalized.
    BlockJobPending(BlockJob),
    /// A disk's I/O failed.
    BlockIoError(BlockIoError),
    /// A device is gone.
    DeviceDeleted(DevicePath),
    /// The guest refused to give a device up.
    DeviceUnplugGuestError(DevicePath),
    /// The guest opened or closed a serial port, as its agent does.
    VserportChange(PortChange),
    /// The balloon changed; the guest has so many bytes now.
    BalloonChange(u64),
    /// The guest set its clock; the offset in seconds.
    RtcChange(i64),
    /// A memory dump ended.
    DumpCompleted(DumpCompleted),
    /// A memory device changed its size.
    MemoryDeviceSizeChange(MemorySize),
    /// Anything else. The [`Event`] has it whole.
    Other,
}

impl Event {
    /// The typed view. [`QmpEvent::Other`] if the event is unknown or its data are.
    #[must_use]
    pub fn typed(&self) -> QmpEvent {
        self.known().unwrap_or(QmpEvent::Other)
    }

    /// Decodes what it carries.
    ///
    /// # Errors
    ///
    /// When it carries nothing, or something that does not fit `T`.
    pub fn decode<'a, T: Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.data.as_ref().map_or("null", |data| data.get()))
    }

    fn known(&self) -> Option<QmpEvent> {
        #[derive(Deserialize)]
        struct Status {
            status: MigrationStatus,
        }
        #[derive(Deserialize)]
        struct Pass {
            pass: u64,
        }
        #[derive(Deserialize)]
        struct Actual {
            actual: u64,
        }
        #[derive(Deserialize)]
        struct Offset {
            offset: i64,
        }
        Some(match self.name.as_str() {
            "SHUTDOWN" => QmpEvent::Shutdown(self.data()?),
            "POWERDOWN" => QmpEvent::Powerdown,
            "RESET" => QmpEvent::Reset(self.data()?),
            "STOP" => QmpEvent::Stop,
            "RESUME" => QmpEvent::Resume,
            "SUSPEND" => QmpEvent::Suspend,
            "SUSPEND_DISK" => QmpEvent::SuspendDisk,
            "WAKEUP" => QmpEvent::Wakeup,
            "GUEST_PANICKED" => QmpEvent::GuestPanicked(self.data()?),
            "GUEST_CRASHLOADED" => QmpEvent::GuestCrashloaded(self.data()?),
            "WATCHDOG" => QmpEvent::Watchdog(self.data()?),
            "MIGRATION" => QmpEvent::Migration(self.data::<Status>()?.status),
            "MIGRATION_PASS" => QmpEvent::MigrationPass(self.data::<Pass>()?.pass),
            "JOB_STATUS_CHANGE" => QmpEvent::JobStatusChange(self.data()?),
            "BLOCK_JOB_COMPLETED" => QmpEvent::BlockJobCompleted(self.data()?),
            "BLOCK_JOB_CANCELLED" => QmpEvent::BlockJobCancelled(self.data()?),
            "BLOCK_JOB_ERROR" => QmpEvent::BlockJobError(self.data()?),
            "BLOCK_JOB_READY" => QmpEvent::BlockJobReady(self.data()?),
            "BLOCK_JOB_PENDING" => QmpEvent::BlockJobPending(self.data()?),
            "BLOCK_IO_ERROR" => QmpEvent::BlockIoError(self.data()?),
            "DEVICE_DELETED" => QmpEvent::DeviceDeleted(self.data()?),
            "DEVICE_UNPLUG_GUEST_ERROR" => QmpEvent::DeviceUnplugGuestError(self.data()?),
            "VSERPORT_CHANGE" => QmpEvent::VserportChange(self.data()?),
            "BALLOON_CHANGE" => QmpEvent::BalloonChange(self.data::<Actual>()?.actual),
            "RTC_CHANGE" => QmpEvent::RtcChange(self.data::<Offset>()?.offset),
            "DUMP_COMPLETED" => QmpEvent::DumpCompleted(self.data()?),
            "MEMORY_DEVICE_SIZE_CHANGE" => QmpEvent::MemoryDeviceSizeChange(self.data()?),
            _ => return None,
        })
    }

    fn data<T: DeserializeOwned>(&self) -> Option<T> {
        self.decode().ok()
    }
}
