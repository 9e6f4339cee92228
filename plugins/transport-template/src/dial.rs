//! Dialing: two pipes, a knock on the door, and the wait for an answer. Must not know how a
//! listener answers.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, retry_on_intr};
use transport_abi::{Dial, Failure, Step};

use crate::pipes::{Pair, open};
use crate::pump;

/// How soon a full door is tried again: no readiness comes from a pipe that we do not hold open.
const FULL_DOOR: Duration = Duration::from_millis(2);
/// How often a dialer looks whether the listener still lives: one that dies without an answer
/// sends no sign.
const STILL_THERE: Duration = Duration::from_millis(100);

/// A connection in the making. Dropping it removes its pipes; a listener that finds the knock later
/// finds nobody behind it.
pub(crate) struct Knocking {
    door: PathBuf,
    pair: Pair,
    ends: Option<Ends>,
    has_knocked: bool,
}

/// Our ends of the pipes.
struct Ends {
    down: OwnedFd,
    up: OwnedFd,
    /// Reads what we write, until the listener does: a pipe without a reader cannot be opened for
    /// writing, and one whose listener has come and gone already could not any more.
    stand_in: OwnedFd,
}

impl Knocking {
    pub(crate) fn new(door: &Path) -> Result<Self, Failure> {
        // Before anything is made: a path that is wrong leaves nothing beside it.
        open_door(door)?;
        let pair = Pair::new(door)?;
        let open = |path, access| open(path, access).map_err(Failure::io("open our pipe"));
        let ends = Ends {
            down: open(&pair.down, OFlags::RDONLY)?,
            stand_in: open(&pair.up, OFlags::RDONLY)?,
            up: open(&pair.up, OFlags::WRONLY)?,
        };
        Ok(Self {
            door: door.to_owned(),
            pair,
            ends: Some(ends),
            has_knocked: false,
        })
    }

    /// Whether there was room for it.
    fn knock(&self) -> Result<bool, Failure> {
        let door = open_door(&self.door)?;
        let line = format!("{}\n", self.pair.name);
        // A write this short is whole or not at all; and by clause 2.5 it is no signal if the
        // listener has just gone.
        match retry_on_intr(|| rustix::io::write(&door, line.as_bytes())) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(Failure::io("knock")(error)),
        }
    }
}

impl Dial for Knocking {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        if !self.has_knocked {
            self.has_knocked = self.knock()?;
        }
        if !self.has_knocked {
            return Ok(Step::retry_after(FULL_DOOR));
        }
        let ends = self
            .ends
            .take()
            .ok_or_else(|| Failure::new("step a finished dial"))?;
        if is_answered(&ends.down)? {
            drop(ends.stand_in);
            return pump::start(ends.down, ends.up).map(Step::Ready);
        }
        open_door(&self.door)?;
        let ends = self.ends.insert(ends);
        Ok(Step::readable(ends.down.as_fd()).at_most(STILL_THERE))
    }
}

fn open_door(door: &Path) -> Result<OwnedFd, Failure> {
    open(door, OFlags::WRONLY).map_err(|error| match error {
        Errno::NXIO => Failure::io("connect: nobody listens")(error),
        Errno::NOTSUP => Failure::new("connect: what is there is no pipe"),
        other => Failure::io("connect")(other),
    })
}

/// Takes the listener's one byte, if it has come.
fn is_answered(down: &OwnedFd) -> Result<bool, Failure> {
    // Reading would not tell a listener that has not come yet from one that has gone: both are the
    // end of a pipe without a writer. Only the latter is a hang-up.
    let now = Timespec::default();
    let mut watched = [PollFd::new(down, PollFlags::IN)];
    retry_on_intr(|| poll(&mut watched, Some(&now))).map_err(Failure::io("poll"))?;
    if watched[0].revents().is_empty() {
        return Ok(false);
    }
    match retry_on_intr(|| rustix::io::read(down, &mut [0])) {
        Ok(1..) => Ok(true),
        Ok(0) => Err(Failure::new("connect: the listener hung up")),
        Err(error) => Err(Failure::io("read the answer")(error)),
    }
}
