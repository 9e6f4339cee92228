//! The guards: what a job gives the right to, and for how long.
//!
//! Owned, `Send`, ended by drop on any thread without blocking. None has a public constructor, so holding one is the proof.

use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroU64;

use crate::error::{BeginError, Gone};
use crate::held::{Held, wait};
use crate::kind::{AgentKind, Kind, KindSet};
use crate::label::Label;
use crate::progress::{Estimate, Progress};
use crate::scheduler::Scheduler;
use crate::slots::Want;
use crate::snapshot::{AsyncRecord, Outcome};
use crate::sync::Arc;
use crate::token::Token;

/// The right to change one domain, held until dropped.
///
/// While a `Job` lives, no other normal job and no nested step of this domain runs. Drop passes the right to the next
/// waiter. It never blocks and may happen on any thread; it does not undo what was already sent to the guest.
///
/// Its end consumes it, so what needs a job comes before:
///
/// ```
/// use job_core::{Guarded, JobKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let memory = Guarded::new(&domain, 512);
/// let job = domain.caller("resize").try_begin(JobKind::Modify).unwrap();
/// memory.change(&job, |memory| *memory = 1024).unwrap();
/// job.finish();
/// ```
///
/// After its end there is nothing left to show:
///
/// ```compile_fail,E0382
/// use job_core::{Guarded, JobKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let memory = Guarded::new(&domain, 512);
/// let job = domain.caller("resize").try_begin(JobKind::Modify).unwrap();
/// job.finish();
/// memory.change(&job, |memory| *memory = 1024).unwrap();
/// ```
#[must_use = "the job ends as soon as the guard is dropped"]
#[derive(Debug)]
pub struct Job(Held);

/// The right to talk to the guest agent of one domain, held until dropped.
///
/// Independent of normal and async jobs, so that a silent guest delays only those who talk to it. Drop as [`Job`].
#[must_use = "the job ends as soon as the guard is dropped"]
#[derive(Debug)]
pub struct AgentJob(Held);

/// A long operation on one domain, held until dropped.
///
/// While it lives no other async job runs, and of the normal jobs only those in its mask. It gives no right to the
/// monitor by itself: each visit is a [`nested`](Self::nested) step. Drop lets go of all it held back; it does not undo
/// what was begun in QEMU.
#[must_use = "the job ends as soon as the guard is dropped"]
#[derive(Debug)]
pub struct AsyncJob(Held);

/// One visit of an async job to the monitor. Holds the normal slot; borrows the async job, so it cannot outlive it.
///
/// An async job has nested steps:
///
/// ```
/// # futures::executor::block_on(async {
/// use job_core::{AsyncKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let mut save = domain.caller("save").begin_async(AsyncKind::Save, std::future::pending()).await?;
/// let step = save.nested(std::future::pending()).await?;
/// drop(step);
/// save.finish();
/// # Ok::<_, job_core::BeginError>(()) }).unwrap();
/// ```
///
/// Without an async job there are none:
///
/// ```compile_fail,E0599
/// # futures::executor::block_on(async {
/// use job_core::{JobKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let mut job = domain.caller("save").begin(JobKind::Modify, std::future::pending()).await?;
/// let step = job.nested(std::future::pending()).await?;
/// # Ok::<_, job_core::BeginError>(()) }).unwrap();
/// ```
///
/// Nor do they outlive it:
///
/// ```compile_fail,E0505
/// # futures::executor::block_on(async {
/// use job_core::{AsyncKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let mut save = domain.caller("save").begin_async(AsyncKind::Save, std::future::pending()).await?;
/// let step = save.nested(std::future::pending()).await?;
/// save.finish();
/// drop(step);
/// # Ok::<_, job_core::BeginError>(()) }).unwrap();
/// ```
#[must_use = "the step ends as soon as the guard is dropped"]
#[derive(Debug)]
pub struct NestedJob<'a> {
    held: Held,
    parent: PhantomData<&'a mut AsyncJob>,
}

/// An agent job that an async job took for a moment, to freeze or thaw. Excludes a nested step of the same job.
#[must_use = "the step ends as soon as the guard is dropped"]
#[derive(Debug)]
pub struct AgentStep<'a> {
    held: Held,
    parent: PhantomData<&'a mut AsyncJob>,
}

/// What every guard can be asked. Sealed: only this crate's guards are proof of anything.
pub trait Guard: sealed::Sealed + Send + fmt::Debug {
    /// The job's stable id.
    fn id(&self) -> u64 {
        self.held().id
    }

    /// What it is.
    fn kind(&self) -> Kind {
        self.held().kind
    }

    /// The generation of the guest it belongs to.
    fn generation(&self) -> u64 {
        self.held().generation
    }

    /// Whether it is a guard of that domain.
    fn is_of(&self, scheduler: &Scheduler) -> bool {
        Arc::ptr_eq(&self.held().shared, &scheduler.0)
    }

    /// Whether it still gives a right.
    ///
    /// # Errors
    ///
    /// [`Gone`] once its generation has ended.
    fn check(&self) -> Result<(), Gone> {
        self.held().shared.check(self.held().generation)
    }

    /// The signal that asks this job to stop. Clones of it outlive the job.
    #[must_use]
    fn token(&self) -> Token {
        let held = self.held();
        held.shared.token(held.name, held.id, held.generation)
    }

    /// Tells which command the job waits for, or that it waits for none, for snapshots and others' errors.
    fn tell_command(&self, command: Option<Label>) {
        let held = self.held();
        held.shared.tell_command(held.name, held.id, command);
    }
}

/// A guard that gives the right to enter the monitor (R11): a [`Job`] or a [`NestedJob`].
///
/// ```
/// fn enter(_proof: &impl job_core::MonitorRight) {}
/// fn normal(job: &job_core::Job) { enter(job) }
/// ```
///
/// An agent job, or an async job itself, does not:
///
/// ```compile_fail,E0277
/// fn enter(_proof: &impl job_core::MonitorRight) {}
/// fn agent(job: &job_core::AgentJob) { enter(job) }
/// ```
///
/// ```compile_fail,E0277
/// fn enter(_proof: &impl job_core::MonitorRight) {}
/// fn asynchronous(job: &job_core::AsyncJob) { enter(job) }
/// ```
pub trait MonitorRight: Guard {}

/// A guard that gives the right to enter the agent (R13): an [`AgentJob`] or an [`AgentStep`].
pub trait AgentRight: Guard {}

/// What a helper that serves normal and async jobs alike takes: a [`Job`] enters directly, an [`AsyncJob`] through a
/// nested step each time (R12).
pub trait Steps: Guard {
    /// One visit to the monitor.
    ///
    /// # Errors
    ///
    /// For an async job as [`Caller::begin`](crate::Caller::begin); for a normal job [`BeginError::Gone`] only.
    ///
    /// # Cancel safety
    ///
    /// As [`Caller::begin`](crate::Caller::begin).
    fn step(
        &mut self,
        deadline: impl Future<Output = ()> + Send,
    ) -> impl Future<Output = Result<Step<'_>, BeginError>> + Send;
}

/// One visit to the monitor under either kind of job.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "nested steps come from async jobs, and nothing else enters but a job"
)]
pub enum Step<'a> {
    /// Under the normal job itself.
    Direct(&'a mut Job),
    /// Under a nested step of the async job.
    Nested(NestedJob<'a>),
}

impl Job {
    /// Ends the job as done.
    pub fn finish(self) {
        self.end(Outcome::Done);
    }

    /// Ends the job with an outcome for the history.
    pub fn end(mut self, outcome: Outcome) {
        self.0.outcome = Some(outcome);
    }
}

impl AgentJob {
    /// Ends the job as done.
    pub fn finish(self) {
        self.end(Outcome::Done);
    }

    /// Ends the job with an outcome for the history.
    pub fn end(mut self, outcome: Outcome) {
        self.0.outcome = Some(outcome);
    }
}

impl AsyncJob {
    /// Takes the normal slot for one visit to the monitor, waiting in turn with the normal jobs that may pass (R10).
    ///
    /// # Errors
    ///
    /// [`BeginError::TimedOut`], [`BeginError::Gone`] or [`BeginError::Closed`]; nested steps meet no limit.
    ///
    /// # Cancel safety
    ///
    /// As [`Caller::begin`](crate::Caller::begin).
    pub async fn nested(
        &mut self,
        deadline: impl Future<Output = ()>,
    ) -> Result<NestedJob<'_>, BeginError> {
        let held = match self.0.shared.request_part(Want::Nested(self.0.id))? {
            Ok(held) => held,
            Err(waiting) => wait(waiting, deadline).await?,
        };
        Ok(NestedJob {
            held,
            parent: PhantomData,
        })
    }

    /// Takes the agent slot for a moment: to freeze or thaw.
    ///
    /// # Errors
    ///
    /// As [`Caller::begin_agent`](crate::Caller::begin_agent).
    ///
    /// # Cancel safety
    ///
    /// As [`Caller::begin`](crate::Caller::begin).
    pub async fn agent(
        &mut self,
        kind: AgentKind,
        deadline: impl Future<Output = ()>,
    ) -> Result<AgentStep<'_>, BeginError> {
        let within = NonZeroU64::new(self.0.id);
        let held = match self.0.shared.request_part(Want::Agent { kind, within })? {
            Ok(held) => held,
            Err(waiting) => wait(waiting, deadline).await?,
        };
        Ok(AgentStep {
            held,
            parent: PhantomData,
        })
    }

    /// Asks a remote peer while the job is held and nothing of the domain is locked (R14). No nested step can run
    /// meanwhile; afterwards it is checked again that the guest lives.
    ///
    /// # Errors
    ///
    /// [`Gone`] if the guest ended meanwhile; the peer's answer is lost then, since nothing may be done with it here.
    ///
    /// # Cancel safety
    ///
    /// As safe as `question`.
    pub async fn remote<T>(&mut self, question: impl Future<Output = T>) -> Result<T, Gone> {
        self.check()?;
        let answer = question.await;
        self.check()?;
        Ok(answer)
    }

    /// Changes what passes beside this job. Widening grants at once; narrowing touches no granted job.
    pub fn set_mask(&self, mask: KindSet) {
        self.0.shared.set_mask(self.0.id, mask);
    }

    /// Tells which phase the job is in, for snapshots, errors and records.
    pub fn set_phase(&self, phase: impl Into<Label>) {
        self.0
            .shared
            .tell_phase(self.0.name, self.0.id, Some(phase.into()));
    }

    /// From here on the job will be finished: a request to cancel it is answered [`TooLate`](crate::CancelError::TooLate).
    pub fn pass_point_of_return(&self) {
        self.0.shared.decide(self.0.name, self.0.id);
    }

    /// Tells how far the job is. Yields the picture if it is time to tell the world again: at most four times a second,
    /// and once complete.
    ///
    /// When it will be done is estimated by its mean rate, for as long as `done` does not fall back. A job that knows better
    /// [says so](Self::report_estimated).
    #[must_use = "what it yields is due to be published"]
    pub fn report(&self, done: u64, total: u64) -> Option<Progress> {
        let shared = &self.0.shared;
        shared.report(self.0.name, self.0.id, (done, total), None)
    }

    /// As [`report`](Self::report), with an estimate of the job's own: from the first one on nothing is estimated here.
    #[must_use = "what it yields is due to be published"]
    pub fn report_estimated(&self, done: u64, total: u64, estimate: Estimate) -> Option<Progress> {
        let shared = &self.0.shared;
        shared.report(self.0.name, self.0.id, (done, total), Some(estimate))
    }

    /// What must be kept so that a restarted daemon can take the job up; nothing once the slot was taken from it.
    #[must_use]
    pub fn record(&self) -> Option<AsyncRecord> {
        self.0.shared.record(self.0.id)
    }

    /// Ends the job as done.
    pub fn finish(self) {
        self.end(Outcome::Done);
    }

    /// Ends the job with an outcome for the history.
    pub fn end(mut self, outcome: Outcome) {
        self.0.outcome = Some(outcome);
    }

    pub(crate) fn restore(&self, phase: Option<Label>, decided: bool) {
        self.0.shared.tell_phase(self.0.name, self.0.id, phase);
        if decided {
            self.pass_point_of_return();
        }
    }
}

impl Steps for Job {
    async fn step(
        &mut self,
        _deadline: impl Future<Output = ()> + Send,
    ) -> Result<Step<'_>, BeginError> {
        self.check()?;
        Ok(Step::Direct(self))
    }
}

impl Steps for AsyncJob {
    async fn step(
        &mut self,
        deadline: impl Future<Output = ()> + Send,
    ) -> Result<Step<'_>, BeginError> {
        self.nested(deadline).await.map(Step::Nested)
    }
}

impl Guard for Job {}
impl Guard for AgentJob {}
impl Guard for AsyncJob {}
impl Guard for NestedJob<'_> {}
impl Guard for AgentStep<'_> {}
impl Guard for Step<'_> {}
impl MonitorRight for Job {}
impl MonitorRight for NestedJob<'_> {}
impl MonitorRight for Step<'_> {}
impl AgentRight for AgentJob {}
impl AgentRight for AgentStep<'_> {}

pub(crate) fn job(held: Held) -> Job {
    Job(held)
}

pub(crate) fn agent(held: Held) -> AgentJob {
    AgentJob(held)
}

pub(crate) fn asynchronous(held: Held) -> AsyncJob {
    AsyncJob(held)
}

mod sealed {
    use super::{AgentJob, AgentStep, AsyncJob, Held, Job, NestedJob, Step};

    #[expect(unnameable_types, reason = "that is what seals the traits built on it")]
    pub trait Sealed {
        fn held(&self) -> &Held;
    }

    impl Sealed for Job {
        fn held(&self) -> &Held {
            &self.0
        }
    }

    impl Sealed for AgentJob {
        fn held(&self) -> &Held {
            &self.0
        }
    }

    impl Sealed for AsyncJob {
        fn held(&self) -> &Held {
            &self.0
        }
    }

    impl Sealed for NestedJob<'_> {
        fn held(&self) -> &Held {
            &self.held
        }
    }

    impl Sealed for AgentStep<'_> {
        fn held(&self) -> &Held {
            &self.held
        }
    }

    impl Sealed for Step<'_> {
        fn held(&self) -> &Held {
            match self {
                Step::Direct(job) => job.held(),
                Step::Nested(job) => job.held(),
            }
        }
    }
}
