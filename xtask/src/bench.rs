//! `bench NAME`: measures one crate in release build. What needs no guest is a bench of its crate,
//! the others are an example of `tests`.

use std::process::Command;

use crate::error::Failure;
use crate::rig::Rig;
use crate::{figures, run, workspace};

/// A name, the package, and its benches.
const OF_A_CRATE: &[(&str, &str, &[&str])] = &[
    (
        "job-core",
        "job-core",
        &["uncontended", "handover", "queue", "broadcast", "memory"],
    ),
    ("transport", "transport-host", &["dial"]),
];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let (flags, names): (Vec<_>, Vec<_>) = arguments.iter().partition(|word| word.starts_with('-'));
    if let Some(other) = flags.iter().find(|flag| **flag != "--short") {
        return Err(Failure::Usage(format!("bench does not know '{other}'")));
    }
    let [name] = names[..] else {
        return Err(Failure::Usage(format!(
            "bench takes one name, not {}",
            names.len()
        )));
    };
    let own = OF_A_CRATE.iter().find(|(own, ..)| own == name);
    let mut bench = match own {
        Some((_, package, benches)) => of_a_crate(package, benches),
        None if name == "monitor-qmp" => beside_peers(),
        None => of_the_suite(name)?,
    };
    figures::collect(bench.args(flags), &format!("bench-{name}"))
}

fn of_a_crate(package: &str, benches: &[&str]) -> Command {
    let mut bench = run::cargo();
    bench.current_dir(workspace::root());
    bench.args(["bench", "--quiet", "--package", package]);
    bench.args(benches.iter().flat_map(|bench| ["--bench", bench]));
    bench.arg("--");
    bench
}

/// Other projects' crates are measured in a workspace of their own.
fn beside_peers() -> Command {
    let mut bench = run::cargo();
    bench.current_dir(workspace::root().join("tests/peers"));
    bench.args(["run", "--quiet", "--release", "--"]);
    bench
}

fn of_the_suite(name: &str) -> Result<Command, Failure> {
    let mut bench = Rig::prepare(None)?.cargo();
    bench.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "tests",
        "--example",
        "bench",
        "--",
        name,
    ]);
    Ok(bench)
}
