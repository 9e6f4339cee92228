//! Running, stopping, resetting, and what state the guest is in.

use serde::{Deserialize, Serialize};

use super::{arguments, commands, open_enum, plain};

commands! {
    QueryStatus => "query-status" -> Status,
    Cont => "cont",
    Stop => "stop",
    Quit => "quit",
    SystemPowerdown => "system_powerdown",
    SystemReset => "system_reset",
    SystemWakeup => "system_wakeup",
    InjectNmi => "inject-nmi",
    RtcResetReinjection => "rtc-reset-reinjection",
    SetAction => "set-action",
    WatchdogSetAction => "watchdog-set-action",
}

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryStatus;

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
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Cont;

/// Stops the virtual CPUs.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Stop;

/// Ends QEMU. A SHUTDOWN event and the end of the stream follow the reply.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Quit;

/// Presses the power button. Whether anything happens is up to the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct SystemPowerdown;

/// Resets the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct SystemReset;

/// Wakes the guest from sleep.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct SystemWakeup;

plain! {
    /// Sends the guest an interrupt that it cannot ignore.
    InjectNmi,
    /// Forgets clock interrupts that the guest missed (x86).
    RtcResetReinjection,
}

arguments! {
    /// Says what QEMU does when something happens to the guest (QEMU 6.0 and later).
    SetAction optional {
        /// On a reset: `reset` or `shutdown`.
        reboot: String,
        /// On a shutdown: `poweroff` or `pause`.
        shutdown: String,
        /// On a panic: `pause`, `shutdown`, `exit-failure` or `none`.
        panic: String,
        /// When the watchdog fires, as [`WatchdogSetAction`].
        watchdog: String,
    }
}

arguments! {
    /// Says what QEMU does when the watchdog fires.
    WatchdogSetAction {
        /// As `pause` or `reset`.
        action: String,
    }
}
