//! The suite: the driver with all its parts, on fakes where QEMU will not show a case on demand, and on real QEMU with a
//! real guest for everything that matters.
//!
//! What the machine lacks is reported as ignored, by name and with the reason.

mod authority;
mod between;
mod guests;
mod harness;
mod rig;
mod storage;

mod agent;
mod attach;
mod backup;
mod bad_input;
mod bad_places;
mod block_jobs;
mod bulk;
mod chains;
mod death;
mod dump;
mod dying;
mod examples;
mod files;
mod floods;
mod freeze;
mod inside;
mod jobs;
mod lifecycle;
mod migration;
mod monitor;
mod observability;
mod plug;
mod recovery;
mod save;
mod seams;
mod silence;
mod snapshot;
mod transports;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if let Some(code) = agent::freezer().or_else(transports::visitor) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    // Two guests at once fit two cores; more makes boots slow.
    arguments.test_threads.get_or_insert(2);
    let modules: &[(&str, harness::Tests)] = &[
        ("agent", agent::TESTS),
        ("attach", attach::TESTS),
        ("backup", backup::TESTS),
        ("bad_input", bad_input::TESTS),
        ("bad_places", bad_places::TESTS),
        ("block_jobs", block_jobs::TESTS),
        ("bulk", bulk::TESTS),
        ("chains", chains::TESTS),
        ("death", death::TESTS),
        ("dump", dump::TESTS),
        ("dying", dying::TESTS),
        ("examples", examples::TESTS),
        ("files", files::TESTS),
        ("floods", floods::TESTS),
        ("freeze", freeze::TESTS),
        ("inside", inside::TESTS),
        ("jobs", jobs::TESTS),
        ("lifecycle", lifecycle::TESTS),
        ("migration", migration::TESTS),
        ("monitor", monitor::TESTS),
        ("observability", observability::TESTS),
        ("plug", plug::TESTS),
        ("recovery", recovery::TESTS),
        ("save", save::TESTS),
        ("seams", seams::TESTS),
        ("silence", silence::TESTS),
        ("snapshot", snapshot::TESTS),
        ("transports", transports::TESTS),
    ];
    let trials: Vec<Trial> = modules
        .iter()
        .flat_map(|(module, tests)| harness::trials(module, tests))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
