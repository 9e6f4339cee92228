//! What is observed of a guest, as plain data. Written only by [`Observed::apply`]; no job writes it, and none is
//! needed to read it (R6).

use std::time::SystemTime;

use job_core::GoneWhy;
use monitor_qmp::{Health, QmpEvent, Release, Shutdown, command};

/// What is known of a guest now.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Observed {
    /// What it does.
    pub run: Run,
    /// Since when.
    pub since: SystemTime,
    /// How QEMU's monitor does; without meaning while the domain is off.
    pub health: Health,
    /// The generation of the guest.
    pub generation: u64,
    /// QEMU's process id, if it is known.
    pub pid: Option<u32>,
    /// QEMU's version.
    pub qemu: Option<Release>,
    /// Whether somebody in the guest has the agent's port open.
    pub agent_open: bool,
    /// The memory the guest has now, in bytes, once the balloon told.
    pub memory: Option<u64>,
    /// The status of the last migration or save, once QEMU told.
    pub migration: Option<command::MigrationStatus>,
    /// Why the guest is about to end, once QEMU told.
    pub shutdown: Option<Shutdown>,
    /// How the last guest ended.
    pub ended: Option<GoneWhy>,
    /// The place on the wire of the last event that was applied.
    pub(crate) told: u64,
    /// Counts the changes.
    pub revision: u64,
}

/// What a guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Run {
    /// The domain has no process.
    Off,
    /// QEMU is there, the guest has not run yet.
    Starting,
    /// What QEMU's `query-status` calls it; `running`, `paused` and so on.
    Qemu(command::RunState),
    /// QEMU's process runs, but its monitor's connection was lost.
    Lost,
}

impl Run {
    /// The name for people: QEMU's, or `off`, `starting`, `lost`.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::Qemu(state) => state.as_str(),
            Self::Lost => "lost",
        }
    }

    /// Whether the virtual CPUs run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        *self == Self::Qemu(command::RunState::Running)
    }
}

/// Something that was seen.
#[derive(Debug)]
pub(crate) enum Observation<'a> {
    /// A process was started or found.
    Launched { generation: u64, pid: Option<u32> },
    /// The monitor greeted.
    Greeted(Release),
    /// An event came.
    Event(&'a QmpEvent, u64),
    /// `query-status` answered, at that place on the wire.
    Status(command::RunState, u64),
    /// `query-migrate` answered, at that place on the wire.
    Migration(command::MigrationStatus, u64),
    /// `query-chardev` answered for the agent's channel.
    AgentPort(bool),
    /// The monitor's health changed.
    Health(Health),
    /// The monitor's connection is lost while QEMU runs on.
    Lost,
    /// QEMU ended.
    Ended(GoneWhy),
}

impl Observed {
    pub(crate) fn new(now: SystemTime) -> Self {
        Self {
            run: Run::Off,
            since: now,
            health: Health::Closed,
            generation: 1,
            pid: None,
            qemu: None,
            agent_open: false,
            memory: None,
            migration: None,
            shutdown: None,
            ended: None,
            told: 0,
            revision: 0,
        }
    }

    /// Takes an observation in.
    pub(crate) fn apply(&mut self, observation: Observation<'_>, now: SystemTime) {
        use command::RunState;
        let is_first = matches!(observation, Observation::Launched { .. });
        if self.run == Run::Off && !is_first {
            // What an ended guest said last may still come in; it must not come back to life by it.
            return;
        }
        self.revision += 1;
        let run = match observation {
            Observation::Launched { generation, pid } => {
                let revision = self.revision;
                *self = Self {
                    generation,
                    pid,
                    revision,
                    health: Health::Ok,
                    ..Self::new(now)
                };
                Some(Run::Starting)
            }
            Observation::Greeted(version) => {
                self.qemu = Some(version);
                None
            }
            // An event that came after the answer knows better.
            Observation::Status(_, place) if place < self.told => None,
            Observation::Status(status, _) => Some(Run::Qemu(status)),
            Observation::Migration(_, place) if place < self.told => None,
            Observation::Migration(status, _) => {
                self.migration = Some(status);
                None
            }
            Observation::AgentPort(open) => {
                self.agent_open = open;
                None
            }
            Observation::Health(health) => {
                self.health = health;
                None
            }
            Observation::Lost => Some(Run::Lost),
            Observation::Ended(why) => {
                self.ended = Some(why);
                self.health = Health::Closed;
                self.agent_open = false;
                self.pid = None;
                Some(Run::Off)
            }
            Observation::Event(event, place) => {
                self.told = self.told.max(place);
                match event {
                    QmpEvent::Stop if self.run.is_running() || self.run == Run::Starting => {
                        Some(Run::Qemu(RunState::Paused))
                    }
                    QmpEvent::Resume => Some(Run::Qemu(RunState::Running)),
                    QmpEvent::Suspend => Some(Run::Qemu(RunState::Suspended)),
                    QmpEvent::Wakeup => Some(Run::Qemu(RunState::Running)),
                    QmpEvent::GuestPanicked(_) => Some(Run::Qemu(RunState::GuestPanicked)),
                    QmpEvent::Shutdown(shutdown) => {
                        self.shutdown = Some(shutdown.clone());
                        Some(Run::Qemu(RunState::Shutdown))
                    }
                    QmpEvent::VserportChange(port) => {
                        self.agent_open = port.open;
                        None
                    }
                    QmpEvent::BalloonChange(actual) => {
                        self.memory = Some(*actual);
                        None
                    }
                    QmpEvent::Migration(status) => {
                        self.migration = Some(status.clone());
                        None
                    }
                    _ => None,
                }
            }
        };
        if let Some(run) = run
            && run != self.run
        {
            self.run = run;
            self.since = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use command::RunState;

    fn after(observations: impl IntoIterator<Item = Observation<'static>>) -> Observed {
        let mut observed = Observed::new(SystemTime::UNIX_EPOCH);
        for observation in observations {
            observed.apply(observation, SystemTime::UNIX_EPOCH);
        }
        observed
    }

    const LAUNCHED: Observation<'static> = Observation::Launched {
        generation: 3,
        pid: Some(5),
    };

    #[test]
    fn stop_and_resume_are_followed() {
        let running = || [LAUNCHED, Observation::Status(RunState::Running, 9)];
        assert!(after(running()).run.is_running());
        let paused = after(
            running()
                .into_iter()
                .chain([Observation::Event(&QmpEvent::Stop, 9)]),
        );
        assert_eq!(paused.run, Run::Qemu(RunState::Paused));
    }

    #[test]
    fn a_stop_does_not_hide_why_the_guest_is_not_running() {
        // QEMU sends GUEST_PANICKED or SHUTDOWN first and STOP after it.
        let panicked = after([
            LAUNCHED,
            Observation::Status(RunState::GuestPanicked, 9),
            Observation::Event(&QmpEvent::Stop, 9),
        ]);
        assert_eq!(panicked.run, Run::Qemu(RunState::GuestPanicked));
    }

    #[test]
    fn an_ended_guest_is_not_brought_back_by_its_last_words() {
        let ended = after([
            LAUNCHED,
            Observation::Ended(GoneWhy::Destroyed),
            Observation::Event(&QmpEvent::Resume, 9),
            Observation::Status(RunState::Running, 9),
            Observation::Health(Health::Ok),
            Observation::Ended(GoneWhy::ShutDown),
        ]);
        assert_eq!((ended.run, ended.health), (Run::Off, Health::Closed));
        assert_eq!(ended.ended, Some(GoneWhy::Destroyed));
    }

    #[test]
    fn an_answer_that_an_event_overtook_changes_nothing() {
        let observed = after([
            LAUNCHED,
            Observation::Status(RunState::Running, 3),
            Observation::Event(&QmpEvent::Stop, 5),
            Observation::Status(RunState::Running, 4),
        ]);
        assert_eq!(observed.run, Run::Qemu(RunState::Paused));
    }

    #[test]
    fn a_new_guest_starts_with_nothing_of_the_old_one() {
        let observed = after([
            LAUNCHED,
            Observation::AgentPort(true),
            Observation::Event(&QmpEvent::BalloonChange(7), 9),
            Observation::Ended(GoneWhy::ShutDown),
            Observation::Launched {
                generation: 4,
                pid: None,
            },
        ]);
        assert_eq!(
            (observed.generation, observed.memory, observed.agent_open),
            (4, None, false)
        );
        assert_eq!(observed.ended, None);
        assert_eq!(observed.revision, 5);
    }
}
