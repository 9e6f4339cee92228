//! How every operation runs: it waits for its job in the caller's future and does the rest on a task of its own, so that
//! a job never ends while its command is still inside QEMU.
//!
//! ```text
//!  caller's future          task of its own
//!  ───────────────          ───────────────
//!  wait for the job ──────► do the work, under the guard
//!  dropped: withdraw        │
//!  wait for the end ◄────── end the job, tell how it ended
//!  dropped: stop waiting
//! ```

mod agent;
pub(crate) mod attach;
mod backup;
pub(crate) mod block_jobs;
mod call;
mod define;
pub(crate) mod destroy;
mod disks;
mod dump;
mod files;
mod freeze;
mod group;
mod held;
mod inside;
pub(crate) mod job_watch;
mod lent;
pub(crate) mod migrate;
pub(crate) mod parts;
pub(crate) mod plug;
pub(crate) mod recover;
mod remove;
mod run_state;
pub(crate) mod save;
mod snapshot;
pub(crate) mod start;
pub(crate) mod visit;

use std::sync::PoisonError;

use job_core::{
    AgentKind, Ask, AsyncJob, AsyncKind, BeginError, Guard, JobKind, Kind, KindSet, Label, Outcome,
};
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{Instrument, debug, info_span};

use crate::domain::{Domain, Published};
use crate::error::{Cause, Error, ErrorKind};
use crate::events::What;
use crate::ops::lent::{Ends, Lent};

pub use attach::Attach;
pub use backup::{BackedUp, BackupOf, BackupOptions, BackupTarget};
pub use block_jobs::{BlockJob, BlockJobState, CommitOptions, MirrorOptions, StreamOptions};
pub use call::Call;
pub use dump::{DumpFormat, Dumped};
pub use freeze::FreezeOptions;
pub use held::{AgentOp, AsyncOp, Op};
pub use inside::InsideSnapshot;
pub use migrate::{MigrateOptions, Tuning};
pub use recover::{Became, Recovered};
pub use save::{SaveOptions, Saved};
pub use snapshot::{SnapshotOptions, Snapshotted};
pub use start::StartOptions;

pub(crate) use attach::{attach, observed_only};

/// An operation that is out of time still undoes what it did, and its caller is told how that went. More than any undoing
/// here gives itself.
const UNDOING: Duration = Duration::from_secs(60);

/// Until when something may take, on tokio's clock.
pub type Deadline = Instant;
impl Domain {
    /// Runs `body` under a normal job of that kind. `owner` is what errors, snapshots and logs call it.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](crate::ErrorKind::TimedOut), which names the holder, and the other ways in which a job is not granted; what
    /// `body` returns; [`Panicked`](crate::ErrorKind::Panicked) if it panics.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. Dropped before the grant, the request is withdrawn; after it, only the waiting stops and `body` goes
    /// on by itself.
    pub async fn run<T, F, B>(
        &self,
        owner: impl Into<Label>,
        kind: JobKind,
        deadline: Deadline,
        body: B,
    ) -> Result<T, Error>
    where
        B: FnOnce(Op) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        let owner = owner.into();
        let asked = self
            .0
            .jobs
            .begin(Ask::new(owner.clone(), sleep_until(deadline)), kind);
        let job = self.granted(&owner, asked).await?;
        let domain = self.clone();
        self.on_own_task(owner, job, deadline, move |job| {
            body(Op {
                domain,
                job,
                kind,
                deadline,
            })
        })
        .await
    }

    /// Runs `body` under an agent job of that kind.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    ///
    /// # Cancel safety
    ///
    /// As [`run`](Self::run).
    pub async fn run_agent<T, F, B>(
        &self,
        owner: impl Into<Label>,
        kind: AgentKind,
        deadline: Deadline,
        body: B,
    ) -> Result<T, Error>
    where
        B: FnOnce(AgentOp) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        let owner = owner.into();
        let asked = self
            .0
            .jobs
            .begin_agent(Ask::new(owner.clone(), sleep_until(deadline)), kind);
        let job = self.granted(&owner, asked).await?;
        let domain = self.clone();
        self.on_own_task(owner, job, deadline, move |job| {
            body(AgentOp {
                domain,
                job,
                deadline,
            })
        })
        .await
    }

    /// Runs `body` under an async job of that kind, which lets the kinds in `mask` pass. The wait for the job may take
    /// the default of a call; all of it until `deadline`.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    ///
    /// # Cancel safety
    ///
    /// As [`run`](Self::run).
    pub async fn run_async<T, F, B>(
        &self,
        owner: impl Into<Label>,
        kind: AsyncKind,
        mask: KindSet,
        deadline: Deadline,
        body: B,
    ) -> Result<T, Error>
    where
        B: FnOnce(AsyncOp) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        let owner = owner.into();
        let patience = deadline.min(Instant::now() + self.0.context.defaults.call);
        let asked =
            self.0
                .jobs
                .begin_async(Ask::new(owner.clone(), sleep_until(patience)), kind, mask);
        let job = self.granted(&owner, asked).await?;
        self.run_with(owner, job, deadline, body).await
    }

    /// Runs `body` under an async job that is held already.
    pub(crate) async fn run_with<T, F, B>(
        &self,
        owner: Label,
        job: AsyncJob,
        deadline: Deadline,
        body: B,
    ) -> Result<T, Error>
    where
        B: FnOnce(AsyncOp) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        let (domain, name) = (self.clone(), owner.clone());
        self.on_own_task(owner, job, deadline, move |job| {
            body(AsyncOp {
                domain,
                job,
                owner: name,
                deadline,
            })
        })
        .await
    }

    /// Waits for a job that was asked for.
    async fn granted<J>(
        &self,
        owner: &Label,
        asked: impl Future<Output = Result<J, BeginError>>,
    ) -> Result<J, Error> {
        let began = Instant::now();
        let granted = asked.await;
        self.0.context.meter.asked(began.elapsed(), &granted);
        granted.map_err(|error| {
            debug!(domain = %self.0.name, owner = %owner, %error, "job not granted");
            self.error(owner.clone(), error)
        })
    }

    /// Lends the job to `body` on a task of its own, and ends it with the outcome that body had.
    async fn on_own_task<J, T, F, B>(
        &self,
        owner: Label,
        job: J,
        deadline: Deadline,
        body: B,
    ) -> Result<T, Error>
    where
        J: Ends + Guard + Send + 'static,
        B: FnOnce(Lent<J>) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        if !job.is_of(&self.0.scheduler) {
            return Err(self.error(
                owner,
                Cause::BadRequest("the scheduler gave a job of another domain".into()),
            ));
        }
        if self.0.context.closing.is_cancelled() {
            return Err(self.error(owner, Cause::ShuttingDown));
        }
        if self.0.is_observed && !asks_only(job.kind()) {
            let error = observed_only(&format!("a {} job", job.kind()));
            return Err(error.told_of(&owner, &self.0.name));
        }
        let span = info_span!("operation", domain = %self.0.name, job = job.id(), kind = %job.kind(), owner = %owner);
        let (id, kind) = (job.id(), job.kind());
        let began = Instant::now();
        let (domain, name) = (self.clone(), owner.clone());
        let work = async move {
            // First, so that it is dropped last, also when the work panics.
            let _published = Published::new(&domain.0);
            let (lent, home) = Lent::new(job);
            let result = body(lent)
                .await
                .map_err(|error| error.told_of(&name, &domain.0.name));
            // A guest that is gone takes its record along; one whose connection was lost alone is settled once it is back.
            let is_gone = |error: &Error| error.kind() == ErrorKind::Gone;
            let is_cut_short = result.as_ref().is_err_and(is_gone);
            let is_left = is_cut_short && domain.0.job_is_cut_short(id).await;
            if !is_cut_short {
                domain.0.job_is_over(id).await;
            }
            let outcome = outcome(result.as_ref().err());
            domain.0.context.meter.ended(began.elapsed(), &outcome);
            let job = home.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(job) = job {
                job.end(outcome.clone());
            }
            if is_left {
                recover::settle_left(&domain);
            }
            domain.0.publish_holder();
            domain.0.tell(What::JobEnded {
                job: id,
                kind,
                owner: name,
                outcome,
            });
            result
        };
        let task = self.0.context.tracker.spawn(work.instrument(span));
        // What hangs where no deadline reaches (a file on a dead mount) keeps its job, but not its caller.
        let Ok(ended) = timeout_at(deadline + UNDOING, task).await else {
            let cause = Cause::TimedOut {
                what: "its own end",
                waited: began.elapsed(),
            };
            return Err(self.error(owner, cause));
        };
        match ended {
            Ok(result) => result,
            Err(error) => {
                let text = error
                    .try_into_panic()
                    .map_or_else(|_| "its runtime shut down".to_owned(), panic_text);
                Err(self.error(owner, Cause::Panicked(text)))
            }
        }
    }
}

/// Whether an observer may hold a job of that kind. One that starts is what takes a guest in; there is nothing else it
/// could be started from.
fn asks_only(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Normal(JobKind::Query | JobKind::Destroy)
            | Kind::Agent(AgentKind::Query)
            | Kind::Async(AsyncKind::Start)
    )
}

fn outcome(error: Option<&Error>) -> Outcome {
    match error {
        None => Outcome::Done,
        Some(error) => match error.kind() {
            ErrorKind::Cancelled => Outcome::Cancelled,
            ErrorKind::Gone => Outcome::Gone(format!("{error:#}").into()),
            _ => Outcome::Failed(format!("{error:#}").into()),
        },
    }
}

fn panic_text(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a text".to_owned())
}
