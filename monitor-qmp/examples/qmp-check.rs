//! Compares this crate's types with the live schema of each QEMU named: `qmp-check QEMU…`.
//!
//! Lists what that QEMU lacks, and ends with status 1 if anything cannot be explained by the
//! QEMU's age or build. Each is started without a machine and ends with the check.

use std::{error::Error, io, path::Path, process::ExitCode, process::Stdio, time::Duration};

use monitor_qmp::{Deadline, DifferenceKind, Monitor, NoFds, Options, Schema, command::Quit};
use tokio::process::Command;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut is_right = true;
    for qemu in std::env::args_os().skip(1) {
        match check(Path::new(&qemu)).await {
            Ok(agrees) => is_right &= agrees,
            Err(error) => {
                eprintln!("cannot check {}: {error}", qemu.display());
                is_right = false;
            }
        }
    }
    if is_right {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

async fn check(qemu: &Path) -> Result<bool, Box<dyn Error>> {
    let mut child = Command::new(qemu)
        .args([
            "-M",
            "none",
            "-S",
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let closed = || io::Error::from(io::ErrorKind::BrokenPipe);
    let output = child.stdout.take().ok_or_else(closed)?;
    let input = child.stdin.take().ok_or_else(closed)?;
    let deadline = Deadline::now() + Duration::from_secs(30);
    let wire = NoFds(tokio::io::join(output, input));
    let monitor = Monitor::connect(wire, Options::default(), (), deadline).await?;

    let release = monitor.greeting().version.qemu;
    let differences = Schema::ask(&monitor, deadline).await?.compare();
    monitor.execute(Quit, deadline).await?;
    let (commands, events) = Schema::compared();
    println!(
        "{} is QEMU {release}: {commands} commands and {events} events compared",
        qemu.display()
    );
    let mut agrees = true;
    for difference in &differences {
        let is_expected = difference.is_expected_of(release);
        agrees &= is_expected;
        let mark = match (difference.kind, is_expected) {
            (_, true) => "lacks, as expected,",
            (DifferenceKind::Contradiction, _) => "WRONG: there is no",
            _ => "LACKS",
        };
        println!("  {mark} {difference}");
    }
    Ok(agrees)
}
