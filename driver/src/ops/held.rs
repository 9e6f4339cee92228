//! What an operation is given: its job, and the doors that the job opens.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use job_core::{
    AgentJob, AsyncJob, Estimate, Guard, Job, JobKind, Label, Progress, Step, Steps, Stop,
};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use crate::access::{Agent, Monitor, Rescue};
use crate::domain::{Domain, Live, Records};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::guest::Guest;
use crate::made::Made;
use crate::ops::Deadline;
use crate::ops::lent::Lent;
use crate::ops::recover::settle_left;
use crate::ops::save::blocking;
use crate::records::{Interrupted, Running, Work};

/// A normal job and what it may do. Ends with the operation it was lent to.
#[derive(Debug)]
pub struct Op {
    pub(crate) domain: Domain,
    pub(crate) job: Lent<Job>,
    pub(crate) kind: JobKind,
    pub(crate) deadline: Deadline,
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
    /// [`Gone`](crate::ErrorKind::Gone) if the guest ended, [`State`](crate::ErrorKind::State) if there is none.
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
    /// [`Gone`](crate::ErrorKind::Gone) if the guest this job belongs to ended.
    pub fn with_state<R>(&self, change: impl FnOnce(&mut Records) -> R) -> Result<R, Error> {
        Ok(self.domain.0.records.change(&*self.job, change)?)
    }
}

/// An agent job and what it may do. Ends with the operation it was lent to.
#[derive(Debug)]
pub struct AgentOp {
    pub(crate) domain: Domain,
    pub(crate) job: Lent<AgentJob>,
    pub(crate) deadline: Deadline,
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
    /// [`Gone`](crate::ErrorKind::Gone) if the guest ended, [`State`](crate::ErrorKind::State) if there is none, or no agent's channel.
    pub fn agent(&mut self) -> Result<Agent<'_, AgentJob>, Error> {
        Agent::enter(&self.domain, &*self.job, self.deadline)
    }
}

/// An async job and what it may do. Ends with the operation it was lent to.
#[derive(Debug)]
pub struct AsyncOp {
    pub(crate) domain: Domain,
    pub(crate) job: Lent<AsyncJob>,
    pub(crate) owner: Label,
    pub(crate) deadline: Deadline,
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
    /// As [`Op::monitor`], and [`TimedOut`](crate::ErrorKind::TimedOut) if the nested job was not granted in time.
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

    /// The way past QEMU's main loop, for when that is stuck.
    ///
    /// # Errors
    ///
    /// As [`Op::monitor`].
    pub(crate) fn rescue(&self) -> Result<Rescue, Error> {
        Rescue::enter(&self.domain, &*self.job)
    }

    /// Changes definition and intent, as [`Op::with_state`].
    ///
    /// # Errors
    ///
    /// [`Gone`](crate::ErrorKind::Gone) if the guest this job belongs to ended.
    pub fn with_state<R>(&self, change: impl FnOnce(&mut Records) -> R) -> Result<R, Error> {
        Ok(self.domain.0.records.change(&*self.job, change)?)
    }

    /// Tells which phase the job is in.
    pub fn set_phase(&self, phase: impl Into<Label>) {
        let phase = phase.into();
        self.job.set_phase(phase.clone());
        self.domain.0.publish_holder();
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
        self.tell(self.job.report(done, total))
    }

    /// The same, where the job itself estimates how fast it is and when it will be done.
    #[expect(
        clippy::must_use_candidate,
        reason = "those who follow the domain have been told"
    )]
    pub fn report_estimated(&self, done: u64, total: u64, estimate: Estimate) -> Option<Progress> {
        self.tell(self.job.report_estimated(done, total, estimate))
    }

    fn tell(&self, due: Option<Progress>) -> Option<Progress> {
        let progress = due?;
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
    /// [`Cancelled`](crate::ErrorKind::Cancelled) or [`Gone`](crate::ErrorKind::Gone) if so: the holder undoes what it did and
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

    /// Writes down what this job is about to do, with what is needed to finish or undo it.
    pub(crate) async fn note_work(&self, work: Work) -> Result<(), Error> {
        self.refuse_if_unsettled().await?;
        let job = self.interrupted(work);
        let noted = self.domain.0.note(move |record| {
            if let Some(record) = record {
                record.job = Some(job);
            }
        });
        Ok(noted.await?)
    }

    /// Makes a file that this job owns until it is done, and writes down what the job is then at, before and after.
    pub(crate) async fn make_file(
        &self,
        path: &Path,
        work: impl Fn(Made) -> Work,
    ) -> Result<Made, Error> {
        let path = path.to_owned();
        let mut file = blocking(move || Made::plan(&path)).await?;
        self.note_work(work(file.clone())).await?;
        file = blocking(move || file.make().map(|()| file)).await?;
        if let Err(error) = self.note_work(work(file.clone())).await {
            blocking(move || file.remove()).await?;
            return Err(error);
        }
        Ok(file)
    }

    /// Writes down that what is noted is further now, whoever began it.
    pub(crate) async fn amend_work(&self, work: Work) -> Result<(), Error> {
        let noted = self.domain.0.note(move |record| {
            if let Some(job) = record.as_mut().and_then(|record| record.job.as_mut()) {
                job.work = work;
            }
        });
        Ok(noted.await?)
    }

    /// Takes over what a job that was cut short was at: from here on this job ends it.
    pub(crate) async fn take_over(&self, work: Work) -> Result<(), Error> {
        let job = self.interrupted(work);
        let noted = self.domain.0.note(move |record| {
            if let Some(record) = record {
                record.job = Some(job);
            }
        });
        Ok(noted.await?)
    }

    /// There is one note of a job: that of one that was cut short is not written over before it is settled.
    async fn refuse_if_unsettled(&self) -> Result<(), Error> {
        let noted = self.domain.0.noted().await.and_then(|record| record.job);
        match noted.filter(|job| job.is_cut_short && job.id != self.job.id()) {
            None => Ok(()),
            Some(job) => {
                let (name, id) = (job.work.name(), job.id);
                let text = format!("job {id}, a {name}, was cut short and is to be settled first");
                Err(Cause::State(text).into())
            }
        }
    }

    /// Writes down that a guest is about to be brought up, and for what.
    pub(crate) async fn note_guest(&self, guest: &Guest, work: Work) -> Result<(), Error> {
        let record = Running {
            guest: guest.clone(),
            life: Uuid::new_v4(),
            process: None,
            job: Some(self.interrupted(work)),
            freezes: Vec::new(),
            is_thaw_due: false,
            moving: Vec::new(),
            block_jobs: Vec::new(),
        };
        let noted = self.domain.0.note(move |place| *place = Some(record));
        Ok(noted.await?)
    }

    /// What this job began could not be undone: it is settled by a job of its own, as after a lost connection.
    pub(crate) async fn leave_unsettled(&self) {
        if self.domain.0.job_is_cut_short(self.job.id()).await {
            settle_left(&self.domain);
        }
    }

    fn interrupted(&self, work: Work) -> Interrupted {
        Interrupted {
            id: self.job.id(),
            owner: self.owner.to_string(),
            work,
            is_cut_short: false,
            is_paused: false,
        }
    }

    /// The guest of this job's own generation, if it is still there.
    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        self.domain
            .0
            .live()
            .filter(|live| live.generation == self.job.generation())
    }

    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// Gives what undoes a job that is out of time a time of its own.
    pub(crate) fn extend(&mut self, limit: Duration) {
        self.deadline = self.deadline.max(Instant::now() + limit);
    }
}
