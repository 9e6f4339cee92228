//! The journal of migrations as records in the driver's store.
//!
//! One that cannot be read is no migration to anybody, and costs no other guest: [`unreadable`] tells whose it is, and that
//! guest is neither started nor moved while it stands, since nobody knows whether it is here.

use std::sync::Arc;
use std::{fmt, io};

use async_trait::async_trait;
use remote_migrate::{Journal, JournalError, MigrationId, Record, Side};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::records;
use crate::store::{Found, Shelf, StateStore};

/// As text, with which a record's name begins.
const UUID_LENGTH: usize = 36;

/// One durable record a migration and side.
pub(crate) struct StoreJournal {
    store: Arc<dyn StateStore>,
    /// Held while something is written, so that stores take effect in the order of the calls.
    turn: Arc<Mutex<()>>,
}

impl StoreJournal {
    pub(crate) fn new(store: Arc<dyn StateStore>) -> Self {
        Self {
            store,
            turn: Arc::default(),
        }
    }

    /// Does `work` in its turn and to its end, also when the caller leaves.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn StateStore) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, JournalError> {
        let (store, turn) = (self.store.clone(), self.turn.clone().lock_owned().await);
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&*store)
        });
        done.await
            .unwrap_or_else(|error| Err(JournalError::new(error)))
    }
}

/// The record's name tells the guest as well, so that what cannot be read costs that one alone.
fn key(record: &Record) -> String {
    let names = Names {
        migration: record.migration(),
        side: record.side(),
        domain: Some(record.domain()),
    };
    names.to_string()
}

/// What a record's name tells.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Names {
    migration: MigrationId,
    side: Side,
    /// Earlier versions did not say it.
    domain: Option<Uuid>,
}

impl Names {
    fn read(key: &str) -> Option<Self> {
        let (migration, rest) = key.split_at_checked(UUID_LENGTH)?;
        let (side, domain) = match rest.strip_prefix('-')?.split_once('-') {
            Some((side, domain)) => (side, Some(Uuid::try_parse(domain).ok()?)),
            None => (rest.strip_prefix('-')?, None),
        };
        let side = match side {
            "source" => Side::Source,
            "destination" => Side::Destination,
            _ => return None,
        };
        Some(Self {
            migration: MigrationId::from_uuid(Uuid::try_parse(migration).ok()?),
            side,
            domain,
        })
    }

    fn is_of(&self, migration: MigrationId, side: Side) -> bool {
        (self.migration, self.side) == (migration, side)
    }

    fn fits(&self, record: &Record) -> bool {
        self.is_of(record.migration(), record.side())
            && self.domain.is_none_or(|domain| domain == record.domain())
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Source => "source",
            Side::Destination => "destination",
        };
        write!(f, "{}-{side}", self.migration)?;
        match self.domain {
            Some(domain) => write!(f, "-{domain}"),
            None => Ok(()),
        }
    }
}

/// A record that tells nothing of how far its migration came. It stays where it is, since that is what keeps its guest from
/// being started: the migration may be open, and the other host may have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable {
    /// What it is called in the store.
    pub(crate) key: String,
    /// What is wrong with it.
    pub(crate) reason: String,
    /// Whose it is: by its name, or by what is left of its text. Without either it may be any guest's.
    pub(crate) domain: Option<Uuid>,
    side: Option<Side>,
}

impl Unreadable {
    /// Whether it may be of that guest.
    pub(crate) fn may_be_of(&self, domain: Uuid) -> bool {
        self.domain.is_none_or(|known| known == domain)
    }

    /// Whether it may be of that guest on that side.
    pub(crate) fn may_be_at(&self, domain: Uuid, side: Side) -> bool {
        self.may_be_of(domain) && self.side.is_none_or(|known| known == side)
    }
}

/// The records that tell nothing.
///
/// # Errors
///
/// The shelf as a whole cannot be read.
pub(crate) fn unreadable(store: &dyn StateStore) -> io::Result<Vec<Unreadable>> {
    let found = read(store)?.into_iter();
    Ok(found.filter_map(|(_, read)| read.err()).collect())
}

/// A record, or why it is none, and what its name tells.
type Read = (Option<Names>, Result<Record, Unreadable>);

/// All records. One that an earlier version began is found under both names until it goes: the longer one is newer.
fn read(store: &dyn StateStore) -> io::Result<Vec<Read>> {
    let found = store.list(Shelf::Migrations)?.into_iter();
    let mut all: Vec<Read> = found.map(one).collect();
    let newer: Vec<Names> = all.iter().filter_map(|(names, _)| *names).collect();
    all.retain(|(names, _)| {
        names.is_none_or(|names| {
            let is_newer =
                |other: &Names| other.domain.is_some() && other.is_of(names.migration, names.side);
            names.domain.is_some() || !newer.iter().any(is_newer)
        })
    });
    Ok(all)
}

fn one((key, bytes): Found) -> Read {
    let names = Names::read(&key);
    let told = |domain| names.and_then(|names| names.domain).or(domain);
    let (reason, domain) = match bytes {
        Err(error) => (format!("cannot be read: {error}"), None),
        Ok(bytes) => match records::decode::<Record>(&bytes) {
            Ok(record) if names.is_some_and(|names| names.fits(&record)) => {
                return (names, Ok(record));
            }
            Ok(record) => {
                let reason = format!("is a copy: it says that it is {}", self::key(&record));
                (reason, Some(record.domain()))
            }
            Err(error) => (error.to_string(), domain_in(&bytes)),
        },
    };
    let bad = Unreadable {
        key,
        reason,
        domain: told(domain),
        side: names.map(|names| names.side),
    };
    (names, Err(bad))
}

/// The guest that a damaged record, or one of a newer version, still names.
fn domain_in(bytes: &[u8]) -> Option<Uuid> {
    let text = String::from_utf8_lossy(bytes);
    let (_, rest) = text.split_once("\"domain\"")?;
    let quoted = rest
        .trim_start_matches([':', ' ', '\n'])
        .strip_prefix('"')?;
    Uuid::try_parse(quoted.split_once('"')?.0).ok()
}

#[async_trait]
impl Journal for StoreJournal {
    async fn store(&self, record: &Record) -> Result<(), JournalError> {
        let key = key(record);
        let bytes = records::encode(record).map_err(JournalError::new)?;
        self.blocking(move |store| {
            let put = store.put(Shelf::Migrations, &key, &bytes);
            put.map_err(JournalError::new)
        })
        .await
    }

    async fn load(
        &self,
        migration: MigrationId,
        side: Side,
    ) -> Result<Option<Record>, JournalError> {
        self.blocking(move |store| {
            let is_it = |names: &Names| names.is_of(migration, side);
            let found = read(store).map_err(JournalError::new)?.into_iter();
            let mut mine = found.filter(|(names, _)| names.as_ref().is_some_and(is_it));
            match mine.next() {
                None => Ok(None),
                Some((_, Ok(record))) => Ok(Some(record)),
                // Not the same as none: of one that is not known the other side says what is true of a lost journal.
                Some((_, Err(bad))) => {
                    let text = format!("the record {} {}", bad.key, bad.reason);
                    Err(JournalError::new(text))
                }
            }
        })
        .await
    }

    /// Those that can be read; [`unreadable`] has the others, and their guests are refused wherever these are asked for.
    async fn list(&self) -> Result<Vec<Record>, JournalError> {
        self.blocking(|store| {
            let found = read(store).map_err(JournalError::new)?.into_iter();
            Ok(found.filter_map(|(_, read)| read.ok()).collect())
        })
        .await
    }

    async fn remove(&self, migration: MigrationId, side: Side) -> Result<(), JournalError> {
        self.blocking(move |store| {
            let mut found = store.list(Shelf::Migrations).map_err(JournalError::new)?;
            // The older one first, which has the shorter name: alone it would be believed.
            found.sort_by_key(|(key, _)| key.len());
            for (key, _) in found {
                if Names::read(&key).is_some_and(|names| names.is_of(migration, side)) {
                    let removed = store.remove(Shelf::Migrations, &key);
                    removed.map_err(JournalError::new)?;
                }
            }
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use remote_migrate::{Epoch, RunState, SourceRecord, SourceStage};

    use super::*;
    use crate::store::MemoryStore;

    fn record() -> Record {
        Record::Source(SourceRecord {
            migration: MigrationId::random(),
            domain: Uuid::new_v4(),
            epoch: Epoch::FIRST,
            run: RunState::Running,
            peer: "there".into(),
            stage: SourceStage::HandingOver,
        })
    }

    fn old_key(record: &Record) -> String {
        format!("{}-source", record.migration())
    }

    fn journal() -> (Arc<MemoryStore>, StoreJournal) {
        let store = Arc::new(MemoryStore::default());
        (store.clone(), StoreJournal::new(store))
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_read_costs_its_own_guest_alone() {
        let (store, journal) = journal();
        let (good, bad) = (record(), record());
        journal.store(&good).await.unwrap();
        let newer = br#"{"format": 99, "record": []}"#;
        for bytes in [b"".as_slice(), b"\0\0\0\0", b"{\"format\": 2", newer] {
            store.put(Shelf::Migrations, &key(&bad), bytes).unwrap();
            assert_eq!(journal.list().await.unwrap(), vec![good.clone()]);
            let loaded = journal.load(good.migration(), Side::Source).await;
            assert_eq!(loaded.unwrap(), Some(good.clone()));
            // Never the same as none.
            let loaded = journal.load(bad.migration(), Side::Source).await;
            loaded.expect_err("it is there");
            let told = unreadable(&*store).unwrap();
            assert_eq!(told.len(), 1);
            assert_eq!(told[0].domain, Some(bad.domain()));
            assert!(!told[0].may_be_of(good.domain()));
            assert!(told[0].may_be_at(bad.domain(), Side::Source));
            assert!(!told[0].may_be_at(bad.domain(), Side::Destination));
        }
    }

    #[tokio::test]
    async fn under_an_old_name_the_text_tells_the_guest_and_where_it_does_not_any_may_be_meant() {
        let (store, journal) = journal();
        let bad = record();
        let bytes = records::encode(&bad).unwrap();
        let key = old_key(&bad);
        let cut = &bytes[..bytes.len() - 9];
        store.put(Shelf::Migrations, &key, cut).unwrap();
        let told = unreadable(&*store).unwrap();
        assert_eq!(told[0].domain, Some(bad.domain()));
        let zeroed = vec![0; bytes.len()];
        store.put(Shelf::Migrations, &key, &zeroed).unwrap();
        let told = unreadable(&*store).unwrap();
        assert!(told[0].may_be_of(Uuid::new_v4()));
        assert_eq!(journal.list().await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_record_under_an_old_name_is_read_replaced_and_forgotten() {
        let (store, journal) = journal();
        let old = record();
        let bytes = records::encode(&old).unwrap();
        store
            .put(Shelf::Migrations, &old_key(&old), &bytes)
            .unwrap();
        assert_eq!(journal.list().await.unwrap(), vec![old.clone()]);
        let Record::Source(mut new) = old.clone() else {
            unreachable!("it is the source's");
        };
        new.stage = SourceStage::Released;
        let new = Record::Source(new);
        journal.store(&new).await.unwrap();
        assert_eq!(journal.list().await.unwrap(), vec![new.clone()]);
        let loaded = journal.load(new.migration(), Side::Source).await;
        assert_eq!(loaded.unwrap(), Some(new.clone()));
        // The older one is not believed in the place of one that cannot be read.
        store.put(Shelf::Migrations, &key(&new), b"").unwrap();
        assert_eq!(journal.list().await.unwrap(), []);
        journal.remove(new.migration(), Side::Source).await.unwrap();
        assert!(store.list(Shelf::Migrations).unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_copy_under_another_name_is_not_taken_for_a_record() {
        let (store, journal) = journal();
        let record = record();
        let bytes = records::encode(&record).unwrap();
        store.put(Shelf::Migrations, "copy", &bytes).unwrap();
        assert_eq!(journal.list().await.unwrap(), []);
        let told = unreadable(&*store).unwrap();
        assert_eq!(told[0].domain, Some(record.domain()));
    }
}
