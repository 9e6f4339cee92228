//! Migrations that are not settled on both sides, for an operator: which there are, and a ruling where nobody can be asked.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use job_core::Label;
use monitor_qmp::command::MigrationStatus;
use remote_migrate::verdict::Ruling;
use remote_migrate::{MigrationId, Owner, Phase, Record, Side};
use tokio::time::Instant;
use uuid::Uuid;

use crate::domain::Domain;
use crate::driver::Driver;
use crate::error::{Cause, Error};
use crate::ops::migrate::{is_post_copy, resolve_bygone};
use crate::ops::{Call, Deadline};
use crate::settling::{address, is_under_way};

/// A migration that is not settled on both sides.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenMigration {
    /// Which one.
    pub id: MigrationId,
    /// Which side of it is here.
    pub side: Side,
    /// The guest.
    pub uuid: Uuid,
    /// What the guest is called, if it is known here.
    pub name: Option<Label>,
    /// How far it came, as far as this side knows.
    pub phase: Phase,
    /// Whom this side takes for the owner.
    pub owner: Owner,
    /// How it stands with the rest of the memory, if the guest is in two halves, as QEMU here told last.
    pub post_copy: Option<PostCopy>,
    /// Where the other daemon is, in the words that were kept of it; none were, if it is empty.
    pub peer: Arc<str>,
    /// Since when this driver knows of it.
    pub since: SystemTime,
    /// What happens with it.
    pub next: Next,
}

/// How it stands with a guest in two halves: it runs at the destination, and some of its memory is at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PostCopy {
    /// The rest of its memory follows.
    Follows,
    /// The stream is broken: the guest stands still as soon as it needs what is missing, until another stream is made. The
    /// driver does so by itself once the other side answers.
    Paused,
}

impl PostCopy {
    fn of(status: Option<&MigrationStatus>) -> Option<Self> {
        match status {
            Some(MigrationStatus::PostcopyPaused) => Some(Self::Paused),
            status => is_post_copy(status).then_some(Self::Follows),
        }
    }
}

/// What happens with an open migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Next {
    /// It is under way here, under a job. [`Domain::cancel_job`] turns it back as long as that is possible.
    UnderWay,
    /// The other daemon is asked, after so long at most. An operator who knows what became of it may rule instead:
    /// [`Driver::resolve_migration`].
    Asked {
        /// So long.
        within: Duration,
    },
    /// No way to the other daemon is known here. It may ask by itself once it is back; else an operator rules.
    Waits,
}

impl Driver {
    /// The migrations that are not settled on both sides, those that are under way among them. Those whose record cannot be
    /// read are told of by [`recovered`](Self::recovered) and by what they refuse.
    ///
    /// # Errors
    ///
    /// [`State`](crate::ErrorKind::State) if the journal cannot be read.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn migrations(&self) -> Result<Vec<OpenMigration>, Error> {
        let context = self.context();
        let records = context.migrations().await;
        let records = records.map_err(|cause| Error::new("list migrations", None, cause))?;
        let now = Instant::now();
        let row = |record: &Record| {
            let entry = context.settling.entry(record);
            let peer = address(record).clone();
            let next = if is_under_way(context, record) {
                Next::UnderWay
            } else if peer.is_empty() || (context.find_peer)(&peer).is_none() {
                Next::Waits
            } else {
                let at = entry.map_or(now, |entry| entry.next);
                Next::Asked {
                    within: at.saturating_duration_since(now),
                }
            };
            let phase = match record {
                Record::Source(record) => record.stage.phase(),
                Record::Destination(record) => record.stage.phase(),
            };
            let domain = context.registry.by_uuid(record.domain());
            let live = domain.as_ref().map(|domain| domain.observed());
            OpenMigration {
                id: record.migration(),
                side: record.side(),
                uuid: record.domain(),
                name: domain.map(|domain| domain.name.clone()),
                phase,
                owner: record.owner(),
                post_copy: live.and_then(|seen| PostCopy::of(seen.migration.as_ref())),
                peer,
                since: entry.map_or_else(SystemTime::now, |entry| entry.since),
                next,
            }
        };
        Ok(records.iter().map(row).collect())
    }

    /// Decides an open migration by the word of an operator, who knows what became of the other side. If that is not true,
    /// the guest runs twice or is lost: [`Ruling`] says what each word claims. Yields the owner that follows, if the migration
    /// is remembered still: until the other side was told.
    ///
    /// Refused as [`State`](crate::ErrorKind::State) if this side has no such migration. A guest that is lost by that word is
    /// told as a failed [`Migration`](crate::ErrorKind::Migration), and may be started anew where nothing of it can be left
    /// elsewhere; so is a word that cannot be followed, with the reason and what can be done instead.
    pub fn resolve_migration(
        &self,
        id: MigrationId,
        side: Side,
        ruling: Ruling,
    ) -> Call<Option<Owner>> {
        let driver = self.clone();
        Call::new(self.context().defaults.long, move |deadline| async move {
            let ruled = driver.rule(id, side, ruling, deadline).await;
            ruled.map_err(|error| error.retold("resolve migration"))
        })
    }

    async fn rule(
        &self,
        id: MigrationId,
        side: Side,
        ruling: Ruling,
        deadline: Deadline,
    ) -> Result<Option<Owner>, Error> {
        let context = self.context();
        let records = context.migrations().await?;
        let is_it = |record: &&Record| record.migration() == id && record.side() == side;
        let record = records
            .iter()
            .find(is_it)
            .ok_or_else(|| Cause::State(format!("no migration {id} is open here as its {side}")))?;
        let domain = context.registry.by_uuid(record.domain()).map(Domain);
        let ruled = match (side, domain) {
            (Side::Source, Some(domain)) => {
                let ruled = domain.resolve_within(Some(id), ruling).until(deadline);
                ruled.await.map(|report| Some(report.owner))
            }
            (Side::Source, None) => match resolve_bygone(context, id, ruling).await {
                Ok(report) => Ok(Some(report.owner)),
                Err(error) => Err(Cause::Migrate(error).into()),
            },
            (Side::Destination, _) => {
                match self.destination().resolve(id, ruling, deadline).await {
                    Ok(standing) => Ok(standing.owner),
                    Err(error) => Err(Cause::Migrate(error).into()),
                }
            }
        };
        // The other side is still to be told, also of a loss.
        context.settling.left(record.domain());
        ruled
    }
}
