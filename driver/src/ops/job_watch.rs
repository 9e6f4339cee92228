//! Following one of QEMU's jobs from a visit to the monitor to the next. Decides nothing:
//! [`JobState`](crate::qemu_job::JobState) does.
//!
//! The events come by the domain's log, which is read from before the job begins: none is missed, and a gap is told. A
//! query each second is the net beneath, and tells how far the job is.
//!
//! ```text
//!  let mut watch = JobWatch::new(domain, "id");       // before the command that begins the job
//!  op.visit().await?.execute(begin).await?;           // with auto-dismiss off
//!  match watch.finish(&mut op, report).await? { .. }  // how it ended; it is dismissed
//! ```

use std::time::Duration;

use monitor_qmp::command;
use tokio::time::{Instant, timeout_at};

use crate::domain::Domain;
use crate::error::{Cause, Error, ErrorKind};
use crate::events::{Notice, Subscription, What};
use crate::ops::visit::Visits;
use crate::qemu_job::{End, JobState, Next, Seen};

/// How often QEMU is asked how far its job is, and whether an event was missed.
const ASK: Duration = Duration::from_secs(1);
/// What a job that is asked to stop may take for that, whatever was left of the operation's own time.
const STOPPING: Duration = Duration::from_secs(30);

/// One of QEMU's jobs, followed by its events.
pub(crate) struct JobWatch {
    state: JobState,
    events: Subscription,
    /// When QEMU answered last how far it is.
    asked_at: Instant,
}

impl JobWatch {
    /// Follows the job of that id from now on: to be made before the command that begins it is sent, or, for one that was
    /// begun before, at any time.
    pub(crate) fn new(domain: &Domain, id: impl Into<String>) -> Self {
        Self {
            state: JobState::new(id),
            events: domain.subscribe(),
            asked_at: Instant::now(),
        }
    }

    /// Waits until the job ended, and dismisses it. `report` is told how far it is, and how far it goes.
    ///
    /// Asked to stop, or out of time, it has the job cancelled, waits for that, and says why. An error of the monitor leaves
    /// the job as it is: whoever undoes the operation cancels it, once QEMU answers again.
    pub(crate) async fn finish<V: Visits>(
        &mut self,
        op: &mut V,
        mut report: impl FnMut(u64, u64) + Send,
    ) -> Result<End, Error> {
        let began = Instant::now();
        let mut why_stopped = None;
        let mut next = Next::Ask;
        loop {
            next = match next {
                Next::Wait => {
                    if why_stopped.is_none()
                        && let Some(error) = must_stop(op, began)
                    {
                        why_stopped = Some(error);
                        op.extend_to(Instant::now() + STOPPING);
                        cancel(op, self.state.id()).await?;
                        Next::Ask
                    } else if why_stopped.is_some() && Instant::now() >= op.deadline() {
                        let what = "QEMU to give its job up";
                        let waited = STOPPING;
                        return Err(Cause::TimedOut { what, waited }.into());
                    } else {
                        self.wait(op, why_stopped.is_some()).await
                    }
                }
                Next::Ask => {
                    let jobs = op.visit().await?.execute(command::QueryJobs).await?;
                    // Not before it answered: one that is slow is not asked without a pause.
                    self.asked_at = Instant::now();
                    let mine = jobs.iter().find(|job| job.id == self.state.id());
                    let next = self.state.take(&Seen::Listed(mine));
                    let (done, total) = self.state.progress();
                    report(done, total);
                    next
                }
                Next::Dismiss => {
                    dismiss(op, self.state.id()).await?;
                    self.state.take(&Seen::Dismissed)
                }
                Next::Stop => {
                    let end = self.state.end().cloned().unwrap_or(End::Unknown);
                    return match why_stopped {
                        // Else it was too late to stop it.
                        Some(error) if end != End::Done => Err(error),
                        _ => Ok(end),
                    };
                }
            };
        }
    }

    /// Waits for the next event, for a request to stop, or for the time to ask.
    async fn wait<V: Visits>(&mut self, op: &V, is_stopping: bool) -> Next {
        // Counted from the last time: news of other things that come ever faster do not put it off.
        let until = (self.asked_at + ASK).min(op.deadline());
        let token = op.token();
        let notice = tokio::select! {
            notice = timeout_at(until, self.events.next()) => notice,
            _ = token.stop(), if !is_stopping => return Next::Wait,
        };
        match notice {
            Ok(Notice::News { news, .. }) => match &news.what {
                What::Qemu(event) => self.state.take(&Seen::Event(&event.typed())),
                _ => Next::Wait,
            },
            Ok(Notice::Gap { .. }) | Err(_) => self.state.take(&Seen::Unsure),
        }
    }
}

/// Why the job is to be stopped, if it is.
fn must_stop<V: Visits>(op: &V, began: Instant) -> Option<Error> {
    if let Err(error) = op.check_stopped() {
        return Some(error);
    }
    let what = "QEMU to end its job";
    let waited = began.elapsed();
    (Instant::now() >= op.deadline()).then(|| Cause::TimedOut { what, waited }.into())
}

/// Asks a job to stop. One that has ended, or is about to, is no error: the list tells how it ended.
pub(crate) async fn cancel<V: Visits>(op: &mut V, job: &str) -> Result<(), Error> {
    let id = job.to_owned();
    tolerant(op.visit().await?.execute(command::JobCancel { id }).await)
}

/// Takes a job that ended off the list. One that somebody else took off is no error.
pub(crate) async fn dismiss<V: Visits>(op: &mut V, job: &str) -> Result<(), Error> {
    let id = job.to_owned();
    tolerant(op.visit().await?.execute(command::JobDismiss { id }).await)
}

fn tolerant<T>(answer: Result<T, Error>) -> Result<(), Error> {
    match answer {
        Err(error) if error.kind() == ErrorKind::Refused => Ok(()),
        other => other.map(drop),
    }
}
