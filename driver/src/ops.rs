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
mod attach;
mod destroy;
pub(crate) mod migrate;
mod remove;
mod run_state;
mod save;
pub(crate) mod start;

use std::fmt;
use std::future::IntoFuture;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use job_core::{
    AgentJob, AgentKind, Ask, AsyncJob, AsyncKind, Guard, Job, JobKind, KindSet, Label, Outcome,
    Progress, Step, Steps, Stop,
};
use tokio::time::{Instant, sleep_until};
use tracing::{Instrument, info_span};

use crate::access::{Agent, Monitor};
use crate::domain::{Domain, Records};
use crate::error::{Cause, Error, ErrorKind};
use crate::events::What;

pub use migrate::MigrateOptions;
pub use save::{SaveOptions, Saved};
pub use start::StartOptions;

pub(crate) use attach::attach;

/// Until when something may take, on tokio's clock.
pub type Deadline = Instant;

/// A call that has not begun. Awaiting it begins it; until then its deadline may be changed.
///
/// The deadline covers all of it: the wait for the job, for commands of callers that left, and its own commands.
#[must_use = "nothing happens until it is awaited"]
pub struct Call<T> {
    limit: Limit,
    begin: Box<dyn FnOnce(Deadline) -> Running<T> + Send>,
}

type Running<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

#[derive(Clone, Copy, Debug)]
enum Limit {
    For(Duration),
    Until(Deadline),
}

impl<T> Call<T> {
    pub(crate) fn new<F>(
        limit: Duration,
        begin: impl FnOnce(Deadline) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        Self {
            limit: Limit::For(limit),
            begin: Box::new(move |deadline| Box::pin(begin(deadline))),
        }
    }

    /// Gives it so long, from when it is awaited.
    pub fn deadline(self, limit: Duration) -> Self {
        Self {
            limit: Limit::For(limit),
            ..self
        }
    }

    /// Gives it until then.
    pub fn until(self, deadline: Deadline) -> Self {
        Self {
            limit: Limit::Until(deadline),
            ..self
        }
    }
}

impl<T> IntoFuture for Call<T> {
    type Output = Result<T, Error>;
    type IntoFuture = Running<T>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = match self.limit {
            Limit::For(limit) => Instant::now() + limit,
            Limit::Until(deadline) => deadline,
        };
        (self.begin)(deadline)
    }
}

impl<T> fmt::Debug for Call<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// A normal job and what it may do. Ends with the operation it was lent to.
#[derive(Debug)]
pub struct Op {
    domain: Domain,
    job: Lent<Job>,
    kind: JobKind,
    deadline: Deadline,
}

impl Op {
    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Enters the monitor.
    ///
    /// # Errors
    ///
    /// [`Gone`](ErrorKind::Gone) if the guest ended, [`State`](ErrorKind::State) if there is none.
    pub fn monitor(&mut self) -> Result<Monitor<'_>, Error> {
        Monitor::enter(
            &self.domain,
            Step::Direct(&mut self.job),
            Some(self.kind),
            self.deadline,
        )
    }

    /// Changes definition and intent. The lock is held for as long as the closure runs, which cannot wait.
    ///
    /// # Errors
    ///
    /// [`Gone`](ErrorKind::Gone) if the guest this job belongs to ended.
    pub fn with_state<R>(&self, change: impl FnOnce(&mut Records) -> R) -> Result<R, Error> {
        Ok(self.domain.0.records.change(&*self.job, change)?)
    }
}

/// An agent job and what it may do. Ends with the operation it was lent to.
#[derive(Debug)]
pub struct AgentOp {
    domain: Domain,
    job: Lent<AgentJob>,
    deadline: Deadline,
}

impl AgentOp {
    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Enters the agent.
    ///
    /// # Errors
    ///
    /// [`Gone`](ErrorKind::Gone) if the guest ended, [`State`](ErrorKind::State) if there is none, or no agent's channel.
    pub fn agent(&mut self) -> Result<Agent<'_, AgentJob>, Error> {
        Agent::enter(&self.domain, &*self.job, self.deadline)
    }
}

/// An async job and what it may do. Ends with the operation it was lent to.
#[derive(Debug)]
pub struct AsyncOp {
    domain: Domain,
    job: Lent<AsyncJob>,
    deadline: Deadline,
}

impl AsyncOp {
    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// The job itself: mask, phase, token, agent steps, remote questions.
    pub fn job(&mut self) -> &mut AsyncJob {
        &mut self.job
    }

    /// Visits the monitor once, through a nested job. The visit as a whole, its wait included, may take as long as one
    /// command.
    ///
    /// # Errors
    ///
    /// As [`Op::monitor`], and [`TimedOut`](ErrorKind::TimedOut) if the nested job was not granted in time.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing was sent yet.
    pub async fn monitor(&mut self) -> Result<Monitor<'_>, Error> {
        let deadline = self
            .deadline
            .min(Instant::now() + self.domain.0.context.defaults.command);
        let step = self.job.step(sleep_until(deadline)).await?;
        Monitor::enter(&self.domain, step, None, deadline)
    }

    /// Changes definition and intent, as [`Op::with_state`].
    ///
    /// # Errors
    ///
    /// [`Gone`](ErrorKind::Gone) if the guest this job belongs to ended.
    pub fn with_state<R>(&self, change: impl FnOnce(&mut Records) -> R) -> Result<R, Error> {
        Ok(self.domain.0.records.change(&*self.job, change)?)
    }

    /// Tells which phase the job is in.
    pub fn set_phase(&self, phase: impl Into<Label>) {
        let phase = phase.into();
        self.job.set_phase(phase.clone());
        self.domain.0.tell(What::Phase {
            job: self.job.id(),
            phase,
        });
    }

    /// Tells how far the job is. Those who follow the domain hear of it at most four times a second.
    #[expect(
        clippy::must_use_candidate,
        reason = "those who follow the domain have been told"
    )]
    pub fn report(&self, done: u64, total: u64) -> Option<Progress> {
        let progress = self.job.report(done, total)?;
        self.domain.0.tell(What::Progress {
            job: self.job.id(),
            progress,
        });
        Some(progress)
    }

    /// Whether somebody asked the job to stop.
    ///
    /// # Errors
    ///
    /// [`Cancelled`](ErrorKind::Cancelled) or [`Gone`](ErrorKind::Gone) if so: the holder undoes what it did and
    /// passes it on.
    pub fn check_cancelled(&self) -> Result<(), Error> {
        match self.job.token().stopped() {
            None => Ok(()),
            Some(stop @ Stop::Cancelled(_)) => Err(Cause::Cancelled(stop.to_string()).into()),
            Some(_) => Ok(self.job.check()?),
        }
    }

    /// Waits so long, or until somebody asks the job to stop.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn pause(&self, length: Duration) {
        let token = self.job.token();
        let _stopped = tokio::time::timeout(length, token.stop()).await;
    }

    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// Gives what undoes a job that is out of time a time of its own.
    pub(crate) fn extend(&mut self, limit: Duration) {
        self.deadline = self.deadline.max(Instant::now() + limit);
    }
}

/// A guard on loan: it comes home when the operation lets go of it, whatever the operation does.
#[derive(Debug)]
struct Lent<J> {
    job: Option<J>,
    home: Arc<Mutex<Option<J>>>,
}

impl<J> Lent<J> {
    fn new(job: J) -> (Self, Arc<Mutex<Option<J>>>) {
        let home = Arc::new(Mutex::new(None));
        (
            Self {
                job: Some(job),
                home: home.clone(),
            },
            home,
        )
    }
}

impl<J> Deref for Lent<J> {
    type Target = J;

    fn deref(&self) -> &J {
        self.job
            .as_ref()
            .expect("it is at home only after the drop")
    }
}

impl<J> DerefMut for Lent<J> {
    fn deref_mut(&mut self) -> &mut J {
        self.job
            .as_mut()
            .expect("it is at home only after the drop")
    }
}

impl<J> Drop for Lent<J> {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.job.take();
    }
}

/// A guard that can be ended with an outcome.
trait Ends: Guard {
    fn end(self, outcome: Outcome);
}

impl Ends for Job {
    fn end(self, outcome: Outcome) {
        Self::end(self, outcome);
    }
}

impl Ends for AgentJob {
    fn end(self, outcome: Outcome) {
        Self::end(self, outcome);
    }
}

impl Ends for AsyncJob {
    fn end(self, outcome: Outcome) {
        Self::end(self, outcome);
    }
}

impl Domain {
    /// Runs `body` under a normal job of that kind. `owner` is what errors, snapshots and logs call it.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](ErrorKind::TimedOut), which names the holder, and the other ways in which a job is not granted; what
    /// `body` returns; [`Panicked`](ErrorKind::Panicked) if it panics.
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
        let job = asked
            .await
            .map_err(|error| self.error(owner.clone(), error))?;
        let domain = self.clone();
        self.on_own_task(owner, job, move |job| {
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
        let job = asked
            .await
            .map_err(|error| self.error(owner.clone(), error))?;
        let domain = self.clone();
        self.on_own_task(owner, job, move |job| {
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
        let job = asked
            .await
            .map_err(|error| self.error(owner.clone(), error))?;
        let domain = self.clone();
        self.on_own_task(owner, job, move |job| {
            body(AsyncOp {
                domain,
                job,
                deadline,
            })
        })
        .await
    }

    /// Lends the job to `body` on a task of its own, and ends it with the outcome that body had.
    async fn on_own_task<J, T, F, B>(&self, owner: Label, job: J, body: B) -> Result<T, Error>
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
        let span = info_span!("operation", domain = %self.0.name, job = job.id(), owner = %owner);
        let (id, kind) = (job.id(), job.kind());
        let (domain, name) = (self.clone(), owner.clone());
        let work = async move {
            let (lent, home) = Lent::new(job);
            let result = body(lent)
                .await
                .map_err(|error| error.told_of(&name, &domain.0.name));
            let outcome = outcome(result.as_ref().err());
            let job = home.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(job) = job {
                job.end(outcome.clone());
            }
            domain.0.tell(What::JobEnded {
                job: id,
                kind,
                owner: name,
                outcome,
            });
            result
        };
        match self.0.context.tracker.spawn(work.instrument(span)).await {
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
