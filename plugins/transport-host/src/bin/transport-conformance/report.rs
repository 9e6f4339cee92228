//! What came of each clause, as lines for people and figures for machines. Must not know what a
//! clause asks.

use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use crate::process;
use crate::subject::{Needs, Subject};

/// One thing that the contract asks.
pub(crate) struct Clause {
    pub(crate) number: &'static str,
    pub(crate) says: &'static str,
    pub(crate) needs: Needs,
    pub(crate) check: fn(&Subject) -> Check,
}

pub(crate) type Check = Result<(), Trouble>;

/// Why a clause does not count as kept.
#[derive(Debug)]
pub(crate) enum Trouble {
    Broken(String),
    /// Broken in a way after which nothing in this process can be relied on.
    Fatal(String),
    /// It says nothing about the plugin.
    NotTried(String),
}

/// Whatever goes wrong while a clause is checked, breaks it.
impl<E: Error> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Broken(with_causes(&error))
    }
}

/// An error and what is behind it, in one line.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(because) = cause {
        text += &format!(": {because}");
        cause = because.source();
    }
    text
}

/// Breaks the clause unless `kept`.
pub(crate) fn must(kept: bool, otherwise: impl Into<String>) -> Check {
    if kept {
        Ok(())
    } else {
        Err(Trouble::Broken(otherwise.into()))
    }
}

#[derive(Default)]
pub(crate) struct Tally {
    kept: u32,
    broken: u32,
    not_tried: u32,
}

impl Tally {
    pub(crate) fn check(&mut self, clause: &Clause, subject: &Subject) {
        process::beat();
        let outcome = match subject.lacks(clause.needs) {
            Some(reason) => Err(Trouble::NotTried(reason)),
            // A kit that trips over what a plugin did, has found something too.
            None => catch_unwind(AssertUnwindSafe(|| (clause.check)(subject)))
                .unwrap_or_else(|_| Err(Trouble::Broken("the kit stumbled; see above".to_owned()))),
        };
        let (number, says) = (clause.number, clause.says);
        match outcome {
            Ok(()) => {
                self.kept += 1;
                println!("kept   {number:<5} {says}");
            }
            Err(Trouble::Broken(what)) => {
                self.broken += 1;
                println!("BROKEN {number:<5} {says}: {what}");
            }
            Err(Trouble::Fatal(what)) => {
                println!("BROKEN {number:<5} {says}: {what}\n\nnothing more can be tried");
                subject.remove_scratch();
                std::process::exit(1);
            }
            Err(Trouble::NotTried(reason)) => {
                self.not_tried += 1;
                println!("-      {number:<5} {says}: not tried, {reason}");
            }
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        if self.broken == 0 && self.kept > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kept,
            broken,
            not_tried,
        } = self;
        write!(f, "{kept} kept, {broken} broken, {not_tried} not tried")
    }
}

/// Prints a measured figure, which breaks its clause if it is over the limit.
pub(crate) fn figure(subject: &Subject, name: &str, value: u64, unit: &str, at_most: u64) -> Check {
    let kept = value <= at_most;
    let verdict = if kept { "ok" } else { "short" };
    let scheme = subject.scheme();
    println!("figure conformance-{scheme}-{name} {value} {unit} bar <= {at_most} {verdict}");
    must(
        kept,
        format!("{value} {unit} {name}, at most {at_most} allowed"),
    )
}
