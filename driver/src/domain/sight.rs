//! Whether a QEMU that somebody had in hand is dead, or only out of sight.
//!
//! A monitor's connection may be lost while QEMU runs on, and a driver that parts lets go of guests that run. Neither is
//! its end: its process alone is believed, by the descriptor through which it is watched. What a migration does about a
//! guest hangs on the difference, so it is told here and nowhere else.

use crate::domain::Inner;
use crate::domain::state::Run;
use crate::error::Cause;
use crate::process::Process;

/// What is known of a QEMU, where anything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// It can be asked, by whoever has a job of its generation.
    Here,
    /// Its process has ended.
    Dead,
}

impl Inner {
    /// What is known of the QEMU that was this process and had this generation. Where neither is known any more, of whatever
    /// QEMU the domain may have: no generation is 0.
    ///
    /// # Errors
    ///
    /// It lives, and its connection was lost: it cannot be seen, which says nothing of what it does. It can be once it has
    /// a connection again, under the next generation.
    pub(crate) fn sight(&self, process: Option<&Process>, generation: u64) -> Result<Sight, Cause> {
        let is_of_it = self
            .live()
            .is_some_and(|live| live.generation == generation);
        if is_of_it && self.scheduler.generation() == generation {
            return Ok(Sight::Here);
        }
        let is_dead = match process {
            Some(process) => process.has_ended(),
            None => self.observed().run == Run::Off,
        };
        if is_dead {
            return Ok(Sight::Dead);
        }
        let text = "it cannot be seen: its QEMU runs and the connection to it was lost";
        Err(Cause::State(text.into()))
    }
}
