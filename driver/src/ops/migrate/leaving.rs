//! The local steps of a guest that leaves, on a real QEMU: described, sent, let go or let run again.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use job_core::{GoneWhy, Guard};
use monitor_qmp::command::{self, MigrationInfo, MigrationStatus};
use remote_migrate::source::Outcome;
use remote_migrate::verdict::GuestState;
use remote_migrate::{
    Begun, Cookie, HostError, Meter, MigrationId, Owner, Prepared, Record, Report, RunState, Side,
    SourceHost, Step, Stopped,
};
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout};
use tracing::warn;

use super::following::{self, is_over};
use super::sending::{self, only};
use super::tune::Lead;
use super::{MigrateOptions, Moving};
use crate::domain::{Domain, Sight};
use crate::error::{Cause, Error};
use crate::ops::AsyncOp;
use crate::ops::parts::refuse_unsettled;
use crate::ops::start::as_it_runs;
use crate::policy::Watch;
use crate::process::Process;
use crate::records::Work;
use crate::stream_tls;

/// Between two looks at a migration that is about to end.
const POLL: Duration = Duration::from_millis(20);

/// How long a cancel may take of a QEMU that is not stuck in a connect. It takes some milliseconds.
const CANCELLED: Duration = Duration::from_secs(2);

/// The local steps, on a real QEMU.
pub(super) struct Leaving<'a> {
    pub(super) op: &'a Mutex<AsyncOp>,
    pub(super) options: MigrateOptions,
    lead: Lead,
    /// The QEMU it is about, under whatever generation.
    process: Option<Arc<Process>>,
    /// Told when it cannot be brought to its end under this job.
    pub(super) stranded: Notify,
}

impl<'a> Leaving<'a> {
    pub(super) fn new(
        domain: &Domain,
        op: &'a Mutex<AsyncOp>,
        options: MigrateOptions,
        lead: Lead,
    ) -> Self {
        Self {
            op,
            options,
            lead,
            process: domain.0.live().and_then(|live| live.process.clone()),
            stranded: Notify::new(),
        }
    }

    /// For a guest whose memory is not sent again.
    pub(super) fn without_options(domain: &Domain, op: &'a Mutex<AsyncOp>, lead: Lead) -> Self {
        Self::new(domain, op, MigrateOptions::default(), lead)
    }

    /// Whether the QEMU is there to be asked. Where only its connection was lost, that is seen under a job of the next
    /// generation.
    fn sight(&self, op: &AsyncOp) -> Result<Sight, Error> {
        let process = self.process.as_deref();
        let seen = op.domain().0.sight(process, op.job.generation());
        if seen.is_err() {
            self.stranded.notify_one();
        }
        Ok(seen?)
    }

    /// The guest lives elsewhere: its QEMU here ends.
    async fn release(&self, op: &mut AsyncOp, migration: MigrationId) -> Result<(), Error> {
        op.extend(op.domain().0.context.defaults.command);
        let context = op.domain().0.context.clone();
        let records = context.migrations().await?;
        let is_it =
            |record: &&Record| record.migration() == migration && record.side() == Side::Source;
        let owner = records.iter().find(is_it).map(Record::owner);
        // One that is lost lives nowhere: it may be started anew.
        if owner != Some(Owner::Nobody) {
            op.with_state(|records| records.moved_away = true)?;
            op.domain().0.store_definition().await?;
        }
        let is_here = self.sight(op)? == Sight::Here;
        let Some(live) = op.live().filter(|_| is_here) else {
            return Ok(());
        };
        live.doom(GoneWhy::Left("it moved to another host".into()));
        let Some(process) = &live.process else {
            // Only a guest with a definition moves, and that one was started here.
            return Err(Cause::State("its process is not known".into()).into());
        };
        process.terminate().map_err(crate::error::io(
            "signal QEMU, process",
            process.pid().to_string(),
        ))?;
        if timeout(context.defaults.terminate, process.exited())
            .await
            .is_err()
        {
            process.kill().map_err(crate::error::io(
                "signal QEMU, process",
                process.pid().to_string(),
            ))?;
            process.exited().await;
        }
        Ok(())
    }

    /// Works until it is done, or can be done under another job only.
    pub(super) async fn unless_stranded(
        &self,
        work: impl Future<Output = Result<Report, remote_migrate::Error>>,
    ) -> Result<Report, Error> {
        tokio::select! {
            done = work => Ok(done.map_err(Cause::Migrate)?),
            () = self.stranded.notified() => {
                let lost = Cause::State("its QEMU ended, or the connection to it was lost".into());
                Err(Cause::Unsettled(Box::new(lost.into())).into())
            }
        }
    }
}

#[async_trait]
impl SourceHost for Leaving<'_> {
    async fn begin(&self, _step: Step) -> Result<Begun, HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("begin");
        refuse_unsettled(op.domain())
            .await
            .map_err(HostError::new)?;
        let mut guest = as_it_runs(op.domain()).await.map_err(HostError::new)?;
        op.note_work(Work::MigrationOut)
            .await
            .map_err(HostError::new)?;
        // A pause that came before is seen by the look that follows, and one that comes later may not be.
        if let Some(live) = op.live() {
            live.note_pause(false);
        }
        let (status, info) = look(&mut op).await.map_err(HostError::new)?;
        if let Some(reason) = info.blocked_reasons.first() {
            return Err(HostError::new(format!("it cannot be moved: {reason}")));
        }
        if let (Some(status), None) = (&info.status, is_over(info.status.as_ref())) {
            let status = status.as_str();
            let text = format!("QEMU is not done with an earlier migration yet: {status}");
            return Err(HostError::new(text));
        }
        // Another QEMU may mean a newer machine by the same short name.
        if let Some(machine) = machine(&mut op).await.map_err(HostError::new)? {
            guest.machine = machine;
        }
        let (channels, post_copy) = (self.options.channels, self.options.post_copy);
        let moving = Moving::new(guest, channels, post_copy);
        let cookie = Cookie::encode(&moving).map_err(HostError::new)?;
        Ok(Begun {
            cookie,
            run: if status.running {
                RunState::Running
            } else {
                RunState::Paused
            },
        })
    }

    async fn perform(
        &self,
        _step: Step,
        to: &Prepared,
        meter: &Meter,
    ) -> Result<Stopped, HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("perform");
        let performed = async {
            // First of all, also if the guest is known to be dead by now: who waits for memory over there hears only by the
            // end of the connection that none will come, and would wait for ever.
            sending::begin(&mut op, to, &self.options).await?;
            let rescue = op.rescue()?;
            let watch = Watch::new(self.options.policy.clone());
            following::follow(&mut op, &rescue, to, meter, watch, &self.lead).await
        };
        performed.await.map_err(HostError::new)
    }

    async fn complete(&self, _step: Step, meter: &Meter) -> Result<(), HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("switchover");
        let completed = async {
            let rescue = op.rescue()?;
            following::complete(&mut op, &rescue, meter).await
        };
        completed.await.map_err(HostError::new)
    }

    async fn switch(&self, _step: Step, to: &Prepared) -> Result<(), HostError> {
        let mut op = self.op.lock().await;
        // The journal says so already.
        op.job().pass_point_of_return();
        op.set_phase("switch");
        let switched = following::switch(&mut op, to, &self.options).await;
        switched.map_err(HostError::new)
    }

    async fn drain(
        &self,
        _step: Step,
        to: Option<&Prepared>,
        meter: &Meter,
    ) -> Result<(), HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("post-copy");
        let drained = async {
            if let Some(to) = to {
                sending::resume(&mut op, to).await?;
            }
            following::follow_rest(&mut op, meter).await
        };
        drained.await.map_err(HostError::new)
    }

    async fn confirm(&self, step: Step, outcome: Outcome) -> Result<(), HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("confirm");
        match outcome {
            Outcome::Kept(run) => keep(&mut op, run).await,
            Outcome::Released => {
                let released = self.release(&mut op, step.migration).await;
                if released.is_err() && op.job.check().is_err() {
                    // Its QEMU ended first. It can be written down under a job of the next generation, which waits for ours.
                    self.stranded.notify_one();
                }
                released
            }
        }
        .map_err(HostError::new)
    }

    fn was_paused(&self) -> bool {
        // Nobody else has it between two steps.
        let op = self.op.try_lock().ok();
        op.and_then(|op| op.live())
            .is_some_and(|live| live.was_paused())
    }

    fn stopped_at(&self) -> Option<i64> {
        // Nobody else has it while the answer of the other side is looked at.
        let op = self.op.try_lock().ok()?;
        op.live()?.stopped_at()
    }

    async fn inspect(&self, _step: Step) -> Result<GuestState, HostError> {
        let mut op = self.op.lock().await;
        let patience = op.domain().0.context.defaults.command;
        op.extend(patience);
        if self.sight(&op).map_err(HostError::new)? == Sight::Dead {
            return Ok(GuestState::Gone);
        }
        let (status, info) = look(&mut op).await.map_err(HostError::new)?;
        Ok(match (status.running, is_over(info.status.as_ref())) {
            (true, _) => GuestState::Running,
            (false, Some(true)) | (false, None) => GuestState::Stopped,
            (false, Some(false)) => GuestState::GivenUp,
        })
    }
}

/// The full name of the machine that runs, as `pc-q35-7.2` for one that was started as `q35`.
async fn machine(op: &mut AsyncOp) -> Result<Option<String>, Error> {
    let property = command::QomGet {
        path: "/machine".into(),
        property: "type".into(),
    };
    let said = op.monitor().await?.execute(property).await?;
    let kind: String = serde_json::from_str(said.get()).unwrap_or_default();
    Ok(kind.strip_suffix("-machine").map(str::to_owned))
}

/// What the guest does, and how far QEMU is with its migration.
async fn look(op: &mut AsyncOp) -> Result<(command::Status, MigrationInfo), Error> {
    let monitor = op.monitor().await?;
    let status = monitor.execute(command::QueryStatus).await?;
    let info = monitor.execute(command::QueryMigrate).await?;
    Ok((status, info))
}

/// Ends what is left of the migration, and lets the guest run if it ran.
async fn keep(op: &mut AsyncOp, run: RunState) -> Result<(), Error> {
    op.extend(op.domain().0.context.defaults.command);
    let mut info = op.monitor().await?.execute(command::QueryMigrate).await?;
    if is_over(info.status.as_ref()).is_none() {
        // In post-copy too: nobody comes here then but upon the other side's word that it never ran there.
        op.monitor().await?.execute(command::MigrateCancel).await?;
        let (began, is_connecting) = (Instant::now(), info.status == Some(MigrationStatus::Setup));
        while is_over(info.status.as_ref()).is_none() {
            if is_connecting && began.elapsed() > CANCELLED {
                // By itself, and two minutes may pass until the kernel gives that up. Nothing was sent and the guest not
                // stopped. Whatever is to stream it next is refused until then, and sets right what was left on.
                warn!(
                    domain = op.domain().name(),
                    "QEMU waits still for an answer to a connect that was cancelled"
                );
                return Ok(());
            }
            let mut changes = op.domain().changes();
            changes.wait(POLL).await;
            info = op.monitor().await?.execute(command::QueryMigrate).await?;
        }
    }
    let monitor = op.monitor().await?;
    // What it left on would be in the way of a save, or of the next one.
    monitor.execute(only(&[])).await?;
    stream_tls::take_off(&monitor).await?;
    let is_running = monitor.execute(command::QueryStatus).await?.running;
    match (run, is_running) {
        // Paused while QEMU had stopped it for the switchover, which QEMU takes back without asking.
        (RunState::Paused, true) => _ = monitor.execute(command::Stop).await?,
        (RunState::Running, false) => {
            drop(monitor);
            // What cannot be read may be another migration of it, by which it runs elsewhere.
            let (context, uuid) = (op.domain().0.context.clone(), op.domain().uuid());
            context.refuse_unreadable(uuid).await?;
            op.monitor().await?.execute(command::Cont).await?;
        }
        _ => {}
    }
    Ok(())
}
