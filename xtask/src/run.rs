//! Starting other programs: shown before, judged after. Knows no task.
//!
//! What xtask itself says goes to stderr, so that stdout belongs to the program that is run:
//! `demo --json | jq` sees nothing but the demo.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::error::Failure;

/// Cargo, the one that runs us where there is one. Under CI without colours.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if under_ci() {
        command.env("CARGO_TERM_COLOR", "never");
    }
    command
}

/// Whether a machine, not a person, reads the output and nothing may be skipped unlisted.
pub(crate) fn under_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true" || value == "1")
}

/// Shows a command, runs it to its end and passes its status on.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    show(command);
    let status = command.status().map_err(Failure::because(line(command)))?;
    judge(status)
}

/// As [`run`], for helpers whose chatter must not end up in our stdout.
pub(crate) fn run_aside(command: &mut Command) -> Result<(), Failure> {
    command.stdin(Stdio::null()).stdout(io::stderr());
    run(command).map_err(|_| Failure::wrong(format!("failed: {}", line(command))))
}

/// The stdout of a command that asks and changes nothing. Its stderr is part of the failure.
pub(crate) fn ask(command: &mut Command) -> Result<Vec<u8>, Failure> {
    let answer = command.output().map_err(Failure::because(line(command)))?;
    if answer.status.success() {
        return Ok(answer.stdout);
    }
    let complaint = String::from_utf8_lossy(&answer.stderr);
    Err(Failure::wrong(format!(
        "failed: {}\n{}",
        line(command),
        complaint.trim_end()
    )))
}

pub(crate) fn show(command: &Command) {
    eprintln!("$ {}", line(command));
}

pub(crate) fn judge(status: ExitStatus) -> Result<(), Failure> {
    if status.success() {
        return Ok(());
    }
    // A death by signal has no code; 1 says no more and no less than "failed".
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Err(Failure::Status(code.unwrap_or(1)))
}

/// Where a program lies, as a shell would find it, or in a folder that is often not on PATH.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// A command as one would type it: program by its file name, then the arguments.
fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut line = program
        .file_name()
        .unwrap_or_else(|| OsStr::new("?"))
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        let _ = write!(line, " {}", argument.to_string_lossy());
    }
    line
}
