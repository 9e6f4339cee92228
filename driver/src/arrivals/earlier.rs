//! Guests that began to arrive at an earlier daemon: what is left of them, and the end of what was begun.
//!
//! Recovery has found the QEMU, if there is one, and has left it as it was: a copy, complete or not, or the guest. Its gate
//! went with the daemon, so whoever did not connect yet never will. Whoever asks while recovery is still at it waits in line
//! behind its job.

use std::time::Duration;

use job_core::{AsyncKind, Guard as _, JobKind};
use monitor_qmp::command::{self, MigrationStatus};
use remote_migrate::{CopyState, Owner, Ran, RunState, Side, Step};
use tokio::time::{Instant, sleep};

use super::disks;
use super::in_halves;
use super::taken::taken;
use crate::context::Context;
use crate::domain::{Domain, Sight};
use crate::error::{Cause, Error, ErrorKind};
use crate::ops::destroy::cleaned_up;
use crate::ops::migrate::is_post_copy;
use crate::ops::start::{give_up, refuse_if_running, run, run_in_halves};
use crate::ops::{AsyncOp, Op};
use crate::records::Work;

/// Between two looks at a guest that is about to be gone.
const POLL: Duration = Duration::from_millis(20);

/// What is there.
pub(super) async fn look(context: &Context, step: Step) -> Result<CopyState, Error> {
    let Some(domain) = context.registry.by_uuid(step.domain).map(Domain) else {
        // Nobody wrote of a QEMU. One that is there all the same is not to be taken for gone.
        let directory = context.run_dir.join(step.domain.to_string());
        refuse_if_running(&directory.join("monitor.sock")).await?;
        return Ok(CopyState::Gone(Ran::Maybe));
    };
    let was_taken = was_taken(context, step).await?;
    loop {
        let seen = domain.run("look", JobKind::Query, step.deadline, move |op| {
            see(op, was_taken)
        });
        match seen.await {
            // It ended while we stood in line, or was looked at. Once that is cleaned up, it is seen to be off.
            Err(error) if error.kind() == ErrorKind::Gone && Instant::now() < step.deadline => {
                sleep(POLL).await;
            }
            seen => return seen,
        }
    }
}

/// Lets a guest that was taken run, if it does not and should.
pub(super) async fn start(context: &Context, step: Step, state: RunState) -> Result<(), Error> {
    let is_in_halves = match look(context, step).await? {
        CopyState::Complete => false,
        CopyState::Switched => true,
        _ => return Err(Cause::State("it is not one that waits to be started".into()).into()),
    };
    let work = move |mut op: AsyncOp| async move {
        let live = op
            .live()
            .ok_or_else(|| Cause::State("no guest runs in it".into()))?;
        op.job().pass_point_of_return();
        taken(&op).await?;
        let is_run = state == RunState::Running;
        if is_in_halves {
            run_in_halves(&mut op, &live, is_run).await
        } else {
            if !is_run {
                disks::take(&mut op).await?;
            }
            run(&mut op, &live, is_run).await
        }
    };
    arriving(context, step, work).await
}

/// Sees to it that nothing is left of one that is not the guest.
pub(super) async fn discard(context: &Context, step: Step) -> Result<(), Error> {
    let was_taken = was_taken(context, step).await?;
    match look(context, step).await? {
        CopyState::Gone(_) if !is_there(context, step) => return forget(context, step).await,
        CopyState::Gone(_) | CopyState::Incoming | CopyState::Complete => {}
        // Nobody took it while some of its memory was to come, and now none will.
        CopyState::Switched if !was_taken => {}
        _ => return Err(Cause::State("it may be the guest".into()).into()),
    }
    let work = move |op: AsyncOp| async move {
        let live = op.live();
        if let Some(live) = &live {
            if !is_arriving(op.domain()).await {
                return Err(Cause::State("a guest of the same identity runs in it".into()).into());
            }
            give_up(live);
        }
        Ok(live)
    };
    let ended = arriving(context, step, work).await?;
    let domain = context.registry.by_uuid(step.domain).map(Domain);
    if let (Some(live), Some(domain)) = (ended, domain) {
        cleaned_up(&domain, &live, step.deadline).await?;
    }
    forget(context, step).await
}

fn is_there(context: &Context, step: Step) -> bool {
    let domain = context.registry.by_uuid(step.domain);
    domain.is_some_and(|domain| domain.live().is_some())
}

/// Nobody here may start what was known of a guest for its arrival alone: it is another host's.
async fn forget(context: &Context, step: Step) -> Result<(), Error> {
    match context.registry.by_uuid(step.domain).map(Domain) {
        Some(domain) if !domain.records().persistent && domain.0.live().is_none() => {
            domain.remove_after_job(step.deadline).await
        }
        _ => Ok(()),
    }
}

/// Works under the job of a guest that arrives.
async fn arriving<T, F>(
    context: &Context,
    step: Step,
    work: impl FnOnce(AsyncOp) -> F + Send + 'static,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>> + Send + 'static,
    T: Send + 'static,
{
    let domain = context.registry.by_uuid(step.domain).map(Domain);
    let domain = domain.ok_or_else(|| Cause::State("it was removed meanwhile".into()))?;
    let (kind, mask) = (
        AsyncKind::MigrationIn,
        AsyncKind::MigrationIn.default_mask(),
    );
    domain
        .run_async("arrive", kind, mask, step.deadline, work)
        .await
}

/// Whether the journal says that the guest was taken here.
async fn was_taken(context: &Context, step: Step) -> Result<bool, Error> {
    let record = context
        .journal
        .load(step.migration, Side::Destination)
        .await
        .map_err(|error| {
            Cause::State(format!("the migration journal cannot be read: {error:#}"))
        })?;
    Ok(record.is_some_and(|record| record.owner() == Owner::Destination))
}

/// Whether the QEMU there was brought up for a guest that arrives, and was not let run since.
async fn is_arriving(domain: &Domain) -> bool {
    let job = domain.0.noted().await.and_then(|record| record.job);
    job.is_some_and(|job| job.work == Work::MigrationIn)
}

async fn see(mut op: Op, was_taken: bool) -> Result<CopyState, Error> {
    let domain = op.domain().0.clone();
    let process = domain.live().and_then(|live| live.process.clone());
    if domain.sight(process.as_deref(), op.job.generation())? == Sight::Dead {
        return Ok(CopyState::Gone(Ran::Maybe));
    }
    if !was_taken {
        if !is_arriving(op.domain()).await {
            // Another guest of the same identity is not to be touched.
            let text = "a QEMU is there that this migration did not hand over";
            return Err(Cause::State(text.into()).into());
        }
        let info = op.monitor()?.execute(command::QueryMigrate).await?;
        return Ok(match info.status {
            Some(MigrationStatus::Completed) => CopyState::Complete,
            Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                CopyState::Gone(Ran::Never)
            }
            status if is_post_copy(status.as_ref()) => {
                let status = op.monitor()?.execute(command::QueryStatus).await?.status;
                in_halves(&status)
            }
            // It was told of nobody who brings memory, and the gate to it went with whoever held that.
            None | Some(MigrationStatus::None) => CopyState::Gone(Ran::Never),
            _ => CopyState::Incoming,
        });
    }
    let monitor = op.monitor()?;
    let info = monitor.execute(command::QueryMigrate).await?;
    let status = monitor.execute(command::QueryStatus).await?.status;
    // It was taken before all of its memory was there, or after: only one word says that all is.
    let is_whole = matches!(info.status, None | Some(MigrationStatus::Completed));
    Ok(match status {
        command::RunState::InMigrate | command::RunState::Paused if !is_whole => {
            CopyState::Switched
        }
        _ if !is_whole => CopyState::Partial,
        // It was taken only once it was loaded.
        command::RunState::InMigrate | command::RunState::PreLaunch | command::RunState::Paused => {
            CopyState::Complete
        }
        // Whatever became of it became of it while it ran.
        _ => CopyState::Started,
    })
}
