//! A handle on a block job: how far it is, waiting for it, stopping it, having it pivot.

use std::fmt;
use std::sync::Arc;

use job_core::JobKind;
use tokio::time::{Instant, timeout_at};

use super::over::set_stage;
use super::track::Tracked;
use crate::block_job::{BlockJobEnd, BlockJobKind, Job, Pivot, Stage};
use crate::domain::Domain;
use crate::error::{Cause, Error};
use crate::ops::job_watch::cancel;
use crate::ops::{Call, Deadline};

/// A handle on a block job. Dropping it changes nothing: the job goes on, and is [found](Domain::block_job) again by its id,
/// also by a driver that comes back.
#[derive(Clone)]
pub struct BlockJob {
    domain: Domain,
    tracked: Arc<Tracked>,
}

/// How far a block job is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockJobState {
    /// How far it got, in bytes.
    pub done: u64,
    /// How far it is to go, in bytes; may grow as the guest writes.
    pub total: u64,
    /// Whether both files are equal now, and are kept so.
    pub is_ready: bool,
    /// How it ended.
    pub end: Option<BlockJobEnd>,
}

impl BlockJob {
    pub(super) fn new(domain: Domain, tracked: Arc<Tracked>) -> Self {
        Self { domain, tracked }
    }

    /// Its id, the same in QEMU.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.tracked.noted.id
    }

    /// The name of its disk.
    #[must_use]
    pub fn disk(&self) -> &str {
        &self.tracked.noted.disk
    }

    /// What it does.
    #[must_use]
    pub fn kind(&self) -> BlockJobKind {
        self.tracked.noted.kind()
    }

    /// How far it is, as of when QEMU was last asked: a second ago while somebody waits for it, else up to ten. Needs no job and
    /// never waits.
    #[must_use]
    pub fn state(&self) -> BlockJobState {
        self.tracked.state.borrow().clone()
    }

    /// Waits until its state satisfies `done`, or it ended.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](crate::ErrorKind::TimedOut) at the deadline.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn wait_for(
        &self,
        done: impl Fn(&BlockJobState) -> bool + Send,
        deadline: Deadline,
    ) -> Result<BlockJobState, Error> {
        let began = Instant::now();
        let mut state = self.tracked.state.subscribe();
        let enough = |state: &BlockJobState| state.end.is_some() || done(state);
        match timeout_at(deadline, state.wait_for(enough)).await {
            Ok(Ok(state)) => Ok(state.clone()),
            // The sender is in this handle.
            Ok(Err(_)) => Err(self.error(Cause::State("nobody follows it any more".into()))),
            Err(_) => Err(self.error(Cause::TimedOut {
                what: "the block job",
                waited: began.elapsed(),
            })),
        }
    }

    /// Waits until it ended.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](crate::ErrorKind::TimedOut) at the deadline; the job goes on.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn wait(&self, deadline: Deadline) -> Result<BlockJobEnd, Error> {
        let state = self.wait_for(|_| false, deadline).await?;
        Ok(state.end.unwrap_or(BlockJobEnd::Unknown))
    }

    /// Stops it and waits until all of it is undone. [`TooLate`](crate::ErrorKind::TooLate) if it was done first, or the
    /// guest goes over to the new file already. An owner who leaves has stopped it all the same.
    pub fn cancel(&self) -> Call<()> {
        let job = self.clone();
        let limit = self.domain.0.context.defaults.call;
        Call::new(limit, move |deadline| async move {
            let id = job.id().to_owned();
            let work = move |mut op| async move { ask_to_stop(&mut op, &id).await };
            let domain = &job.domain;
            domain
                .run("cancel-block-job", JobKind::Abort, deadline, work)
                .await?;
            job.tracked.asked.notify_one();
            match job.wait(deadline).await? {
                BlockJobEnd::Done => Err(job.error(Cause::TooLate("it was done first".into()))),
                _ => Ok(()),
            }
        })
    }

    /// Has the guest go over to the copy of a mirror, as soon as that is whole, and waits for it.
    pub fn pivot(&self) -> Call<()> {
        let job = self.clone();
        let limit = self.domain.0.context.defaults.long;
        Call::new(limit, move |deadline| async move {
            let id = job.id().to_owned();
            let work = move |op: crate::Op| async move {
                let noted = op.domain().0.note(move |record| {
                    let jobs = record.iter_mut().flat_map(|record| &mut record.block_jobs);
                    for job in jobs.filter(|job| job.id == id) {
                        if let Job::Mirror { pivot, .. } = &mut job.work {
                            *pivot = Pivot::WhenReady;
                        }
                    }
                });
                Ok(noted.await?)
            };
            let domain = &job.domain;
            domain.run("pivot", JobKind::Modify, deadline, work).await?;
            job.tracked.asked.notify_one();
            match job.wait(deadline).await? {
                BlockJobEnd::Done => Ok(()),
                other => Err(job.error(Cause::Failed(format!("it ended as {other:?}")))),
            }
        })
    }

    fn error(&self, cause: Cause) -> Error {
        let operation = format!("follow block job {} of", self.id());
        self.domain.error(operation, cause)
    }
}

async fn ask_to_stop(op: &mut crate::Op, id: &str) -> Result<(), Error> {
    let record = op.domain().0.noted().await;
    let jobs = record.map(|record| record.block_jobs).unwrap_or_default();
    let Some(noted) = jobs.into_iter().find(|job| job.id == id) else {
        // How it ended is known to those who wait.
        return Ok(());
    };
    if matches!(noted.stage, Stage::Pivoting { .. }) {
        let text = "the guest goes over to the new file";
        return Err(Cause::TooLate(text.into()).into());
    }
    set_stage(op.domain(), id, Stage::Cancelling).await?;
    cancel(op, id).await
}

impl fmt::Debug for BlockJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockJob")
            .field("id", &self.id())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
