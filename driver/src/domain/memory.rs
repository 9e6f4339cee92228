//! What the domain writes down for a daemon that comes after this one: the guest that runs, and its definition.
//!
//! Every write is done on a thread that may block, and goes on to its end when its caller is dropped.

use std::sync::{Arc, Mutex, PoisonError};

use tracing::warn;

use crate::domain::Inner;
use crate::error::{Cause, io};
use crate::guest::Guest;
use crate::ops::block_jobs::drop_copies;
use crate::records::{self, Attached, Defined, Interrupted, Running, Work};
use crate::store::{Shelf, StateStore};

impl Inner {
    /// Changes the record of the guest that runs. It is written when this returns.
    pub(crate) async fn note(
        &self,
        change: impl FnOnce(&mut Option<Running>) + Send + 'static,
    ) -> Result<(), Cause> {
        let mut place = self.running.clone().lock_owned().await;
        let (store, key) = (self.context.store.clone(), self.uuid.to_string());
        let shown = self.description.clone();
        // The lock goes with the work, so that writes follow one another also when their callers leave.
        let written =
            tokio::task::spawn_blocking(move || write(&*store, &key, &mut place, &shown, change));
        written
            .await
            .unwrap_or_else(|error| Err(Cause::Panicked(error.to_string())))
    }

    /// As [`note`](Self::note), on a thread that may block.
    pub(crate) fn note_blocking(
        &self,
        change: impl FnOnce(&mut Option<Running>),
    ) -> Result<(), Cause> {
        let (store, key) = (&*self.context.store, self.uuid.to_string());
        let mut place = self.running.blocking_lock();
        write(store, &key, &mut place, &self.description, change)
    }

    /// As [`noted`](Self::noted), on a thread that may block.
    pub(crate) fn noted_blocking(&self) -> Option<Running> {
        self.running.blocking_lock().clone()
    }

    /// What is written of the guest that runs.
    pub(crate) async fn noted(&self) -> Option<Running> {
        self.running.lock().await.clone()
    }

    /// What an earlier daemon wrote, before anybody sees the domain.
    pub(crate) fn take_up(&self, mut record: Running) {
        if let Some(job) = &mut record.job {
            job.is_cut_short = true;
        }
        record.is_thaw_due = !record.freezes.is_empty();
        show(&self.description, Some(&record));
        if let Ok(mut place) = self.running.try_lock() {
            *place = Some(record);
        }
    }

    /// The life of a guest that an earlier driver froze and did not thaw, once: whoever asks sees to it.
    pub(crate) async fn take_due_thaw(&self) -> Option<uuid::Uuid> {
        let mut place = self.running.lock().await;
        let record = place.as_mut().filter(|record| record.is_thaw_due)?;
        record.is_thaw_due = false;
        Some(record.life)
    }

    /// That async job has ended: nothing is to be finished or undone for it any more.
    pub(crate) async fn job_is_over(&self, id: u64) {
        // Most write nothing down: a query is not to pay for a thread that finds nothing to do. Only the job itself notes it.
        let is_noted = |record: &Running| record.job.as_ref().is_some_and(|job| job.id == id);
        if !self.running.lock().await.as_ref().is_some_and(is_noted) {
            return;
        }
        let noted = self.note(move |record| {
            if let Some(record) = record
                && let Some(job) = &record.job
                && job.id == id
                && !job.is_cut_short
            {
                record.job = None;
            }
        });
        if let Err(error) = noted.await {
            // A later daemon will look at what the job did, and find it done or undone.
            warn!(domain = %self.name, ?error, "the end of a job was not written down");
        }
    }

    /// That async job was cut short while QEMU may go on with it: its note stays until it is settled. Says whether there is
    /// one.
    pub(crate) async fn job_is_cut_short(&self, id: u64) -> bool {
        let mut place = self.running.lock().await;
        let noted = place.as_mut().and_then(|record| record.job.as_mut());
        match noted.filter(|job| job.id == id) {
            Some(job) => {
                job.is_cut_short = true;
                true
            }
            None => false,
        }
    }

    /// Whether somebody paused the guest since it began to leave. What its migration itself has written says so only from
    /// its next step on.
    pub(crate) async fn note_pause(&self, is_paused: bool) -> Result<(), Cause> {
        let leaves = |job: &&mut Interrupted| job.work == Work::MigrationOut;
        let noted = self.note(move |record| {
            let job = record.as_mut().and_then(|record| record.job.as_mut());
            if let Some(job) = job.filter(leaves) {
                job.is_paused = is_paused;
            }
        });
        noted.await
    }

    /// Nothing is to be finished or undone any more, whoever began it.
    pub(crate) async fn work_is_over(&self) -> Result<(), Cause> {
        let noted = self.note(|record| {
            if let Some(record) = record {
                record.job = None;
            }
        });
        noted.await
    }

    /// Nothing is left of the guest: its directory goes, and then what is written of it.
    pub(crate) async fn forget_guest(&self) {
        let directory = self.run_dir();
        match tokio::fs::remove_dir_all(&directory).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                warn!(domain = %self.name, directory = %directory.display(), %error, "run directory was not removed");
            }
            _ => {}
        }
        if let Some(record) = self.noted().await
            && let Err(error) = drop_copies(self, &record).await
        {
            let error = format!("{error:#}");
            warn!(domain = %self.name, error, "the copy of a mirror was left behind");
        }
        if let Err(error) = self.note(|record| *record = None).await {
            warn!(domain = %self.name, ?error, "the end of the guest was not written down");
        }
    }

    /// Writes or forgets what a later driver must know of a guest that was attached.
    pub(crate) async fn note_attached(&self, record: Option<Attached>) -> Result<(), Cause> {
        let (store, key, new) = (
            self.context.store.clone(),
            self.uuid.to_string(),
            record.clone(),
        );
        let put = move || put(&*store, Shelf::Attached, &key, new.as_ref());
        tokio::task::spawn_blocking(put)
            .await
            .unwrap_or_else(|error| Err(Cause::Panicked(error.to_string())))?;
        self.take_up_attached(record);
        Ok(())
    }

    /// What is written of a guest that was attached.
    pub(crate) fn take_up_attached(&self, record: Option<Attached>) {
        *self.attached.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    pub(crate) fn attached(&self) -> Option<Attached> {
        self.attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Writes the definition, if it is one that is kept. It is on the disk when this returns.
    pub(crate) async fn store_definition(&self) -> Result<(), Cause> {
        let records = self.records.get();
        let Some(guest) = records.definition.clone().filter(|_| records.persistent) else {
            return Ok(());
        };
        self.put_definition(Some(Defined {
            guest,
            autostart: records.autostart,
            moved_away: records.moved_away,
        }))
        .await
    }

    /// Writes or forgets the definition.
    pub(crate) async fn put_definition(&self, defined: Option<Defined>) -> Result<(), Cause> {
        let (store, key) = (self.context.store.clone(), self.uuid.to_string());
        let put = move || put(&*store, Shelf::Definitions, &key, defined.as_ref());
        tokio::task::spawn_blocking(put)
            .await
            .unwrap_or_else(|error| Err(Cause::Panicked(error.to_string())))
    }
}

/// Lets those who ask see the description of the guest as it runs.
fn show(shown: &Mutex<Option<Arc<Guest>>>, record: Option<&Running>) {
    let next = record.map(|record| Arc::new(record.guest.clone()));
    let mut place = shown.lock().unwrap_or_else(PoisonError::into_inner);
    let last = std::mem::replace(&mut *place, next);
    drop(place);
    drop(last);
}

fn write(
    store: &dyn StateStore,
    key: &str,
    place: &mut Option<Running>,
    shown: &Mutex<Option<Arc<Guest>>>,
    change: impl FnOnce(&mut Option<Running>),
) -> Result<(), Cause> {
    let mut next = place.clone();
    change(&mut next);
    if next != *place {
        put(store, Shelf::Running, key, next.as_ref())?;
        show(shown, next.as_ref());
        *place = next;
    }
    Ok(())
}

fn put<T: serde::Serialize>(
    store: &dyn StateStore,
    shelf: Shelf,
    key: &str,
    record: Option<&T>,
) -> Result<(), Cause> {
    match record {
        Some(record) => {
            let bytes = records::encode(record);
            let bytes = bytes.map_err(|error| Cause::BadRequest(error.to_string()))?;
            store.put(shelf, key, &bytes)
        }
        None => store.remove(shelf, key),
    }
    .map_err(io("write the record", key))
}
