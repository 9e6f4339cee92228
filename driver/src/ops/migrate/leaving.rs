//! The local steps of a guest that leaves, on a real QEMU: described, sent, let go or let run again.

use std::time::Duration;

use async_trait::async_trait;
use job_core::{GoneWhy, Guard};
use monitor_qmp::command::{self, MigrationStatus};
use remote_migrate::source::Outcome;
use remote_migrate::verdict::GuestState;
use remote_migrate::{
    Begun, Cookie, HostError, Meter, MigrationId, Owner, Prepared, Ran, Record, RunState, Side,
    SourceHost, Step, Transfer,
};
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout};

use super::{Bring, MigrateOptions, Moving};
use crate::domain::state::Run;
use crate::error::{Cause, Error};
use crate::ops::AsyncOp;
use crate::ops::parts::refuse_unsettled;
use crate::ops::start::as_it_runs;
use crate::records::Work;

/// How often QEMU is asked how far it is, where none of its events comes first.
const POLL: Duration = Duration::from_millis(100);
/// The name under which QEMU keeps the connection.
const FD_NAME: &str = "vmwright-migrate";

/// Bytes a second unless told otherwise: QEMU's own default of 128 MiB/s, said explicitly since a save may have changed it.
const BANDWIDTH: u64 = 128 << 20;

/// The local steps, on a real QEMU.
pub(super) struct Leaving<'a> {
    pub(super) op: &'a Mutex<AsyncOp>,
    pub(super) options: MigrateOptions,
    /// Told when it cannot be brought to its end under this job.
    pub(super) stranded: Notify,
}

impl<'a> Leaving<'a> {
    pub(super) fn new(op: &'a Mutex<AsyncOp>, options: MigrateOptions) -> Self {
        Self {
            op,
            options,
            stranded: Notify::new(),
        }
    }

    /// For a guest whose memory is not sent again.
    pub(super) fn without_options(op: &'a Mutex<AsyncOp>) -> Self {
        Self::new(op, MigrateOptions::default())
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
        let guest = as_it_runs(op.domain()).await.map_err(HostError::new)?;
        op.note_work(Work::MigrationOut)
            .await
            .map_err(HostError::new)?;
        let monitor = op.monitor().await.map_err(HostError::new)?;
        let status = monitor
            .execute(command::QueryStatus)
            .await
            .map_err(HostError::new)?;
        let info = monitor
            .execute(command::QueryMigrate)
            .await
            .map_err(HostError::new)?;
        if let Some(reason) = info.blocked_reasons.first() {
            return Err(HostError::new(format!("it cannot be moved: {reason}")));
        }
        let cookie = Cookie::encode(&Moving { guest }).map_err(HostError::new)?;
        Ok(Begun {
            cookie,
            run: if status.running {
                RunState::Running
            } else {
                RunState::Paused
            },
        })
    }

    async fn perform(&self, _step: Step, to: &Prepared, meter: &Meter) -> Result<(), HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("perform");
        self.send(&mut op, to, meter).await.map_err(HostError::new)
    }

    async fn confirm(&self, step: Step, outcome: Outcome) -> Result<(), HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("confirm");
        match outcome {
            Outcome::Kept(run) => keep(&mut op, run).await,
            Outcome::Released => {
                let released = release(&mut op, step.migration).await;
                if released.is_err() && op.job.check().is_err() {
                    // Its QEMU ended first. It can be written down under a job of the next generation, which waits for ours.
                    self.stranded.notify_one();
                }
                released
            }
        }
        .map_err(HostError::new)
    }

    async fn inspect(&self, _step: Step) -> Result<GuestState, HostError> {
        let mut op = self.op.lock().await;
        let patience = op.domain().0.context.defaults.command;
        op.extend(patience);
        let is_off = {
            let observed = op.domain().0.observed();
            observed.generation != op.job.generation() || observed.run == Run::Off
        };
        if is_off || op.live().is_none() {
            // How far it ran on its own before it died is not known here.
            return Ok(GuestState::Gone(Ran::Maybe));
        }
        let monitor = op.monitor().await.map_err(HostError::new)?;
        let status = monitor
            .execute(command::QueryStatus)
            .await
            .map_err(HostError::new)?;
        let info = monitor
            .execute(command::QueryMigrate)
            .await
            .map_err(HostError::new)?;
        Ok(match (status.running, is_over(info.status.as_ref())) {
            (true, _) => GuestState::Running,
            (false, Some(true)) | (false, None) => GuestState::Stopped,
            (false, Some(false)) => GuestState::Running,
        })
    }
}

/// Whether the migration moved the guest (`true`), or left it where it was (`false`); nothing while it is under way.
fn is_over(status: Option<&MigrationStatus>) -> Option<bool> {
    match status {
        Some(MigrationStatus::Completed) => Some(true),
        None
        | Some(MigrationStatus::None | MigrationStatus::Failed | MigrationStatus::Cancelled) => {
            Some(false)
        }
        Some(_) => None,
    }
}

impl Leaving<'_> {
    /// Sends the guest's memory over a connection of ours, until QEMU says that all was acknowledged.
    async fn send(&self, op: &mut AsyncOp, to: &Prepared, meter: &Meter) -> Result<(), Error> {
        let deadline = op
            .deadline()
            .min(Instant::now() + op.domain().0.context.defaults.connect);
        let context = op.domain().0.context.clone();
        let Bring { ticket } = to.cookie.decode().map_err(|error| {
            Cause::State(format!(
                "the other side gave no ticket for the memory: {error}"
            ))
        })?;
        let stream = context.transports.dial(&to.connect, deadline).await?;
        let shown = ticket.show(stream, context.defaults.silence).await;
        let connection = shown.map_err(crate::error::io("show the ticket at", &*to.connect))?;
        let monitor = op.monitor().await?;
        // Without the return path QEMU says `completed` while the destination exits (test bed, QEMU 7.2 and 10.0).
        let capabilities = vec![
            command::MigrationCapability::on("events"),
            command::MigrationCapability::on("return-path"),
        ];
        monitor
            .execute(command::MigrateSetCapabilities { capabilities })
            .await?;
        let mut parameters = command::MigrateSetParameters::default();
        parameters.max_bandwidth = Some(self.options.bandwidth.unwrap_or(BANDWIDTH));
        parameters.downtime_limit = self.options.downtime.map(|limit| limit.as_millis() as u64);
        monitor.execute(parameters).await?;
        monitor
            .execute_with_fds(
                command::Getfd {
                    fdname: FD_NAME.into(),
                },
                vec![connection],
            )
            .await?;
        monitor
            .execute(command::Migrate::new(format!("fd:{FD_NAME}")))
            .await?;
        drop(monitor);
        loop {
            let mut changes = op.domain().changes();
            let info = op.monitor().await?.execute(command::QueryMigrate).await?;
            if let Some(ram) = &info.ram {
                meter.report(Transfer {
                    sent: ram.transferred,
                    remaining: ram.remaining,
                    total: ram.total,
                    pass: ram.dirty_sync_count,
                    dirty_rate: ram.dirty_pages_rate * ram.page_size,
                });
                op.report(ram.total.saturating_sub(ram.remaining), ram.total);
            }
            match is_over(info.status.as_ref()) {
                Some(true) => return Ok(()),
                Some(false) => {
                    let reason = info
                        .error_desc
                        .unwrap_or_else(|| "QEMU gave it up without a reason".into());
                    return Err(Cause::Failed(reason).into());
                }
                None => changes.wait(POLL).await,
            }
        }
    }
}

/// Ends what is left of the migration, and lets the guest run if it ran.
async fn keep(op: &mut AsyncOp, run: RunState) -> Result<(), Error> {
    op.extend(op.domain().0.context.defaults.command);
    let info = op.monitor().await?.execute(command::QueryMigrate).await?;
    if is_over(info.status.as_ref()).is_none() {
        op.monitor().await?.execute(command::MigrateCancel).await?;
        loop {
            let mut changes = op.domain().changes();
            let info = op.monitor().await?.execute(command::QueryMigrate).await?;
            if is_over(info.status.as_ref()).is_some() {
                break;
            }
            changes.wait(POLL).await;
        }
    }
    let monitor = op.monitor().await?;
    if run == RunState::Running && !monitor.execute(command::QueryStatus).await?.running {
        monitor.execute(command::Cont).await?;
    }
    Ok(())
}

/// The guest lives elsewhere: its QEMU here ends.
async fn release(op: &mut AsyncOp, migration: MigrationId) -> Result<(), Error> {
    op.extend(op.domain().0.context.defaults.command);
    let context = op.domain().0.context.clone();
    let records = context.migrations().await?;
    let is_it = |record: &&Record| record.migration() == migration && record.side() == Side::Source;
    let owner = records.iter().find(is_it).map(Record::owner);
    // One that is lost lives nowhere: it may be started anew.
    if owner != Some(Owner::Nobody) {
        op.with_state(|records| records.moved_away = true)?;
        op.domain().0.store_definition().await?;
    }
    let Some(live) = op.live() else {
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
