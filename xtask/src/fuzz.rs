//! `fuzz TARGET`: coverage-guided fuzzing of one parser or protocol machine, with cargo-fuzz.
//! `fuzz hostile`: as many hostile strings as told through all of them, from a seed.
//!
//! cargo-fuzz is found, or built into `target/tools`. What is new goes to `target/fuzz`, not
//! into the committed corpus, and an input that fails is kept there and named. The hostile
//! strings are tests of the crates, which run fewer of them in CI; they need no nightly.

use std::path::Path;
use std::process::Command;

use crate::error::Failure;
use crate::{figures, run, workspace};

/// How long if nothing is said: enough to find what is shallow.
const SECONDS: &str = "60";

/// How many hostile strings each parser and protocol machine gets if nothing is said.
const STRINGS: u64 = 10_000_000;

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (target, limit) = match words[..] {
        ["hostile", ref rest @ ..] => return hostile(rest),
        [target] => (target, format!("-max_total_time={SECONDS}")),
        [target, "--seconds", seconds] => (target, format!("-max_total_time={}", whole(seconds)?)),
        [target, "--runs", runs] => (target, format!("-runs={}", whole(runs)?)),
        _ => return Err(Failure::Usage("fuzz takes a target".into())),
    };
    let home = workspace::root().join("tests/fuzz");
    let known = targets(&home)?;
    if !known.iter().any(|name| name == target) {
        let known = known.join(" ");
        return Err(Failure::Usage(format!("no target '{target}', but {known}")));
    }
    let found = workspace::target()?.join("fuzz").join(target);
    std::fs::create_dir_all(found.join("corpus"))
        .map_err(Failure::because("make a folder for new inputs"))?;
    let mut fuzz = Command::new(cargo_fuzz()?);
    fuzz.current_dir(&home);
    // It asks for nightly itself; our own toolchain's variables would overrule that.
    fuzz.env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO");
    // What is fuzzed has no unsafe code: an address sanitizer would only make it slow.
    fuzz.args(["fuzz", "run", "--sanitizer", "none", "--fuzz-dir", "."]);
    fuzz.arg("--target-dir")
        .arg(workspace::target()?.join("fuzz/build"));
    fuzz.arg(target).arg(found.join("corpus"));
    fuzz.arg(home.join("corpus").join(target));
    fuzz.args([
        "--",
        &limit,
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    ]);
    fuzz.arg(format!("-artifact_prefix={}/", found.display()));
    run::run(&mut fuzz)
}

/// The campaigns of the tests, in release build and one after the other.
fn hostile(words: &[&str]) -> Result<(), Failure> {
    let (mut strings, mut seed) = (STRINGS, 1);
    for option in words.chunks(2) {
        match *option {
            ["--strings", number] => strings = whole(number)?,
            ["--seed", number] => seed = whole(number)?,
            _ => return Err(Failure::Usage("hostile takes --strings and --seed".into())),
        }
    }
    let mut campaigns = run::cargo();
    campaigns.current_dir(workspace::root());
    campaigns.args(["test", "--quiet", "--release", "--lib"]);
    for package in ["monitor-qmp", "agent-qga", "remote-migrate"] {
        campaigns.args(["--package", package]);
    }
    campaigns.args(["campaign_of_hostile", "--", "--nocapture"]);
    campaigns.arg("--test-threads=1");
    campaigns.env("VMWRIGHT_HOSTILE", strings.to_string());
    campaigns.env("FAULT_SEED", seed.to_string());
    figures::collect(&mut campaigns, "fuzz-hostile")
}

fn whole(text: &str) -> Result<u64, Failure> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| Failure::Usage(format!("'{text}' is no whole number above 0")))
}

/// The targets there are, one file each.
fn targets(home: &Path) -> Result<Vec<String>, Failure> {
    let files = home.join("fuzz_targets").read_dir();
    let files = files.map_err(Failure::because("list the targets"))?;
    let mut names: Vec<_> = files
        .filter_map(|file| Some(file.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn cargo_fuzz() -> Result<std::path::PathBuf, Failure> {
    if let Some(found) = run::find_program("cargo-fuzz") {
        return Ok(found);
    }
    let tools = workspace::target()?.join("tools");
    let built = tools.join("bin/cargo-fuzz");
    if !built.is_file() {
        run::run_aside(
            run::cargo()
                .args(["install", "cargo-fuzz", "--root"])
                .arg(&tools),
        )?;
    }
    Ok(built)
}
