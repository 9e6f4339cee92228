//! Where a freeze is written down before it is asked for.
//!
//! A record is small and there is one a frozen guest, so the store that comes with the crate is one
//! file, rewritten whole. It knows no agent.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use crate::command::{Command, FsfreezeFreeze};
use crate::error::Error;

/// One freeze that may be in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LeaseRecord {
    /// Its own name, random.
    pub id: String,
    /// Which guest, as the plan named it.
    pub guest: String,
    /// When it was written, in milliseconds since 1970.
    pub since_ms: u64,
    /// When its time is over, by the same clock.
    pub until_ms: u64,
    /// The mount points, if not all.
    #[serde(default)]
    pub mountpoints: Vec<String>,
}

impl LeaseRecord {
    pub(super) fn new(guest: &str, hold: Duration, mountpoints: &[String]) -> Self {
        let since_ms = unix_ms();
        let hold = u64::try_from(hold.as_millis()).unwrap_or(u64::MAX);
        Self {
            id: format!("{:016x}", RandomState::new().build_hasher().finish()),
            guest: guest.to_owned(),
            since_ms,
            until_ms: since_ms.saturating_add(hold),
            mountpoints: mountpoints.to_vec(),
        }
    }

    /// How long ago it was written, by the wall clock.
    pub(super) fn age(&self) -> Duration {
        Duration::from_millis(unix_ms().saturating_sub(self.since_ms))
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// Keeps the records of freezes. Its calls may block; they are made where that is allowed.
///
/// One process at a time: a record in it counts as left behind when [`recover`](super::recover) asks.
pub trait LeaseStore: Send + Sync {
    /// Adds a record. Once this returns, it survives the process, and the machine.
    ///
    /// # Errors
    ///
    /// It cannot be written; then nothing is frozen.
    fn put(&self, record: &LeaseRecord) -> io::Result<()>;

    /// Removes the record of that id. One that is not there is no error.
    ///
    /// # Errors
    ///
    /// It cannot be removed, and may be found again.
    fn remove(&self, id: &str) -> io::Result<()>;

    /// All records.
    ///
    /// # Errors
    ///
    /// They cannot be read. Then nobody knows who is frozen, and nothing may be taken for thawed.
    fn pending(&self) -> io::Result<Vec<LeaseRecord>>;
}

/// Records in memory: for tests, and for those who do without thawing after a restart.
#[derive(Debug, Default)]
pub struct MemoryLeases(Mutex<BTreeMap<String, LeaseRecord>>);

impl LeaseStore for MemoryLeases {
    fn put(&self, record: &LeaseRecord) -> io::Result<()> {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        records.insert(record.id.clone(), record.clone());
        Ok(())
    }

    fn remove(&self, id: &str) -> io::Result<()> {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        records.remove(id);
        Ok(())
    }

    fn pending(&self) -> io::Result<Vec<LeaseRecord>> {
        let records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(records.values().cloned().collect())
    }
}

/// Who changes the records for longer than this hangs.
const LONGEST_CHANGE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(2);

/// Records in one file of JSON.
///
/// Each change writes a file beside it, syncs that to the disk, renames it over the old one and
/// syncs the folder: a crash at any point leaves the old file or the new one. Changes of other
/// stores of the same file, in this process or another, are kept out by a lock on a file beside it.
#[derive(Debug)]
pub struct FileLeases {
    path: PathBuf,
}

impl FileLeases {
    /// A store in that file. The file appears with the first record, its folder must be there.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    fn change(&self, change: impl FnOnce(&mut Vec<LeaseRecord>) -> bool) -> io::Result<()> {
        let _one = lock(&beside(&self.path, ".lock"))?;
        let mut records = read(&self.path)?;
        if change(&mut records) {
            replace(&self.path, &serde_json::to_vec(&records)?)?;
        }
        Ok(())
    }
}

impl LeaseStore for FileLeases {
    fn put(&self, record: &LeaseRecord) -> io::Result<()> {
        self.change(|records| {
            records.retain(|known| known.id != record.id);
            records.push(record.clone());
            true
        })
    }

    fn remove(&self, id: &str) -> io::Result<()> {
        self.change(|records| {
            let before = records.len();
            records.retain(|known| known.id != id);
            records.len() != before
        })
    }

    fn pending(&self) -> io::Result<Vec<LeaseRecord>> {
        read(&self.path)
    }
}

fn read(path: &Path) -> io::Result<Vec<LeaseRecord>> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Keeps everybody else out for as long as the file lives. A change takes milliseconds, and a process
/// that was killed holds nothing, so one that is waited for longer hangs.
fn lock(path: &Path) -> io::Result<File> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if began.elapsed() >= LONGEST_CHANGE => {
                let text = format!("{} is locked for {LONGEST_CHANGE:?}", path.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            // A wait for the lock itself would have no end.
            Err(TryLockError::WouldBlock) => thread::sleep(LOOK),
        }
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let draft_name = beside(path, ".draft");
    let mut draft = File::create(&draft_name)?;
    draft.write_all(content)?;
    draft.sync_all()?;
    fs::rename(&draft_name, path)?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

/// A store as the tasks of this crate use it: on threads that may block.
#[derive(Clone)]
pub(super) struct Shelf(pub(super) Arc<dyn LeaseStore>);

impl Shelf {
    pub(super) async fn put(&self, record: &LeaseRecord) -> Result<(), Error> {
        let record = record.clone();
        self.with(move |store| store.put(&record)).await
    }

    pub(super) async fn remove(&self, record: &LeaseRecord) -> Result<(), Error> {
        let id = record.id.clone();
        self.with(move |store| store.remove(&id)).await
    }

    /// The records of one guest.
    pub(super) async fn of(&self, guest: &str) -> Result<Vec<LeaseRecord>, Error> {
        let mut records = self.with(|store| store.pending()).await?;
        records.retain(|record| record.guest == guest);
        Ok(records)
    }

    async fn with<T: Send + 'static>(
        &self,
        act: impl FnOnce(&dyn LeaseStore) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let store = self.0.clone();
        let done = spawn_blocking(move || act(&*store)).await;
        let done = done.unwrap_or_else(|stopped| Err(io::Error::other(stopped)));
        done.map_err(|error| Error::lease_store(FsfreezeFreeze::NAME, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(guest: &str) -> LeaseRecord {
        LeaseRecord::new(guest, Duration::from_secs(60), &["/mnt".to_owned()])
    }

    #[test]
    fn two_stores_of_one_file_lose_nothing_of_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("leases.json");
        let left: Vec<_> = (0..4).map(|number| record(&number.to_string())).collect();
        thread::scope(|scope| {
            for record in &left {
                let store = FileLeases::new(&path);
                scope.spawn(move || {
                    for _ in 0..10 {
                        store.put(record).unwrap();
                        store.remove(&record.id).unwrap();
                    }
                    store.put(record).unwrap();
                });
            }
        });
        let mut found = FileLeases::new(&path).pending().unwrap();
        found.sort_by(|a, b| a.guest.cmp(&b.guest));
        assert_eq!(found, left);
    }

    #[test]
    fn a_file_keeps_its_records_for_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("leases.json");
        assert_eq!(FileLeases::new(&path).pending().unwrap(), []);
        let (one, two) = (record("one"), record("two"));
        let store = FileLeases::new(&path);
        for record in [&one, &two, &one] {
            store.put(record).unwrap();
        }
        drop(store);
        let store = FileLeases::new(&path);
        assert_eq!(store.pending().unwrap(), [two.clone(), one.clone()]);
        store.remove(&two.id).unwrap();
        store.remove("never there").unwrap();
        assert_eq!(FileLeases::new(&path).pending().unwrap(), [one]);
        assert_eq!(
            fs::read_dir(&folder).unwrap().count(),
            2,
            "no draft is left beside the records and their lock"
        );
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_taken_for_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("leases.json");
        fs::write(&path, b"[{\"id\":").unwrap();
        let store = FileLeases::new(&path);
        store.pending().unwrap_err();
        store.put(&record("one")).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"[{\"id\":", "nothing is lost");
        FileLeases::new(folder.path().join("no/such/folder"))
            .put(&record("one"))
            .unwrap_err();
    }
}
