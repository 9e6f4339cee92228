//! Listening: the door, who holds it, and what comes through it. Must not know how a dialer waits.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};
use transport_abi::{Failure, Listen, Step};

use crate::pipes::{Name, PRIVATE, open};
use crate::pump;

/// How often the door may vanish between making and locking it before we believe that somebody
/// fights us for it.
const ATTEMPTS: usize = 4;
/// What is read from the door at once: a pipe's whole capacity is 16 of these.
const ROOM: usize = 4096;

/// The pipe that dialers knock on, locked: a door that nobody has locked is a leftover, and taken
/// over.
pub(crate) struct Door {
    pipe: OwnedFd,
    target: String,
    path: PathBuf,
    identity: Identity,
    /// What was read and is not answered yet: whole lines, and the beginning of one.
    heard: Vec<u8>,
}

impl Door {
    pub(crate) fn new(target: &str) -> Result<Self, Failure> {
        // Absolute, since the daemon may have another directory when it closes.
        let path = std::path::absolute(target).map_err(Failure::io("make the path absolute"))?;
        for _ in 0..ATTEMPTS {
            if let Some((pipe, identity)) = take(&path)? {
                return Ok(Self {
                    pipe,
                    target: target.to_owned(),
                    path,
                    identity,
                    heard: Vec::new(),
                });
            }
        }
        Err(Failure::io("listen: somebody else keeps taking the path")(
            Errno::ADDRINUSE,
        ))
    }

    fn next_name(&mut self) -> Option<Name> {
        while let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.heard.drain(..=end).collect();
            if let Some(name) = Name::parse(&line[..end]) {
                return Some(name);
            }
        }
        if self.heard.len() > Name::LONGEST {
            self.heard.clear(); // nobody of ours writes such a line
        }
        None
    }
}

impl Listen for Door {
    fn accept(&mut self) -> Result<Step<'_>, Failure> {
        loop {
            while let Some(name) = self.next_name() {
                if let Some(stream) = answer(&self.path, name)? {
                    return Ok(Step::Ready(stream));
                }
            }
            let mut room = [0; ROOM];
            match retry_on_intr(|| rustix::io::read(&self.pipe, &mut room)) {
                Ok(count) => self.heard.extend_from_slice(&room[..count]),
                Err(Errno::AGAIN) => return Ok(Step::readable(self.pipe.as_fd())),
                Err(error) => return Err(Failure::io("read the door")(error)),
            }
        }
    }

    fn address(&self) -> Result<String, Failure> {
        Ok(self.target.clone())
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if rustix::fs::lstat(&self.path).is_ok_and(|found| identity(&found) == self.identity) {
            let _gone_already = rustix::fs::unlink(&self.path);
        }
    }
}

/// Makes the door, or takes over one whose listener is dead; nothing if it vanished under our
/// hands.
fn take(path: &Path) -> Result<Option<(OwnedFd, Identity)>, Failure> {
    let in_use = |what: &str| Failure::io(what)(Errno::ADDRINUSE);
    match rustix::fs::mkfifoat(CWD, path, PRIVATE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(Failure::io("make the door")(error)),
    }
    // Held open for writing too: a pipe without writers is at its end, and would be for ever ready.
    let pipe = match open(path, OFlags::RDWR) {
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::NOTSUP | Errno::LOOP) => return Err(in_use("listen: what is there is no pipe")),
        other => other.map_err(Failure::io("open the door"))?,
    };
    let opened = rustix::fs::fstat(&pipe).map_err(Failure::io("look at the door"))?;
    if opened.st_uid != rustix::process::geteuid().as_raw() || opened.st_mode & 0o077 != 0 {
        return Err(in_use("listen: others may open what is there"));
    }
    match rustix::fs::flock(&pipe, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Err(in_use("listen: a live listener answers there")),
        other => other.map_err(Failure::io("lock the door"))?,
    }
    // Its last owner may have removed it before we had the lock.
    let is_there = rustix::fs::lstat(path).is_ok_and(|there| identity(&there) == identity(&opened));
    Ok(is_there.then(|| (pipe, identity(&opened))))
}

/// Connects with the dialer behind a knock; nothing if it has given up.
fn answer(door: &Path, name: Name) -> Result<Option<OwnedFd>, Failure> {
    let up = open(&name.up(door), OFlags::RDONLY);
    let down = open(&name.down(door), OFlags::WRONLY);
    let (up, down) = match (up, down) {
        (Ok(up), Ok(down)) => (up, down),
        (Err(Errno::NOENT), _) | (_, Err(Errno::NOENT | Errno::NXIO)) => return Ok(None),
        (Err(error), _) | (_, Err(error)) => {
            return Err(Failure::io("open a peer's pipe")(error));
        }
    };
    match retry_on_intr(|| rustix::io::write(&down, b"!")) {
        Err(Errno::PIPE) => Ok(None),
        Err(error) => Err(Failure::io("answer")(error)),
        Ok(_) => pump::start(up, down).map(Some),
    }
}

/// Device and inode. The inode stays ours as long as the door is open.
type Identity = (u64, u64);

const fn identity(found: &Stat) -> Identity {
    (found.st_dev, found.st_ino)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn at(path: &Path) -> Result<Door, Failure> {
        Door::new(path.to_str().unwrap())
    }

    #[test]
    fn the_door_is_private_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        let door = at(&path).unwrap();
        assert_eq!(
            path.metadata().unwrap().permissions().mode() & 0o7777,
            0o600
        );
        drop(door);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_listeners_door_is_taken_over_and_a_live_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        rustix::fs::mkfifoat(CWD, &path, PRIVATE).unwrap();
        let _door = at(&path).unwrap();
        assert_eq!(
            at(&path).err().unwrap().text(),
            "listen: a live listener answers there"
        );
    }

    #[test]
    fn a_plain_file_and_an_open_pipe_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pipe) = (dir.path().join("file"), dir.path().join("pipe"));
        std::fs::write(&file, "precious").unwrap();
        assert_eq!(
            at(&file).err().unwrap().text(),
            "listen: what is there is no pipe"
        );
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        rustix::fs::mkfifoat(CWD, &pipe, PRIVATE).unwrap();
        std::fs::set_permissions(&pipe, std::fs::Permissions::from_mode(0o622)).unwrap();
        assert_eq!(
            at(&pipe).err().unwrap().text(),
            "listen: others may open what is there"
        );
        assert!(pipe.exists());
    }

    #[test]
    fn garbage_in_the_door_is_no_peer_and_the_next_line_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut door = at(&dir.path().join("door")).unwrap();
        door.heard = b"rubbish\n1-2\n3-".to_vec();
        assert_eq!(door.next_name().unwrap().to_string(), "1-2");
        assert_eq!(door.next_name(), None);
        assert_eq!(door.heard, b"3-");
        door.heard = vec![b'x'; Name::LONGEST + 1];
        assert_eq!((door.next_name(), door.heard.len()), (None, 0));
    }
}
