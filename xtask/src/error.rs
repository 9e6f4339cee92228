//! How a task ends when it does not end well. Knows no task.

use std::fmt::Display;
use std::process::ExitCode;

/// Why a task failed, and so how the process ends.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line makes no sense. Status 2.
    Usage(String),
    /// Something is wrong, said here, one text a finding. Status 1.
    Wrong(Vec<String>),
    /// A program that was started ended with this status and has said why itself.
    Status(u8),
}

impl Failure {
    pub(crate) fn wrong(text: impl Into<String>) -> Self {
        Self::Wrong(vec![text.into()])
    }

    /// For `map_err`: the deed that failed in front of its cause.
    pub(crate) fn because<E: Display>(deed: impl Display) -> impl FnOnce(E) -> Self {
        move |cause| Self::wrong(format!("cannot {deed}: {cause}"))
    }

    /// Says what is left to say and gives the status to end with.
    pub(crate) fn report(self) -> ExitCode {
        match self {
            Self::Usage(text) => {
                eprintln!("xtask: {text}");
                ExitCode::from(2)
            }
            Self::Wrong(texts) => {
                for text in texts {
                    eprintln!("xtask: {text}");
                }
                ExitCode::FAILURE
            }
            Self::Status(status) => ExitCode::from(status),
        }
    }

    /// One line for a list of failures.
    pub(crate) fn summary(&self) -> String {
        match self {
            Self::Usage(text) => text.clone(),
            Self::Wrong(texts) => texts.join("\n"),
            Self::Status(status) => format!("ended with status {status}"),
        }
    }
}
