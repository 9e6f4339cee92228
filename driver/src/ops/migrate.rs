//! A guest leaves for another host: the driver's steps for the source side of `remote-migrate`.
//!
//! The async job is held from Begin to Confirm. The peer is asked while the job is held and nothing is locked (R14);
//! whether the guest still lives is checked again afterwards, by looking at it. Decides nothing: the phases do.

mod asking;
mod bygone;
mod cookies;
mod following;
mod leaving;
mod sending;
mod stopping;
mod switchover;
mod threshold;
mod tune;

use std::convert::Infallible;
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use job_core::{AsyncKind, Guard, Stop};
use remote_migrate::verdict::Ruling;
use remote_migrate::{
    Control, Journal, Limits, MigrationId, Owner, Peer, Plan, Record, Report, Side,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use crate::access::Rescue;
use crate::context::Context;
use crate::domain::{Domain, Live};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::ops::destroy::cleaned_up;
use crate::ops::{AsyncOp, Call};
use crate::policy::{Policy, Remedy};
use crate::settling::Leaves;

use bygone::Bygone;
use leaving::Leaving;
use switchover::Bounds;
use threshold::{Asked, Noted};
use tune::{Lead, underway};

pub use tune::Tuning;

pub(crate) use cookies::{Bring, Moving, read};
pub(crate) use following::is_post_copy;
pub(crate) use sending::only as only_capabilities;
pub(crate) use tune::{Moves, Underway};

/// How long QEMU may take to obey a cancel. It takes some milliseconds.
const FREE_AFTER: Duration = Duration::from_secs(1);

/// Bytes a second unless told otherwise: QEMU's own default of 128 MiB/s, said explicitly since a save may have changed it.
const BANDWIDTH: u64 = 128 << 20;
/// How long the guest may stand still at the end unless told otherwise: QEMU's own default.
const DOWNTIME: Duration = Duration::from_millis(300);

/// How a guest is moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..MigrateOptions::default()`"
)]
pub struct MigrateOptions {
    /// At most so many bytes a second; QEMU's own default is 128 MiB/s. The last of the memory, for which the guest stands
    /// still, goes as fast as it can.
    pub bandwidth: Option<u64>,
    /// The longest the guest may stand still for the last of its memory; QEMU's own default is 300 ms. It is stopped as soon
    /// as what is left can be sent within that. Whether it can nobody knows while QEMU goes over the memory for the first
    /// time: at the end of that, and up to three times in all, the guest is stopped to see, and runs on after some
    /// milliseconds if it cannot. Each stop brings its disks to rest first, as long as that takes; where it is slow, it is
    /// the last on trial.
    pub downtime: Option<Duration>,
    /// Whether QEMU takes time from the guest's processors if it writes faster than can be sent.
    pub auto_converge: bool,
    /// Over so many connections side by side. QEMU makes them itself then, so they must be under TLS, or the other side must
    /// have said that nobody else is on that network ([`Landing::trusting`](crate::Landing::trusting)). Not together with
    /// post-copy.
    pub channels: Option<NonZero<u8>>,
    /// Whether it may be turned to post-copy while it is under way, by [`Domain::post_copy`] or its policy.
    pub post_copy: bool,
    /// What is done if it does not come to its end by itself.
    pub policy: Policy,
    /// Where the daemon is that the guest goes to, in words of the daemon's own. Kept in the journal, for whoever has to
    /// ask it again after a restart.
    pub there: Option<Arc<str>>,
    /// Where this daemon is. Kept in the other one's journal, for whoever has to ask back.
    pub home: Option<Arc<str>>,
}

impl MigrateOptions {
    fn bounds(&self) -> Bounds {
        Bounds {
            bandwidth: self.bandwidth.unwrap_or(BANDWIDTH),
            downtime: self.downtime.unwrap_or(DOWNTIME),
        }
    }

    /// Refuses what contradicts itself, before anything is begun.
    fn check(&self) -> Result<(), Cause> {
        let refused = |text: &str| Err(Cause::BadRequest(text.to_owned()));
        if self.post_copy && self.channels.is_some() {
            return refused("post-copy goes over one connection, and several are wanted");
        }
        if !self.post_copy && self.policy.then.contains(&Remedy::PostCopy) {
            return refused("its policy turns to post-copy, which it is begun without");
        }
        Ok(())
    }
}

impl Domain {
    /// Moves the guest to the driver behind `peer`. Done means that the destination has said that the guest is its own.
    ///
    /// It can be cancelled until the guest was offered to the other side; then the answer is
    /// [`TooLate`](crate::ErrorKind::TooLate). Refused as [`Invalid`](crate::ErrorKind::Invalid) are options that contradict
    /// each other. A failure names who owns the guest; in doubt, nothing is resumed here
    /// until the peer was asked or an operator decided. A driver that can [find it again](crate::Builder::peers) asks by
    /// itself, for as long as it runs.
    ///
    /// A definition that is kept stays where it is, on both sides. It is not brought along, and that of the destination
    /// changes only once the guest is there, in the files of the disks that both have: they may have become others on the
    /// way.
    ///
    /// # Shared paths
    ///
    /// No file is copied. Each that the guest has (disks, kernel, initrd) must lie under the same path on both
    /// hosts, and a disk must be the same file on storage that both write to, on which QEMU's locks hold across hosts: the
    /// lock of an image passes on with the guest. A file that the destination's QEMU cannot open is refused in its words,
    /// with the path, before memory moves, and the guest runs on here. Another file under the same path is not noticed: it
    /// would be taken for the guest's disk, so whoever lays out the paths of two hosts vouches for them.
    pub fn migrate(&self, peer: Arc<dyn Peer>, options: MigrateOptions) -> Call<Report> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::MigrationOut.default_mask();
            let (migration, again) = (MigrationId::random(), peer.clone());
            let work = move |op: AsyncOp| leave(op, migration, peer, options);
            let live = domain.0.live();
            let moved = domain
                .run_async("migrate", AsyncKind::MigrationOut, mask, deadline, work)
                .await;
            let Some(moved) = moved? else {
                let recovered = domain.recover_within(Some(migration), again, Limits::default());
                let report = recovered.until(deadline).await?;
                return match report.owner {
                    Owner::Destination => Ok(report),
                    owner => Err(domain.error("migrate", Cause::NotMoved(owner))),
                };
            };
            gone_with(&domain, live, deadline).await?;
            Ok(moved)
        })
    }

    /// Takes up a migration of this guest that was left in doubt or unsettled, and asks the peer how it stands there.
    /// Nothing is resumed upon silence.
    ///
    /// Of several that is the one that still has the guest. Those that are only to be told to a peer that was not there are
    /// told by the driver itself; it is refused as [`State`](crate::ErrorKind::State) if there are several of these alone.
    pub fn recover_migration(&self, peer: Arc<dyn Peer>) -> Call<Report> {
        self.recover_within(None, peer, Limits::default())
    }

    /// Ends a migration of this guest by the word of an operator, who knows what became of the other side: that it is
    /// fenced, that it has the guest, or that it needs nothing from here any more either ([`Ruling`]). Where post-copy may
    /// have begun only the last of these ends what is here.
    ///
    /// One that is in doubt while its call still asks the other side is ruled at once, and its call ends with what was ruled.
    /// If that takes longer than this call may, it fails as [`TimedOut`](crate::ErrorKind::TimedOut), with an unknown
    /// [effect](crate::Effect::Unknown): the ruling stands.
    /// Which one it is of several is told as by [`Domain::recover_migration`];
    /// [`Driver::resolve_migration`](crate::Driver::resolve_migration) is told which one is meant.
    pub fn resolve_migration(&self, ruling: Ruling) -> Call<Report> {
        self.resolve_within(None, ruling)
    }

    pub(crate) fn resolve_within(
        &self,
        meant: Option<MigrationId>,
        ruling: Ruling,
    ) -> Call<Report> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let live = domain.0.live();
            let failed = |cause| domain.error("settle-migration", cause);
            let migration = found(&domain, meant).await.map_err(failed)?;
            if let Ok(asking) = underway(&domain)
                && asking.migration == migration
                && asking.control.rule(ruling)
            {
                let began = Instant::now();
                let ended = timeout_at(deadline, asking.control.ended()).await;
                let ended = ended.map_err(|_| {
                    let what =
                        "the migration to end as ruled: it has taken that, and will act by it";
                    let waited = began.elapsed();
                    domain.error("settle-migration", Cause::TimedOut { what, waited })
                });
                // Without a report it was left as it is, and is ruled under a job of its own.
                if let Some(report) = ended? {
                    gone_with(&domain, live, deadline).await?;
                    return Ok(report);
                }
            }
            domain.resolve_left(migration, ruling).until(deadline).await
        })
    }

    /// Ends one that nobody drives, by the word of an operator.
    fn resolve_left(&self, migration: MigrationId, ruling: Ruling) -> Call<Report> {
        self.settle(Some(migration), move |op, migration| async move {
            let domain = op.domain().clone();
            let (journal, op) = (domain.0.context.journal.clone(), Mutex::new(op));
            let lead = Lead::new(migration, &MigrateOptions::default());
            let host = Leaving::without_options(&domain, &op, lead);
            let limits = Limits::default();
            let resolved = remote_migrate::resolve(migration, ruling, limits, &host, &*journal);
            host.unless_stranded(resolved).await
        })
    }

    /// Takes up the one that is meant, or [the one](found) there is.
    pub(crate) fn recover_within(
        &self,
        meant: Option<MigrationId>,
        peer: Arc<dyn Peer>,
        limits: Limits,
    ) -> Call<Report> {
        self.settle(meant, move |op, migration| async move {
            let lead = Lead::new(migration, &MigrateOptions::default());
            let (domain, control) = (op.domain().clone(), lead.control.clone());
            // Under way as well: it can be looked at, and ruled.
            let _underway = Underway::begin(&domain, lead.clone());
            let (journal, op) = (domain.0.context.journal.clone(), Mutex::new(op));
            let host = Leaving::without_options(&domain, &op, lead);
            let peer = Asked::again(&op, &*peer);
            let recovered =
                remote_migrate::recover(migration, limits, &host, &peer, &*journal, &control);
            host.unless_stranded(recovered).await
        })
    }

    /// A call that runs `body` for the migration that is [meant](found), under the job of one.
    fn settle<F>(
        &self,
        meant: Option<MigrationId>,
        body: impl FnOnce(AsyncOp, MigrationId) -> F + Send + 'static,
    ) -> Call<Report>
    where
        F: Future<Output = Result<Report, Error>> + Send + 'static,
    {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let (kind, mask) = (
                AsyncKind::MigrationOut,
                AsyncKind::MigrationOut.default_mask(),
            );
            let live = domain.0.live();
            let work = move |op: AsyncOp| async move {
                let migration = found(op.domain(), meant).await?;
                let domain = op.domain().clone();
                let had_moved = domain.records().moved_away;
                let report = body(op, migration).await?;
                if report.owner == Owner::Destination && !had_moved {
                    domain.0.tell(moved_away(&report));
                }
                if !left(&domain).await?.iter().any(Record::refuses_migration) {
                    domain.0.work_is_over().await?;
                }
                Ok(report)
            };
            let settled = domain
                .run_async("settle-migration", kind, mask, deadline, work)
                .await?;
            gone_with(&domain, live, deadline).await?;
            Ok(settled)
        })
    }
}

fn moved_away(report: &Report) -> What {
    let (side, downtime) = (Side::Source, report.downtime);
    What::Moved { side, downtime }
}

/// What the journal has of this guest that left, or was about to.
pub(crate) async fn left(domain: &Domain) -> Result<Vec<Record>, Cause> {
    let mut records = domain.0.context.migrations().await?;
    records.retain(|record| record.domain() == domain.uuid() && record.side() == Side::Source);
    Ok(records)
}

/// The migration of this guest that is meant. Where none was named, it is the one that can still do something to the guest,
/// which is one at most, or else the only one: never any of several, since each has a peer of its own.
async fn found(domain: &Domain, meant: Option<MigrationId>) -> Result<MigrationId, Cause> {
    let records = left(domain).await?;
    let is_it = |record: &&Record| match meant {
        Some(migration) => record.migration() == migration,
        None => records.len() == 1 || record.refuses_migration(),
    };
    let mut those = records.iter().filter(is_it);
    match (those.next(), those.next()) {
        (Some(record), None) => Ok(record.migration()),
        (None, _) if meant.is_some() || records.is_empty() => {
            Err(Cause::State("no migration of it is unsettled".into()))
        }
        _ => {
            let text = "several migrations of it are still to be told, and none is named";
            Err(Cause::State(text.into()))
        }
    }
}

/// If the guest that was there has left, its QEMU is gone when this returns.
async fn gone_with(
    domain: &Domain,
    live: Option<Arc<Live>>,
    deadline: Instant,
) -> Result<(), Error> {
    match live {
        Some(live) if domain.records().moved_away => cleaned_up(domain, &live, deadline).await,
        _ => Ok(()),
    }
}

/// Takes up a migration of a guest that is not known here any more.
pub(crate) async fn recover_bygone(
    context: &Context,
    migration: MigrationId,
    peer: &dyn Peer,
    limits: Limits,
) -> Result<Report, remote_migrate::Error> {
    let (host, control) = (Bygone(context), Control::new());
    remote_migrate::recover(migration, limits, &host, peer, &*context.journal, &control).await
}

/// Ends a migration of a guest that is not known here any more, by the word of an operator.
pub(crate) async fn resolve_bygone(
    context: &Context,
    migration: MigrationId,
    ruling: Ruling,
) -> Result<Report, remote_migrate::Error> {
    let (host, limits) = (Bygone(context), Limits::default());
    remote_migrate::resolve(migration, ruling, limits, &host, &*context.journal).await
}

/// Moves it. Nothing, if it has moved and only the next job of the domain can write that down.
async fn leave(
    op: AsyncOp,
    migration: MigrationId,
    peer: Arc<dyn Peer>,
    options: MigrateOptions,
) -> Result<Option<Report>, Error> {
    options.check()?;
    let (context, uuid) = (op.domain().0.context.clone(), op.domain().uuid());
    // Also if nobody waits for the call any more. Dropped last: this job is as good as over then.
    let _leaves = Leaves::new(context.clone(), uuid);
    context.refuse_unreadable(uuid).await?;
    let journal: Arc<dyn Journal> = context.journal.clone();
    let mut plan = Plan::new(uuid).migration(migration);
    if let Some(there) = &options.there {
        plan = plan.peer(there.clone());
    }
    if let Some(home) = &options.home {
        plan = plan.home(home.clone());
    }
    // Out of time is out of luck only before the point of return.
    plan = plan.limits(Limits {
        perform: op.deadline().saturating_duration_since(Instant::now()),
        ..Limits::default()
    });
    let lead = Lead::new(migration, &options);
    let control = lead.control.clone();
    let _underway = Underway::begin(op.domain(), lead.clone());
    let (domain, token, rescue) = (op.domain().clone(), op.job.token(), op.rescue()?);
    let op = Mutex::new(op);
    let host = Leaving::new(&domain, &op, options, lead);
    let (peer, journal) = (Asked::first(&op, &*peer), Noted::new(&op, &*journal));
    let moving = remote_migrate::migrate(&plan, &host, &peer, &journal, &control);
    tokio::pin!(moving);
    let moved = async {
        let stop = tokio::select! {
            moved = &mut moving => return moved,
            stop = token.stop() => stop,
        };
        match stop {
            Stop::Cancelled(_) if control.cancel().is_ok() => tokio::select! {
                moved = &mut moving => moved,
                never = free_if_stuck(&domain, &rescue) => match never {},
            },
            // It is too late, or the guest died, which each step meets by itself: one that was cut short might leave the other
            // side waiting for memory, with nobody ever to connect to it. The migration says how it ended.
            _ => moving.await,
        }
    };
    tokio::select! {
        moved = moved => {
            let report = moved.map_err(Cause::Migrate)?;
            // Here, since nobody may wait for the call any more.
            domain.0.tell(moved_away(&report));
            Ok(Some(report))
        }
        () = host.stranded.notified() => Ok(None),
    }
}

/// A cancel that QEMU has not obeyed by then meets a main loop that is stuck behind a link which is down.
async fn free_if_stuck(domain: &Domain, rescue: &Rescue) -> Infallible {
    loop {
        sleep(FREE_AFTER).await;
        let status = domain.observed().migration;
        if following::is_over(status.as_ref()).is_none() {
            asking::cut(rescue).await;
        }
    }
}
