//! Listening on a unix socket: taking the path without taking it from anybody, and giving it back.
//! Must not know dialing's steps.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, FileType, Mode, RenameFlags, Stat};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SocketAddrUnix, SocketFlags};
use transport_abi::{Failure, Listen, Step};

/// As many as the kernel allows (it caps by `net.core.somaxconn`): a full backlog only makes
/// clients poll.
const BACKLOG: i32 = 4096;
/// How often the path may be found taken by leftovers before we believe that somebody fights us for
/// it.
const ATTEMPTS: usize = 4;

/// A bound socket, and the path it made.
pub(crate) struct Bound {
    socket: OwnedFd,
    target: String,
    path: PathBuf,
    /// The inode stays ours as long as `socket` is open, so the number cannot be used again
    /// meanwhile.
    identity: Identity,
}

impl Bound {
    pub(crate) fn new(target: &str) -> Result<Self, Failure> {
        let address = crate::address(target)?;
        // Absolute, since the daemon may have another directory when it closes.
        let path = std::path::absolute(target).map_err(Failure::io("make the path absolute"))?;
        let socket = crate::socket()?;
        // The path inherits the mode of the socket's own inode, so it never is more open than this,
        // whatever the umask.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(Failure::io("set mode 0600"))?;
        bind(&socket, &address, &path)?;
        let found = rustix::fs::lstat(&path).map_err(Failure::io("look at the bound path"))?;
        let bound = Self {
            socket,
            target: target.to_owned(),
            path,
            identity: Identity::of(&found),
        };
        rustix::net::listen(&bound.socket, BACKLOG).map_err(Failure::io("listen"))?;
        Ok(bound)
    }
}

impl Listen for Bound {
    fn accept(&mut self) -> Result<Step<'_>, Failure> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match retry_on_intr(|| rustix::net::accept_with(&self.socket, flags)) {
            Ok(accepted) => Ok(Step::Ready(accepted)),
            Err(Errno::AGAIN) => Ok(Step::readable(self.socket.as_fd())),
            Err(error) => Err(Failure::io("accept")(error)),
        }
    }

    fn address(&self) -> Result<String, Failure> {
        Ok(self.target.clone())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let is_ours =
            rustix::fs::lstat(&self.path).is_ok_and(|found| Identity::of(&found) == self.identity);
        if is_ours {
            let _gone_already = rustix::fs::unlink(&self.path);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    const fn of(found: &Stat) -> Self {
        Self {
            device: found.st_dev,
            inode: found.st_ino,
        }
    }
}

fn bind(socket: &OwnedFd, address: &SocketAddrUnix, path: &Path) -> Result<(), Failure> {
    for _ in 0..ATTEMPTS {
        match rustix::net::bind(socket, address) {
            Err(Errno::ADDRINUSE) => remove_leftover(address, path)?,
            other => return other.map_err(Failure::io("bind")),
        }
    }
    Err(Failure::io("bind: somebody else keeps taking the path")(
        Errno::ADDRINUSE,
    ))
}

/// Removes what is at `path` if it is the socket of a server that is dead; done also if it is gone
/// by itself.
fn remove_leftover(address: &SocketAddrUnix, path: &Path) -> Result<(), Failure> {
    let found = match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(Failure::io("look at what is there"))?,
    };
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(Failure::io("bind: what is there is no socket")(
            Errno::ADDRINUSE,
        ));
    }
    let probe = crate::socket()?;
    match retry_on_intr(|| rustix::net::connect(&probe, address)) {
        Err(Errno::CONNREFUSED) => move_aside(path, Identity::of(&found)),
        Err(Errno::NOENT) => Ok(()),
        Ok(()) | Err(Errno::AGAIN) => Err(Failure::io("bind: a live server answers there")(
            Errno::ADDRINUSE,
        )),
        Err(error) => Err(Failure::io("ask whether a server lives there")(error)),
    }
}

/// Between asking and removing, somebody else may have removed the leftover and bound the path. So
/// it is renamed first, which is atomic, and looked at under its new name, where nobody else
/// reaches for it; what was not dead goes back.
fn move_aside(path: &Path, dead: Identity) -> Result<(), Failure> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(
        ".dead-{}-{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    ));
    let aside = PathBuf::from(aside);
    match rustix::fs::renameat_with(CWD, path, CWD, &aside, RenameFlags::NOREPLACE) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(Failure::io("move a dead server's socket aside"))?,
    }
    let moved = rustix::fs::lstat(&aside).map_err(Failure::io("look at the moved socket"))?;
    if Identity::of(&moved) == dead {
        return rustix::fs::unlink(&aside).map_err(Failure::io("remove a dead server's socket"));
    }
    rustix::fs::renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE).map_err(Failure::io(
        "put back a socket that somebody bound meanwhile",
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn at(path: &Path) -> Result<Bound, Failure> {
        Bound::new(path.to_str().unwrap())
    }

    #[test]
    fn path_is_private_and_goes_with_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bound = at(&path).unwrap();
        assert_eq!(
            path.metadata().unwrap().permissions().mode() & 0o7777,
            0o600
        );
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn each_peer_is_accepted_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut bound = at(&path).unwrap();
        assert!(matches!(bound.accept(), Ok(Step::Wait(_))));
        let _client = UnixStream::connect(&path).unwrap();
        assert!(matches!(bound.accept(), Ok(Step::Ready(_))));
        assert!(matches!(bound.accept(), Ok(Step::Wait(_))));
    }

    #[test]
    fn leftover_of_a_dead_server_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let _bound = at(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(
            dir.path().read_dir().unwrap().count(),
            1,
            "nothing is left aside"
        );
    }

    #[test]
    fn live_server_and_plain_file_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (live, file) = (dir.path().join("live"), dir.path().join("file"));
        let server = UnixListener::bind(&live).unwrap();
        let failure = at(&live).err().unwrap();
        assert_eq!(failure.os_error(), Some(Errno::ADDRINUSE.raw_os_error()));
        assert_eq!(failure.text(), "bind: a live server answers there");
        drop(server.accept().unwrap());
        std::fs::write(&file, "precious").unwrap();
        assert_eq!(
            at(&file).err().unwrap().text(),
            "bind: what is there is no socket"
        );
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn path_that_somebody_else_took_over_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bound = at(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(bound);
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn socket_bound_between_asking_and_removing_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _racer = UnixListener::bind(&path).unwrap();
        move_aside(
            &path,
            Identity {
                device: 0,
                inode: 0,
            },
        )
        .unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
    }
}
