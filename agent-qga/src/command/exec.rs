//! Programs in the guest.

use serde::Serialize;

use super::Command;

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

answers! {
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
