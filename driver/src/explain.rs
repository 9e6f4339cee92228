//! Why a guest's callers wait, and what its monitor and its agent do, as data and as text for people.

use std::fmt;
use std::time::SystemTime;

use job_core::{Held, Snapshot};
use monitor_qmp::Health;

use crate::domain::Domain;
use crate::domain::state::Run;

/// Who holds a guest, who waits for whom, and what its monitor and its agent do. Shown as a few lines of text.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Explanation {
    /// The name of the guest.
    pub name: String,
    /// What it does.
    pub run: String,
    /// Since when.
    pub since: SystemTime,
    /// What its QEMU's monitor does; none if the domain is off.
    pub monitor: Option<MonitorLink>,
    /// What its agent does; none if the domain is off.
    pub agent: Option<AgentLink>,
    /// Who holds it and who waits.
    pub jobs: Snapshot,
}

/// What a monitor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MonitorLink {
    /// It is not connected, or not yet; that is tried again as long as QEMU runs.
    NotConnected,
    /// It answers.
    Answers,
    /// A command is overdue, and QEMU gives signs of life.
    Busy,
    /// A command is overdue and QEMU is silent, also out of band.
    Silent,
}

/// What an agent does, by the word of QEMU and of what we are connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AgentLink {
    /// The guest has no channel to an agent, or none that is known.
    NoChannel,
    /// Nobody in the guest has the channel open: it boots, or no agent is installed.
    NobodyListens,
    /// Somebody in the guest has it open. Whether it answers, a ping tells.
    Listens,
}

impl Domain {
    /// Explains who holds the guest, why others wait, and what monitor and agent do. Needs no job and never waits.
    #[must_use]
    pub fn explain(&self) -> Explanation {
        let (observed, live) = (self.0.observed(), self.0.live());
        let is_on = observed.run != Run::Off;
        let monitor = match live.as_ref().and_then(|live| live.monitor()) {
            None => MonitorLink::NotConnected,
            Some(monitor) => match monitor.health() {
                Health::Ok => MonitorLink::Answers,
                Health::Busy => MonitorLink::Busy,
                Health::Unresponsive => MonitorLink::Silent,
                _ => MonitorLink::NotConnected,
            },
        };
        let agent = match live.as_ref().and_then(|live| live.agent()) {
            None => AgentLink::NoChannel,
            Some(_) if observed.agent_open => AgentLink::Listens,
            Some(_) => AgentLink::NobodyListens,
        };
        Explanation {
            name: self.name().to_owned(),
            run: observed.run.name().to_owned(),
            since: observed.since,
            monitor: is_on.then_some(monitor),
            agent: is_on.then_some(agent),
            jobs: self.jobs(),
        }
    }
}

impl fmt::Display for MonitorLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotConnected => "is not connected; that is tried again as long as QEMU runs",
            Self::Answers => "answers",
            Self::Busy => "is late with an answer, and gives signs of life",
            Self::Silent => "is silent, also out of band: all but a destroy is refused",
        })
    }
}

impl fmt::Display for AgentLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoChannel => "has no channel that is known",
            Self::NobodyListens => "is not there: nobody in the guest has its channel open",
            Self::Listens => "has its channel open",
        })
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let jobs = &self.jobs;
        write!(f, "\"{}\" is {}", self.name, self.run)?;
        if let Ok(since) = self.since.elapsed() {
            write!(f, " for {:.1}s", since.as_secs_f64())?;
        }
        if let Some(monitor) = &self.monitor {
            write!(f, "\n  its monitor {monitor}")?;
        }
        if let Some(agent) = &self.agent {
            write!(f, "\n  its agent {agent}")?;
        }
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
