//! The machine's processors, memory balloon and character devices.

use serde::{Deserialize, Serialize};

use super::command;

/// The virtual CPUs and their threads.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct QueryCpusFast;
command!(QueryCpusFast, "query-cpus-fast", Vec<Cpu>);

/// One of [`QueryCpusFast`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    /// Its number.
    pub cpu_index: u32,
    /// Its QOM path.
    pub qom_path: String,
    /// The host's thread that runs it.
    pub thread_id: u32,
    /// The architecture, as `x86_64`.
    pub target: String,
}

/// How much memory the guest has.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct QueryBalloon;
command!(QueryBalloon, "query-balloon", BalloonInfo);

/// Reply of [`QueryBalloon`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonInfo {
    /// Bytes the guest has now.
    pub actual: u64,
}

/// Asks the guest to use so much memory. It takes its time; `BALLOON_CHANGE` tells.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Balloon {
    /// Bytes.
    pub value: u64,
}
command!(Balloon, "balloon");

/// The character devices.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct QueryChardev;
command!(QueryChardev, "query-chardev", Vec<Chardev>);

/// One of [`QueryChardev`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Chardev {
    /// Its id.
    pub label: String,
    /// Where it leads, as `unix:/run/agent.sock,server=on`.
    pub filename: String,
    /// Whether the guest's side is open.
    pub frontend_open: bool,
}
