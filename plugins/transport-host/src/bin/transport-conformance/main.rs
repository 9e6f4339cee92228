//! The conformance kit: the contract of `transport-abi`, clause by clause, on a plugin as it was
//! built.
//!
//! This file owns the order of the clauses and the verdict; what a clause asks is in the file of
//! its subject. It knows no transport: all it is given is a file and a target to listen on.
//!
//! ```text
//!  table.rs     what is under the symbol, and altered copies of the file: other versions, another name
//!  calls.rs     the C functions, called one by one as the contract allows and no host should
//!  server.rs    the same of a plugin that only dials, on a live server
//!  streams.rs   what goes through: bytes, half-close, refusals, limits, cancelling
//!  growth.rs    many rounds of dial and accept, and what they leave behind
//!    ├─ raw.rs      the calls themselves, watched for what they must not do
//!    └─ process.rs  descriptors, threads and memory of this process
//! ```

mod calls;
mod growth;
mod process;
mod raw;
mod report;
mod server;
mod streams;
mod subject;
mod table;

use std::process::ExitCode;

use crate::report::{Clause, Tally};
use crate::subject::{Arguments, Subject};

const USAGE: &str = "usage: transport-conformance PATH.so TARGET [--short] [--unreachable TARGET]

PATH.so      the plugin, as a daemon would load it: libtransport_NAME.so
TARGET       where it can listen, as in unix:/tmp/s or tcp:127.0.0.1:0; for a plugin that only dials, a live server
--short      300 rounds instead of 10000
--unreachable TARGET
             where nothing answers; without it that clause is not tried";

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(wrong) => {
            eprintln!("{wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    process::watch_for_standstill();
    let subject = match Subject::new(&arguments) {
        Ok(subject) => subject,
        Err(error) => {
            println!("BROKEN 1    it loads and its target can be used: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{subject}\n");
    let mut tally = Tally::default();
    let groups: [&[Clause]; 5] = [
        table::CLAUSES,
        calls::CLAUSES,
        server::CLAUSES,
        streams::CLAUSES,
        growth::CLAUSES,
    ];
    let clauses = groups.into_iter().flatten();
    for clause in clauses.filter(|clause| subject.is_about(clause.needs)) {
        tally.check(clause, &subject);
    }
    println!("\n{tally}");
    tally.exit_code()
}
