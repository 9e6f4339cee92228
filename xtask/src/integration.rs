//! `integration [FILTER] [--qemu PATH] [--newer]`: the tests on real QEMU and on nothing else.
//!
//! With `--newer` a newer QEMU is fetched beside the installed one, for the tests that move a guest from the one to the other;
//! where none can be had the command fails and says why. Without it those tests are skipped, by name.
//!
//! They are the suite's tests named `real::…`, and in any other crate the test programs named
//! `real_…`. A filter is a part of a name.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Failure;
use crate::plugins::device;
use crate::rig::Rig;
use crate::test::{Tally, conclude, watch};
use crate::{needs, run, workspace};

const REAL: &str = "real::";

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let Arguments {
        filter,
        qemu,
        newer,
    } = parse(arguments)?;
    let mut rig = Rig::prepare(qemu.as_deref())?;
    if newer {
        rig = rig.and_newer(needs::newer::qemu()?);
    }
    if device::is_wanted(filter.as_deref())
        && let Err(failure) = device::fetch()
    {
        eprintln!("xtask: {}; its tests are skipped", failure.summary());
    }

    let mut runs = vec![suite(&rig, filter.as_deref())?];
    for (package, target) in real_targets()? {
        let mut tests = rig.cargo();
        tests.args(["test", "--package", &package, "--test", &target, "--"]);
        tests.args(&filter);
        runs.push(tests);
    }

    // The suite runs the driver's examples, which `cargo test --package tests` alone does not build.
    run::run(
        rig.cargo()
            .args(["build", "--package", "driver", "--examples"]),
    )?;

    let mut tally = Tally::default();
    let mut outcome = Ok(());
    for tests in &mut runs {
        let this = watch(tests, &mut tally);
        outcome = outcome.and(this);
    }
    if outcome.is_ok() && tally.is_empty() {
        let filter = filter.unwrap_or_default();
        return Err(Failure::wrong(format!(
            "no test on real QEMU has '{filter}' in its name"
        )));
    }
    conclude(&tally, outcome)
}

fn suite(rig: &Rig, filter: Option<&str>) -> Result<Command, Failure> {
    let cargo = || {
        let mut cargo = rig.cargo();
        cargo.args(["test", "--package", "tests", "--test", "suite", "--"]);
        cargo
    };
    let mut suite = cargo();
    let Some(filter) = filter else {
        suite.arg(REAL);
        return Ok(suite);
    };
    let listed = run::ask(cargo().arg("--list"))?;
    let listed = String::from_utf8_lossy(&listed);
    suite
        .arg(filter)
        .args(others(&listed, filter).flat_map(|name| ["--skip", name]));
    Ok(suite)
}

#[derive(Debug, Default, PartialEq)]
struct Arguments {
    filter: Option<String>,
    qemu: Option<PathBuf>,
    newer: bool,
}

fn parse(arguments: &[String]) -> Result<Arguments, Failure> {
    let mut parsed = Arguments::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--qemu" {
            let path = rest
                .next()
                .ok_or_else(|| Failure::Usage("--qemu wants a path".into()))?;
            let path = Path::new(path)
                .canonicalize()
                .map_err(|error| Failure::Usage(format!("{path}: {error}")))?;
            parsed.qemu = Some(path);
        } else if argument == "--newer" {
            parsed.newer = true;
        } else if argument.starts_with('-') || parsed.filter.is_some() {
            return Err(Failure::Usage(format!(
                "integration does not know '{argument}'"
            )));
        } else {
            parsed.filter = Some(argument.clone());
        }
    }
    Ok(parsed)
}

/// Tests that the filter would let through though they are not on real QEMU: the suite's harness
/// takes one filter only, so the prefix cannot be asked for beside it.
fn others<'a>(listed: &'a str, filter: &'a str) -> impl Iterator<Item = &'a str> {
    listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(move |name| name.contains(filter) && !name.starts_with(REAL))
}

/// Test programs named `real_…`, with their packages.
fn real_targets() -> Result<Vec<(String, String)>, Failure> {
    let mut found = Vec::new();
    for package in workspace::list(workspace::metadata()?, "packages") {
        for target in workspace::list(package, "targets") {
            let name = target["name"].as_str().unwrap_or_default();
            if name.starts_with("real_")
                && workspace::list(target, "kind")
                    .iter()
                    .any(|kind| kind == "test")
            {
                found.push((
                    package["name"].as_str().unwrap_or_default().to_owned(),
                    name.to_owned(),
                ));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_and_qemu_come_in_any_order() {
        let words = ["--newer", "--qemu", "/dev/null", "save"].map(str::to_owned);
        let wanted = Arguments {
            filter: Some("save".into()),
            qemu: Some("/dev/null".into()),
            newer: true,
        };
        assert_eq!(parse(&words).unwrap(), wanted);
        let words = ["save", "--qemu", "/dev/null", "--newer"].map(str::to_owned);
        assert_eq!(parse(&words).unwrap(), wanted);
    }

    #[test]
    fn a_qemu_that_is_not_there_is_a_usage_error() {
        let words = ["--qemu", "/nowhere/qemu"].map(str::to_owned);
        assert!(
            matches!(parse(&words), Err(Failure::Usage(text)) if text.contains("/nowhere/qemu"))
        );
    }

    #[test]
    fn the_filter_keeps_real_tests_only() {
        let listed =
            "real::saves: test\nfake::saves: test\nfake::waits: test\n2 tests, 0 benchmarks\n";
        assert_eq!(others(listed, "saves").collect::<Vec<_>>(), ["fake::saves"]);
    }
}
