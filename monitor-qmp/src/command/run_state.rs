//! Running, stopping, resetting, and what state the guest is in.

use serde::{Deserialize, Serialize};

use super::{command, open_enum};

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct QueryStatus;
command!(QueryStatus, "query-status", Status);

/// Reply of [`QueryStatus`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Whether the virtual CPUs run.
    pub running: bool,
    /// Why, or why not.
    pub status: RunState,
}

open_enum! {
    /// The guest's state as QEMU sees it.
    pub enum RunState {
        Debug = "debug",
        InMigrate = "inmigrate",
        InternalError = "internal-error",
        IoError = "io-error",
        Paused = "paused",
        PostMigrate = "postmigrate",
        PreLaunch = "prelaunch",
        FinishMigrate = "finish-migrate",
        RestoreVm = "restore-vm",
        Running = "running",
        SaveVm = "save-vm",
        Shutdown = "shutdown",
        Suspended = "suspended",
        Watchdog = "watchdog",
        GuestPanicked = "guest-panicked",
        Colo = "colo",
    }
}

/// Starts the virtual CPUs.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cont;
command!(Cont, "cont");

/// Stops the virtual CPUs.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Stop;
command!(Stop, "stop");

/// Ends QEMU. A SHUTDOWN event and the end of the stream follow the reply.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Quit;
command!(Quit, "quit");

/// Presses the power button. Whether anything happens is up to the guest.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct SystemPowerdown;
command!(SystemPowerdown, "system_powerdown");

/// Resets the guest.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct SystemReset;
command!(SystemReset, "system_reset");

/// Wakes the guest from sleep.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct SystemWakeup;
command!(SystemWakeup, "system_wakeup");
