//! One of the two daemons dies at an instant that matters, and another comes in its place: the guest runs on one side, and
//! counts on.

use std::collections::HashMap;
use std::future::{IntoFuture, pending};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use driver::{
    Became, Domain, Driver, ErrorKind, Landing, MigrateOptions, Run, SaveOptions, StartOptions,
};
use monitor_qmp::command::MigrationStatus;
use remote_migrate::{
    Answer, Call, Destination, DestinationStage, Journal, JournalError, MigrationId, Owner, Peer,
    PeerError, Record, Report, Request, Service, Side,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;

use super::post_copy::{breaks, is_in_post_copy, turned_to_post_copy, unlimited};
use super::{SECOND, counts_on, is_performing, peer, slow};
use crate::rig::{Env, Rig, Signal, boot, kill};

/// A daemon on a runtime of its own. Its death is that this is torn from under it: as near to a kill as one process
/// allows. Its guests run on then.
pub(super) struct Daemon {
    pub(super) driver: Driver,
    destination: Destination,
    runtime: Option<Runtime>,
    town: Town,
    landing: Landing,
}

/// Which daemon answers to which words. They find each other here, as they would over a network.
#[derive(Clone, Default)]
pub(super) struct Town(Arc<std::sync::Mutex<HashMap<String, Arc<dyn Peer>>>>);

/// A daemon as the others reach it: what it does it does on its own runtime, and ends with that.
struct House {
    destination: Destination,
    runtime: Handle,
}

#[async_trait]
impl Peer for House {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let destination = self.destination.clone();
        let serving = async move { destination.serve(request, deadline).await };
        self.runtime
            .spawn(serving)
            .await
            .map_err(PeerError::no_answer)
    }
}

impl Town {
    /// From now on that daemon answers to those words.
    pub(super) fn enter(&self, words: &str, destination: Destination, runtime: &Handle) {
        let runtime = runtime.clone();
        let house = House {
            destination,
            runtime,
        };
        self.moves_in(words, Arc::new(house));
    }

    /// The same of one that need not be a daemon.
    pub(super) fn moves_in(&self, words: &str, house: Arc<dyn Peer>) {
        let mut all = self.0.lock().expect("no panic");
        all.insert(words.to_owned(), house);
    }

    pub(super) fn leave(&self, words: &str) {
        self.0.lock().expect("no panic").remove(words);
    }

    pub(super) fn find(&self, words: &str) -> Option<Arc<dyn Peer>> {
        self.0.lock().expect("no panic").get(words).cloned()
    }
}

impl Daemon {
    async fn begin(env: &Env, dir: &Path) -> Self {
        Self::in_town(env, dir, Town::default()).await
    }

    pub(super) async fn in_town(env: &Env, dir: &Path, town: Town) -> Self {
        Self::at(env, dir, town, Landing::unix()).await
    }

    /// With guests' memory taken in at that place.
    pub(super) async fn at(env: &Env, dir: &Path, town: Town, landing: Landing) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let transports = env.transports().expect("the staged plugins load");
        let builder = Driver::builder(transports, dir.join("run"))
            .state_dir(dir.join("state"))
            .qemu(&env.qemu)
            .landing(landing.clone())
            .peers({
                let town = town.clone();
                move |words| town.find(words)
            });
        let built = runtime.spawn(async move { builder.build() }).await;
        let driver = built.expect("no panic").expect("its directories are free");
        Self {
            destination: driver.destination(),
            driver,
            runtime: Some(runtime),
            town,
            landing,
        }
    }

    /// Dies, and is followed by another.
    pub(super) async fn again(self, env: &Env, dir: &Path) -> Self {
        let (town, landing) = (self.town.clone(), self.landing.clone());
        self.die().await;
        Self::at(env, dir, town, landing).await
    }

    pub(super) async fn die(mut self) {
        let runtime = self.runtime.take().expect("it lives");
        let dying = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(10 * SECOND));
        dying.await.expect("it dies");
        drop(self);
    }

    /// Starts a guest, and waits until it has booted.
    pub(super) async fn starts(&self, rig: &Rig) -> Domain {
        let started = self.driver.start(rig.guest("web"), StartOptions::default());
        let domain = self.runtime().spawn(started.into_future()).await;
        let domain = domain.expect("no panic").expect("it starts");
        let booted = domain.wait_agent().deadline(60 * SECOND);
        booted.await.expect("it boots");
        domain
    }

    pub(super) fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it lives")
    }

    /// Takes up the guest that its predecessor was moving, and what became of it.
    pub(super) async fn takes_up(&self, name: &str) -> (Domain, Became) {
        let all = self.driver.recovered(Instant::now() + 40 * SECOND);
        let found = all.await.expect("all were looked at").remove(0);
        let domain = self.driver.by_name(name).expect("it is known");
        (domain, found.became)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that died has left its guests to the next.
        let Some(runtime) = self.runtime.take() else {
            return;
        };
        for domain in self.driver.domains() {
            if let Some(pid) = domain.observed().pid {
                kill(pid, Signal::KILL);
            }
        }
        runtime.shutdown_background();
    }
}

/// When the destination's daemon dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dies {
    /// All was sent, and nobody has asked it to take the guest.
    Unasked,
    /// Its journal says that it takes the guest, and the guest does not run.
    Taking,
    /// The guest runs, and its journal does not say so.
    Starting,
    /// It has said that the guest is its own, and nobody has heard it.
    Unheard,
}

/// The journal of a daemon that dies at a certain record.
struct LastWords {
    journal: Arc<dyn Journal>,
    dies: Dies,
    reached: Arc<Notify>,
}

#[async_trait]
impl Journal for LastWords {
    async fn store(&self, record: &Record) -> Result<(), JournalError> {
        let is_at = |stage: &DestinationStage| matches!(record, Record::Destination(record) if record.stage == *stage);
        let ends = match self.dies {
            Dies::Taking if is_at(&DestinationStage::Starting) => {
                self.journal.store(record).await?;
                true
            }
            Dies::Starting => is_at(&DestinationStage::Owned),
            _ => false,
        };
        if ends {
            self.reached.notify_one();
            return pending().await;
        }
        self.journal.store(record).await
    }

    async fn load(&self, id: MigrationId, side: Side) -> Result<Option<Record>, JournalError> {
        self.journal.load(id, side).await
    }

    async fn list(&self) -> Result<Vec<Record>, JournalError> {
        self.journal.list().await
    }

    async fn remove(&self, id: MigrationId, side: Side) -> Result<(), JournalError> {
        self.journal.remove(id, side).await
    }
}

/// The way to a daemon that dies once, and is there again when it is asked next.
struct Mortal {
    env: Env,
    dir: PathBuf,
    dies: Dies,
    reached: Arc<Notify>,
    lives: Mutex<Lives>,
}

struct Lives {
    /// The one that lives now.
    daemon: Option<Daemon>,
    has_died: bool,
}

impl Mortal {
    async fn new(env: &Env, dir: &Path, dies: Dies) -> Arc<Self> {
        let mut daemon = Daemon::begin(env, dir).await;
        let reached = Arc::new(Notify::new());
        let journal = LastWords {
            journal: daemon.driver.journal(),
            dies,
            reached: reached.clone(),
        };
        let arrivals = Arc::new(daemon.driver.arrivals());
        daemon.destination = Destination::new(arrivals, Arc::new(journal));
        let lives = Lives {
            daemon: Some(daemon),
            has_died: false,
        };
        Arc::new(Self {
            env: env.clone(),
            dir: dir.to_owned(),
            dies,
            reached,
            lives: Mutex::new(lives),
        })
    }

    async fn die(&self, lives: &mut Lives) {
        let old = lives.daemon.take().expect("one lives at a time");
        lives.daemon = Some(old.again(&self.env, &self.dir).await);
        lives.has_died = true;
    }

    async fn has_died(&self) -> bool {
        self.lives.lock().await.has_died
    }

    /// The guest, in the daemon that lives now.
    async fn guest(&self, of: &Domain) -> Option<Domain> {
        let lives = self.lives.lock().await;
        lives.daemon.as_ref()?.driver.by_uuid(of.uuid())
    }
}

#[async_trait]
impl Peer for Mortal {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let mut lives = self.lives.lock().await;
        let is_the_one = request.call == Call::Finish && !lives.has_died;
        if is_the_one && self.dies == Dies::Unasked {
            self.die(&mut lives).await;
        }
        let daemon = lives.daemon.as_ref().expect("one lives at a time");
        let destination = daemon.destination.clone();
        let serving = async move { destination.serve(request, deadline).await };
        let serving = daemon.runtime().spawn(serving);
        let answer = tokio::select! {
            answer = serving => Some(answer.map_err(PeerError::no_answer)?),
            () = self.reached.notified() => None,
        };
        match answer {
            Some(answer) if !(is_the_one && self.dies == Dies::Unheard) => Ok(answer),
            _ => {
                self.die(&mut lives).await;
                Err(PeerError::no_answer("its daemon died"))
            }
        }
    }
}

pub(super) async fn a_destination_that_dies_before_it_is_asked_takes_the_guest_when_it_is_back(
    rig: Rig,
) {
    arrives_past_a_death(rig, Dies::Unasked).await;
}

pub(super) async fn a_destination_that_dies_as_it_takes_the_guest_runs_it_when_it_is_back(
    rig: Rig,
) {
    arrives_past_a_death(rig, Dies::Taking).await;
}

pub(super) async fn a_destination_that_dies_as_it_starts_the_guest_owns_it_when_it_is_back(
    rig: Rig,
) {
    arrives_past_a_death(rig, Dies::Starting).await;
}

pub(super) async fn a_destination_that_dies_with_its_answer_repeats_it_when_it_is_back(rig: Rig) {
    arrives_past_a_death(rig, Dies::Unheard).await;
}

pub(super) async fn a_destination_that_dies_as_it_takes_a_guest_in_two_halves_runs_it_when_it_is_back(
    rig: Rig,
) {
    arrives_in_halves_past_a_death(rig, Dies::Taking).await;
}

pub(super) async fn a_destination_that_dies_before_it_is_asked_for_a_guest_in_two_halves_runs_it_when_it_is_back(
    rig: Rig,
) {
    arrives_in_halves_past_a_death(rig, Dies::Unasked).await;
}

async fn arrives_in_halves_past_a_death(rig: Rig, dies: Dies) {
    let dir = tempfile::tempdir().expect("it can be made");
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let there = Mortal::new(&rig.env, dir.path(), dies).await;
    let moving = turned_to_post_copy(&domain, there.clone()).await;
    while !there.has_died().await {
        tokio::task::yield_now().await;
    }
    // Most of its memory is still at the source.
    counts_on(&rig, 1, 20 * SECOND).await;
    unlimited(&domain).await;
    let report = moving.await.expect("no panic").expect("it is asked again");
    has_arrived(&rig, &domain, &there, &report).await;
}

/// Whoever answers to those words when it is asked.
struct AtHome {
    town: Town,
    words: &'static str,
}

#[async_trait]
impl Peer for AtHome {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let found = self.town.find(self.words);
        let found = found.ok_or_else(|| PeerError::not_sent("nobody is there"))?;
        found.ask(request, deadline).await
    }
}

pub(super) async fn a_post_copy_whose_stream_broke_goes_on_at_the_daemon_that_comes_next(rig: Rig) {
    let dir = tempfile::tempdir().expect("it can be made");
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let town = Town::default();
    let mut there = Daemon::in_town(&rig.env, dir.path(), town.clone()).await;
    let enters = |daemon: &Daemon| {
        let runtime = daemon.runtime().handle();
        town.enter("there", daemon.destination.clone(), runtime);
    };
    enters(&there);
    let peer = Arc::new(AtHome {
        town: town.clone(),
        words: "there",
    });
    let moving = turned_to_post_copy(&domain, peer).await;
    is_in_post_copy(&domain).await;
    let has = |side: &Domain, status: MigrationStatus| {
        let side = side.clone();
        async move {
            let until = Instant::now() + 20 * SECOND;
            let is_it = |seen: &driver::Observed| seen.migration.as_ref() == Some(&status);
            let seen = side.wait_for(is_it, until).await;
            seen.unwrap_or_else(|error| panic!("{status:?}: {error:#}"));
        }
    };
    for death in 0..2 {
        town.leave("there");
        there = there.again(&rig.env, dir.path()).await;
        let (guest, became) = there.takes_up("web").await;
        assert_eq!(became, Became::Kept);
        assert!(guest.query_status().await.expect("it answers").running);
        if death == 0 {
            enters(&there);
            breaks(&domain).await;
        } else {
            // The one that died has brought the memory by its own hands.
            has(&domain, MigrationStatus::PostcopyPaused).await;
            enters(&there);
        }
        // QEMU 7.2 ends itself if the new stream breaks before both have agreed on what is missing.
        for side in [&domain, &guest] {
            has(side, MigrationStatus::PostcopyActive).await;
        }
    }
    unlimited(&domain).await;
    let report = moving.await.expect("no panic").expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&rig, 2, 20 * SECOND).await;
    let reset = moved.reset().deadline(10 * SECOND).await;
    reset.expect("nobody holds it any more");
}

async fn arrives_past_a_death(rig: Rig, dies: Dies) {
    let dir = tempfile::tempdir().expect("it can be made");
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let there = Mortal::new(&rig.env, dir.path(), dies).await;
    let moved = domain.migrate(there.clone(), MigrateOptions::default());
    let report = moved.await.expect("it is asked again");
    has_arrived(&rig, &domain, &there, &report).await;
}

async fn has_arrived(rig: &Rig, domain: &Domain, there: &Mortal, report: &Report) {
    assert!(there.has_died().await);
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(domain.observed().run, Run::Off);
    let moved = there.guest(domain).await.expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(rig, 0, 20 * SECOND).await;
}

/// The way to a daemon whose answer to the offer of the guest never comes. What it does it does on its own runtime.
pub(super) struct Deaf {
    there: Destination,
    runtime: Handle,
    pub(super) answered: Arc<Notify>,
}

impl Deaf {
    pub(super) fn new(there: &Rig) -> Self {
        Self {
            there: there.driver.destination(),
            runtime: Handle::current(),
            answered: Arc::default(),
        }
    }
}

#[async_trait]
impl Peer for Deaf {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let is_the_one = request.call == Call::Finish;
        let there = self.there.clone();
        let serving = async move { there.serve(request, deadline).await };
        let answer = self.runtime.spawn(serving).await;
        if is_the_one {
            self.answered.notify_one();
            return pending().await;
        }
        answer.map_err(PeerError::no_answer)
    }
}

pub(super) async fn a_source_that_dies_before_it_hears_the_answer_gives_the_guest_up_when_it_is_back(
    rig: Rig,
) {
    let dir = tempfile::tempdir().expect("it can be made");
    let here = Daemon::begin(&rig.env, dir.path()).await;
    let there = Deaf::new(&rig);
    let answered = there.answered.clone();
    begins_to_move(&here, &rig, there, MigrateOptions::default()).await;
    answered.notified().await;
    let here = here.again(&rig.env, dir.path()).await;
    let (web, became) = here.takes_up("web").await;
    assert_eq!(became, Became::InDoubt);
    let error = web.resume().await.expect_err("it runs elsewhere");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    let file = dir.path().join("web.save");
    let saved = web.save(&file, SaveOptions::default()).await;
    let error = saved.expect_err("an older guest would be kept, of disks that are newer");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    assert!(!file.exists());
    let report = web.recover_migration(peer(&rig)).await.expect("it is told");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    let is_off = |seen: &driver::Observed| seen.run == Run::Off;
    let off = web.wait_for(is_off, Instant::now() + 20 * SECOND).await;
    off.expect("its QEMU here ends");
    let moved = rig.driver.by_uuid(web.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&rig, 0, 20 * SECOND).await;
}

pub(super) async fn a_source_that_dies_while_memory_moves_keeps_the_guest_when_it_is_back(
    rig: Rig,
) {
    let dir = tempfile::tempdir().expect("it can be made");
    let here = Daemon::begin(&rig.env, dir.path()).await;
    let domain = begins_to_move(&here, &rig, Deaf::new(&rig), slow()).await;
    assert!(is_performing(&domain).await);
    drop(domain);
    let here = here.again(&rig.env, dir.path()).await;
    let (web, became) = here.takes_up("web").await;
    assert_eq!(became, Became::InDoubt);
    let report = web.recover_migration(peer(&rig)).await.expect("it is told");
    assert_eq!((report.owner, report.settled), (Owner::Source, true));
    assert!(web.query_status().await.expect("it answers").running);
    assert!(rig.driver.by_uuid(web.uuid()).is_none(), "it was forgotten");
    counts_on(&rig, 0, 20 * SECOND).await;
}

/// Boots a guest in a daemon that is about to die, and begins to move it.
pub(super) async fn begins_to_move(
    here: &Daemon,
    rig: &Rig,
    peer: Deaf,
    options: MigrateOptions,
) -> Domain {
    let domain = here.starts(rig).await;
    here.runtime()
        .spawn(domain.migrate(Arc::new(peer), options).into_future());
    domain
}
