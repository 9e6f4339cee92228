//! Assembling a driver: what it connects through, where its guests live, how long things may take.

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use job_core::{Jobs, Limits, Overdue, Scheduler};
use monitor_qmp::Qmp;
use remote_migrate::{Journal, Peer};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use transport_host::Transports;

use crate::context::{Context, Defaults, WrapJobs, WrapMonitor};
use crate::driver::Driver;
use crate::error::{Cause, Error, io};
use crate::events::{Bound, Log};
use crate::journal::StoreJournal;
use crate::landing::Landing;
use crate::ops::migrate::Moves;
use crate::ops::recover::{Recoveries, recover_all};
use crate::process::{Launcher, Plain};
use crate::registry::Registry;
use crate::settling::{FindPeer, Settling};
use crate::store::{FileStore, StateStore};

/// How much a driver remembers for those who follow it.
const DRIVER_LOG: Bound = Bound {
    entries: 4096,
    bytes: 4 << 20,
};

/// A child that a driver had made when it ended, to become QEMU, holds the driver's lock until it is QEMU.
const LONGEST_LAUNCH: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);

/// The longest path a unix socket's address holds, without its final zero (`sockaddr_un`).
const LONGEST_SOCKET_PATH: usize = 107;
/// The longest a guest's socket adds to the run directory: its uuid, and the socket's own name.
const LONGEST_NAME: usize = "/00000000-0000-0000-0000-000000000000/migrate.sock".len();

/// A driver to be. Nothing happens until [`build`](Self::build).
#[must_use = "nothing happens until it is built"]
pub struct Builder {
    transports: Transports,
    run_dir: PathBuf,
    qemu: PathBuf,
    defaults: Defaults,
    limits: Limits,
    launcher: Box<dyn Launcher>,
    wrap_jobs: WrapJobs,
    wrap_monitor: WrapMonitor,
    landing: Landing,
    find_peer: FindPeer,
    journal: Option<Arc<dyn Journal>>,
    state_dir: Option<PathBuf>,
    store: Option<Arc<dyn StateStore>>,
}

impl Builder {
    pub(crate) fn new(transports: Transports, run_dir: PathBuf) -> Self {
        Self {
            transports,
            run_dir,
            qemu: "qemu-system-x86_64".into(),
            defaults: Defaults::default(),
            limits: Limits::default(),
            launcher: Box::new(Plain),
            wrap_jobs: Box::new(|scheduler| Arc::new(scheduler.clone())),
            wrap_monitor: Box::new(|_, monitor| monitor),
            landing: Landing::default(),
            find_peer: Box::new(|_| None),
            journal: None,
            state_dir: None,
            store: None,
        }
    }

    /// The QEMU to start guests with, instead of `qemu-system-x86_64` from the path.
    pub fn qemu(self, qemu: impl Into<PathBuf>) -> Self {
        Self {
            qemu: qemu.into(),
            ..self
        }
    }

    /// How long things may take unless a call says otherwise.
    pub fn defaults(self, defaults: Defaults) -> Self {
        Self { defaults, ..self }
    }

    /// How many callers may wait for one domain.
    pub fn limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Starts QEMU processes in a way of one's own.
    pub fn launcher(self, launcher: impl Launcher + 'static) -> Self {
        Self {
            launcher: Box::new(launcher),
            ..self
        }
    }

    /// Wraps each domain's scheduler: to audit, limit, delay or refuse.
    pub fn wrap_jobs(
        self,
        wrap: impl Fn(&Scheduler) -> Arc<dyn Jobs> + Send + Sync + 'static,
    ) -> Self {
        Self {
            wrap_jobs: Box::new(wrap),
            ..self
        }
    }

    /// Wraps each monitor, given the domain's name: to audit, allow-list or record.
    pub fn wrap_monitor(
        self,
        wrap: impl Fn(&str, Arc<dyn Qmp>) -> Arc<dyn Qmp> + Send + Sync + 'static,
    ) -> Self {
        Self {
            wrap_monitor: Box::new(wrap),
            ..self
        }
    }

    /// Where the memory of guests that arrive is taken in, instead of on unix sockets.
    pub fn landing(self, landing: Landing) -> Self {
        Self { landing, ..self }
    }

    /// How the daemon is found that some words name: those that a migration was begun with, as
    /// [`there`](crate::MigrateOptions::there) or as [`home`](crate::MigrateOptions::home). With it a migration that was
    /// left open is settled without an operator once the other daemon can be asked, on either side.
    pub fn peers(
        self,
        find: impl Fn(&str) -> Option<Arc<dyn Peer>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            find_peer: Box::new(find),
            ..self
        }
    }

    /// Keeps definitions and migrations below that directory, which should outlive the host's next start. Without it they
    /// are kept below the run directory, and live as long as that.
    pub fn state_dir(self, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: Some(state_dir.into()),
            ..self
        }
    }

    /// Keeps all records there, instead of in files below the two directories.
    pub fn state_store(self, store: Arc<dyn StateStore>) -> Self {
        Self {
            store: Some(store),
            ..self
        }
    }

    /// Keeps the records of migrations there, instead of with the others.
    pub fn journal(self, journal: Arc<dyn Journal>) -> Self {
        Self {
            journal: Some(journal),
            ..self
        }
    }

    /// Builds the driver. Must be called in a tokio runtime. From here on its configuration does not change.
    ///
    /// Guests that an earlier driver left running are known at once, and found again side by side, each under a job of
    /// its own; [`Driver::recovered`] waits for that. Definitions are read, and those to be started with the host are,
    /// once a host's start.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if the run directory is not an absolute path, is too
    /// long for sockets in it, or others may write to it, or if other hosts could not be told where guests are taken in,
    /// [`Exists`](crate::ErrorKind::Exists) if another driver uses it or the state directory,
    /// [`Io`](crate::ErrorKind::Io) if one cannot be made or read. A single record that cannot be read is set aside; one of a
    /// migration stays where it is, and refuses its own guest alone.
    pub fn build(self) -> Result<Driver, Error> {
        let failed = |cause: Cause| Error::new("build the driver", None, cause);
        if !self.run_dir.is_absolute() {
            let text = format!(
                "the run directory {} is not an absolute path",
                self.run_dir.display()
            );
            return Err(failed(Cause::BadRequest(text)));
        }
        let longest = self.run_dir.as_os_str().len() + LONGEST_NAME;
        if longest > LONGEST_SOCKET_PATH {
            let text = format!(
                "sockets in {} would have paths of {longest} bytes, and at most {LONGEST_SOCKET_PATH} are possible: choose a \
                 shorter run directory",
                self.run_dir.display()
            );
            return Err(failed(Cause::BadRequest(text)));
        }
        self.landing.check().map_err(failed)?;
        let mut locks = vec![own(&self.run_dir).map_err(failed)?];
        if let Some(state_dir) = &self.state_dir {
            locks.push(own(state_dir).map_err(failed)?);
        }
        let store = match self.store {
            Some(store) => store,
            None => {
                let below = || self.run_dir.join("state");
                let state_dir = self.state_dir.unwrap_or_else(below);
                let files = FileStore::new(&self.run_dir, &state_dir);
                Arc::new(
                    files
                        .map_err(io("make folders for records in", &state_dir))
                        .map_err(failed)?,
                )
            }
        };
        let journal = self
            .journal
            .unwrap_or_else(|| Arc::new(StoreJournal::new(store.clone())));
        let context = Context {
            transports: self.transports,
            run_dir: self.run_dir,
            qemu: self.qemu,
            defaults: self.defaults,
            limits: self.limits,
            launcher: self.launcher,
            wrap_jobs: self.wrap_jobs,
            wrap_monitor: self.wrap_monitor,
            landing: self.landing,
            find_peer: self.find_peer,
            settling: Settling::default(),
            moves: Moves::default(),
            journal,
            store,
            recoveries: Recoveries::default(),
            overdue: Overdue::new(),
            log: Arc::new(Log::new(DRIVER_LOG)),
            meter: Arc::default(),
            registry: Registry::default(),
            tracker: TaskTracker::new(),
            closing: CancellationToken::new(),
            watchers: TaskTracker::new(),
            parting: CancellationToken::new(),
            _locks: locks,
        };
        let sweep = Context::sweep(context.overdue.clone(), context.parting.clone());
        context.watchers.spawn(sweep);
        let context = Arc::new(context);
        recover_all(&context).map_err(failed)?;
        Ok(Driver::new(context))
    }
}

/// Makes a directory that is ours alone, as long as the file lives.
fn own(dir: &Path) -> Result<File, Cause> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io("make", dir))?;
    check_private(dir)?;
    lock(dir)
}

/// Two drivers on one directory would each take the other's guests for leftovers.
fn lock(dir: &Path) -> Result<File, Cause> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    let file = file.map_err(io("open", &path))?;
    let until = Instant::now() + LONGEST_LAUNCH;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // A lock cannot be waited for with a limit.
            Err(Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(LOOK),
            Err(Errno::WOULDBLOCK) => {
                let text = format!("another driver uses {}", dir.display());
                return Err(Cause::Exists(text));
            }
            Err(error) => return Err(io("lock", &path)(error.into())),
        }
    }
}

/// Who can write to the directory can put sockets and records of their own in the place of a guest's.
fn check_private(dir: &Path) -> Result<(), Cause> {
    let metadata = std::fs::metadata(dir).map_err(io("look at", dir))?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o777);
    if owner != rustix::process::geteuid().as_raw() || mode & 0o022 != 0 {
        let text = format!(
            "the directory {} must be ours and writable by nobody else; it belongs to uid {owner}, mode {mode:o}",
            dir.display()
        );
        return Err(Cause::BadRequest(text));
    }
    Ok(())
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("run_dir", &self.run_dir)
            .field("qemu", &self.qemu)
            .finish_non_exhaustive()
    }
}
