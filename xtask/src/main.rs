//! The project's commands, run as `cargo xtask TASK`.
//!
//! This file owns the table of tasks and the way to it; each task is a file of its own.
//! It depends on none of the workspace's crates, so that it builds in seconds and also
//! when one of them does not compile.
//!
//! ```text
//!  demo bench test integration ci ── rig ─┬─ needs     what the machine must have; fetched if it can be
//!                                         ├─ guest     kernel and initramfs
//!                                         └─ plugins   the transports, built and staged
//!  conformance new-transport              a transport plugin on its own, judged or begun
//!  tidy                                   reads sources and cargo's metadata only
//! ```
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

use std::process::ExitCode;

use crate::error::Failure;

mod bench;
mod ci;
mod conformance;
mod demo;
mod error;
mod faults;
mod figures;
mod fuzz;
mod guest;
mod integration;
mod needs;
mod new_transport;
mod plugins;
mod qmp_check;
mod rig;
mod run;
mod test;
mod tidy;
mod verify;
mod workspace;

struct Task {
    name: &'static str,
    arguments: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Result<(), Failure>,
}

const TASKS: &[Task] = &[
    Task {
        name: "demo",
        arguments: "[--json]",
        about: "the main job on a real guest, readable as it happens",
        run: demo::run,
    },
    Task {
        name: "test",
        arguments: "",
        about: "every test, real QEMU included; ends with what was skipped and why",
        run: test::run,
    },
    Task {
        name: "integration",
        arguments: "[FILTER] [--qemu PATH] [--newer]",
        about: "only the tests on real QEMU; also those that take a newer one beside it, which is fetched",
        run: integration::run,
    },
    Task {
        name: "verify",
        arguments: "[job-core|migrate] [--short] [--mutants] [--miri]",
        about: "the explorations: states, interleavings, what was checked",
        run: verify::run,
    },
    Task {
        name: "faults",
        arguments: "daemon|migrate [--runs N] [--seed S] [--from K] [--short]",
        about: "daemons with a real guest, or one on its way between two: killed, cut off, and whole again",
        run: faults::run,
    },
    Task {
        name: "bench",
        arguments: "NAME [--short]",
        about: "measures one crate, ours beside the floor",
        run: bench::run,
    },
    Task {
        name: "conformance",
        arguments: "PATH.so|PATH.c TARGET [--short] [--unreachable TARGET]",
        about: "the contract of a transport plugin, clause by clause",
        run: conformance::run,
    },
    Task {
        name: "new-transport",
        arguments: "NAME",
        about: "a transport plugin crate that builds and conforms, to be filled in",
        run: new_transport::run,
    },
    Task {
        name: "fuzz",
        arguments: "TARGET [--seconds N|--runs N] | hostile [--strings N] [--seed N]",
        about: "coverage-guided fuzzing of one parser or protocol machine; hostile strings through all",
        run: fuzz::run,
    },
    Task {
        name: "qmp-check",
        arguments: "[QEMU...]",
        about: "the typed commands and events against the live schema of each QEMU",
        run: qmp_check::run,
    },
    Task {
        name: "ci",
        arguments: "",
        about: "everything a merge needs: format, clippy, docs, tidy, short explorations and faults, test",
        run: ci::run,
    },
    Task {
        name: "tidy",
        arguments: "",
        about: "arrows between crates, docs sections, module heads, top level",
        run: tidy::run,
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn dispatch(arguments: &[String]) -> Result<(), Failure> {
    let Some((name, rest)) = arguments.split_first() else {
        return Err(Failure::Usage(format!("which task?\n\n{}", help())));
    };
    if name == "help" || asks_help(name) {
        println!("{}", help());
        return Ok(());
    }
    let task = TASKS
        .iter()
        .find(|task| task.name == name)
        .ok_or_else(|| Failure::Usage(format!("no task '{name}'\n\n{}", help())))?;
    if rest.iter().any(|argument| asks_help(argument)) {
        println!(
            "cargo xtask {} {}\n  {}",
            task.name, task.arguments, task.about
        );
        return Ok(());
    }
    (task.run)(rest).map_err(|failure| match failure {
        Failure::Usage(text) => Failure::Usage(format!(
            "{text}\nusage: cargo xtask {} {}",
            task.name, task.arguments
        )),
        other => other,
    })
}

fn asks_help(argument: &str) -> bool {
    matches!(argument, "--help" | "-h")
}

fn help() -> String {
    let mut text = String::from("cargo xtask TASK\n\n");
    for task in TASKS {
        let call = format!("{} {}", task.name, task.arguments);
        text += &format!("  {call:<36} {}\n", task.about);
    }
    text += "\nWhat a task needs (QEMU, qemu-ga, busybox, a kernel) is found, or fetched on Debian. To name it:\n";
    for (variable, meaning) in needs::VARIABLES {
        text += &format!("  {variable:<36} {meaning}\n");
    }
    text.truncate(text.trim_end().len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn an_unknown_task_is_a_usage_error_that_lists_the_tasks() {
        let Err(Failure::Usage(text)) = dispatch(&words("dance")) else {
            panic!("accepted")
        };
        assert!(text.contains("no task 'dance'"));
        assert!(TASKS.iter().all(|task| text.contains(task.name)));
    }

    #[test]
    fn no_task_is_a_usage_error() {
        assert!(matches!(dispatch(&[]), Err(Failure::Usage(_))));
    }

    #[test]
    fn arguments_a_task_does_not_know_are_refused_with_its_usage() {
        for line in [
            "demo --fast",
            "test all",
            "bench",
            "bench a b",
            "verify --fast",
            "verify transport",
            "integration --qemu",
            "conformance a.so",
            "conformance a.so x:1 --fast",
            "new-transport No_Name",
            "ci now",
            "tidy up",
            "qmp-check --all",
            "fuzz",
            "fuzz monitor_frame --seconds soon",
            "fuzz hostile --strings many",
            "fuzz hostile --seed",
        ] {
            let Err(Failure::Usage(text)) = dispatch(&words(line)) else {
                panic!("accepted: {line}")
            };
            assert!(text.contains("usage: cargo xtask"), "{text}");
        }
    }
}
