//! Migrations that were left open by callers who left, and by peers that do not answer: they cost nobody but themselves.

use std::future::{IntoFuture, pending};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use driver::{Became, Driver, ErrorKind, MigrateOptions, Notice, Run, What};
use remote_migrate::{
    Answer, Call, Destination, Epoch, MigrationId, Peer, PeerError, Record, Request, RunState,
    Service, Side, SourceRecord, SourceStage,
};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::restart::{Daemon, Town};
use super::settling::{Burned, between_both, stale};
use super::{SECOND, counts_on, moved_by};
use crate::rig::Rig;

/// The way to a daemon that takes the guest, and whose answer is lost.
struct Lost {
    there: Destination,
    runtime: Handle,
    has_taken: Notify,
    goes_on: Notify,
}

#[async_trait]
impl Peer for Lost {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let (there, asked) = (self.there.clone(), request.clone());
        let serving = async move { there.serve(asked, deadline).await };
        let answer = self.runtime.spawn(serving).await;
        if request.call == Call::Finish {
            self.has_taken.notify_one();
            self.goes_on.notified().await;
            return Ok(stale(&request));
        }
        answer.map_err(PeerError::no_answer)
    }
}

/// What is told next of a migration that was left open.
async fn told(driver: &Driver, until: Instant) -> Became {
    let mut events = driver.subscribe();
    let telling = async {
        loop {
            if let Notice::News { news, .. } = events.next().await
                && let What::Recovered(recovered) = &news.what
            {
                return recovered.became.clone();
            }
        }
    };
    let told = timeout_at(until, telling).await;
    told.expect("it is settled by itself")
}

pub(super) async fn a_migration_whose_caller_has_left_is_settled_by_itself(rig: Rig) {
    let dir = tempfile::tempdir().expect("it can be made");
    let town = Town::default();
    let here = Daemon::in_town(&rig.env, dir.path(), town.clone()).await;
    let domain = here.starts(&rig).await;
    let peer = Arc::new(Lost {
        there: rig.driver.destination(),
        runtime: Handle::current(),
        has_taken: Notify::new(),
        goes_on: Notify::new(),
    });
    let mut events = here.driver.subscribe();
    let call = domain.migrate(peer.clone(), between_both());
    let moving = here.runtime().spawn(call.into_future());
    peer.has_taken.notified().await;
    moving.abort();
    let left = moving.await.expect_err("nobody waits for it any more");
    assert!(left.is_cancelled());
    // Its work goes on, and ends in doubt.
    town.enter("there", rig.driver.destination(), &Handle::current());
    peer.goes_on.notify_one();
    let became = told(&here.driver, Instant::now() + 40 * SECOND).await;
    assert_eq!(became, Became::Finished);
    let is_off = |seen: &driver::Observed| seen.run == Run::Off;
    let off = domain.wait_for(is_off, Instant::now() + 20 * SECOND).await;
    off.expect("its QEMU here ends");
    let moved = timeout(20 * SECOND, moved_by(&mut events)).await;
    assert_eq!(moved.expect("it is told").0, Side::Source);
    for driver in [&here.driver, &rig.driver] {
        let open = driver.migrations().await.expect("it can be read");
        assert!(open.is_empty(), "{open:?}");
    }
    counts_on(&rig, 0, 20 * SECOND).await;
}

/// A daemon that takes every question and answers none.
#[derive(Default)]
struct Mute {
    asked: Notify,
}

#[async_trait]
impl Peer for Mute {
    async fn ask(&self, _request: Request, _deadline: Instant) -> Result<Answer, PeerError> {
        self.asked.notify_one();
        pending().await
    }
}

pub(super) async fn a_peer_that_does_not_answer_holds_no_job_of_a_guest_that_was_kept(rig: Rig) {
    let dir = tempfile::tempdir().expect("it can be made");
    let (town, mute) = (Town::default(), Arc::new(Mute::default()));
    town.moves_in("mute", mute.clone());
    let here = Daemon::in_town(&rig.env, dir.path(), town).await;
    let domain = here.starts(&rig).await;
    let options = MigrateOptions {
        there: Some("mute".into()),
        ..MigrateOptions::default()
    };
    let moved = here
        .runtime()
        .spawn(domain.migrate(Arc::new(Burned), options).into_future());
    let error = moved.await.expect("no panic").expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    let asked = timeout(20 * SECOND, mute.asked.notified()).await;
    asked.expect("it is to be told that the guest was kept");
    let resumed = domain.resume().deadline(2 * SECOND).await;
    resumed.expect("the guest is not what it is about");
    let open = here.driver.migrations().await.expect("it can be read");
    assert_eq!(open.len(), 1, "{open:?}");
}

pub(super) async fn a_peer_that_does_not_answer_is_in_the_way_of_no_other(rig: Rig) {
    let dir = tempfile::tempdir().expect("it can be made");
    let (town, mute) = (Town::default(), Arc::new(Mute::default()));
    town.moves_in("mute", mute.clone());
    let here = Daemon::in_town(&rig.env, dir.path(), town.clone()).await;
    // Each of them is as old as that of the peer that answers, and is to be told only.
    for number in 0..40 {
        let record = SourceRecord {
            migration: MigrationId::random(),
            domain: uuid::Uuid::from_u128(number + 1),
            epoch: Epoch::FIRST,
            run: RunState::Running,
            peer: if number == 39 { "there" } else { "mute" }.into(),
            stage: SourceStage::Kept {
                tell: true,
                ended: true,
            },
        };
        let stored = here.driver.journal().store(&Record::Source(record)).await;
        stored.expect("it is written");
    }
    let here = here.again(&rig.env, dir.path()).await;
    let asked = timeout(20 * SECOND, mute.asked.notified()).await;
    asked.expect("it is to be told as well");
    town.enter("there", rig.driver.destination(), &Handle::current());
    let telling = async {
        while here
            .driver
            .migrations()
            .await
            .expect("it can be read")
            .len()
            == 40
        {
            // A file tells nobody that it is gone.
            sleep(Duration::from_millis(20)).await;
        }
    };
    let told = timeout(15 * SECOND, telling).await;
    told.expect("its turn comes before a silent peer has used up its time");
    let open = here.driver.migrations().await.expect("it can be read");
    assert!(open.iter().all(|open| &*open.peer == "mute"), "{open:?}");
}
