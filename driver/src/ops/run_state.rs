//! Whether the guest runs, and how much memory it has: query, pause, resume, power down, reset, balloon.

use job_core::JobKind;
use monitor_qmp::command;
use remote_migrate::Owner;
use tracing::warn;

use crate::domain::Domain;
use crate::error::{Cause, Effect, Error, ErrorKind};
use crate::ops::migrate::left;
use crate::ops::start::refuse_if_moved;
use crate::ops::{Call, Deadline, Op};

impl Domain {
    /// Asks QEMU what the guest does. [`observed`](Self::observed) has the last known answer without asking.
    pub fn query_status(&self) -> Call<command::Status> {
        self.normal("query", JobKind::Query, |mut op| async move {
            op.monitor()?.execute(command::QueryStatus).await
        })
    }

    /// Stops the virtual CPUs. A guest that is paused already stays so, and one on its way to another host arrives so. Once it
    /// was offered to the other host it is refused as [`State`](crate::ErrorKind::State): it is that one's to pause.
    pub fn pause(&self) -> Call<()> {
        self.normal("pause", JobKind::Suspend, |mut op| async move {
            refuse_if_offered(op.domain()).await?;
            let domain = op.domain().clone();
            // Before it is done, since the guest may be offered in the next instant, and this daemon may end.
            domain.0.note_pause(true).await?;
            let live = domain.0.live();
            let was_paused = live.as_ref().is_some_and(|live| live.note_pause(true));
            let stop = async { op.monitor()?.execute(command::Stop).await };
            let stopped = stop.await.map(drop);
            let is_in_vain = |error: &Error| error.effect() != Effect::Unknown;
            if stopped.as_ref().is_err_and(is_in_vain) && !was_paused {
                if let Some(live) = &live {
                    live.note_pause(false);
                }
                if let Err(error) = domain.0.note_pause(false).await {
                    warn!(
                        domain = domain.name(),
                        ?error,
                        "a pause that failed stays noted"
                    );
                }
            }
            stopped
        })
    }

    /// Lets the virtual CPUs run.
    pub fn resume(&self) -> Call<()> {
        self.normal("resume", JobKind::Modify, |mut op| async move {
            // A guest in doubt stands still here, and may run elsewhere.
            refuse_if_moved(op.domain()).await?;
            op.monitor()?.execute(command::Cont).await?;
            Ok(())
        })
    }

    /// Presses the power button. Whether the guest shuts down is its own decision: follow
    /// [`wait_for`](Self::wait_for).
    pub fn powerdown(&self) -> Call<()> {
        self.normal("powerdown", JobKind::Modify, |mut op| async move {
            match op.monitor()?.execute(command::SystemPowerdown).await {
                // A guest that obeys at once may be gone before the answer is looked at.
                Err(error) if error.kind() == ErrorKind::Gone && has_shut_down(op.domain()) => {
                    Ok(())
                }
                answer => answer.map(|_| ()),
            }
        })
    }

    /// Presses the reset button.
    pub fn reset(&self) -> Call<()> {
        self.normal("reset", JobKind::Modify, |mut op| async move {
            op.monitor()?.execute(command::SystemReset).await?;
            Ok(())
        })
    }

    /// The memory the guest has now, in bytes, by its balloon.
    pub fn query_memory(&self) -> Call<u64> {
        self.normal("query-memory", JobKind::Query, |mut op| async move {
            Ok(op.monitor()?.execute(command::QueryBalloon).await?.actual)
        })
    }

    /// Asks the guest to give memory back, or lets it have more, up to what it was defined with. It takes its time, and
    /// may never do it: follow [`Observed::memory`](crate::Observed::memory).
    pub fn set_memory(&self, bytes: u64) -> Call<()> {
        self.normal("set-memory", JobKind::Modify, move |mut op| async move {
            op.monitor()?
                .execute(command::Balloon { value: bytes })
                .await?;
            Ok(())
        })
    }

    /// A call that runs `body` under a normal job, within the default of a call.
    pub(crate) fn normal<T, F, B>(&self, owner: &'static str, kind: JobKind, body: B) -> Call<T>
    where
        B: FnOnce(Op) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        let domain = self.clone();
        let limit = self.0.context.defaults.call;
        Call::new(limit, move |deadline: Deadline| async move {
            domain.run(owner, kind, deadline, body).await
        })
    }
}

/// From then on it is not known who has it, or somebody else does.
async fn refuse_if_offered(domain: &Domain) -> Result<(), Error> {
    let records = left(domain).await?;
    match records
        .iter()
        .find(|record| record.owner() != Owner::Source)
    {
        None => Ok(()),
        Some(record) => {
            let (migration, owner) = (record.migration(), record.owner());
            let text = format!("migration {migration} has offered it, its owner is {owner}");
            Err(Cause::State(text).into())
        }
    }
}

/// Whether QEMU told that the guest shut down, rather than died.
fn has_shut_down(domain: &Domain) -> bool {
    domain.0.observed().shutdown.is_some()
}
