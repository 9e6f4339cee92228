//! Why a guest's callers wait, as text for people. The same as data is [`Domain::jobs`].

use std::fmt;

use job_core::{Held, Snapshot};

use crate::domain::Domain;

/// Who holds a guest, and who waits for whom. Shown as a few lines of text.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Explanation {
    /// The name of the guest.
    pub name: String,
    /// What it does.
    pub run: String,
    /// Who holds it and who waits.
    pub jobs: Snapshot,
}

impl Domain {
    /// Explains who holds the guest and why others wait. Needs no job and never waits.
    #[must_use]
    pub fn explain(&self) -> Explanation {
        Explanation {
            name: self.name().to_owned(),
            run: self.observed().run.name().to_owned(),
            jobs: self.jobs(),
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let jobs = &self.jobs;
        write!(f, "\"{}\" is {}", self.name, self.run)?;
        let held = [
            ("normal", &jobs.normal),
            ("async", &jobs.asynchronous),
            ("agent", &jobs.agent),
        ];
        for (slot, held) in held {
            if let Some(held) = held {
                write!(f, "\n  {slot:<6} held by {}", held.holder)?;
                done(f, held)?;
            }
        }
        for waiting in &jobs.waiting {
            let (kind, owner, waited) = (waiting.kind, &waiting.owner, waiting.waited);
            let secs = waited.as_secs_f64();
            write!(
                f,
                "\n  waits  {kind} for \"{owner}\", {secs:.1}s, place {}",
                waiting.place
            )?;
            if let Some(holder) = &waiting.blocked_by {
                write!(f, ": behind {holder}")?;
            }
        }
        Ok(())
    }
}

fn done(f: &mut fmt::Formatter<'_>, held: &Held) -> fmt::Result {
    match held.progress {
        Some(progress) if progress.total > 0 => {
            let percent = progress.done.saturating_mul(100) / progress.total;
            write!(f, ", {percent} % done")
        }
        _ => Ok(()),
    }
}
