//! What the guest is: the agent itself, its system, its name, its clock.

use serde::Serialize;

use super::{Command, Empty};

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
    /// The guest's time zone (2.10).
    GetTimezone = "guest-get-timezone" -> Timezone;
    /// The guest's PCI devices and their drivers (5.2); agents on Windows only.
    GetDevices = "guest-get-devices" -> Vec<Device>;
}

asked! {
    /// Has the agent echo a number. Works while frozen.
    SyncPlain = "guest-sync" -> i64 {
        /// What to echo.
        id: i64,
    }

    /// Sets the guest's clock.
    SetTime = "guest-set-time" -> Empty {
        /// In nanoseconds since 1970; from the guest's hardware clock if `None`.
        #[serde(skip_serializing_if = "Option::is_none")]
        time: Option<i64>,
    }
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

    /// A time zone.
    Timezone {
        /// Such as `CET`, in whatever form the guest has it.
        zone: Option<String>,
        /// Seconds east of Greenwich, now.
        offset: i64,
    }

    /// A device of the guest.
    Device {
        /// The driver it uses.
        driver_name: String,
        /// When that was made, in nanoseconds since 1970.
        driver_date: Option<i64>,
        /// Which version of it.
        driver_version: Option<String>,
        /// Which device.
        id: Option<DeviceId>,
    }

    /// What a device says it is.
    DeviceId {
        /// Such as `pci`.
        #[serde(rename = "type")]
        kind: String,
        /// Its maker's number.
        vendor_id: Option<u16>,
        /// Its maker's number for it.
        device_id: Option<u16>,
    }
}

impl AgentInfo {
    /// Whether it has that command, be it enabled or not.
    #[must_use]
    pub fn knows(&self, command: &str) -> bool {
        self.supported_commands
            .iter()
            .any(|known| known.name == command)
    }
}

const fn yes() -> bool {
    true
}
