//! `ci`: everything a merge needs. All steps run, then every failure is reported.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::error::Failure;
use crate::{faults, run, test, tidy, verify, workspace};

struct Step {
    name: &'static str,
    run: fn() -> Result<(), Failure>,
}

const STEPS: &[Step] = &[
    Step {
        name: "format",
        run: || cargo(&["fmt", "--all", "--check"]),
    },
    Step {
        name: "clippy",
        run: || {
            cargo(&[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])
        },
    },
    Step {
        name: "docs",
        run: || {
            run::run(
                command(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
            )
        },
    },
    Step {
        name: "tidy",
        run: || tidy::run(&[]),
    },
    Step {
        name: "verify",
        run: || verify::run(&["--short".into()]),
    },
    Step {
        name: "faults daemon",
        run: || faults::run(&["daemon".into(), "--short".into()]),
    },
    Step {
        name: "faults migrate",
        run: || faults::run(&["migrate".into(), "--short".into()]),
    },
    Step {
        name: "test",
        run: || test::run(&[]),
    },
];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(other) = arguments.first() {
        return Err(Failure::Usage(format!(
            "ci takes no argument, '{other}' was given"
        )));
    }
    let mut times = Vec::new();
    let mut failures = Vec::new();
    for step in STEPS {
        eprintln!("\n== {}", step.name);
        let start = Instant::now();
        let outcome = (step.run)();
        times.push((step.name, start.elapsed(), outcome.is_ok()));
        if let Err(failure) = outcome {
            failures.push(format!("{}: {}", step.name, failure.summary()));
        }
    }
    eprintln!("\n{}", table(&times));
    if failures.is_empty() {
        Ok(())
    } else {
        Err(Failure::Wrong(failures))
    }
}

fn cargo(arguments: &[&str]) -> Result<(), Failure> {
    run::run(&mut command(arguments))
}

fn command(arguments: &[&str]) -> Command {
    let mut command = run::cargo();
    command.current_dir(workspace::root()).args(arguments);
    command
}

fn table(times: &[(&str, Duration, bool)]) -> String {
    let row = |(name, time, ok): &(&str, Duration, bool)| {
        format!(
            "{name:<14} {:>7.1} s  {}",
            time.as_secs_f64(),
            if *ok { "ok" } else { "FAILED" }
        )
    };
    times.iter().map(row).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_time_and_outcome_of_each_step() {
        let times = [
            ("format", Duration::from_millis(420), true),
            ("test", Duration::from_secs(61), false),
        ];
        assert_eq!(
            table(&times),
            "format             0.4 s  ok\ntest              61.0 s  FAILED"
        );
    }
}
