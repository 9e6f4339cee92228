//! Reaching a guest whose QEMU runs and whose monitor is lost, and settling the job that was cut short: both are tried
//! again until they are done or QEMU ends.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use job_core::KindSet;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{Became, carry_on, kind, settle, tell};
use crate::domain::{Domain, Live};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::ops::attach;
use crate::ops::start::{Sockets, connect};
use crate::ops::{AsyncOp, Deadline};

/// Between two tries, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Tries to reach a guest whose QEMU runs and to settle what was cut short, until that is done or the guest ends.
pub(crate) fn reconnect(domain: Domain, live: Arc<Live>) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let parting = domain.0.context.parting.clone();
        parting.run_until_cancelled(try_again(domain, live)).await;
    })
}

/// A job was cut short just now, and its note says so. If the guest was reached again before, whoever did that has not seen
/// it; else this finds it settled, or is followed by who settles it.
pub(crate) fn settle_left(domain: &Domain) {
    if let Some(live) = domain.0.live().filter(|live| live.monitor().is_some()) {
        let watchers = &domain.0.context.watchers;
        watchers.spawn(reconnect(domain.clone(), live));
    }
}

async fn try_again(domain: Domain, live: Arc<Live>) {
    let is_here = || {
        domain
            .0
            .live()
            .is_some_and(|found| Arc::ptr_eq(&found, &live))
    };
    let mut pause = FIRST_PAUSE;
    // The first try comes at once: a connection may be lost alone.
    while let Err(error) = reach_and_settle(&domain, &live).await {
        let error = format!("{error:#}");
        warn!(
            domain = domain.name(),
            error, "QEMU runs, and cannot be reached or what was cut short not be settled"
        );
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        if !is_here() {
            return;
        }
    }
}

async fn reach_and_settle(domain: &Domain, live: &Arc<Live>) -> Result<(), Error> {
    let defaults = domain.0.context.defaults;
    let was_lost = live.monitor().is_none();
    if was_lost {
        reach(domain, live, Instant::now() + defaults.connect).await?;
        domain.0.count(|tally| &tally.reconnects);
    }
    let noted = domain.0.noted().await.and_then(|record| record.job);
    let Some(job) = noted.filter(|job| job.is_cut_short) else {
        // Else somebody has settled it meanwhile, and has told.
        if was_lost {
            domain.0.tell(What::Started {
                generation: live.generation,
            });
        }
        domain.0.settle_parts_again();
        return Ok(());
    };
    let (name, kind) = (job.work.name(), kind(Some(&job.work)));
    let deadline = Instant::now() + defaults.long;
    let live = live.clone();
    let work = move |mut op: AsyncOp| async move {
        let noted = op.domain().0.noted().await.and_then(|record| record.job);
        if !noted.is_some_and(|job| job.is_cut_short) {
            // Somebody else was here first.
            return Ok(None);
        }
        settle(&mut op, &live).await.map(Some)
    };
    // Whatever other async job begins before this one is told to wait for it: there is one note.
    let settled = domain.run_async("recover", kind, KindSet::DESTROY_ONLY, deadline, work);
    let Some(became) = settled.await? else {
        return Ok(());
    };
    tell(domain, Some(name.into()), became.clone());
    if became == Became::GoesOn {
        let watchers = &domain.0.context.watchers;
        watchers.spawn(carry_on(domain.clone()));
    }
    domain.0.settle_parts_again();
    Ok(())
}

/// Connects to the guest's monitor, and to its agent's channel where that is ours.
async fn reach(domain: &Domain, live: &Arc<Live>, deadline: Deadline) -> Result<(), Error> {
    if let Some(record) = domain.0.attached() {
        return attach::connect(domain, live, &record, deadline).await;
    }
    let Some(guest) = domain.description() else {
        return Err(Cause::State("where its monitor listens is not known".into()).into());
    };
    connect(domain, live, &Sockets::of(domain, &guest), deadline).await
}
