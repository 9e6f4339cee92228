#![expect(unsafe_code, reason = "watches the pidfd of a process")]
//! A QEMU process: started in its own session, watched and signalled through its pidfd, never through a number.
//!
//! Knows nothing of QEMU's arguments or protocols. [`Launcher`] is the seam for daemons that start processes elsewhere (a
//! cgroup, a scope); whoever launches hands over a pidfd.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Flock, FlockType, Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use crate::records::Identity;

mod spawn;

/// A process to be started.
#[derive(Debug)]
#[expect(clippy::exhaustive_structs, reason = "launchers take it apart")]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, without its own name.
    pub arguments: Vec<OsString>,
    /// Descriptors the child must find open under the numbers they have here.
    pub descriptors: Vec<OwnedFd>,
    /// Where its standard error goes; its standard input and output are `/dev/null`.
    pub stderr: File,
    /// A file on which the child takes a `fcntl` write lock before it becomes the program, and which it keeps open. It
    /// has no other descriptor: closing one would unlock it. By it a daemon that was killed right after the launch is known by the next one to have launched, and what. A
    /// launcher that cannot do this leaves such a guest to be ended by hand.
    pub lock: File,
}

/// Starts QEMU processes.
#[async_trait]
pub trait Launcher: Send + Sync {
    /// Starts one, so that it outlives this process, and yields its pid and pidfd.
    ///
    /// # Errors
    ///
    /// What the system said; nothing was started then.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the process may have been started. The driver never drops it half way.
    async fn launch(&self, launch: Launch) -> io::Result<(u32, OwnedFd)>;
}

/// Starts QEMU as a child in a session of its own, so that a signal to the daemon's group does not reach it.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::exhaustive_structs, reason = "has nothing to configure")]
pub struct Plain;

#[async_trait]
impl Launcher for Plain {
    async fn launch(&self, launch: Launch) -> io::Result<(u32, OwnedFd)> {
        // The thread stands still until the child is the program, whose file may be far away.
        tokio::task::spawn_blocking(move || spawn::spawn(launch))
            .await
            .map_err(io::Error::other)?
    }
}

fn pid(number: u32) -> io::Result<Pid> {
    i32::try_from(number)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other(format!("{number} is no process id")))
}

/// Who holds the lock of a [`Launch`], by the kernel's word. The holder is alive.
pub(crate) fn lock_holder(path: &Path) -> io::Result<Option<u32>> {
    let file = match File::options().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let asked = Flock::from(FlockType::WriteLock);
    let held = rustix::process::fcntl_getlk(&file, &asked)?;
    let holder = held.and_then(|held| held.pid);
    Ok(holder.and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok()))
}

impl Identity {
    /// That process', as it is now.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The program's name is in parentheses and may hold any; the fields after it are counted from the third on.
        let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let started = fields.split(' ').nth(19).and_then(|text| text.parse().ok());
        Ok(Self {
            pid,
            started: started.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is odd")))?,
            boot: boot.trim().to_owned(),
        })
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// It exited with that status.
    Status(i32),
    /// That signal killed it.
    Signal(i32),
    /// It is not our child, so only its parent knows.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exited with status {status}"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}

/// A process that is watched through its pidfd. Dropping it neither ends nor reaps the process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    exit: Mutex<Option<Exit>>,
    /// Whether it is for us to reap. A child that another part of this program started is its own to wait for.
    is_ours: bool,
    /// Whether it must never be signalled.
    is_watched_only: bool,
}

impl Process {
    /// Watches a process that this driver started, through its pidfd, and reaps it. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// What the system said when the descriptor was to be watched.
    pub fn watch(pid: u32, pidfd: OwnedFd) -> io::Result<Self> {
        Self::registered(pid, pidfd).map_err(|(error, _)| error)
    }

    /// As [`watch`](Self::watch), and kills what cannot be watched.
    pub(crate) fn watch_or_kill(pid: u32, pidfd: OwnedFd) -> io::Result<Self> {
        Self::registered(pid, pidfd).map_err(|(error, pidfd)| {
            // The caller is told of the first failure; a second one would add nothing.
            let _killed = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
            error
        })
    }

    /// A process whose pidfd cannot be watched comes back: it runs.
    fn registered(pid: u32, pidfd: OwnedFd) -> Result<Self, (io::Error, OwnedFd)> {
        // SAFETY: the descriptor is owned, moved in, and the same until the `AsyncFd` that owns it is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        let pidfd = registered.map_err(|error| {
            let (pidfd, error) = error.into_parts();
            (error, pidfd)
        })?;
        Ok(Self {
            pid,
            pidfd,
            exit: Mutex::new(None),
            is_ours: true,
            is_watched_only: false,
        })
    }

    /// Watches a process that somebody else started, if `is_it` still holds once its pidfd is open: a pid that was
    /// reused before cannot be mistaken then. It is not reaped.
    ///
    /// # Errors
    ///
    /// What the system said; [`io::ErrorKind::NotFound`] if `is_it` does not hold.
    pub fn adopt(number: u32, is_it: impl FnOnce(u32) -> bool) -> io::Result<Self> {
        let pidfd = rustix::process::pidfd_open(pid(number)?, PidfdFlags::empty())?;
        if !is_it(number) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("process {number} is another one"),
            ));
        }
        Ok(Self {
            is_ours: false,
            ..Self::watch(number, pidfd)?
        })
    }

    /// The same, and it cannot be signalled any more.
    #[must_use]
    pub fn watched_only(self) -> Self {
        let is_watched_only = true;
        Self {
            is_watched_only,
            ..self
        }
    }

    /// Its process id, for people. It is reused once the process was reaped.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it ended, and reaps it if it is our child.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn exited(&self) -> Exit {
        loop {
            let Ok(mut ready) = self.pidfd.readable().await else {
                // The runtime shuts down, and with it whoever waits here.
                return std::future::pending().await;
            };
            let mut exit = self.exit.lock().await;
            if let Some(exit) = *exit {
                return exit;
            }
            if let Some(found) = self.reap() {
                *exit = Some(found);
                return found;
            }
            ready.clear_ready();
        }
    }

    /// Whether it has ended, as the kernel says now. One that cannot be asked about has not.
    pub(crate) fn has_ended(&self) -> bool {
        let mut asked = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        let at_once = Timespec::default();
        poll(&mut asked, Some(&at_once)).is_ok_and(|ended| ended > 0)
    }

    /// How it ended, if it did.
    fn reap(&self) -> Option<Exit> {
        let mut options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        if !self.is_ours {
            options |= WaitIdOptions::NOWAIT;
        }
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(status), _) => Exit::Status(status),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            }),
            Ok(None) => None,
            // Not our child: that its pidfd is readable is all there is to know.
            Err(_) => Some(Exit::Unknown),
        }
    }

    /// Asks it to end (`SIGTERM`). One that has ended is no error.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::TERM)
    }

    /// Kills it (`SIGKILL`). One that has ended is no error.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.is_watched_only {
            let text = format!("process {} is watched only", self.pid);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// The number under which a child finds a descriptor that is passed to it.
pub(crate) fn number(descriptor: &OwnedFd) -> i32 {
    descriptor.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use rustix::process::{Resource, Rlimit};

    use super::*;

    pub(super) fn sh(script: &str) -> Launch {
        Launch {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            descriptors: Vec::new(),
            stderr: File::options().write(true).open("/dev/null").unwrap(),
            lock: tempfile::tempfile().unwrap(),
        }
    }

    async fn launched(launch: Launch) -> Process {
        let (pid, pidfd) = Plain.launch(launch).await.unwrap();
        Process::watch(pid, pidfd).unwrap()
    }

    #[tokio::test]
    async fn the_exit_status_is_known_to_all_who_wait() {
        let process = launched(sh("exit 7")).await;
        let both = tokio::join!(process.exited(), process.exited());
        assert_eq!(both, (Exit::Status(7), Exit::Status(7)));
        process.kill().unwrap();
    }

    #[tokio::test]
    async fn a_killed_process_says_by_which_signal() {
        let process = launched(sh("exec sleep 60")).await;
        process.kill().unwrap();
        assert_eq!(process.exited().await, Exit::Signal(9));
    }

    #[tokio::test]
    async fn that_a_process_has_ended_is_known_before_and_after_it_was_reaped() {
        let (input, output) = io::pipe().unwrap();
        let script = format!("exec cat /proc/self/fd/{}", input.as_raw_fd());
        let process = launched(Launch {
            descriptors: vec![input.into()],
            ..sh(&script)
        })
        .await;
        assert!(!process.has_ended(), "it waits for its input's end");
        drop(output);
        // Not reaped, and not waited for through tokio: as one sees it that looks for the first time.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        rustix::process::waitid(WaitId::PidFd(process.pidfd.as_fd()), options).unwrap();
        assert!(process.has_ended());
        process.exited().await;
        assert!(process.has_ended());
    }

    #[tokio::test]
    async fn a_child_finds_the_descriptors_it_was_given_and_no_others() {
        let (read, write) = io::pipe().unwrap();
        let write = OwnedFd::from(write);
        let script = format!("echo given > /proc/self/fd/{}", number(&write));
        let process = launched(Launch {
            descriptors: vec![write],
            ..sh(&script)
        })
        .await;
        assert_eq!(process.exited().await, Exit::Status(0));
        assert_eq!(io::read_to_string(read).unwrap(), "given\n");
    }

    #[tokio::test]
    async fn whoever_was_launched_is_known_by_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert_eq!(lock_holder(&path).unwrap(), None);
        let process = launched(Launch {
            lock: File::create_new(&path).unwrap(),
            ..sh("exec sleep 60")
        })
        .await;
        assert_eq!(lock_holder(&path).unwrap(), Some(process.pid()));
        process.kill().unwrap();
        process.exited().await;
        assert_eq!(lock_holder(&path).unwrap(), None);
    }

    #[tokio::test]
    async fn an_identity_is_that_of_one_process_only() {
        let process = launched(sh("exec sleep 60")).await;
        let identity = Identity::of(process.pid()).unwrap();
        assert_eq!(Identity::of(process.pid()).unwrap(), identity);
        assert_ne!(Identity::of(std::process::id()).unwrap(), identity);
        process.kill().unwrap();
        process.exited().await;
        Identity::of(process.pid()).expect_err("it is gone");
    }

    #[tokio::test]
    async fn a_process_that_is_watched_only_is_never_signalled() {
        let process = launched(sh("exec sleep 60")).await.watched_only();
        for refused in [process.terminate(), process.kill()] {
            let error = refused.expect_err("it is not ours to end");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        let own = Process::adopt(process.pid(), |_| true).unwrap();
        own.kill().unwrap();
        assert_eq!(process.exited().await, Exit::Signal(9));
    }

    /// What a process may open is a limit of all of its threads, so this one begins itself anew, alone.
    #[test]
    fn a_process_is_known_also_when_no_descriptor_is_left() {
        const ALONE: &str = "VMWRIGHT_TEST_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let own = std::env::current_exe().unwrap();
            let name = "process::tests::a_process_is_known_also_when_no_descriptor_is_left";
            let mut alone = std::process::Command::new(own);
            let ended = alone.args(["--exact", name]).env(ALONE, "1").output();
            let ended = ended.unwrap();
            let said = String::from_utf8_lossy(&ended.stdout);
            assert!(
                ended.status.success() && said.contains("1 passed"),
                "{said}"
            );
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (pid, pidfd) = Plain.launch(sh("exec sleep 60")).await.unwrap();
            let all = rustix::process::getrlimit(Resource::Nofile);
            let none = Rlimit {
                current: Some(0),
                ..all
            };
            rustix::process::setrlimit(Resource::Nofile, none).unwrap();
            File::open("/dev/null").expect_err("no descriptor is left");
            let process = Process::watch_or_kill(pid, pidfd).unwrap();
            process.kill().unwrap();
            assert_eq!(process.exited().await, Exit::Signal(9));
        });
    }

    #[tokio::test]
    async fn a_process_that_is_not_the_one_meant_is_not_adopted() {
        let error = Process::adopt(std::process::id(), |_| false).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
