//! Figures of all guests side by side: each row has a deadline of its own, and a silent guest costs its own row only.

use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use job_core::{JobKind, Label};
use monitor_qmp::command::{self, RunState};
use uuid::Uuid;

use crate::domain::Domain;
use crate::driver::Driver;
use crate::error::{Error, ErrorKind};
use crate::ops::{Call, Op};

/// So many guests are asked at a time: enough that silent ones delay nobody, few enough that a host is not flooded.
const AT_ONCE: usize = 256;

/// One guest's figures, or why there are none.
#[derive(Debug)]
#[non_exhaustive]
pub struct StatsRow {
    /// Its number in this driver.
    pub id: u64,
    /// Its identity.
    pub uuid: Uuid,
    /// Its name.
    pub name: Label,
    /// What its QEMU answered, or why it did not: off, silent, held by another job.
    pub stats: Result<Stats, Error>,
}

/// What a guest uses, by the word of its QEMU.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// What it does.
    pub status: RunState,
    /// Its virtual processors.
    pub vcpus: usize,
    /// The memory it has now, in bytes, if it has a balloon.
    pub memory: Option<u64>,
    /// The counters of its disks, by the name of the backend.
    pub disks: Vec<command::BlockStats>,
}

impl Domain {
    /// Asks QEMU what the guest uses: processors, memory, disks.
    pub fn stats(&self) -> Call<Stats> {
        self.normal("stats", JobKind::Query, ask)
    }
}

impl Driver {
    /// Asks all guests what they use, side by side. Each row has `limit`, its wait for a job included, and one that is
    /// silent or held has the reason in it; so the whole takes hardly longer than `limit`, up to 256 guests, and as
    /// long again for each 256 more of which some are silent.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropping it only stops the asking.
    pub async fn stats(&self, limit: Duration) -> Vec<StatsRow> {
        let rows = self.domains().into_iter().map(|domain| async move {
            let stats = domain.stats().deadline(limit).await;
            StatsRow {
                id: domain.id(),
                uuid: domain.uuid(),
                name: domain.0.name.clone(),
                stats,
            }
        });
        stream::iter(rows).buffered(AT_ONCE).collect().await
    }
}

async fn ask(mut op: Op) -> Result<Stats, Error> {
    let monitor = op.monitor()?;
    let status = monitor.execute(command::QueryStatus).await?.status;
    let vcpus = monitor.execute(command::QueryCpusFast).await?.len();
    let disks = monitor.execute(command::QueryBlockstats::default()).await?;
    let memory = match monitor.execute(command::QueryBalloon).await {
        Ok(balloon) => Some(balloon.actual),
        // It has none, or its driver is not there yet.
        Err(error) if error.kind() == ErrorKind::Refused => None,
        Err(error) => return Err(error),
    };
    Ok(Stats {
        status,
        vcpus,
        memory,
        disks,
    })
}
