//! Where records outlive the daemon: bytes on three shelves, each record replaced as a whole.
//!
//! ```text
//!  RUN_DIR/records/UUID.json          Shelf::Running      of the guests that run; gone with the host, so never flushed
//!  RUN_DIR/attached/UUID.json         Shelf::Attached     of those that another tool started; neither
//!  STATE_DIR/domains/UUID.json        Shelf::Definitions  flushed to the disk before `put` returns
//!  STATE_DIR/migrations/ID-SIDE-UUID.json
//!                                     Shelf::Migrations   flushed, too; a history, since guests stand still meanwhile
//! ```
//!
//! Knows no record's meaning ([`records`](crate::records) does). [`StateStore`] is the seam for daemons that keep state
//! in a database.

mod history;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "a store must have a place for each"
)]
pub enum Shelf {
    /// Guests that run, and what is being done with them. Means nothing after the host was started anew.
    Running,
    /// Guests that another tool started, and that were attached. Means nothing after the host was started anew.
    Attached,
    /// What guests are, whether they run or not.
    Definitions,
    /// Migrations whose end is not known on both sides.
    Migrations,
}

impl Shelf {
    const fn folder(self) -> &'static str {
        match self {
            Self::Running => "records",
            Self::Attached => "attached",
            Self::Definitions => "domains",
            Self::Migrations => "migrations",
        }
    }

    /// Whether a guest may stand still while a record is written.
    const fn is_urgent(self) -> bool {
        matches!(self, Self::Migrations)
    }

    /// Whether a record must survive a loss of power.
    #[must_use]
    pub const fn is_durable(self) -> bool {
        !matches!(self, Self::Running | Self::Attached)
    }
}

/// A record as it was found: its key, and its bytes or why they cannot be read. One that cannot costs no other.
pub type Found = (String, io::Result<Vec<u8>>);

/// Keeps records. Called on threads that may block, never in a task of the runtime; calls for one key come one after
/// another.
///
/// A key is a file name without a suffix: of letters, digits and `-`.
pub trait StateStore: Send + Sync {
    /// Replaces a record as a whole, and returns when it would survive the daemon, or, on a
    /// [durable](Shelf::is_durable) shelf, the host.
    ///
    /// # Errors
    ///
    /// The new record is there or its predecessor is, whole in either case.
    fn put(&self, shelf: Shelf, key: &str, record: &[u8]) -> io::Result<()>;

    /// All records of a shelf.
    ///
    /// # Errors
    ///
    /// The shelf as a whole cannot be read.
    fn list(&self, shelf: Shelf) -> io::Result<Vec<Found>>;

    /// Forgets a record; one that is not there is forgotten already.
    ///
    /// # Errors
    ///
    /// The record may still be there.
    fn remove(&self, shelf: Shelf, key: &str) -> io::Result<()>;

    /// Puts a record that makes no sense where it is in nobody's way and an operator finds it. Yields the place.
    ///
    /// # Errors
    ///
    /// It is still where it was.
    fn set_aside(&self, shelf: Shelf, key: &str) -> io::Result<String>;
}

/// One JSON file a record, below the run directory and the state directory.
#[derive(Debug)]
pub struct FileStore {
    folders: [PathBuf; 4],
}

impl FileStore {
    /// Keeps records of running guests below `run_dir`, all others below `state_dir`. Makes the folders.
    ///
    /// # Errors
    ///
    /// A folder cannot be made.
    pub fn new(run_dir: &Path, state_dir: &Path) -> io::Result<Self> {
        let store = Self {
            // In the order of the shelves: each is its own index.
            folders: [
                Shelf::Running,
                Shelf::Attached,
                Shelf::Definitions,
                Shelf::Migrations,
            ]
            .map(|shelf| {
                let below = if shelf.is_durable() {
                    state_dir
                } else {
                    run_dir
                };
                below.join(shelf.folder())
            }),
        };
        for folder in &store.folders {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)?;
        }
        Ok(store)
    }

    fn folder(&self, shelf: Shelf) -> &Path {
        &self.folders[shelf as usize]
    }

    fn path(&self, shelf: Shelf, key: &str) -> PathBuf {
        self.folder(shelf).join(format!("{key}.json"))
    }

    /// Puts `text` in the place of what was under that key.
    fn replace(&self, shelf: Shelf, key: &str, text: &[u8]) -> io::Result<()> {
        let new = self.folder(shelf).join(format!(".{key}.new"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        let written = file.write_all(text).and_then(|()| {
            if shelf.is_durable() {
                file.sync_all()?;
            }
            fs::rename(&new, self.path(shelf, key))
        });
        if let Err(error) = written {
            // A disk that is full keeps nothing half written; the first failure is the one to tell.
            let _removed = fs::remove_file(&new);
            return Err(error);
        }
        self.flush_folder(shelf)
    }

    fn flush_folder(&self, shelf: Shelf) -> io::Result<()> {
        if shelf.is_durable() {
            File::open(self.folder(shelf))?.sync_all()?;
        }
        Ok(())
    }
}

impl StateStore for FileStore {
    fn put(&self, shelf: Shelf, key: &str, record: &[u8]) -> io::Result<()> {
        if shelf.is_urgent() {
            if history::add(&self.path(shelf, key), record)? {
                return Ok(());
            }
            return self.replace(shelf, key, &history::of(record)?);
        }
        self.replace(shelf, key, record)
    }

    fn list(&self, shelf: Shelf) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.folder(shelf))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // What begins with a dot was being written when a daemon ended: its predecessor counts.
            let Some(key) = name
                .strip_suffix(".json")
                .filter(|key| !key.starts_with('.'))
            else {
                continue;
            };
            let mut read = fs::read(&path);
            if let Ok(text) = &mut read
                && shelf.is_urgent()
            {
                *text = history::last(text).to_vec();
            }
            // One that was forgotten since the folder was read is none.
            if read.as_ref().err().map(io::Error::kind) != Some(io::ErrorKind::NotFound) {
                found.push((key.to_owned(), read));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    fn remove(&self, shelf: Shelf, key: &str) -> io::Result<()> {
        match fs::remove_file(self.path(shelf, key)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.flush_folder(shelf),
        }
    }

    fn set_aside(&self, shelf: Shelf, key: &str) -> io::Result<String> {
        let path = self.path(shelf, key);
        // An earlier one is not overwritten: it may be all that is left of a guest.
        let aside = (1_u32..)
            .map(|number| path.with_extension(format!("json.bad-{number}")))
            .find(|aside| !aside.exists())
            .expect("numbers do not run out");
        fs::rename(&path, &aside)?;
        Ok(aside.display().to_string())
    }
}

/// A store that lives as long as the process: for tests, and for daemons whose guests end with them.
#[derive(Debug, Default)]
pub struct MemoryStore {
    records: Mutex<BTreeMap<(Shelf, String), Vec<u8>>>,
}

impl MemoryStore {
    fn with<R>(&self, change: impl FnOnce(&mut BTreeMap<(Shelf, String), Vec<u8>>) -> R) -> R {
        // Every change is one insert or remove, so a poisoned map is still whole.
        change(&mut self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl StateStore for MemoryStore {
    fn put(&self, shelf: Shelf, key: &str, record: &[u8]) -> io::Result<()> {
        self.with(|all| all.insert((shelf, key.to_owned()), record.to_owned()));
        Ok(())
    }

    fn list(&self, shelf: Shelf) -> io::Result<Vec<Found>> {
        Ok(self.with(|all| {
            let mine = all.iter().filter(|((place, _), _)| *place == shelf);
            mine.map(|((_, key), record)| (key.clone(), Ok(record.clone())))
                .collect()
        }))
    }

    fn remove(&self, shelf: Shelf, key: &str) -> io::Result<()> {
        self.with(|all| all.remove(&(shelf, key.to_owned())));
        Ok(())
    }

    fn set_aside(&self, shelf: Shelf, key: &str) -> io::Result<String> {
        self.remove(shelf, key)?;
        Ok("nowhere: it was kept in memory only".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, FileStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::new(&dir.path().join("run"), &dir.path().join("state")).unwrap();
        (dir, store)
    }

    fn keys(store: &dyn StateStore, shelf: Shelf) -> Vec<String> {
        let found = store.list(shelf).unwrap();
        found.into_iter().map(|(key, _)| key).collect()
    }

    fn newest(store: &dyn StateStore, shelf: Shelf) -> Vec<u8> {
        let mut found = store.list(shelf).unwrap();
        assert_eq!(found.len(), 1);
        found.remove(0).1.unwrap()
    }

    #[test]
    fn a_record_is_replaced_found_and_forgotten() {
        let (_dir, files) = store();
        for store in [&files as &dyn StateStore, &MemoryStore::default()] {
            store.put(Shelf::Definitions, "a", b"1").unwrap();
            store.put(Shelf::Definitions, "a", b"2").unwrap();
            store.put(Shelf::Running, "a", b"3").unwrap();
            let found = store.list(Shelf::Definitions).unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].1.as_ref().unwrap(), b"2");
            store.remove(Shelf::Definitions, "a").unwrap();
            store.remove(Shelf::Definitions, "a").unwrap();
            assert!(keys(store, Shelf::Definitions).is_empty());
            assert_eq!(keys(store, Shelf::Running), ["a"]);
        }
    }

    #[test]
    fn what_was_half_written_is_not_found() {
        let (dir, store) = store();
        store.put(Shelf::Running, "a", b"1").unwrap();
        let folder = dir.path().join("run/records");
        fs::write(folder.join(".a.new"), b"{\"for").unwrap();
        assert_eq!(keys(&store, Shelf::Running), ["a"]);
    }

    #[test]
    fn what_was_put_last_counts_on_every_shelf_also_after_an_earlier_release() {
        let (_dir, store) = store();
        for shelf in [Shelf::Definitions, Shelf::Migrations] {
            // As earlier releases left it.
            fs::write(store.path(shelf, "a"), b"{\n}\n").unwrap();
            assert_eq!(newest(&store, shelf), b"{\n}\n");
            for text in [&b"1"[..], b"{\n2}", b"3"] {
                store.put(shelf, "a", text).unwrap();
                assert_eq!(newest(&store, shelf), text);
            }
            store.remove(shelf, "a").unwrap();
            assert!(keys(&store, shelf).is_empty());
        }
    }

    #[test]
    fn a_record_set_aside_is_out_of_the_way_and_not_overwritten() {
        let (_dir, store) = store();
        let mut places = Vec::new();
        for text in [b"1", b"2"] {
            store.put(Shelf::Running, "a", text).unwrap();
            places.push(store.set_aside(Shelf::Running, "a").unwrap());
        }
        assert!(keys(&store, Shelf::Running).is_empty());
        assert_eq!(fs::read(&places[0]).unwrap(), b"1");
        assert_eq!(fs::read(&places[1]).unwrap(), b"2");
    }

    #[test]
    fn a_store_that_cannot_write_keeps_the_predecessor() {
        let (dir, store) = store();
        store.put(Shelf::Running, "a", b"1").unwrap();
        // A folder in the place of the new file: as root, permissions would refuse nothing.
        fs::create_dir(dir.path().join("run/records/.a.new")).unwrap();
        store.put(Shelf::Running, "a", b"2").expect_err("refused");
        let found = store.list(Shelf::Running).unwrap();
        assert_eq!(found[0].1.as_ref().unwrap(), b"1");
    }
}
