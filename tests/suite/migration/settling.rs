//! Migrations that were left open come to an end: by themselves where the daemons find each other again, by an operator's
//! word where they never will.

use std::future::{IntoFuture, pending};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use driver::{Became, Driver, Effect, ErrorKind, MigrateOptions, Next, Notice, Run, What};
use remote_migrate::verdict::Ruling;
use remote_migrate::{
    Answer, Call, Destination, Owner, Peer, PeerError, Reason, Reply, Request, Service, Side,
};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::restart::{Daemon, Deaf, Town, begins_to_move};
use super::{SECOND, counts_on, is_performing, slow};
use crate::rig::{Rig, Signal, boot, kill};

pub(super) fn between_both() -> MigrateOptions {
    MigrateOptions {
        there: Some("there".into()),
        home: Some("home".into()),
        ..MigrateOptions::default()
    }
}

/// Waits until a driver has told that a migration that was left open is settled.
async fn settled(driver: &Driver) -> Became {
    let told = driver.recovered(Instant::now() + 40 * SECOND).await;
    let mut events = driver.subscribe();
    let told = told.expect("all were looked at").remove(0).became;
    if told != Became::InDoubt {
        return told;
    }
    let telling = async {
        loop {
            if let Notice::News { news, .. } = events.next().await
                && let What::Recovered(recovered) = &news.what
                && recovered.became != Became::InDoubt
            {
                return recovered.became.clone();
            }
        }
    };
    let told = timeout_at(Instant::now() + 40 * SECOND, telling).await;
    told.expect("it is settled by itself")
}

pub(super) async fn a_source_that_is_back_settles_by_itself_what_it_left(rig: Rig) {
    let dir = tempfile::tempdir().expect("it can be made");
    let town = Town::default();
    let here = Daemon::in_town(&rig.env, dir.path(), town.clone()).await;
    let there = Deaf::new(&rig);
    let answered = there.answered.clone();
    let domain = begins_to_move(&here, &rig, there, between_both()).await;
    let uuid = domain.uuid();
    drop(domain);
    answered.notified().await;
    let here = here.again(&rig.env, dir.path()).await;
    // The link is down still: what is known is told, and nothing follows from silence.
    let all = here.driver.recovered(Instant::now() + 40 * SECOND).await;
    assert_eq!(all.expect("all were looked at")[0].became, Became::InDoubt);
    let open = here.driver.migrations().await.expect("it can be read");
    assert_eq!((open.len(), open[0].side), (1, Side::Source));
    assert_eq!((open[0].owner, &*open[0].peer), (Owner::InDoubt, "there"));
    let web = here.driver.by_uuid(uuid).expect("it is known");
    assert!(!web.observed().run.is_running());

    town.enter("there", rig.driver.destination(), &Handle::current());
    assert_eq!(settled(&here.driver).await, Became::Finished);
    let is_off = |seen: &driver::Observed| seen.run == Run::Off;
    let off = web.wait_for(is_off, Instant::now() + 20 * SECOND).await;
    off.expect("its QEMU here ends");
    for driver in [&here.driver, &rig.driver] {
        let open = driver.migrations().await.expect("it can be read");
        assert!(open.is_empty(), "{open:?}");
    }
    let all = here.driver.recovered(Instant::now()).await;
    assert_eq!(all.expect("all were looked at")[0].became, Became::Finished);
    let moved = rig.driver.by_uuid(uuid).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&rig, 0, 20 * SECOND).await;
}

/// The way to the daemon that lives there, if one does.
pub(super) struct Way {
    pub(super) town: Town,
}

#[async_trait]
impl Peer for Way {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        match self.town.find("there") {
            Some(there) => there.ask(request, deadline).await,
            None => Err(PeerError::not_sent("its daemon is dead")),
        }
    }
}

pub(super) async fn a_destination_that_is_back_discards_by_itself_what_its_source_kept(rig: Rig) {
    let dir = tempfile::tempdir().expect("it can be made");
    let town = Town::default();
    let there = Daemon::in_town(&rig.env, dir.path(), town.clone()).await;
    town.enter(
        "there",
        there.driver.destination(),
        there.runtime().handle(),
    );
    town.enter("home", rig.driver.destination(), &Handle::current());
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let options = MigrateOptions {
        bandwidth: slow().bandwidth,
        ..between_both()
    };
    let way = Arc::new(Way { town: town.clone() });
    let moving = tokio::spawn(domain.migrate(way, options).into_future());
    assert!(is_performing(&domain).await);
    town.leave("there");
    there.die().await;
    domain.cancel_job("test").expect("it can be cancelled");
    let running = |seen: &driver::Observed| seen.run.is_running();
    let runs = domain.wait_for(running, Instant::now() + 20 * SECOND);
    runs.await.expect("it goes on here");

    // It is not told: it asks.
    let there = Daemon::in_town(&rig.env, dir.path(), town).await;
    let became = settled(&there.driver).await;
    assert!(
        matches!(became, Became::Undone | Became::Ended),
        "{became:?}"
    );
    let open = there.driver.migrations().await.expect("it can be read");
    assert!(open.is_empty(), "{open:?}");
    if let Some(copy) = there.driver.by_uuid(domain.uuid()) {
        assert_eq!(copy.observed().run, Run::Off);
    }
    moving.abort();
    counts_on(&rig, 0, 20 * SECOND).await;
}

/// The way to a daemon that is never asked to take the guest: the source dies before.
struct Unasked {
    there: Destination,
    reached: Notify,
}

impl Unasked {
    fn at(there: &Rig) -> Arc<Self> {
        Arc::new(Self {
            there: there.driver.destination(),
            reached: Notify::new(),
        })
    }
}

#[async_trait]
impl Peer for Unasked {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        if request.call == Call::Finish {
            self.reached.notify_one();
            return pending().await;
        }
        Ok(self.there.serve(request, deadline).await)
    }
}

pub(super) async fn an_operator_lets_a_complete_copy_run_whose_source_is_fenced(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let peer = Unasked::at(&there);
    tokio::spawn(domain.migrate(peer.clone(), between_both()).into_future());
    peer.reached.notified().await;
    // Its host is off now.
    kill(
        domain.observed().pid.expect("it has a process"),
        Signal::KILL,
    );
    let open = there.driver.migrations().await.expect("it can be read");
    assert_eq!((open.len(), open[0].side), (1, Side::Destination));
    assert_eq!((open[0].owner, &*open[0].peer), (Owner::Source, "home"));
    assert_ne!(
        open[0].next,
        Next::Asked {
            within: std::time::Duration::ZERO
        }
    );
    let ruled = there
        .driver
        .resolve_migration(open[0].id, Side::Destination, Ruling::PeerFenced);
    assert_eq!(ruled.await.expect("it is done"), Some(Owner::Destination));
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&rig, 0, 20 * SECOND).await;
}

pub(super) async fn an_operator_rules_at_once_while_the_call_that_migrates_still_asks(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let peer = Unasked::at(&there);
    let moving = tokio::spawn(domain.migrate(peer.clone(), between_both()).into_future());
    peer.reached.notified().await;
    // The other host is off now.
    let copy = there.driver.by_uuid(domain.uuid()).expect("it is there");
    kill(copy.observed().pid.expect("it has a process"), Signal::KILL);
    let open = rig.driver.migrations().await.expect("it can be read");
    assert_eq!((open.len(), open[0].owner), (1, Owner::InDoubt));
    // Well within the minute for which the call would ask.
    let ruled = rig
        .driver
        .resolve_migration(open[0].id, Side::Source, Ruling::PeerFenced)
        .deadline(20 * SECOND);
    assert_eq!(ruled.await.expect("it is done"), Some(Owner::Source));
    let error = moving.await.expect("no panic").expect_err("it stays");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    let text = format!("{error:#}");
    assert!(text.contains("an operator ruled"), "{text}");
    assert!(domain.query_status().await.expect("it answers").running);
    counts_on(&rig, 0, 20 * SECOND).await;
}

pub(super) async fn a_guest_that_both_hosts_have_lost_is_started_anew_by_an_operators_word(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let peer = Unasked::at(&there);
    let burned = MigrateOptions {
        there: Some("burned".into()),
        ..MigrateOptions::default()
    };
    let moving = tokio::spawn(domain.migrate(peer.clone(), burned).into_future());
    peer.reached.notified().await;
    // Both hosts lose power, and the other one does not come back.
    let copy = there.driver.by_uuid(domain.uuid()).expect("it is there");
    for lost in [&copy, &domain] {
        let pid = lost.observed().pid.expect("it has a process");
        kill(pid, Signal::KILL);
    }
    let open = rig.driver.migrations().await.expect("it can be read");
    let ruled = rig
        .driver
        .resolve_migration(open[0].id, Side::Source, Ruling::PeerFenced)
        .deadline(20 * SECOND);
    let error = ruled.await.expect_err("nothing is left of it");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    moving.await.expect("no panic").expect_err("it is lost");
    let open = rig.driver.migrations().await.expect("it can be read");
    assert_eq!((open.len(), open[0].owner), (1, Owner::Nobody), "{open:?}");
    // The other side is still to be told, and never will be.
    domain.start().await.expect("it is nowhere else");
    assert!(domain.query_status().await.expect("it answers").running);
}

pub(super) async fn a_ruling_that_takes_longer_than_its_call_may_is_told_as_one_that_stands(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let peer = Unasked::at(&there);
    let moving = tokio::spawn(domain.migrate(peer.clone(), between_both()).into_future());
    peer.reached.notified().await;
    let copy = there.driver.by_uuid(domain.uuid()).expect("it is there");
    kill(copy.observed().pid.expect("it has a process"), Signal::KILL);
    // What is ruled is looked at first, and nobody answers.
    let qemu = domain.observed().pid.expect("it has a process");
    kill(qemu, Signal::STOP);
    let ruled = domain.resolve_migration(Ruling::PeerFenced);
    let error = ruled.deadline(SECOND).await.expect_err("it is too slow");
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown),
        "{error:#}"
    );
    assert!(error.to_string().contains("as ruled"), "{error}");
    kill(qemu, Signal::CONT);
    let error = moving.await.expect("no panic").expect_err("it stays");
    let text = format!("{error:#}");
    assert!(text.contains("an operator ruled"), "{text}");
    counts_on(&rig, 0, 20 * SECOND).await;
}

/// The way to a daemon that does not take the guest. By then a record of the guest is damaged here.
struct Refusing {
    there: Destination,
    record: PathBuf,
}

#[async_trait]
impl Peer for Refusing {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        if request.call != Call::Finish {
            return Ok(self.there.serve(request, deadline).await);
        }
        std::fs::write(&self.record, b"{").expect("there is room");
        Ok(Answer {
            migration: request.migration,
            epoch: request.epoch,
            reply: Reply::Refused(Reason::new("it is not wanted")),
            trouble: None,
            resumed: None,
        })
    }
}

pub(super) async fn a_guest_that_stays_is_not_let_run_while_a_record_of_it_cannot_be_read(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let name = format!("{}-source-{}.json", Uuid::new_v4(), domain.uuid());
    let record = rig.dir.path().join("state/migrations").join(name);
    let peer = Arc::new(Refusing {
        there: there.driver.destination(),
        record: record.clone(),
    });
    let mut told = domain.subscribe();
    let moving = tokio::spawn(
        domain
            .migrate(peer, MigrateOptions::default())
            .into_future(),
    );
    let tried_again = async {
        let mut tries = 0;
        while tries < 2 {
            if let Notice::News { news, .. } = told.next().await
                && matches!(&news.what, What::Phase { phase, .. } if &**phase == "confirm")
            {
                tries += 1;
            }
        }
    };
    let tried = timeout_at(Instant::now() + 30 * SECOND, tried_again).await;
    tried.expect("it is tried again");
    let status = domain.query_status().await.expect("it answers");
    assert!(!status.running, "another host may have it");
    std::fs::remove_file(&record).expect("an operator takes it away");
    let error = moving.await.expect("no panic").expect_err("it stays");
    assert!(format!("{error:#}").contains("not wanted"), "{error:#}");
    counts_on(&rig, 1, 20 * SECOND).await;
}

/// What ends at once the call that hears it, and leaves its migration open: nobody need wait until the source has lost its
/// patience.
pub(super) fn stale(request: &Request) -> Answer {
    Answer {
        migration: request.migration,
        epoch: request.epoch,
        reply: Reply::Stale {
            seen: request.epoch.next(),
        },
        trouble: None,
        resumed: None,
    }
}

/// The way to a daemon that hears the first question, dies of it, and is never told how that ended.
pub(super) struct Burned;

#[async_trait]
impl Peer for Burned {
    async fn ask(&self, request: Request, _deadline: Instant) -> Result<Answer, PeerError> {
        if matches!(request.call, Call::Prepare(_)) {
            return Err(PeerError::no_answer("connection reset by peer"));
        }
        Ok(stale(&request))
    }
}

pub(super) async fn an_operators_word_reaches_the_migration_it_names_and_no_other(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let burned = MigrateOptions {
        there: Some("burned".into()),
        ..MigrateOptions::default()
    };
    let failed = domain.migrate(Arc::new(Burned), burned).await;
    let error = failed.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    let open = rig.driver.migrations().await.expect("it can be read");
    assert_eq!((open.len(), open[0].owner), (1, Owner::Source));
    let told_never = open[0].id;

    // Its guest is offered elsewhere meanwhile, and no answer has come.
    let peer = Unasked::at(&there);
    let moving = tokio::spawn(domain.migrate(peer.clone(), between_both()).into_future());
    peer.reached.notified().await;
    let ruled = rig
        .driver
        .resolve_migration(told_never, Side::Source, Ruling::PeerFenced)
        .deadline(2 * SECOND);
    let error = ruled
        .await
        .expect_err("the other one has the job of the guest");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error:#}");
    assert!(!moving.is_finished(), "nobody ruled that one");
    assert!(!domain.query_status().await.expect("it answers").running);
    let open = rig.driver.migrations().await.expect("it can be read");
    let in_doubt = open.iter().find(|open| open.id != told_never);
    let in_doubt = in_doubt.expect("it is open");
    assert_eq!((open.len(), in_doubt.owner), (2, Owner::InDoubt));

    let copy = there.driver.by_uuid(domain.uuid()).expect("it is there");
    kill(copy.observed().pid.expect("it has a process"), Signal::KILL);
    let ruled = rig
        .driver
        .resolve_migration(in_doubt.id, Side::Source, Ruling::PeerFenced)
        .deadline(20 * SECOND);
    assert_eq!(ruled.await.expect("it is done"), Some(Owner::Source));
    moving.await.expect("no panic").expect_err("it stays");
    let open = rig.driver.migrations().await.expect("it can be read");
    assert!(open.iter().any(|open| open.id == told_never), "{open:?}");
    assert!(domain.query_status().await.expect("it answers").running);
    counts_on(&rig, 0, 20 * SECOND).await;
}
