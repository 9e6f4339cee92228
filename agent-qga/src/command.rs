//! The typed commands of an agent, each a small struct; anyone can add one outside.
//!
//! Names and members are those of the QEMU Guest Agent protocol reference; the version in which
//! a command appeared is given where it is later than 2.0. Members that a guest may leave out are
//! optional, members that it adds are ignored, values that we do not know are kept as text.
//! Everything in a reply was written by the guest: a host name may hold an escape sequence.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};

use crate::protocol::Proof;

/// A command that knows its name and its answer.
///
/// It serialises to its arguments: a struct with members, or a unit struct if it takes none.
///
/// ```
/// # use agent_qga::Command;
/// #[derive(serde::Serialize)]
/// struct GetTimezone;
///
/// #[derive(serde::Deserialize)]
/// struct Timezone {
///     zone: Option<String>,
///     offset: i64,
/// }
///
/// impl Command for GetTimezone {
///     const NAME: &'static str = "guest-get-timezone";
///     type Reply = Timezone;
/// }
/// ```
pub trait Command: Serialize + Send + Sync {
    /// The agent's name for it.
    const NAME: &'static str;

    /// Whether the agent answers with silence when all went well. Then `Reply` is [`Proof`].
    const SILENT: bool = false;

    /// What it answers.
    type Reply: DeserializeOwned;
}

/// Declares commands that take no arguments.
macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident = $wire:literal -> $reply:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        #[expect(clippy::exhaustive_structs, reason = "a command without arguments")]
        pub struct $name;

        impl Command for $name {
            const NAME: &'static str = $wire;
            type Reply = $reply;
        }
    )*};
}

/// Declares commands without arguments whose success is silence.
macro_rules! silent {
    ($($(#[$doc:meta])* $name:ident = $wire:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        #[expect(clippy::exhaustive_structs, reason = "a command without arguments")]
        pub struct $name;

        impl Command for $name {
            const NAME: &'static str = $wire;
            const SILENT: bool = true;
            type Reply = Proof;
        }
    )*};
}

plain! {
    /// Does nothing, and so shows that the agent is there. Works while frozen.
    Ping = "guest-ping" -> Empty;
    /// Which agent it is and which commands it knows. Works while frozen.
    Info = "guest-info" -> AgentInfo;
    /// What the guest says about its operating system (2.10).
    GetOsinfo = "guest-get-osinfo" -> Osinfo;
    /// What the guest calls itself (2.10).
    GetHostName = "guest-get-host-name" -> HostName;
    /// The guest's clock, in nanoseconds since 1970.
    GetTime = "guest-get-time" -> i64;
    /// The guest's network interfaces and their addresses.
    NetworkGetInterfaces = "guest-network-get-interfaces" -> Vec<NetworkInterface>;
    /// The guest's mounted file systems (2.2).
    GetFsinfo = "guest-get-fsinfo" -> Vec<FileSystem>;
    /// The guest's processors.
    GetVcpus = "guest-get-vcpus" -> Vec<Vcpu>;
    /// Whether the guest's file systems are frozen. Works while frozen.
    FsfreezeStatus = "guest-fsfreeze-status" -> FreezeState;
    /// Freezes the guest's file systems; answers how many. Nothing thaws them but
    /// [`FsfreezeThaw`] (and, on Windows, a limit of ten seconds or more).
    FsfreezeFreeze = "guest-fsfreeze-freeze" -> i64;
    /// Thaws the guest's file systems; answers how many. Works while frozen.
    FsfreezeThaw = "guest-fsfreeze-thaw" -> i64;
}

silent! {
    /// Suspends the guest to its memory (`SUSPEND`). Check that the guest can before asking.
    SuspendRam = "guest-suspend-ram";
    /// Suspends the guest to its disk (`SUSPEND_DISK`, then `SHUTDOWN`).
    SuspendDisk = "guest-suspend-disk";
    /// Suspends the guest to its memory and its disk (`SUSPEND`).
    SuspendHybrid = "guest-suspend-hybrid";
}

/// Has the agent echo a number behind 0xFF. The connection does this by itself when it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::exhaustive_structs, reason = "the arguments of the command")]
pub struct SyncDelimited {
    /// What to echo.
    pub id: i64,
}

impl Command for SyncDelimited {
    const NAME: &'static str = "guest-sync-delimited";
    type Reply = i64;
}

/// Shuts the guest down from within. Refused while its file systems are frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::exhaustive_structs, reason = "the arguments of the command")]
pub struct Shutdown {
    /// How.
    pub mode: ShutdownMode,
}

/// How a guest shuts down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ShutdownMode {
    /// Stops the processors and leaves the machine on.
    Halt,
    /// Turns the machine off; what the agent does if not told.
    #[default]
    Powerdown,
    /// Starts anew; ends in [`Proof::Reset`], or under `-no-reboot` in [`Proof::Shutdown`].
    Reboot,
}

impl Command for Shutdown {
    const NAME: &'static str = "guest-shutdown";
    const SILENT: bool = true;
    type Reply = Proof;
}

/// Starts a program. [`QgaExt::run`](crate::QgaExt::run) also waits for its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_structs, reason = "the arguments of the command")]
pub struct Exec {
    /// Its path, or a name to be looked up in the agent's `PATH`.
    pub path: String,
    /// Its arguments, without its own name.
    pub arg: Vec<String>,
    /// Its environment, each as `NAME=VALUE`. Empty: what the agent has.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Its standard input, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_data: Option<String>,
    /// Whether to keep its output, up to 16 MiB each.
    pub capture_output: bool,
}

impl Command for Exec {
    const NAME: &'static str = "guest-exec";
    type Reply = ExecStarted;
}

/// Asks what became of a program. The first answer that it has ended is also the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::exhaustive_structs, reason = "the arguments of the command")]
pub struct ExecStatus {
    /// As [`Exec`] answered.
    pub pid: i64,
}

impl Command for ExecStatus {
    const NAME: &'static str = "guest-exec-status";
    type Reply = ExecState;
}

/// An answer that says no more than that it is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Empty;

impl<'de> Deserialize<'de> for Empty {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(from).map(|_| Self)
    }
}

/// Declares answers: read from kebab-case, more members may be added.
macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident { $($(#[$member_doc:meta])* $member:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[non_exhaustive]
        pub struct $name { $($(#[$member_doc])* pub $member: $type,)* }
    )*};
}

answers! {
    /// Which agent it is.
    AgentInfo {
        /// Such as `7.2.22`.
        version: String,
        /// What it knows.
        #[serde(rename = "supported_commands")]
        supported_commands: Vec<CommandInfo>,
    }

    /// One command of an agent.
    CommandInfo {
        /// Such as `guest-ping`.
        name: String,
        /// Whether it may be used; not, for example, while frozen.
        enabled: bool,
        /// Whether its success is answered.
        #[serde(default = "yes")]
        success_response: bool,
    }

    /// What the guest says about its operating system, mostly from `/etc/os-release`.
    Osinfo {
        /// Such as `debian`; `mswindows` on Windows.
        id: Option<String>,
        /// Such as `Debian GNU/Linux`.
        name: Option<String>,
        /// Such as `Debian GNU/Linux 12 (bookworm)`.
        pretty_name: Option<String>,
        /// Such as `12 (bookworm)`.
        version: Option<String>,
        /// Such as `12`.
        version_id: Option<String>,
        /// Such as `server`.
        variant: Option<String>,
        /// Such as `server`.
        variant_id: Option<String>,
        /// Such as `x86_64`.
        machine: Option<String>,
        /// As `uname -r` says.
        kernel_release: Option<String>,
        /// As `uname -v` says.
        kernel_version: Option<String>,
    }

    /// What the guest calls itself.
    HostName {
        /// The name.
        host_name: String,
    }

    /// A network interface of the guest.
    NetworkInterface {
        /// Such as `eth0`.
        name: String,
        /// Its hardware address.
        hardware_address: Option<String>,
        /// Its addresses.
        #[serde(default)]
        ip_addresses: Vec<IpAddress>,
        /// Its counters (2.11).
        statistics: Option<NetworkStatistics>,
    }

    /// An address of an interface.
    IpAddress {
        /// The address as text.
        ip_address: String,
        /// Which kind.
        ip_address_type: IpKind,
        /// The length of its network prefix.
        prefix: u32,
    }

    /// Counters of an interface.
    NetworkStatistics {
        /// Bytes received.
        rx_bytes: u64,
        /// Packets received.
        rx_packets: u64,
        /// Packets received with errors.
        rx_errs: u64,
        /// Packets dropped on receipt.
        rx_dropped: u64,
        /// Bytes sent.
        tx_bytes: u64,
        /// Packets sent.
        tx_packets: u64,
        /// Packets sent with errors.
        tx_errs: u64,
        /// Packets dropped on sending.
        tx_dropped: u64,
    }

    /// A mounted file system of the guest.
    FileSystem {
        /// Its device.
        name: String,
        /// Where it is mounted.
        mountpoint: String,
        /// Such as `ext4`.
        #[serde(rename = "type")]
        kind: String,
        /// Bytes in use (3.0).
        used_bytes: Option<u64>,
        /// Bytes in all (3.0).
        total_bytes: Option<u64>,
        /// The disks it lies on.
        #[serde(default)]
        disk: Vec<Disk>,
    }

    /// A disk under a file system.
    Disk {
        /// Such as `virtio`.
        bus_type: String,
        /// Bus number.
        bus: i64,
        /// Target number.
        target: i64,
        /// Unit number.
        unit: i64,
        /// Its serial number (3.1).
        serial: Option<String>,
        /// Its device node (3.1).
        dev: Option<String>,
    }

    /// A processor of the guest.
    Vcpu {
        /// Its number in the guest.
        logical_id: i64,
        /// Whether the guest uses it.
        online: bool,
        /// Whether the guest can do without it.
        can_offline: Option<bool>,
    }

    /// A program was started.
    ExecStarted {
        /// What to ask [`ExecStatus`] about.
        pid: i64,
    }

    /// What became of a program.
    ExecState {
        /// Whether it has ended. All else is there only then.
        exited: bool,
        /// What it exited with.
        exitcode: Option<i64>,
        /// The signal that ended it; on Windows the exception.
        signal: Option<i64>,
        /// Its output, in base64.
        out_data: Option<String>,
        /// Its errors, in base64.
        err_data: Option<String>,
        /// Whether the agent kept only the beginning of its output.
        #[serde(default)]
        out_truncated: bool,
        /// Whether the agent kept only the beginning of its errors.
        #[serde(default)]
        err_truncated: bool,
    }
}

/// Whether the guest's file systems are frozen.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FreezeState {
    /// They work as usual.
    Thawed,
    /// Writers wait, and the agent refuses most commands.
    Frozen,
    /// A state that we do not know.
    #[serde(untagged)]
    Other(String),
}

/// Which kind of address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum IpKind {
    /// Version 4.
    Ipv4,
    /// Version 6.
    Ipv6,
    /// A kind that we do not know.
    #[serde(untagged)]
    Other(String),
}

const fn yes() -> bool {
    true
}
