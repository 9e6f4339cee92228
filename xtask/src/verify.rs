//! `verify [job-core|migrate]`: the explorations, how many states and interleavings they covered, and whether they would
//! notice. Without a name, all of them.
//!
//! `--mutants` breaks the slots on purpose, `--miri` interprets the tests of the rules.
//! The tests themselves print what they checked; here they are only started, long or short. The short form takes less
//! than a minute once built and explores less, the same way.

mod mutants;

use std::process::Command;

use crate::error::Failure;
use crate::{figures, run, workspace};

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let (flags, names): (Vec<_>, Vec<_>) = arguments.iter().partition(|word| word.starts_with('-'));
    let known = ["--short", "--mutants", "--miri"];
    if let Some(other) = flags.iter().find(|flag| !known.contains(&flag.as_str())) {
        return Err(Failure::Usage(format!("verify does not know '{other}'")));
    }
    let subjects = ["job-core", "migrate"];
    if let Some(other) = names.iter().find(|name| !subjects.contains(&name.as_str())) {
        return Err(Failure::Usage(format!("verify does not know '{other}'")));
    }
    let wants = |name: &str| names.is_empty() || names.iter().any(|wanted| *wanted == name);
    let has = |name: &str| flags.iter().any(|flag| *flag == name);
    if has("--mutants") {
        return mutants::run();
    }
    if has("--miri") {
        return run::run(&mut interpreted());
    }
    let is_short = has("--short");
    let mut outcomes = Vec::new();
    if wants("job-core") {
        outcomes.push(figures::collect(
            &mut explorations(is_short),
            "verify-job-core",
        ));
        outcomes.push(figures::collect(
            &mut interleavings(is_short)?,
            "verify-job-core-loom",
        ));
    }
    if wants("migrate") {
        outcomes.push(figures::collect(&mut migration(is_short), "verify-migrate"));
    }
    let failures: Vec<_> = outcomes
        .into_iter()
        .filter_map(Result::err)
        .map(|failure| failure.summary())
        .collect();
    if failures.is_empty() {
        Ok(())
    } else {
        Err(Failure::Wrong(failures))
    }
}

/// The walk over all states, every future dropped at every poll, random histories.
fn explorations(is_short: bool) -> Command {
    let mut tests = run::cargo();
    tests.current_dir(workspace::root());
    tests.args(["test", "--package", "job-core"]);
    tests.args(["--test", "walk", "--test", "cancel", "--test", "histories"]);
    if !is_short {
        tests.arg("--release");
        tests.env("JOB_CORE_WALK", "long");
        tests.env("JOB_CORE_HISTORIES", "5000");
    }
    tests.args(["--", "--nocapture"]);
    tests
}

/// The walk of both sides of a migration, and each rule broken on purpose. The widest takes gigabytes, so beside it runs none.
fn migration(is_short: bool) -> Command {
    let mut tests = run::cargo();
    tests.current_dir(workspace::root());
    tests.args(["test", "--package", "remote-migrate", "--test", "walk"]);
    if !is_short {
        tests.arg("--release");
    }
    tests.args(["--", "--nocapture"]);
    if !is_short {
        tests.args(["--include-ignored", "--test-threads=1"]);
    }
    tests
}

/// The rules under miri, which only nightly has (`rustup component add miri --toolchain nightly`). The walks are left to
/// the compiled run: interpreted they take hours, and they have no more unsafe code than the rest, which is none.
fn interpreted() -> Command {
    let mut tests = run::cargo();
    tests.current_dir(workspace::root());
    tests.env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO");
    // The clock and proptest's files are outside.
    tests.env("MIRIFLAGS", "-Zmiri-disable-isolation");
    tests.args(["miri", "test", "--package", "job-core", "--lib"]);
    tests.args(["--test", "rules"]);
    tests
}

/// The models under loom. Their flag changes every crate below, hence a target directory of their own.
fn interleavings(is_short: bool) -> Result<Command, Failure> {
    let mut tests = run::cargo();
    tests.current_dir(workspace::root());
    tests.args(["test", "--release", "--package", "job-core"]);
    tests.args(["--test", "interleave", "--", "--nocapture"]);
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    tests.env("RUSTFLAGS", format!("{flags} --cfg job_core_loom"));
    tests.env("CARGO_TARGET_DIR", workspace::target()?.join("loom"));
    if is_short {
        tests.env("LOOM_MAX_PREEMPTIONS", "2");
    }
    Ok(tests)
}
