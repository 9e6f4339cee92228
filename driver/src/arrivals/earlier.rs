//! Guests that began to arrive at an earlier daemon: what is left of them, and the end of what was begun.
//!
//! Recovery has found the QEMU, if there is one, and keeps it only if the journal says that the guest was taken. So there
//! is the guest, or nothing. Whoever asks while recovery is still at it waits in line behind its job.

use std::time::Duration;

use job_core::{AsyncKind, JobKind};
use monitor_qmp::command;
use remote_migrate::{CopyState, Owner, Ran, RunState, Side, Step};
use tokio::time::{Instant, sleep};

use crate::context::Context;
use crate::domain::Domain;
use crate::error::{Cause, Error, ErrorKind};
use crate::ops::start::{refuse_if_running, run};
use crate::ops::{AsyncOp, Op};

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
    if look(context, step).await? != CopyState::Complete {
        return Err(Cause::State("it is not one that waits to be started".into()).into());
    }
    let domain = context.registry.by_uuid(step.domain).map(Domain);
    let domain = domain.ok_or_else(|| Cause::State("it was removed meanwhile".into()))?;
    let mask = AsyncKind::MigrationIn.default_mask();
    let work = move |mut op: AsyncOp| async move {
        let live = op
            .live()
            .ok_or_else(|| Cause::State("no guest runs in it".into()))?;
        op.job().pass_point_of_return();
        run(&mut op, &live, state == RunState::Running).await
    };
    domain
        .run_async("arrive", AsyncKind::MigrationIn, mask, step.deadline, work)
        .await
}

/// Sees to it that nothing is left of one that is not the guest: recovery ends its QEMU.
pub(super) async fn discard(context: &Context, step: Step) -> Result<(), Error> {
    match look(context, step).await? {
        CopyState::Gone(_) => Ok(()),
        _ => Err(Cause::State("its QEMU is there, and may be the guest".into()).into()),
    }
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

async fn see(mut op: Op, was_taken: bool) -> Result<CopyState, Error> {
    if op.domain().0.live().is_none() {
        return Ok(CopyState::Gone(Ran::Maybe));
    }
    if !was_taken {
        // A copy that recovery has not reached yet, or another guest of the same identity: neither is to be touched.
        let text = "a QEMU is there that this migration did not hand over";
        return Err(Cause::State(text.into()).into());
    }
    let status = op.monitor()?.execute(command::QueryStatus).await?.status;
    Ok(match status {
        // It was taken only once it was loaded.
        command::RunState::InMigrate | command::RunState::PreLaunch | command::RunState::Paused => {
            CopyState::Complete
        }
        // Whatever became of it became of it while it ran.
        _ => CopyState::Started,
    })
}
