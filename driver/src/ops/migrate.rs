//! A guest leaves for another host: the driver's steps for the source side of `remote-migrate`.
//!
//! The async job is held from Begin to Confirm. The peer is asked while the job is held and nothing is locked (R14);
//! whether the guest still lives is checked again afterwards, by looking at it. Decides nothing: the phases do.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use job_core::{AsyncKind, GoneWhy, Guard};
use monitor_qmp::command::{self, MigrationStatus};
use remote_migrate::source::Outcome;
use remote_migrate::verdict::GuestState;
use remote_migrate::{
    Answer, Begun, Control, Cookie, HostError, Journal, Meter, Peer, PeerError, Plan, Prepared,
    Ran, Request, RunState, SourceHost, Step, Transfer,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use crate::domain::Domain;
use crate::domain::state::Run;
use crate::error::{Cause, Error};
use crate::guest::Guest;
use crate::landing::Ticket;
use crate::ops::destroy::cleaned_up;
use crate::ops::start::as_it_runs;
use crate::ops::{AsyncOp, Call};
use crate::records::Work;

/// How often QEMU is asked how far it is.
const POLL: Duration = Duration::from_millis(100);
/// The name under which QEMU keeps the connection.
const FD_NAME: &str = "vmwright-migrate";

/// Bytes a second unless told otherwise: QEMU's own default of 128 MiB/s, said explicitly since a save may have changed it.
const BANDWIDTH: u64 = 128 << 20;

/// How a guest is moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..MigrateOptions::default()`"
)]
pub struct MigrateOptions {
    /// At most so many bytes a second; QEMU's own default is 128 MiB/s.
    pub bandwidth: Option<u64>,
    /// The longest the guest may stand still at the end; QEMU's own default is 300 ms.
    pub downtime: Option<Duration>,
    /// Where the daemon is that the guest goes to, in words of the daemon's own. Kept in the journal, for whoever has to
    /// ask it again after a restart.
    pub there: Option<Arc<str>>,
    /// Where this daemon is. Kept in the other one's journal, for whoever has to ask back.
    pub home: Option<Arc<str>>,
}

/// What the destination's driver must know of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Moving {
    pub(crate) guest: Guest,
}

/// What the source's driver must know to bring the memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bring {
    pub(crate) ticket: Ticket,
}

impl Domain {
    /// Moves the guest to the driver behind `peer`. Done means that the destination has said that the guest is its own.
    ///
    /// It can be cancelled until the guest was offered to the other side; then the answer is
    /// [`TooLate`](crate::ErrorKind::TooLate). A failure names who owns the guest; in doubt, nothing is resumed here
    /// until the peer was asked or an operator decided.
    pub fn migrate(
        &self,
        peer: Arc<dyn Peer>,
        options: MigrateOptions,
    ) -> Call<remote_migrate::Report> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::MigrationOut.default_mask();
            let work = move |op: AsyncOp| leave(op, peer, options);
            let live = domain.0.live();
            let moved = domain
                .run_async("migrate", AsyncKind::MigrationOut, mask, deadline, work)
                .await?;
            if let Some(live) = live {
                cleaned_up(&domain, &live, deadline).await?;
            }
            Ok(moved)
        })
    }
}

impl Domain {
    /// Takes up a migration of this guest that was left in doubt or unsettled, and asks the peer how it stands there.
    /// Nothing is resumed upon silence.
    pub fn recover_migration(&self, peer: Arc<dyn Peer>) -> Call<remote_migrate::Report> {
        self.settle(move |op, migration| async move {
            let journal = op.domain().0.context.journal.clone();
            let op = Mutex::new(op);
            let (host, peer) = (
                Leaving {
                    op: &op,
                    options: MigrateOptions::default(),
                },
                Held {
                    op: &op,
                    peer: &*peer,
                },
            );
            let limits = remote_migrate::Limits::default();
            let control = Control::new();
            Ok(
                remote_migrate::recover(migration, limits, &host, &peer, &*journal, &control)
                    .await
                    .map_err(Cause::Migrate)?,
            )
        })
    }

    /// Ends a migration of this guest by the word of an operator, who knows what became of the other side: that it is
    /// fenced, or that it has the guest.
    pub fn resolve_migration(
        &self,
        ruling: remote_migrate::verdict::Ruling,
    ) -> Call<remote_migrate::Report> {
        self.settle(move |op, migration| async move {
            let journal = op.domain().0.context.journal.clone();
            let op = Mutex::new(op);
            let host = Leaving {
                op: &op,
                options: MigrateOptions::default(),
            };
            let limits = remote_migrate::Limits::default();
            Ok(
                remote_migrate::resolve(migration, ruling, limits, &host, &*journal)
                    .await
                    .map_err(Cause::Migrate)?,
            )
        })
    }

    /// A call that runs `body` for the migration that the journal has of this guest, under the job of one.
    fn settle<F>(
        &self,
        body: impl FnOnce(AsyncOp, remote_migrate::MigrationId) -> F + Send + 'static,
    ) -> Call<remote_migrate::Report>
    where
        F: Future<Output = Result<remote_migrate::Report, Error>> + Send + 'static,
    {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::MigrationOut.default_mask();
            let work = move |op: AsyncOp| async move {
                let records = op.domain().0.context.migrations().await?;
                let uuid = op.domain().uuid();
                let mine = |record: &&remote_migrate::Record| {
                    record.domain() == uuid && record.side() == remote_migrate::Side::Source
                };
                let found = records
                    .iter()
                    .find(mine)
                    .map(remote_migrate::Record::migration);
                let migration =
                    found.ok_or_else(|| Cause::State("no migration of it is unsettled".into()))?;
                body(op, migration).await
            };
            domain
                .run_async(
                    "settle-migration",
                    AsyncKind::MigrationOut,
                    mask,
                    deadline,
                    work,
                )
                .await
        })
    }
}

async fn leave(
    op: AsyncOp,
    peer: Arc<dyn Peer>,
    options: MigrateOptions,
) -> Result<remote_migrate::Report, Error> {
    let journal: Arc<dyn Journal> = op.domain().0.context.journal.clone();
    let mut plan = Plan::new(op.domain().uuid());
    if let Some(there) = &options.there {
        plan = plan.peer(there.clone());
    }
    if let Some(home) = &options.home {
        plan = plan.home(home.clone());
    }
    let control = Control::new();
    let token = op.job.token();
    let op = Mutex::new(op);
    let host = Leaving { op: &op, options };
    let peer = Held {
        op: &op,
        peer: &*peer,
    };
    let moving = remote_migrate::migrate(&plan, &host, &peer, &*journal, &control);
    tokio::pin!(moving);
    let moved = tokio::select! {
        moved = &mut moving => moved,
        _ = token.stop() => {
            // Too late is an answer too: the migration goes on then, and says how it ended.
            let _answer = control.cancel();
            moving.await
        }
    };
    Ok(moved.map_err(Cause::Migrate)?)
}

/// The peer, asked while the job is held.
struct Held<'a> {
    op: &'a Mutex<AsyncOp>,
    peer: &'a dyn Peer,
}

#[async_trait]
impl Peer for Held<'_> {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let mut op = self.op.lock().await;
        if request.call == remote_migrate::Call::Finish {
            // It gives the guest away: nobody can take that back here.
            op.job().pass_point_of_return();
        }
        let mut answer = None;
        let asked = op
            .job()
            .remote(async { answer = Some(self.peer.ask(request.clone(), deadline).await) })
            .await;
        match (answer, asked) {
            // The answer counts also when the guest died here meanwhile: it may live there. The phases look at it next.
            (Some(answer), _) => answer,
            // The guest was gone before: the question stands all the same, since the other side may have it.
            (None, _) => self.peer.ask(request, deadline).await,
        }
    }
}

/// The local steps, on a real QEMU.
struct Leaving<'a> {
    op: &'a Mutex<AsyncOp>,
    options: MigrateOptions,
}

#[async_trait]
impl SourceHost for Leaving<'_> {
    async fn begin(&self, _step: Step) -> Result<Begun, HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("begin");
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

    async fn confirm(&self, _step: Step, outcome: Outcome) -> Result<(), HostError> {
        let mut op = self.op.lock().await;
        op.set_phase("confirm");
        match outcome {
            Outcome::Kept(run) => keep(&mut op, run).await,
            Outcome::Released => release(&mut op).await,
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
                None => sleep(POLL).await,
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
        while is_over(
            op.monitor()
                .await?
                .execute(command::QueryMigrate)
                .await?
                .status
                .as_ref(),
        )
        .is_none()
        {
            sleep(POLL).await;
        }
    }
    let monitor = op.monitor().await?;
    if run == RunState::Running && !monitor.execute(command::QueryStatus).await?.running {
        monitor.execute(command::Cont).await?;
    }
    Ok(())
}

/// The guest lives elsewhere: its QEMU here ends.
async fn release(op: &mut AsyncOp) -> Result<(), Error> {
    op.extend(op.domain().0.context.defaults.command);
    let Some(live) = op.live() else {
        return Ok(());
    };
    op.with_state(|records| records.moved_away = true)?;
    op.domain().0.store_definition().await?;
    live.doom(GoneWhy::Left("it moved to another host".into()));
    let Some(process) = &live.process else {
        // Only a guest with a definition moves, and that one was started here.
        return Err(Cause::State("its process is not known".into()).into());
    };
    process.terminate().map_err(crate::error::io(
        "signal QEMU, process",
        process.pid().to_string(),
    ))?;
    if timeout(op.domain().0.context.defaults.terminate, process.exited())
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
