//! Reaching a guest whose QEMU runs and whose monitor is lost: tried again until it answers or ends.

use std::sync::Arc;
use std::time::Duration;

use job_core::KindSet;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{kind, settle, tell};
use crate::domain::{Domain, Live};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::ops::start::{Sockets, connect, connect_monitor};
use crate::ops::{AsyncOp, Deadline};

/// Between two tries, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Tries to reach a guest whose QEMU runs, until it is reached or ends.
pub(crate) async fn reconnect(domain: Domain, live: Arc<Live>) {
    let parting = domain.0.context.parting.clone();
    parting.run_until_cancelled(try_again(domain, live)).await;
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
    while live.monitor().is_none() {
        let deadline = Instant::now() + domain.0.context.defaults.connect;
        if let Err(error) = reach(&domain, &live, deadline).await {
            let error = format!("{error:#}");
            warn!(
                domain = domain.name(),
                error, "QEMU runs and cannot be reached"
            );
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        if !is_here() {
            return;
        }
    }
    let Some(job) = domain.0.noted().await.and_then(|record| record.job) else {
        domain.0.tell(What::Started {
            generation: live.generation,
        });
        return;
    };
    let name = job.work.name();
    let deadline = Instant::now() + domain.0.context.defaults.long;
    let kind = kind(Some(&job.work));
    let work = move |mut op: AsyncOp| async move { settle(&mut op, &live).await };
    let settled = domain.run_async("recover", kind, KindSet::DESTROY_ONLY, deadline, work);
    match settled.await {
        Ok(became) => tell(&domain, Some(name.into()), became),
        Err(error) => {
            let error = format!("{error:#}");
            warn!(
                domain = domain.name(),
                error, "an interrupted job was not settled"
            );
        }
    }
}

/// Connects to the guest's monitor, and to its agent's channel where that is ours.
async fn reach(domain: &Domain, live: &Arc<Live>, deadline: Deadline) -> Result<(), Error> {
    let records = domain.records();
    if let Some(target) = &records.attached {
        return connect_monitor(domain, live, target, deadline).await;
    }
    let Some(guest) = domain.description() else {
        return Err(Cause::State("where its monitor listens is not known".into()).into());
    };
    connect(domain, live, &Sockets::of(domain, &guest), deadline).await
}
