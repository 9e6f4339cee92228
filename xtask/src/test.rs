//! `test`: every test of the workspace, real QEMU included, and what was skipped and why.

mod tally;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};

use crate::error::Failure;
use crate::rig::Rig;
use crate::{run, workspace};

pub(crate) use tally::Tally;

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(other) = arguments.first() {
        return Err(Failure::Usage(format!(
            "test takes no argument, '{other}' was given"
        )));
    }
    let mut tally = Tally::default();
    let mut tests = Rig::prepare(None)?.cargo();
    let outcome = watch(
        tests.args(["test", "--workspace", "--no-fail-fast"]),
        &mut tally,
    );
    conclude(&tally, outcome)
}

/// Runs cargo's tests, shows their output as it comes and counts along.
pub(crate) fn watch(tests: &mut Command, tally: &mut Tally) -> Result<(), Failure> {
    run::show(tests);
    let broken = || Failure::because("run cargo test");
    let mut child = tests
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(broken())?;
    let mut output = child.stdout.take().expect("stdout was asked to be a pipe");
    let mut chunk = [0; 8192];
    loop {
        let length = output.read(&mut chunk).map_err(broken())?;
        if length == 0 {
            break;
        }
        // A reader that went away (`| head`) is no reason to leave the count unfinished.
        let _ = io::stdout()
            .write_all(&chunk[..length])
            .and_then(|()| io::stdout().flush());
        tally.feed(&chunk[..length]);
    }
    run::judge(child.wait().map_err(broken())?)
}

/// Prints what failed, what was skipped and the closing line; decides how the task ends.
pub(crate) fn conclude(tally: &Tally, outcome: Result<(), Failure>) -> Result<(), Failure> {
    let listed = allowed_skips()?;
    print!("{}", tally.report());
    let unlisted = tally.unlisted_skips(&listed);
    if run::under_ci() && !unlisted.is_empty() {
        for name in &unlisted {
            println!("skipped, but not listed in tests/skips.txt: {name}");
        }
    }
    println!("{}", tally.closing_line());

    outcome?;
    if tally.failed() > 0 || (run::under_ci() && !unlisted.is_empty()) {
        return Err(Failure::Status(1));
    }
    Ok(())
}

/// The first word of each line of `tests/skips.txt`; without the file nothing may be skipped.
fn allowed_skips() -> Result<BTreeSet<String>, Failure> {
    let path = workspace::root().join("tests/skips.txt");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(tally::skip_list(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(Failure::because(format!("read {}", path.display()))(error)),
    }
}
