//! A daemon dies while memory passes under TLS, and another comes in its place: what has been let in goes on under TLS, what
//! is given up leaves no key behind, and the next move is under TLS again.

use std::future::IntoFuture;
use std::sync::Arc;

use driver::{Became, Domain, MigrateOptions, Run};
use remote_migrate::Owner;
use tokio::time::{Instant, sleep};

use super::restart::{Daemon, Deaf, Town, begins_to_move};
use super::settling::Way;
use super::tls::{has_key_on_disk, has_tls};
use super::{SECOND, counts_on, is_performing, peer, slow};
use crate::authority::Authority;
use crate::rig::{Rig, boot};

/// QEMU has no key any more, and neither has the disk. The guest may run a little before the last is taken off.
async fn keeps_no_key(dir: &std::path::Path, domain: &Domain) {
    let deadline = Instant::now() + 20 * SECOND;
    while has_tls(domain).await || has_key_on_disk(dir, domain) {
        assert!(Instant::now() < deadline, "it keeps no key");
        sleep(SECOND / 20).await;
    }
}

pub(super) async fn a_source_that_dies_while_memory_passes_under_tls_keeps_the_guest_and_no_key(
    rig: Rig,
) {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("it can be made");
    let there = Rig::at(&rig.env, authority.landing("b.example"));
    let landing = authority.landing("a.example");
    let here = Daemon::at(&rig.env, dir.path(), Town::default(), landing).await;
    let domain = begins_to_move(&here, &rig, Deaf::new(&there), slow()).await;
    assert!(is_performing(&domain).await);
    assert!(has_tls(&domain).await);
    drop(domain);
    let here = here.again(&rig.env, dir.path()).await;
    let (web, became) = here.takes_up("web").await;
    assert_eq!(became, Became::InDoubt);
    let settled = web.recover_migration(peer(&there)).await;
    let report = settled.expect("it is told");
    assert_eq!((report.owner, report.settled), (Owner::Source, true));
    assert!(there.driver.by_uuid(web.uuid()).is_none());
    keeps_no_key(dir.path(), &web).await;
    counts_on(&rig, 0, 20 * SECOND).await;

    let moved = web.migrate(peer(&there), MigrateOptions::default());
    let report = moved.await.expect("the next one moves it");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    let moved = there.driver.by_uuid(web.uuid()).expect("it is there");
    keeps_no_key(there.dir.path(), &moved).await;
    counts_on(&rig, 0, 20 * SECOND).await;
}

pub(super) async fn a_destination_that_dies_while_memory_passes_under_tls_takes_the_guest_and_keeps_no_key(
    rig: Rig,
) {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("it can be made");
    let town = Town::default();
    let here = Rig::at(&rig.env, authority.landing("a.example"));
    let landing = authority.landing("b.example");
    let there = Daemon::at(&rig.env, dir.path(), town.clone(), landing).await;
    let enter = |there: &Daemon| {
        let runtime = there.runtime().handle();
        town.enter("there", there.driver.destination(), runtime);
    };
    enter(&there);
    let (domain, _) = boot(&here, "web").await.expect("it boots");
    let way = Arc::new(Way { town: town.clone() });
    let moving = tokio::spawn(domain.migrate(way, slow()).into_future());
    assert!(is_performing(&domain).await);
    town.leave("there");
    let there = there.again(&rig.env, dir.path()).await;
    enter(&there);
    // QEMU has its key and its stream, which no daemon is in the way of.
    let report = moving.await.expect("no panic").expect("it arrives");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(domain.observed().run, Run::Off);
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&here, 0, 20 * SECOND).await;
    let back = moved.migrate(peer(&here), MigrateOptions::default());
    back.await.expect("the next one moves it back");
    keeps_no_key(here.dir.path(), &domain).await;
    counts_on(&here, 0, 20 * SECOND).await;
}
