//! An agent whose every call takes an agent job of its own: for what outlives one job. A freeze does, and a file or a
//! program's output would keep all others from the agent for as long as it takes.
//!
//! It is the agent of one QEMU process. While the connection to that is lost, nothing is sent and the agent counts as out
//! of reach; once the process has ended, or the driver has let go of it, as closed. It keeps no driver alive.

use std::sync::{Arc, Weak};

use agent_qga::{Closed, Effect, Error, ErrorKind, Qga, Reply, Request, Signal};
use async_trait::async_trait;
use job_core::{AgentJob, AgentKind, Ask, BeginError, Guard, Label};
use tokio::time::{Instant, sleep_until, timeout};

use crate::access::permit;
use crate::domain::{Domain, EXIT_AFTER_EOF, Inner, Live, Published};
use crate::error::Cause;
use crate::process::Process;

/// The agent of one guest, under a job a call.
pub(crate) struct Queued {
    domain: Weak<Inner>,
    process: Arc<Process>,
    owner: Label,
}

impl Queued {
    /// The agent of the guest that runs now. `owner` is what its jobs are called.
    pub(crate) fn of(domain: &Domain, owner: impl Into<Label>) -> Result<Arc<dyn Qga>, Cause> {
        let live = domain.0.live().filter(|live| live.agent().is_some());
        let process = live.and_then(|live| live.process.clone());
        let process = process.ok_or_else(|| {
            Cause::State("no guest runs in it that has a channel to an agent".into())
        })?;
        Ok(Arc::new(Self {
            domain: Arc::downgrade(&domain.0),
            process,
            owner: owner.into(),
        }))
    }

    /// The guest, under whatever generation it is now; none once its process has ended or the driver let go of it.
    fn live(&self) -> Option<Arc<Live>> {
        let is_mine = |live: &Arc<Live>| {
            let process = live.process.as_ref();
            process.is_some_and(|process| Arc::ptr_eq(process, &self.process))
        };
        self.domain.upgrade()?.live().filter(is_mine)
    }

    /// A job to ask under, and the agent if it is connected.
    async fn admitted(&self, request: &Request) -> Result<(AgentJob, Arc<dyn Qga>), Error> {
        let (command, began) = (&*request.name, Instant::now());
        if let Some(domain) = self.domain.upgrade()
            && let Err(refused) = permit(&domain, command)
        {
            return Err(Error::denied(command, refused.to_string()));
        }
        let ask = Ask::new(self.owner.clone(), sleep_until(request.deadline));
        let Some(jobs) = self.domain.upgrade().map(|domain| domain.jobs.clone()) else {
            return Err(self.gone(command, began));
        };
        let granted = jobs.begin_agent(ask, kind(command)).await;
        let job = granted.map_err(|error| match error {
            BeginError::Gone { .. } | BeginError::Closed => self.gone(command, began),
            BeginError::TimedOut { .. } | BeginError::Busy { .. } => {
                Error::busy(command, began.elapsed())
            }
            error => Error::denied(command, error.to_string()),
        })?;
        let agent = self.live().filter(|_| job.check().is_ok());
        let agent = agent.and_then(|live| live.agent().cloned());
        match agent {
            Some(agent) => Ok((job, agent)),
            None => Err(self.gone(command, began)),
        }
    }

    /// Nothing was sent: the guest is gone, or its connection is.
    fn gone(&self, command: &str, began: Instant) -> Error {
        match self.live() {
            Some(_) => Error::out_of_reach(command, began.elapsed()),
            None => Error::closed(command, Closed::Stopped, Effect::None),
        }
    }

    /// A connection that ended alone is made anew; only the end of the process is one for good.
    async fn verdict(&self, error: Error, began: Instant) -> Error {
        if error.kind() != ErrorKind::Closed
            || timeout(EXIT_AFTER_EOF, self.process.exited()).await.is_ok()
            || self.live().is_none()
        {
            return error;
        }
        match error.effect() {
            Effect::None => Error::out_of_reach(error.command(), began.elapsed()),
            _ => Error::timed_out(error.command(), began.elapsed()),
        }
    }
}

#[async_trait]
impl Qga for Queued {
    async fn call(&self, request: Request) -> Result<Reply, Error> {
        let began = Instant::now();
        let domain = self.domain.upgrade();
        // Before the job, so that it is dropped after it.
        let mut _published = None;
        let (job, agent) = self.admitted(&request).await?;
        _published = domain.as_ref().map(Published::new);
        job.tell_command(Some(request.name.to_string().into()));
        let sent = Instant::now();
        let answer = agent.call(request).await;
        if let Some(domain) = &domain {
            let failed = answer.as_ref().err().map(|error| error.effect().into());
            domain.context.meter.agent.ended(sent.elapsed(), failed);
        }
        match answer {
            Ok(reply) => Ok(reply),
            Err(error) => {
                drop(job);
                Err(self.verdict(error, began).await)
            }
        }
    }

    /// What the monitor saw is handed to the connection itself.
    fn note(&self, _signal: Signal) {}

    async fn closed(&self) -> Closed {
        let domain = self.domain.upgrade();
        let parting = domain.map(|domain| domain.context.parting.clone());
        let Some(parting) = parting.filter(|_| self.live().is_some()) else {
            return Closed::Stopped;
        };
        match parting.run_until_cancelled(self.process.exited()).await {
            Some(_) => Closed::Eof,
            None => Closed::Stopped,
        }
    }
}

/// Whoever waits behind a thaw may wait for the disk that it frees; it counts as done once its status was seen.
fn kind(command: &str) -> AgentKind {
    match command {
        "guest-fsfreeze-thaw" | "guest-fsfreeze-status" => AgentKind::Thaw,
        "guest-ping" | "guest-info" | "guest-exec-status" | "guest-file-read" => AgentKind::Query,
        _ => AgentKind::Modify,
    }
}
