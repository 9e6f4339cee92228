//! This process as the system sees it: descriptors, threads, memory, and what a plugin must leave
//! alone.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::report::{Check, Trouble, must};

/// How long what a plugin closes on threads of its own may take to be gone.
const SETTLES: Duration = Duration::from_secs(5);
/// Without a sign of life for this long, a call of the plugin blocks.
const STANDSTILL: Duration = Duration::from_secs(20);

/// What can leak and be counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
}

impl Held {
    pub(crate) fn now() -> io::Result<Self> {
        Ok(Self {
            descriptors: fs::read_dir("/proc/self/fd")?.count(),
            threads: fs::read_dir("/proc/self/task")?.count(),
        })
    }

    /// What is held once this much or less is, or after a while anyway.
    pub(crate) fn settled(self) -> io::Result<Self> {
        let give_up = Instant::now() + SETTLES;
        loop {
            let now = Self::now()?;
            let is_back = now.descriptors <= self.descriptors && now.threads <= self.threads;
            if is_back || Instant::now() > give_up {
                return Ok(now);
            }
            // The system has no event for "a thread of somebody else's has ended".
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Breaks the clause unless all that is held now was held before.
    pub(crate) fn must_be_back(self) -> Check {
        let now = self.settled()?;
        let is_back = now.descriptors <= self.descriptors && now.threads <= self.threads;
        must(is_back, format!("{self:?} before, {now:?} after"))
    }
}

/// Resident memory in KiB, exactly: the sum in `status` lags behind by some pages a processor.
pub(crate) fn resident_kib() -> Result<u64, Trouble> {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
    rollup
        .lines()
        .find_map(|line| {
            line.strip_prefix("Rss:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .ok_or_else(|| Trouble::NotTried("the kernel does not tell memory exactly".to_owned()))
}

/// What clause 14.1 forbids a plugin to change.
pub(crate) struct Manners {
    directory: PathBuf,
    environment: Vec<(std::ffi::OsString, std::ffi::OsString)>,
    mask_and_signals: Vec<String>,
}

impl Manners {
    pub(crate) fn now() -> io::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let told = ["Umask:", "SigBlk:", "SigIgn:", "SigCgt:"];
        Ok(Self {
            directory: std::env::current_dir()?,
            environment: std::env::vars_os().collect(),
            mask_and_signals: status
                .lines()
                .filter(|line| told.iter().any(|name| line.starts_with(name)))
                .map(|line| line.replace('\t', " "))
                .collect(),
        })
    }

    /// Breaks the clause unless they are the same now.
    pub(crate) fn must_be_kept(&self) -> Check {
        let now = Self::now()?;
        must(self.directory == now.directory, "the directory changed")?;
        must(
            self.environment == now.environment,
            "the environment changed",
        )?;
        let (before, after) = (
            self.mask_and_signals.join(" "),
            now.mask_and_signals.join(" "),
        );
        must(before == after, format!("{before} before, {after} after"))
    }
}

static LAST_BEAT: AtomicU64 = AtomicU64::new(0);

/// Says that the kit goes on.
pub(crate) fn beat() {
    LAST_BEAT.store(seconds(), Ordering::Relaxed);
}

/// Ends the process once the kit stands still: nothing else can end a call that blocks.
pub(crate) fn watch_for_standstill() {
    beat();
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_secs(1));
            let still = seconds().saturating_sub(LAST_BEAT.load(Ordering::Relaxed));
            if still > STANDSTILL.as_secs() {
                println!("BROKEN 3.1   no call blocks: nothing has moved for {still} s");
                std::process::exit(1);
            }
        }
    });
}

fn seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
