//! Named pipes: opening them without ever blocking, and the pair that one connection uses.
//!
//! Must not know who dials and who listens.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use transport_abi::Failure;

/// Nobody but the user who made it.
pub(crate) const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Opens the pipe at `path`, and nothing that is no pipe.
pub(crate) fn open(path: &Path, access: OFlags) -> Result<OwnedFd, Errno> {
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
    let pipe = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()))?;
    let found = rustix::fs::fstat(&pipe)?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Fifo => Ok(pipe),
        _ => Err(Errno::NOTSUP),
    }
}

/// What a dialer calls its two pipes: its process and a number, after the path of the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    process: u32,
    number: u32,
}

impl Name {
    /// The longest line that holds a name, with its end.
    pub(crate) const LONGEST: usize = "4294967295-4294967295\n".len();

    /// Numbers only, so that nobody can lead us to another folder.
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        let (process, number) = std::str::from_utf8(line).ok()?.split_once('-')?;
        Some(Self {
            process: process.parse().ok()?,
            number: number.parse().ok()?,
        })
    }

    /// From the dialer to the listener.
    pub(crate) fn up(self, door: &Path) -> PathBuf {
        self.beside(door, "up")
    }

    /// From the listener to the dialer.
    pub(crate) fn down(self, door: &Path) -> PathBuf {
        self.beside(door, "down")
    }

    fn beside(self, door: &Path, direction: &str) -> PathBuf {
        let mut path = OsString::from(door);
        path.push(format!(".{self}.{direction}"));
        path.into()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.process, self.number)
    }
}

/// Two pipes in the file system, removed on drop; who has opened them keeps them.
#[must_use = "the names are removed as soon as this is dropped"]
pub(crate) struct Pair {
    pub(crate) name: Name,
    pub(crate) up: PathBuf,
    pub(crate) down: PathBuf,
}

impl Pair {
    pub(crate) fn new(door: &Path) -> Result<Self, Failure> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        loop {
            let name = Name {
                process: std::process::id(),
                number: COUNTER.fetch_add(1, Ordering::Relaxed),
            };
            let up = name.up(door);
            match make(&up) {
                // A leftover, or a process of another pid namespace: not ours to remove.
                Err(Errno::EXIST) => continue,
                made => made.map_err(Failure::io("make a pipe"))?,
            }
            let down = name.down(door);
            let pair = Self { name, up, down };
            make(&pair.down).map_err(Failure::io("make the other pipe"))?;
            return Ok(pair);
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for path in [&self.up, &self.down] {
            let _never_made = rustix::fs::unlink(path);
        }
    }
}

fn make(path: &Path) -> Result<(), Errno> {
    rustix::fs::mkfifoat(CWD, path, PRIVATE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_make_a_name() {
        let name = Name::parse(b"12-4294967295").unwrap();
        assert_eq!(name.to_string(), "12-4294967295");
        assert_eq!(
            name.up(Path::new("/run/door")),
            Path::new("/run/door.12-4294967295.up")
        );
        for wrong in [
            &b"../etc-1"[..],
            b"1",
            b"1-",
            b"-1",
            b"1-2-3",
            b"1-\xff",
            b"",
        ] {
            assert_eq!(Name::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_pair_goes_with_its_owner_and_leaves_others_alone() {
        let dir = tempfile::tempdir().unwrap();
        let door = dir.path().join("door");
        let pair = Pair::new(&door).unwrap();
        let foreign = Name {
            number: pair.name.number + 1,
            ..pair.name
        };
        std::fs::write(foreign.up(&door), "precious").unwrap();
        drop(pair);
        drop(Pair::new(&door).unwrap());
        let left: Vec<_> = dir.path().read_dir().unwrap().collect();
        assert_eq!(left.len(), 1);
        assert!(foreign.up(&door).exists());
    }

    #[test]
    fn what_is_no_pipe_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert_eq!(open(&file, OFlags::RDWR).unwrap_err(), Errno::NOTSUP);
        std::os::unix::fs::symlink(&file, dir.path().join("link")).unwrap();
        assert_eq!(
            open(&dir.path().join("link"), OFlags::RDWR).unwrap_err(),
            Errno::LOOP
        );
    }
}
