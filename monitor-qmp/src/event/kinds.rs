//! Typed views of the events a VM daemon needs, in one table.

use serde::Deserialize;
use serde_json::Value;

use super::Event;
use crate::{
    command::{DumpResult, JobStatus, JobType, MigrationStatus, open_enum},
    schema::Typed,
};

/// The table of events: the variant, what it carries, the name on the wire. `Wrapper.member`
/// is where a single value is found.
macro_rules! kinds {
    ($($(#[$meta:meta])* $kind:ident $(($data:ty $(, $wrapper:ident.$member:ident)?))? = $name:literal,)+) => {
        /// The events a VM daemon acts on (QMP reference of QEMU 7.2 to 10.0).
        #[derive(Clone, Debug)]
        #[non_exhaustive]
        pub enum QmpEvent {
            $($(#[$meta])* $kind $(($data))?,)+
            /// Anything else. The [`Event`] has it whole.
            Other,
        }

        impl QmpEvent {
            /// The typed view, if the event is known and carries what is expected.
            pub(crate) fn of(event: &Event) -> Option<Self> {
                match event.name.as_str() {
                    $($name => kinds!(@parse event, $kind $(, $data $(, $wrapper.$member)?)?),)+
                    _ => None,
                }
            }
        }

        /// Every typed event.
        pub(crate) const ALL: &[Typed] = &[
            $(kinds!(@typed $name $(, $data $(, $wrapper)?)?),)+
        ];
    };
    (@parse $event:ident, $kind:ident) => { Some(Self::$kind) };
    (@parse $event:ident, $kind:ident, $data:ty) => { $event.data::<$data>().map(Self::$kind) };
    (@parse $event:ident, $kind:ident, $data:ty, $wrapper:ident.$member:ident) => {
        $event.data::<$wrapper>().map(|data| Self::$kind(data.$member))
    };
    (@typed $name:literal) => { Typed::event::<crate::command::Empty>($name) };
    (@typed $name:literal, $data:ty) => { Typed::event::<$data>($name) };
    (@typed $name:literal, $data:ty, $wrapper:ident) => { Typed::event::<$wrapper>($name) };
}

kinds! {
    /// The guest shut down, or QEMU is about to end.
    Shutdown(Shutdown) = "SHUTDOWN",
    /// The power button was pressed through the monitor.
    Powerdown = "POWERDOWN",
    /// The guest was reset.
    Reset(Shutdown) = "RESET",
    /// The virtual CPUs stopped.
    Stop = "STOP",
    /// The virtual CPUs run again.
    Resume = "RESUME",
    /// The guest sleeps.
    Suspend = "SUSPEND",
    /// The guest hibernates; a shutdown follows.
    SuspendDisk = "SUSPEND_DISK",
    /// The guest woke up.
    Wakeup = "WAKEUP",
    /// The guest's kernel panicked.
    GuestPanicked(GuestFault) = "GUEST_PANICKED",
    /// The guest's crash kernel runs.
    GuestCrashloaded(GuestFault) = "GUEST_CRASHLOADED",
    /// The watchdog fired.
    Watchdog(GuestFault) = "WATCHDOG",
    /// The migration's status changed (needs its capability `events`).
    Migration(MigrationStatus, Status.status) = "MIGRATION",
    /// A pass over the guest's memory began (needs the capability `events`).
    MigrationPass(u64, Pass.pass) = "MIGRATION_PASS",
    /// A job's status changed.
    JobStatusChange(JobChange) = "JOB_STATUS_CHANGE",
    /// A block job ended; look at its `error`.
    BlockJobCompleted(BlockJob) = "BLOCK_JOB_COMPLETED",
    /// A block job was cancelled.
    BlockJobCancelled(BlockJob) = "BLOCK_JOB_CANCELLED",
    /// A block job met an I/O error.
    BlockJobError(BlockJob) = "BLOCK_JOB_ERROR",
    /// A block job may be completed.
    BlockJobReady(BlockJob) = "BLOCK_JOB_READY",
    /// A block job may be finalized.
    BlockJobPending(BlockJob) = "BLOCK_JOB_PENDING",
    /// A disk's I/O failed.
    BlockIoError(BlockIoError) = "BLOCK_IO_ERROR",
    /// A device is gone.
    DeviceDeleted(DevicePath) = "DEVICE_DELETED",
    /// The guest refused to give a device up.
    DeviceUnplugGuestError(DevicePath) = "DEVICE_UNPLUG_GUEST_ERROR",
    /// The guest opened or closed a serial port, as its agent does.
    VserportChange(PortChange) = "VSERPORT_CHANGE",
    /// The balloon changed; the guest has so many bytes now.
    BalloonChange(u64, Actual.actual) = "BALLOON_CHANGE",
    /// The guest set its clock; the offset in seconds.
    RtcChange(i64, Offset.offset) = "RTC_CHANGE",
    /// A memory dump ended.
    DumpCompleted(DumpCompleted) = "DUMP_COMPLETED",
    /// A memory device changed its size.
    MemoryDeviceSizeChange(MemorySize) = "MEMORY_DEVICE_SIZE_CHANGE",
    /// The firmware answered a hot-plug, as a refusal to give memory up.
    AcpiDeviceOst(AcpiOst, AcpiOsts.info) = "ACPI_DEVICE_OST",
    /// The guest wrote beyond a threshold; it is off now.
    BlockWriteThreshold(WriteThreshold) = "BLOCK_WRITE_THRESHOLD",
    /// An image is damaged.
    BlockImageCorrupted(ImageCorrupted) = "BLOCK_IMAGE_CORRUPTED",
    /// An export ended.
    BlockExportDeleted(String, Id.id) = "BLOCK_EXPORT_DELETED",
    /// A tray was opened or closed.
    DeviceTrayMoved(TrayMoved) = "DEVICE_TRAY_MOVED",
    /// The host found broken memory.
    MemoryFailure(MemoryFailure) = "MEMORY_FAILURE",
    /// A card listens to something else now; look at `query-rx-filter`.
    NicRxFilterChanged(NicChanged) = "NIC_RX_FILTER_CHANGED",
    /// A network backend is connected (QEMU 7.2 and later).
    NetdevStreamConnected(StreamConnected) = "NETDEV_STREAM_CONNECTED",
    /// A network backend lost its peer (QEMU 7.2 and later).
    NetdevStreamDisconnected(StreamDisconnected) = "NETDEV_STREAM_DISCONNECTED",
    /// A helper for persistent reservations came or went.
    PrManagerStatusChanged(PrManager) = "PR_MANAGER_STATUS_CHANGED",
    /// The guest took a standby card over.
    FailoverNegotiated(FailoverDevice) = "FAILOVER_NEGOTIATED",
    /// The primary card is to be unplugged.
    UnplugPrimary(FailoverDevice) = "UNPLUG_PRIMARY",
    /// A client of the VNC server connected.
    VncConnected(DisplayClients) = "VNC_CONNECTED",
    /// And proved who it is.
    VncInitialized(DisplayClients) = "VNC_INITIALIZED",
    /// And left.
    VncDisconnected(DisplayClients) = "VNC_DISCONNECTED",
    /// A client of the SPICE server connected.
    SpiceConnected(DisplayClients) = "SPICE_CONNECTED",
    /// And proved who it is.
    SpiceInitialized(DisplayClients) = "SPICE_INITIALIZED",
    /// And left.
    SpiceDisconnected(DisplayClients) = "SPICE_DISCONNECTED",
    /// The client followed the guest to its new host.
    SpiceMigrateCompleted = "SPICE_MIGRATE_COMPLETED",
    /// An address of an RDMA card changed.
    RdmaGidStatusChanged(RdmaGid) = "RDMA_GID_STATUS_CHANGED",
}

/// A struct of one member, of which only that is of use.
macro_rules! wrappers {
    ($($wrapper:ident { $member:ident: $type:ty })+) => {
        $(
            #[derive(Deserialize)]
            struct $wrapper {
                $member: $type,
            }
        )+
    };
}

wrappers! {
    Status { status: MigrationStatus }
    Pass { pass: u64 }
    Actual { actual: u64 }
    Offset { offset: i64 }
    AcpiOsts { info: AcpiOst }
    Id { id: String }
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

/// Data of `ACPI_DEVICE_OST`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct AcpiOst {
    /// The device, if there is one in the slot.
    pub device: Option<String>,
    /// The slot.
    pub slot: String,
    /// `DIMM` or `CPU`.
    pub slot_type: String,
    /// What the firmware answers to, as the ACPI specification numbers it.
    pub source: i64,
    /// Its answer, likewise.
    pub status: i64,
}

/// Data of `BLOCK_WRITE_THRESHOLD`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct WriteThreshold {
    /// The node.
    pub node_name: String,
    /// By how many bytes it was exceeded.
    pub amount_exceeded: u64,
    /// The threshold that was set.
    pub write_threshold: u64,
}

/// Data of `BLOCK_IMAGE_CORRUPTED`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct ImageCorrupted {
    /// The backend's name.
    pub device: String,
    /// The node.
    pub node_name: Option<String>,
    /// For people.
    pub msg: String,
    /// Where in the image.
    pub offset: Option<u64>,
    /// How many bytes.
    pub size: Option<u64>,
    /// Whether it is of no use any more.
    pub fatal: bool,
}

/// Data of `DEVICE_TRAY_MOVED`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct TrayMoved {
    /// The backend's name; empty for one made by `-blockdev`.
    pub device: String,
    /// The device's id or QOM path.
    pub id: String,
    /// Whether it is open now.
    pub tray_open: bool,
}

/// Data of `MEMORY_FAILURE`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryFailure {
    /// Whose memory it is: `hypervisor` or `guest`.
    pub recipient: String,
    /// What was done: `ignore`, `inject`, `fatal` or `reset`.
    pub action: String,
    /// More about it.
    pub flags: MemoryFailureFlags,
}

/// More about a [`MemoryFailure`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MemoryFailureFlags {
    /// Whether something had to be done at once.
    pub action_required: bool,
    /// Whether it came while an earlier one was dealt with.
    pub recursive: bool,
}

/// Data of `NIC_RX_FILTER_CHANGED`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct NicChanged {
    /// The card's id, if it has one.
    pub name: Option<String>,
    /// Its QOM path.
    pub path: String,
}

/// Data of `NETDEV_STREAM_CONNECTED`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct StreamConnected {
    /// The backend.
    pub netdev_id: String,
    /// The other end's address.
    pub addr: Value,
}

/// Data of `NETDEV_STREAM_DISCONNECTED`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct StreamDisconnected {
    /// The backend.
    pub netdev_id: String,
}

/// Data of `PR_MANAGER_STATUS_CHANGED`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrManager {
    /// The manager's id.
    pub id: String,
    /// Whether its helper is there.
    pub connected: bool,
}

/// Data of `FAILOVER_NEGOTIATED` and `UNPLUG_PRIMARY`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct FailoverDevice {
    /// The device.
    pub device_id: String,
}

/// Data of the `VNC_*` and `SPICE_*` events.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct DisplayClients {
    /// Our end.
    pub server: DisplayEnd,
    /// Theirs.
    pub client: DisplayEnd,
}

/// An end of a connection to a display.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct DisplayEnd {
    /// The host.
    pub host: String,
    /// The port; VNC calls it `service`.
    #[serde(alias = "service")]
    pub port: String,
    /// The kind of address, as `ipv4`.
    pub family: String,
}

/// Data of `RDMA_GID_STATUS_CHANGED`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct RdmaGid {
    /// The host's network interface.
    pub netdev: String,
    /// Whether the address came or went.
    pub gid_status: bool,
    /// Its first half.
    pub subnet_prefix: u64,
    /// Its second half.
    pub interface_id: u64,
}
