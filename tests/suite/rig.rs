//! A driver with real guests for the suite, the demo and the benches: where QEMU and the guest's image are, how a guest
//! is described, what its console says.
//!
//! Knows the driver's public face only. Ends every QEMU it started, also when a test panics.

#![allow(dead_code, reason = "each of its users needs a part of it")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use driver::{Defaults, Domain, Driver, Error, Guest, Kernel, Landing, Serial};
use rustix::process::Pid;
pub(crate) use rustix::process::Signal;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout_at};
use transport_host::Transports;

/// What the commands of `xtask` found or built, by the variables they set.
#[derive(Clone, Debug)]
pub(crate) struct Env {
    pub(crate) qemu: PathBuf,
    pub(crate) qemu_img: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) transports: PathBuf,
}

impl Env {
    /// What there is, or which variables are missing.
    pub(crate) fn find() -> Result<Self, String> {
        let mut missing = Vec::new();
        let mut path = |name: &'static str| match std::env::var_os(name) {
            Some(path) => PathBuf::from(path),
            None => {
                missing.push(name);
                PathBuf::new()
            }
        };
        let env = Self {
            qemu: path("VMWRIGHT_QEMU"),
            qemu_img: path("VMWRIGHT_QEMU_IMG"),
            kernel: path("VMWRIGHT_KERNEL"),
            initrd: path("VMWRIGHT_INITRD"),
            transports: path("VMWRIGHT_TRANSPORTS"),
        };
        if missing.is_empty() {
            Ok(env)
        } else {
            Err(format!(
                "{} not set; `cargo xtask` sets them",
                missing.join(", ")
            ))
        }
    }

    /// What `qemu-img` says, asked with these words.
    pub(crate) fn qemu_img(&self, words: &[&str]) -> Result<String, String> {
        let ran = Command::new(&self.qemu_img)
            .args(words)
            .stdin(Stdio::null())
            .output();
        let output = ran.map_err(|error| error.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(format!(
                "qemu-img {words:?}: {}{}",
                text(&output.stdout),
                text(&output.stderr)
            ))
        }
    }

    /// The plugins, loaded from their directory.
    pub(crate) fn transports(&self) -> Result<Transports, String> {
        let mut builder = Transports::builder();
        let report = builder
            .load_dir(&self.transports)
            .map_err(|error| error.to_string())?;
        if let Some(refused) = report.refused.first() {
            return Err(refused.error.to_string());
        }
        builder.build().map_err(|error| error.to_string())
    }
}

/// A driver with a directory of its own.
pub(crate) struct Rig {
    pub(crate) env: Env,
    pub(crate) driver: Driver,
    pub(crate) dir: Arc<TempDir>,
    leave: AtomicBool,
}

impl Rig {
    pub(crate) fn new(env: &Env) -> Self {
        Self::with(env, Defaults::default())
    }

    pub(crate) fn with(env: &Env, defaults: Defaults) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        Self::on(env, defaults, Landing::unix(), Arc::new(dir))
    }

    /// With guests' memory taken in at that place.
    pub(crate) fn at(env: &Env, landing: Landing) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        Self::on(env, Defaults::default(), landing, Arc::new(dir))
    }

    fn on(env: &Env, defaults: Defaults, landing: Landing, dir: Arc<TempDir>) -> Self {
        let transports = env.transports().expect("the staged plugins load");
        let driver = Driver::builder(transports, dir.path().join("run"))
            .state_dir(dir.path().join("state"))
            .qemu(&env.qemu)
            .defaults(defaults)
            .landing(landing)
            .build();
        Self {
            env: env.clone(),
            driver: driver.expect("the directories can be made"),
            dir,
            leave: AtomicBool::new(false),
        }
    }

    /// Ends this driver and leaves its guests running. No handle on a domain may be left.
    pub(crate) async fn leave(self) -> (Env, Arc<TempDir>) {
        let parted = self
            .driver
            .shutdown(Instant::now() + Duration::from_secs(10));
        parted.await.expect("nothing goes on");
        self.leave.store(true, Ordering::SeqCst);
        (self.env.clone(), self.dir.clone())
    }

    /// The driver that comes after one that left.
    pub(crate) fn again((env, dir): (Env, Arc<TempDir>)) -> Self {
        Self::on(&env, Defaults::default(), Landing::unix(), dir)
    }

    /// Its place and means, without the driver that was there: for one that is built in another way.
    pub(crate) fn with_driver(&self, driver: Driver) -> Self {
        Self {
            env: self.env.clone(),
            driver,
            dir: self.dir.clone(),
            leave: AtomicBool::new(false),
        }
    }

    /// The same means at another place. The driver there is somebody else's matter.
    pub(crate) fn at_place(&self, dir: Arc<TempDir>) -> Self {
        Self {
            env: self.env.clone(),
            driver: self.driver.clone(),
            dir,
            leave: AtomicBool::new(true),
        }
    }

    /// A guest that boots the image and counts on its console.
    pub(crate) fn guest(&self, name: &str) -> Guest {
        let arguments = "console=ttyS0 quiet".into();
        let kernel = Kernel {
            initrd: Some(self.env.initrd.clone()),
            arguments,
            ..Kernel::new(&self.env.kernel)
        };
        Guest {
            memory_mib: 256,
            kernel: Some(kernel),
            serial: Serial::File(self.console_path(name)),
            extra_arguments: uneven_memory(256).to_vec(),
            ..Guest::new(name)
        }
    }

    /// A machine without a system: its QEMU answers after 30 ms, and nothing runs in it.
    pub(crate) fn empty(&self, name: &str) -> Guest {
        Guest {
            machine: "none".into(),
            memory_mib: 1,
            agent: driver::AgentChannel::None,
            balloon: false,
            ..Guest::new(name)
        }
    }

    pub(crate) fn console_path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.console"))
    }

    pub(crate) fn console(&self, name: &str) -> Console {
        Console(self.console_path(name))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.leave.load(Ordering::SeqCst) {
            return;
        }
        for domain in self.driver.domains() {
            if domain.records().attached.is_none()
                && let Some(pid) = domain.observed().pid
            {
                // The driver has not reaped it yet, so the number is still its own.
                kill(pid, Signal::KILL);
            }
        }
    }
}

/// Words to QEMU for so much memory and two pages more, which it can move under emulation without losing a write.
///
/// QEMU 7.2 collects which pages were written to 64 at a time where a memory is made of whole such groups, and forgets to
/// tell the emulated processor then, which goes on writing without a note. What it wrote last to such a page stays behind:
/// mostly what its kernel writes most, so that it finds a broken timer or stack after a move. Memory that is not made of
/// whole groups is collected page by page, and the processor told of each. Under a bare script that moves a guest of 128 MiB
/// with a downtime limit of 2 ms six of 75 moves left it broken, and none of 302 with two pages more.
pub(crate) fn uneven_memory(mib: u64) -> [String; 2] {
    ["-m".to_owned(), format!("size={}k", mib * 1024 + 8)]
}

/// Sends a signal to a process this rig started and has not reaped.
pub(crate) fn kill(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process id");
    // It may have ended by itself.
    let _gone = rustix::process::kill_process(pid, signal);
}

/// An image with an empty ext4.
pub(crate) fn ext4(folder: &Path) -> PathBuf {
    let image = folder.join("disk.raw");
    File::create(&image)
        .and_then(|file| file.set_len(16 << 20))
        .expect("an image can be made");
    let made = ["mke2fs", "/sbin/mke2fs", "/usr/sbin/mke2fs"]
        .iter()
        .find_map(|program| {
            Command::new(program)
                .args(["-q", "-F", "-t", "ext4"])
                .arg(&image)
                .stdin(Stdio::null())
                .status()
                .ok()
        });
    let made = made.expect("mke2fs (package e2fsprogs) makes the guest's disk");
    assert!(made.success(), "mke2fs: {made}");
    image
}

/// Has a guest write to its disk for ever, and tell.
pub(crate) const WRITER: &str = "n=0; while :; do echo $n >/mnt/n; echo \"wrote $n\" >/dev/console; n=$((n+1)); sleep 0.05; done";

/// The console of a guest, as a file.
pub(crate) struct Console(PathBuf);

impl Console {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn text(&self) -> String {
        fs::read(&self.0)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The numbers the guest counted, in the order in which it did.
    pub(crate) fn ticks(&self) -> Vec<u64> {
        let text = self.text();
        // The last line may be half written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
            .collect()
    }

    /// The number the guest wrote to its disk last, once it does what [`WRITER`] says.
    pub(crate) fn written(&self) -> Option<u64> {
        let text = self.text();
        let whole = text.rsplit_once('\n')?.0;
        whole
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("wrote ")?.parse().ok())
    }

    /// Waits until the guest has written three numbers more.
    pub(crate) async fn writes(&self, limit: Duration) -> Result<(), String> {
        let before = self.written();
        let deadline = Instant::now() + limit;
        while self.written().is_none() || self.written() <= before.map(|number| number + 2) {
            if Instant::now() >= deadline {
                return Err(format!(
                    "the guest does not write, last {before:?}:\n{}",
                    self.text()
                ));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// That the guest runs and does not write: the proof of a freeze that no agent can forge.
    pub(crate) async fn stands_still(&self) -> Result<(), String> {
        let before = self.written();
        let tick = *self.ticks().last().ok_or("it does not count")?;
        self.past(tick + 8, Duration::from_secs(30)).await?;
        let after = self.written();
        // One write may have been done and not told.
        if after <= before.map(|number| number + 1) {
            Ok(())
        } else {
            Err(format!("wrote {before:?}, and then {after:?}"))
        }
    }

    /// Waits until the guest has counted to more than `tick`.
    pub(crate) async fn past(&self, tick: u64, limit: Duration) -> Result<u64, String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(last) = self.ticks().last().filter(|last| **last > tick) {
                return Ok(*last);
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "the console did not get past tick {tick} in {limit:?}:\n{}",
                    self.text()
                ));
            }
            // A file tells nobody that it grew.
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Waits until `done` holds for who holds and waits for the domain.
pub(crate) async fn jobs_until(
    domain: &Domain,
    limit: Duration,
    done: impl Fn(&job_core::Snapshot) -> bool,
) -> bool {
    let deadline = Instant::now() + limit;
    let looking = async {
        while !done(&domain.jobs()) {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout_at(deadline, looking).await.is_ok()
}

/// Starts a guest and waits until its agent answers. Yields how long that took.
pub(crate) async fn boot(rig: &Rig, name: &str) -> Result<(Domain, Duration), Error> {
    let began = Instant::now();
    let domain = rig
        .driver
        .start(rig.guest(name), driver::StartOptions::default())
        .await?;
    domain
        .wait_agent()
        .deadline(Duration::from_secs(60))
        .await?;
    Ok((domain, began.elapsed()))
}

/// Whether nothing is left of the run directory of a guest.
pub(crate) fn is_clean(rig: &Rig, domain: &Domain) -> bool {
    !Path::new(&rig.dir.path().join("run").join(domain.uuid().to_string())).exists()
}

/// A QEMU of our own making, as another tool would start it.
pub(crate) struct Foreign {
    pub(crate) child: Child,
    socket: PathBuf,
}

impl Foreign {
    pub(crate) async fn start(rig: &Rig) -> Self {
        let socket = rig.dir.path().join("qmp.sock");
        let mut command = Command::new(&rig.env.qemu);
        command.args([
            "-M",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-name",
            "foreign",
        ]);
        // It waits for its first client: one that is early would meet it while it sets its monitor up, and may never be
        // answered then (QEMU 7.2).
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=on", socket.display()));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let foreign = Self {
            child: child.expect("QEMU starts"),
            socket,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        // The path is there before anybody listens on it, and a connection to see would take QEMU's one place.
        while !is_listening(&foreign.socket) {
            assert!(Instant::now() < deadline, "QEMU listens on its socket");
            sleep(Duration::from_millis(5)).await;
        }
        foreign
    }

    pub(crate) fn target(&self) -> String {
        format!("unix:{}", self.socket.display())
    }
}

/// Whether somebody listens on that socket, by the kernel's list.
fn is_listening(path: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let list = fs::read_to_string("/proc/net/unix").expect("there is a list of sockets");
    let path = path.to_str().expect("our own path is text");
    list.lines()
        .any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some(ACCEPTS))
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // It may have ended already; it is reaped either way.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}
