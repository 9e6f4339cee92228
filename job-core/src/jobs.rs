//! The scheduler's seam: what a daemon's author may wrap to audit, limit, delay or refuse.
//!
//! A wrapper forwards; it cannot forge, since guards have no public constructor.

use std::fmt;
use std::pin::Pin;

use async_trait::async_trait;

use crate::caller::Flow;
use crate::error::BeginError;
use crate::guard::{AgentJob, AsyncJob, Job};
use crate::kind::{AgentKind, AsyncKind, JobKind, KindSet};
use crate::label::Label;
use crate::scheduler::Scheduler;
use crate::snapshot::Snapshot;

/// One domain's jobs behind an object-safe trait.
#[async_trait]
pub trait Jobs: Send + Sync {
    /// Begins a normal job.
    ///
    /// # Errors
    ///
    /// As [`Caller::begin`](crate::Caller::begin), and [`BeginError::Refused`] by a wrapper.
    ///
    /// # Cancel safety
    ///
    /// As [`Caller::begin`](crate::Caller::begin).
    async fn begin(&self, ask: Ask, kind: JobKind) -> Result<Job, BeginError>;

    /// Begins an agent job.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    ///
    /// # Cancel safety
    ///
    /// As [`Caller::begin`](crate::Caller::begin).
    async fn begin_agent(&self, ask: Ask, kind: AgentKind) -> Result<AgentJob, BeginError>;

    /// Begins an async job with that mask.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    ///
    /// # Cancel safety
    ///
    /// As [`Caller::begin`](crate::Caller::begin).
    async fn begin_async(
        &self,
        ask: Ask,
        kind: AsyncKind,
        mask: KindSet,
    ) -> Result<AsyncJob, BeginError>;

    /// Who holds what, and who waits why.
    fn snapshot(&self) -> Snapshot;
}

/// Who asks for a job, as a part of which operation, and until when.
pub struct Ask {
    /// What errors and snapshots call it.
    pub owner: Label,
    /// The operation it belongs to.
    pub flow: Flow,
    /// Resolves when the caller will not wait any longer.
    pub deadline: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Ask {
    /// A request of an operation of its own.
    #[must_use]
    pub fn new(
        owner: impl Into<Label>,
        deadline: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        Self {
            owner: owner.into(),
            flow: Flow::new(),
            deadline: Box::pin(deadline),
        }
    }
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ask")
            .field("owner", &self.owner)
            .field("flow", &self.flow)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Jobs for Scheduler {
    async fn begin(&self, ask: Ask, kind: JobKind) -> Result<Job, BeginError> {
        self.caller(ask.owner)
            .in_flow(ask.flow)
            .begin(kind, ask.deadline)
            .await
    }

    async fn begin_agent(&self, ask: Ask, kind: AgentKind) -> Result<AgentJob, BeginError> {
        self.caller(ask.owner)
            .in_flow(ask.flow)
            .begin_agent(kind, ask.deadline)
            .await
    }

    async fn begin_async(
        &self,
        ask: Ask,
        kind: AsyncKind,
        mask: KindSet,
    ) -> Result<AsyncJob, BeginError> {
        self.caller(ask.owner)
            .in_flow(ask.flow)
            .begin_async_with(kind, mask, ask.deadline)
            .await
    }

    fn snapshot(&self) -> Snapshot {
        Self::snapshot(self)
    }
}
