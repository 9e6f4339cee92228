//! Finding a guest again that an earlier driver had attached. Nothing is finished or undone for it: no job of ours outlives
//! a driver there.

use std::sync::Arc;

use job_core::{AsyncJob, AsyncKind, AsyncRecord, GoneWhy, Guard, KindSet};
use monitor_qmp::command;
use tokio::time::Instant;

use super::{Became, adopt, op_or_gone, reconnect, tell};
use crate::context::Context;
use crate::domain::state::Observation;
use crate::domain::{Domain, reap};
use crate::error::Error;
use crate::ops::AsyncOp;
use crate::ops::attach::{connect, put_in};
use crate::records::{Attached, Identity};

/// Begins to find the guest, before anybody sees the domain.
pub(super) fn begin(context: &Arc<Context>, domain: Domain, record: Attached) {
    domain.0.take_up_attached(Some(record.clone()));
    let generation = domain.0.scheduler.generation();
    let pid = record.process.as_ref().map(|process| process.pid);
    domain.0.observe(Observation::Launched { generation, pid });
    domain.0.observe(Observation::Lost);
    let restored = domain.0.scheduler.restore(AsyncRecord {
        id: 0,
        kind: AsyncKind::Start,
        mask: KindSet::DESTROY_ONLY,
        owner: "recover".into(),
        phase: None,
        decided: false,
    });
    let job = restored.expect("nobody else knows the domain yet");
    let parting = context.parting.clone();
    context.recoveries.tasks.spawn(async move {
        parting
            .run_until_cancelled(retake(domain, job, record))
            .await;
    });
}

async fn retake(domain: Domain, job: AsyncJob, record: Attached) {
    let deadline = Instant::now() + domain.0.context.defaults.connect;
    let work = move |op: AsyncOp| find(op, record);
    let found = domain.run_with("recover".into(), job, deadline, work).await;
    let became = found.unwrap_or_else(|error| Became::Unreachable(format!("{error:#}")));
    tell(&domain, None, became.clone());
    if let Became::Unreachable(_) = became
        && let Some(live) = domain.0.live()
    {
        let watchers = domain.0.context.watchers.clone();
        watchers.spawn(reconnect(domain, live));
    }
}

async fn find(mut op: AsyncOp, record: Attached) -> Result<Became, Error> {
    op.set_phase("finding");
    let domain = op.domain().clone();
    let process = match &record.process {
        None => None,
        Some(known) => {
            let is_it = |pid| Identity::of(pid).is_ok_and(|found| found == *known);
            match adopt(known.pid, is_it)? {
                Some(process) => Some(process),
                None => return Ok(gone(&domain, "QEMU ended while no driver was there").await),
            }
        }
    };
    let is_known = process.is_some();
    let live = put_in(&domain, op.job().generation(), process)?;
    domain.0.observe(Observation::Lost);
    let watchers = &domain.0.context.watchers;
    watchers.spawn(reap(domain.0.clone(), live.clone()));
    op.set_phase("connecting");
    if let Err(error) = connect(&domain, &live, &record, op.deadline()).await {
        // Without a process nobody can say that it ended.
        return match is_known {
            true => op_or_gone(&op, error).await,
            false => Err(error),
        };
    }
    if !is_known && is_another(&mut op, &record).await? {
        live.release();
        domain.0.clear_live(&live);
        return Ok(gone(&domain, "another QEMU listens where it did").await);
    }
    domain.0.count(|tally| &tally.reconnects);
    Ok(Became::Kept)
}

/// Whether the QEMU that listens there says that it is another guest. One without an identity says nothing.
async fn is_another(op: &mut AsyncOp, record: &Attached) -> Result<bool, Error> {
    let uuid = op.monitor().await?.execute(command::QueryUuid).await?.uuid;
    let uuid = uuid::Uuid::try_parse(&uuid).ok();
    Ok(uuid.is_some_and(|uuid| !uuid.is_nil() && uuid != record.uuid))
}

async fn gone(domain: &Domain, why: &'static str) -> Became {
    domain.forget_attached().await;
    domain
        .0
        .observe(Observation::Ended(GoneWhy::Died(why.into())));
    Became::Ended
}
