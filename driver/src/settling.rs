//! The task that brings migrations to an end that were left open.
//!
//! A migration is open while the journal has a record of it. One that nobody is at any more, since a daemon died or a link
//! broke, is taken up again here, on either side, for as long as the driver runs: the other daemon is found by the words
//! that were kept of it, and asked. Nothing follows from its silence but that it is asked again, later each time.
//!
//! Decides nothing: the phases do. Knows no transport: [`Builder::peers`](crate::Builder::peers) does.

use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use job_core::Label;
use remote_migrate::{
    Answer, Destination, DestinationRecord, Limits, MigrationId, Owner, Peer, PeerError, Record,
    Request, Side, SourceRecord,
};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};
use uuid::Uuid;

use crate::context::Context;
use crate::domain::Domain;
use crate::error::{Cause, Error};
use crate::events::{News, What};
use crate::journal::Unreadable;
use crate::ops::migrate::recover_bygone;
use crate::ops::{Became, Recovered};

/// Between two tries, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long one try may take: a QEMU may have to be ended.
const TRY: Duration = Duration::from_secs(60);
/// How many of one peer's are taken up side by side: a host that is back finds many open at once, and those of a peer that
/// does not answer are in the way of no other's.
const AT_A_PEER: usize = 4;

/// Finds the daemon of those words.
pub(crate) type FindPeer = Box<dyn Fn(&str) -> Option<Arc<dyn Peer>> + Send + Sync>;

/// What is remembered of the open migrations, beside the journal.
#[derive(Default)]
pub(crate) struct Settling {
    open: Mutex<HashMap<Key, Entry>>,
    changed: Notify,
    turned: Notify,
}

type Key = (MigrationId, Side);

#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) since: SystemTime,
    /// When it is taken up next, unless somebody is at it then.
    pub(crate) next: Instant,
    uuid: Uuid,
    pause: Duration,
    /// Whose the guest is, as was known here last.
    owner: Owner,
    /// No QEMU was left of it here when this driver came: one that is here now was started anew.
    is_gone: bool,
    /// Its end is news: it was left open, and not by somebody who was told.
    is_news: bool,
    /// An earlier driver left it.
    is_earlier: bool,
    /// It was taken up once, for better or worse.
    is_tried: bool,
}

impl Entry {
    fn put_off(&mut self) {
        self.next = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

impl Settling {
    /// A guest arrives or has arrived.
    pub(crate) fn arriving(&self) {
        self.changed.notify_one();
    }

    /// Nobody is at a migration of that guest any more. If it is open still, it is taken up soon.
    pub(crate) fn left(&self, uuid: Uuid) {
        self.with(|open| {
            for entry in open.values_mut().filter(|entry| entry.uuid == uuid) {
                entry.pause = FIRST_PAUSE;
                entry.next = Instant::now() + FIRST_PAUSE;
            }
        });
        self.changed.notify_one();
    }

    /// Forgets those of which there is no record any more, and yields them. One whose record cannot be read is there.
    fn take_gone(&self, records: &[Record], unread: &[Unreadable]) -> Vec<(Key, Entry)> {
        let is_gone = |known: &Key, entry: &mut Entry| {
            let is_unread = |bad: &Unreadable| bad.may_be_at(entry.uuid, known.1);
            !records.iter().any(|record| key(record) == *known) && !unread.iter().any(is_unread)
        };
        self.with(|open| open.extract_if(is_gone).collect())
    }

    /// Waits until the journal was looked at again; what is from now on is not missed.
    pub(crate) fn turn(&self) -> Notified<'_> {
        self.turned.notified()
    }

    /// Whether it was taken up since this driver came.
    pub(crate) fn has_tried(&self, record: &Record) -> bool {
        self.entry(record).is_some_and(|entry| entry.is_tried)
    }

    fn belongs_to(&self, key: Key, owner: Owner) {
        self.with(|open| {
            if let Some(entry) = open.get_mut(&key) {
                entry.owner = owner;
            }
        });
    }

    pub(crate) fn entry(&self, record: &Record) -> Option<Entry> {
        self.with(|open| open.get(&key(record)).copied())
    }

    fn with<R>(&self, change: impl FnOnce(&mut HashMap<Key, Entry>) -> R) -> R {
        change(&mut self.open.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Somebody is at a migration of that guest until this is dropped. What is open then is taken up soon.
pub(crate) struct Leaves {
    context: Arc<Context>,
    uuid: Uuid,
}

impl Leaves {
    pub(crate) fn new(context: Arc<Context>, uuid: Uuid) -> Self {
        Self { context, uuid }
    }
}

impl Drop for Leaves {
    fn drop(&mut self) {
        self.context.settling.left(self.uuid);
    }
}

fn key(record: &Record) -> Key {
    (record.migration(), record.side())
}

/// Whether somebody is at it: then it is theirs to bring on.
pub(crate) fn is_under_way(context: &Context, record: &Record) -> bool {
    let domain = context.registry.by_uuid(record.domain());
    domain.is_some_and(|domain| domain.scheduler.snapshot().asynchronous.is_some())
}

/// Where the other side is, in the words that were kept of it.
pub(crate) fn address(record: &Record) -> &Arc<str> {
    match record {
        Record::Source(record) => &record.peer,
        Record::Destination(record) => &record.home,
    }
}

/// Takes up what is open, until the driver parts.
pub(crate) async fn settle(context: Arc<Context>, destination: Destination) {
    let parting = context.parting.clone();
    let settling = async {
        // What became of the guests of an earlier daemon must be known first.
        context.recoveries.wait().await;
        let mut tries = Tries::default();
        let mut next = round(&context, true, &mut tries).await;
        loop {
            tries.begin(&context, &destination);
            let time = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            let over = tokio::select! {
                () = time => None,
                () = context.settling.changed.notified() => None,
                Some(known) = tries.under_way.next() => Some(known),
            };
            let Some(known) = over else {
                next = round(&context, false, &mut tries).await;
                continue;
            };
            tries.is_over(&context, known);
            // What became of it is seen by its record, and not of each of many alone.
            let soon = match tries.under_way.is_empty() {
                true => Instant::now(),
                false => Instant::now() + FIRST_PAUSE,
            };
            next = Some(next.map_or(soon, |next| next.min(soon)));
        }
    };
    parting.run_until_cancelled(settling).await;
}

/// What is taken up, and what waits for a place at its peer.
#[derive(Default)]
struct Tries<'a> {
    under_way: FuturesUnordered<BoxFuture<'a, Key>>,
    asked: HashMap<Key, Arc<str>>,
    waiting: Vec<Record>,
}

impl<'a> Tries<'a> {
    /// Takes up those of which the peer has a place.
    fn begin(&mut self, context: &'a Arc<Context>, destination: &'a Destination) {
        let mut places: HashMap<Arc<str>, usize> = HashMap::new();
        for peer in self.asked.values() {
            *places.entry(peer.clone()).or_default() += 1;
        }
        for record in std::mem::take(&mut self.waiting) {
            let (known, peer) = (key(&record), address(&record).clone());
            let taken = places.entry(peer.clone()).or_default();
            if *taken == AT_A_PEER {
                self.waiting.push(record);
                continue;
            }
            *taken += 1;
            self.asked.insert(known, peer);
            let tried = take_up(context, destination, record).map(move |()| known);
            self.under_way.push(tried.boxed());
        }
    }

    fn is_over(&mut self, context: &Context, known: Key) {
        self.asked.remove(&known);
        context.settling.with(|open| {
            if let Some(entry) = open.get_mut(&known) {
                entry.is_tried = true;
                entry.put_off();
            }
        });
    }
}

/// Finds those whose time has come. Yields when that of the next one comes.
async fn round(context: &Arc<Context>, is_first: bool, tries: &mut Tries<'_>) -> Option<Instant> {
    let began = Instant::now();
    let Some(records) = listed(context, is_first).await else {
        return Some(began + LONGEST_PAUSE);
    };
    let is_due = |record: &Record| {
        let entry = context.settling.entry(record);
        let is_time = entry.is_some_and(|entry| entry.next <= began);
        // A guest that arrives is held by its own job for as long as its source may come.
        let is_free = record.side() == Side::Destination || !is_under_way(context, record);
        is_time && is_free && !tries.asked.contains_key(&key(record))
    };
    tries.waiting = records.into_iter().filter(is_due).collect();
    context.settling.turned.notify_waiters();
    let waiting: HashSet<_> = tries.waiting.iter().map(key).collect();
    context.settling.with(|open| {
        let is_at_rest = |known: &Key| !waiting.contains(known) && !tries.asked.contains_key(known);
        let at_rest = open.iter_mut().filter(|(known, _)| is_at_rest(known));
        let times = at_rest.map(|(_, entry)| {
            if entry.next <= began {
                entry.put_off();
            }
            entry.next
        });
        times.min()
    })
}

/// The records there are. One that is new is remembered, and the end of one that was left open is told.
async fn listed(context: &Arc<Context>, is_first: bool) -> Option<Vec<Record>> {
    let records = match context.journal.list().await {
        Ok(records) => records,
        Err(error) => {
            warn!(%error, "the journal of migrations cannot be read, so none is taken up");
            return None;
        }
    };
    let now = Instant::now();
    let may_be_gone = context.settling.with(|open| {
        for record in &records {
            let entry = open.entry(key(record)).or_insert_with(|| Entry {
                since: SystemTime::now(),
                next: match (is_first, record.side()) {
                    (true, _) => now,
                    // A guest that arrives is asked after by its source.
                    (false, Side::Destination) if is_under_way(context, record) => {
                        now + LONGEST_PAUSE
                    }
                    // Also if a job is at it: that may be over in the next instant.
                    (false, _) => now + FIRST_PAUSE,
                },
                uuid: record.domain(),
                pause: FIRST_PAUSE,
                owner: record.owner(),
                is_gone: is_first && !is_here(context, record.domain()),
                is_news: is_first,
                is_earlier: is_first,
                is_tried: false,
            });
            entry.owner = record.owner();
        }
        let is_there = |known: &Key| records.iter().any(|record| key(record) == *known);
        open.keys().any(|known| !is_there(known))
    });
    let gone = match may_be_gone {
        false => Vec::new(),
        true => match context.unreadable().await {
            Ok(unread) => context.settling.take_gone(&records, &unread),
            Err(error) => {
                let error = format!("{:#}", Error::from(error));
                warn!(error, "which migrations are settled cannot be told");
                Vec::new()
            }
        },
    };
    for ((id, side), entry) in gone {
        if entry.is_news {
            tell(context, id, side, &entry);
        }
    }
    Some(records)
}

async fn take_up(context: &Arc<Context>, destination: &Destination, record: Record) {
    let peer = address(&record);
    let peer = (!peer.is_empty())
        .then(|| (context.find_peer)(peer))
        .flatten();
    let (id, side) = key(&record);
    let tried = match &record {
        Record::Source(record) => {
            context.settling.with(|open| {
                if let Some(entry) = open.get_mut(&(id, side)) {
                    entry.is_news = true;
                }
            });
            ask_there(context, record, peer).await
        }
        Record::Destination(record) => ask_home(destination, record, peer).await,
    };
    match tried {
        Ok(Some(owner)) => context.settling.belongs_to((id, side), owner),
        Ok(None) => {}
        // That it is lost is told as a failure.
        Err(error) if owner_by(&error) == Some(Owner::Nobody) => {
            context.settling.belongs_to((id, side), Owner::Nobody);
        }
        Err(error) => {
            let error = format!("{error:#}");
            info!(migration = %id, %side, domain = %record.domain(), error, "a migration stays open");
        }
    }
}

/// Whose the guest is, as a failed migration says.
fn owner_by(error: &Error) -> Option<Owner> {
    let failed = error.source()?.downcast_ref::<remote_migrate::Error>()?;
    Some(failed.owner_now())
}

/// One try on the side of the source. What can be done here without the other side is done, whether it answers or not. Yields
/// whose the guest is.
async fn ask_there(
    context: &Arc<Context>,
    record: &SourceRecord,
    peer: Option<Arc<dyn Peer>>,
) -> Result<Option<Owner>, Error> {
    let peer = peer.unwrap_or_else(|| Arc::new(Unknown));
    // The job is not held between two tries.
    let limits = Limits {
        patience: Duration::ZERO,
        ..Limits::default()
    };
    let domain = context.registry.by_uuid(record.domain).map(Domain);
    match domain.filter(|_| !record.stage.only_tells()) {
        Some(domain) => {
            let recovered = domain.recover_within(Some(record.migration), peer, limits);
            let recovered = recovered.deadline(TRY);
            Ok(Some(recovered.await?.owner))
        }
        // It does nothing to the guest, whose own jobs need not wait for a peer that does not answer.
        None => {
            let recovered = recover_bygone(context, record.migration, &*peer, limits).await;
            let failed = |error| Error::new("settle-migration", None, Cause::Migrate(error));
            Ok(Some(recovered.map_err(failed)?.owner))
        }
    }
}

/// One try on the side of the destination. Yields whose the guest is, if that is remembered still.
async fn ask_home(
    destination: &Destination,
    record: &DestinationRecord,
    peer: Option<Arc<dyn Peer>>,
) -> Result<Option<Owner>, Error> {
    let deadline = Instant::now() + TRY;
    let reconciled = destination.reconcile(record.migration, peer.as_deref(), deadline);
    let failed = |error| Error::new("settle-migration", None, Cause::Migrate(error));
    Ok(reconciled.await.map_err(failed)?.owner)
}

/// A daemon that nobody here knows how to find.
struct Unknown;

#[async_trait]
impl Peer for Unknown {
    async fn ask(&self, _request: Request, _: Instant) -> Result<Answer, PeerError> {
        Err(PeerError::not_sent("nobody here knows where it is"))
    }
}

/// Whether a QEMU of that guest is here.
fn is_here(context: &Context, uuid: Uuid) -> bool {
    let domain = context.registry.by_uuid(uuid);
    domain.is_some_and(|domain| domain.live().is_some())
}

/// A migration that was left open is settled on both sides.
fn tell(context: &Arc<Context>, id: MigrationId, side: Side, entry: &Entry) {
    let uuid = entry.uuid;
    let domain = context.registry.by_uuid(uuid).map(Domain);
    let is_here = is_here(context, uuid) && !entry.is_gone;
    let has_moved = domain
        .as_ref()
        .is_some_and(|domain| domain.records().moved_away);
    let became = match side {
        Side::Source if is_here => Became::Undone,
        Side::Source if has_moved => Became::Finished,
        Side::Destination if is_here => Became::Finished,
        _ if entry.owner == Owner::Nobody => Became::Lost,
        // It was the guest here, and ended as any may.
        Side::Destination if entry.owner == Owner::Destination => Became::Ended,
        Side::Destination => Became::Undone,
        Side::Source => Became::Ended,
    };
    let job: Label = match side {
        Side::Source => "migration-out",
        Side::Destination => "migration-in",
    }
    .into();
    info!(migration = %id, %side, domain = %uuid, ?became, "a migration is settled");
    let name = match &domain {
        Some(domain) => domain.0.name.clone(),
        None => uuid.to_string().into(),
    };
    let recovered = Recovered {
        name: name.clone(),
        uuid: Some(uuid),
        job: Some(job),
        became,
    };
    context
        .recoveries
        .settled(recovered.clone(), entry.is_earlier);
    let what = What::Recovered(recovered);
    match domain {
        Some(domain) => domain.0.tell(what),
        None => context.log.push(Arc::new(News {
            uuid,
            name,
            at: SystemTime::now(),
            what,
        })),
    }
}

#[cfg(test)]
mod tests {
    use remote_migrate::{Epoch, Journal, RunState, SourceStage};

    use super::*;
    use crate::journal::{StoreJournal, unreadable};
    use crate::store::{MemoryStore, Shelf, StateStore};

    #[tokio::test]
    async fn a_migration_whose_record_cannot_be_read_any_more_is_not_settled() {
        let store = Arc::new(MemoryStore::default());
        let journal = StoreJournal::new(store.clone());
        let record = Record::Source(SourceRecord {
            migration: MigrationId::random(),
            domain: Uuid::new_v4(),
            epoch: Epoch::FIRST,
            run: RunState::Running,
            peer: "there".into(),
            stage: SourceStage::HandingOver,
        });
        journal.store(&record).await.unwrap();
        let settling = Settling::default();
        let entry = Entry {
            since: SystemTime::now(),
            next: Instant::now(),
            uuid: record.domain(),
            pause: FIRST_PAUSE,
            owner: record.owner(),
            is_gone: false,
            is_news: true,
            is_earlier: false,
            is_tried: false,
        };
        settling.with(|open| open.insert(key(&record), entry));
        let gone = async || {
            let unread = unreadable(&*store).unwrap();
            settling.take_gone(&journal.list().await.unwrap(), &unread)
        };
        assert!(gone().await.is_empty(), "it is there");
        let name = store.list(Shelf::Migrations).unwrap().remove(0).0;
        store.put(Shelf::Migrations, &name, b"{").unwrap();
        assert!(gone().await.is_empty(), "nobody knows how it stands");
        store.remove(Shelf::Migrations, &name).unwrap();
        assert_eq!(gone().await.len(), 1);
        assert!(settling.entry(&record).is_none());
    }
}
