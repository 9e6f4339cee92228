//! The journal of migrations as records in the driver's store.

use std::sync::Arc;

use async_trait::async_trait;
use remote_migrate::{Journal, JournalError, MigrationId, Record, Side};
use tokio::sync::Mutex;

use crate::records;
use crate::store::{Shelf, StateStore};

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

fn key(migration: MigrationId, side: Side) -> String {
    let side = match side {
        Side::Source => "source",
        Side::Destination => "destination",
    };
    format!("{migration}-{side}")
}

fn list(store: &dyn StateStore) -> Result<Vec<Record>, JournalError> {
    let found = store.list(Shelf::Migrations).map_err(JournalError::new)?;
    let mut all = Vec::new();
    for (key, bytes) in found {
        let damaged = |reason: String| JournalError::new(format!("the record {key} {reason}"));
        let bytes = bytes.map_err(|error| damaged(format!("cannot be read: {error}")))?;
        // Not set aside: a guest whose owner is not known must not be taken for one without a migration.
        all.push(records::decode(&bytes).map_err(|error| damaged(error.to_string()))?);
    }
    Ok(all)
}

#[async_trait]
impl Journal for StoreJournal {
    async fn store(&self, record: &Record) -> Result<(), JournalError> {
        let key = key(record.migration(), record.side());
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
        let all = self.blocking(list).await?;
        let is_it = |record: &Record| record.migration() == migration && record.side() == side;
        Ok(all.into_iter().find(is_it))
    }

    async fn list(&self) -> Result<Vec<Record>, JournalError> {
        self.blocking(list).await
    }

    async fn remove(&self, migration: MigrationId, side: Side) -> Result<(), JournalError> {
        let key = key(migration, side);
        self.blocking(move |store| {
            let removed = store.remove(Shelf::Migrations, &key);
            removed.map_err(JournalError::new)
        })
        .await
    }
}
