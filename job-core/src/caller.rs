//! One operation's claim on a domain. Beginning a job consumes it, so that one caller holds one job.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::BeginError;
use crate::guard::{self, AgentJob, AsyncJob, Job};
use crate::held::{Held, wait};
use crate::kind::{AgentKind, AsyncKind, JobKind, KindSet};
use crate::label::Label;
use crate::shared::{Admitted, Shared};
use crate::slots::Want;
use crate::sync::Arc;

/// The identity of one operation, by which a wait for oneself is caught.
///
/// An operation is one flow, and everything it opens carries it. Two operations joined in one task are two flows: they
/// merely queue behind each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow(u64);

impl Flow {
    /// A flow that no other operation has.
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn id(self) -> u64 {
        self.0
    }
}

impl Default for Flow {
    fn default() -> Self {
        Self::new()
    }
}

/// One operation's claim on one domain. Every `begin` consumes it: a second one is a use after move.
///
/// ```
/// # futures::executor::block_on(async {
/// use job_core::{JobKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let job = domain.caller("resize").begin(JobKind::Modify, std::future::pending()).await?;
/// drop(job);
/// # Ok::<_, job_core::BeginError>(()) }).unwrap();
/// ```
///
/// An agent job beside the normal one does not compile:
///
/// ```compile_fail,E0382
/// # futures::executor::block_on(async {
/// use job_core::{AgentKind, JobKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let caller = domain.caller("resize");
/// let job = caller.begin(JobKind::Modify, std::future::pending()).await?;
/// let both = caller.begin_agent(AgentKind::Query, std::future::pending()).await?;
/// drop(job);
/// # Ok::<_, job_core::BeginError>(()) }).unwrap();
/// ```
#[must_use = "a caller holds nothing until it begins a job"]
pub struct Caller {
    shared: Arc<Shared>,
    owner: Label,
    /// None until it is a part of something: what is alone needs no name.
    flow: Option<Flow>,
}

impl Caller {
    pub(crate) fn open(shared: Arc<Shared>, owner: Label) -> Self {
        Self {
            shared,
            owner,
            flow: None,
        }
    }

    /// Makes this a part of an operation that has opened other callers.
    pub fn in_flow(self, flow: Flow) -> Self {
        Self {
            flow: Some(flow),
            ..self
        }
    }

    /// Begins a normal job, waiting in turn until `deadline` resolves.
    ///
    /// # Errors
    ///
    /// - [`BeginError::TimedOut`]: `deadline` came first. Names the holder.
    /// - [`BeginError::QueueFull`]: too many callers wait already. Returned at once.
    /// - [`BeginError::WouldDeadlock`]: this flow holds a job of the domain. Returned at once.
    /// - [`BeginError::Gone`]: the guest ended while waiting; [`BeginError::Closed`]: the domain was removed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. Dropping the future leaves the queue and loses the place in it; a grant that raced with the drop
    /// goes to the next waiter.
    pub async fn begin(
        self,
        kind: JobKind,
        deadline: impl Future<Output = ()>,
    ) -> Result<Job, BeginError> {
        match self.ask(Want::Normal(kind))? {
            Ok(held) => Ok(guard::job(held)),
            Err(waiting) => wait(waiting, deadline).await.map(guard::job),
        }
    }

    /// Begins an agent job, waiting in turn until `deadline` resolves. Neither normal nor async jobs are in its way.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    ///
    /// # Cancel safety
    ///
    /// As [`begin`](Self::begin).
    pub async fn begin_agent(
        self,
        kind: AgentKind,
        deadline: impl Future<Output = ()>,
    ) -> Result<AgentJob, BeginError> {
        match self.ask(Want::Agent { kind, within: None })? {
            Ok(held) => Ok(guard::agent(held)),
            Err(waiting) => wait(waiting, deadline).await.map(guard::agent),
        }
    }

    /// Begins an async job with the mask of its kind, waiting in turn until `deadline` resolves. It begins only when
    /// neither a normal nor an async job runs.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    ///
    /// # Cancel safety
    ///
    /// As [`begin`](Self::begin).
    pub async fn begin_async(
        self,
        kind: AsyncKind,
        deadline: impl Future<Output = ()>,
    ) -> Result<AsyncJob, BeginError> {
        self.begin_async_with(kind, kind.default_mask(), deadline)
            .await
    }

    /// Begins an async job with a mask of the caller's own, in force from its first instant.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    ///
    /// # Cancel safety
    ///
    /// As [`begin`](Self::begin).
    pub async fn begin_async_with(
        self,
        kind: AsyncKind,
        mask: KindSet,
        deadline: impl Future<Output = ()>,
    ) -> Result<AsyncJob, BeginError> {
        match self.ask(Want::Async(kind, mask))? {
            Ok(held) => Ok(guard::asynchronous(held)),
            Err(waiting) => wait(waiting, deadline).await.map(guard::asynchronous),
        }
    }

    /// Begins a normal job if it is free now.
    ///
    /// # Errors
    ///
    /// [`BeginError::Busy`], which names the holder; else as [`begin`](Self::begin).
    pub fn try_begin(self, kind: JobKind) -> Result<Job, BeginError> {
        self.try_acquire(Want::Normal(kind)).map(guard::job)
    }

    /// Begins an agent job if it is free now.
    ///
    /// # Errors
    ///
    /// As [`try_begin`](Self::try_begin).
    pub fn try_begin_agent(self, kind: AgentKind) -> Result<AgentJob, BeginError> {
        self.try_acquire(Want::Agent { kind, within: None })
            .map(guard::agent)
    }

    /// Begins an async job with the mask of its kind if the domain is free now.
    ///
    /// # Errors
    ///
    /// As [`try_begin`](Self::try_begin).
    pub fn try_begin_async(self, kind: AsyncKind) -> Result<AsyncJob, BeginError> {
        self.try_begin_async_with(kind, kind.default_mask())
    }

    /// Begins an async job with a mask of the caller's own if the domain is free now.
    ///
    /// # Errors
    ///
    /// As [`try_begin`](Self::try_begin).
    pub fn try_begin_async_with(
        self,
        kind: AsyncKind,
        mask: KindSet,
    ) -> Result<AsyncJob, BeginError> {
        self.try_acquire(Want::Async(kind, mask))
            .map(guard::asynchronous)
    }

    /// Apart from the waiting, so that a deadline nobody needs is not moved from future to future.
    fn ask(self, want: Want) -> Admitted {
        let flow = self.flow.map(Flow::id);
        self.shared.request(want, self.owner, flow)
    }

    fn try_acquire(self, want: Want) -> Result<Held, BeginError> {
        let flow = self.flow.map(Flow::id);
        self.shared.try_request(want, self.owner, flow)
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller")
            .field("owner", &self.owner)
            .field("flow", &self.flow)
            .finish_non_exhaustive()
    }
}
