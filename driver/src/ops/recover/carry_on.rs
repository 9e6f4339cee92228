//! A job that goes on where an earlier driver left it, under an async job of its own.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{Became, kind, tell};
use crate::domain::Domain;
use crate::error::ErrorKind;
use crate::ops::{AsyncOp, backup};
use crate::records::Work;

/// Between two tries to get the job: whatever has it ends or is settled.
const PAUSE: Duration = Duration::from_secs(1);

/// Carries a backup on that was cut short, and tells what became of it.
pub(crate) async fn carry_on(domain: Domain) {
    let parting = domain.0.context.parting.clone();
    parting.run_until_cancelled(try_to(domain)).await;
}

async fn try_to(domain: Domain) {
    loop {
        let noted = domain.0.noted().await.and_then(|record| record.job);
        let Some(Work::Backup(copies)) = noted.map(|job| job.work) else {
            return;
        };
        let work = Work::Backup(copies.clone());
        let (kind, name) = (kind(Some(&work)), work.name());
        let body = move |mut op: AsyncOp| async move {
            op.take_over(work).await?;
            backup::to_the_end(&mut op, copies).await
        };
        let deadline = Instant::now() + domain.0.context.defaults.long;
        let mask = kind.default_mask();
        let error = match domain.run_async("backup", kind, mask, deadline, body).await {
            Ok(()) => return tell(&domain, Some(name.into()), Became::Finished),
            Err(error) => error,
        };
        let text = format!("{error:#}");
        warn!(
            domain = domain.name(),
            error = text,
            "a backup was carried on"
        );
        if error.kind() == ErrorKind::Gone {
            // Settled once more, if its connection alone was lost.
            return;
        }
        if error.begin().is_none() {
            return tell(&domain, Some(name.into()), Became::Undone);
        }
        sleep(PAUSE).await;
    }
}
