//! Rest and sleep: commands whose success is silence.

use serde::Serialize;

use super::Command;
use crate::protocol::Proof;

silent! {
    /// Suspends the guest to its memory (`SUSPEND`). Check that the guest can before asking.
    SuspendRam = "guest-suspend-ram";
    /// Suspends the guest to its disk (`SUSPEND_DISK`, then `SHUTDOWN`).
    SuspendDisk = "guest-suspend-disk";
    /// Suspends the guest to its memory and its disk (`SUSPEND`).
    SuspendHybrid = "guest-suspend-hybrid";
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
