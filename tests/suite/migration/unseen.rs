//! The connection to a QEMU's monitor is lost while QEMU runs on, at an instant that matters: what cannot be seen is not
//! taken for dead, and the guest runs on one side once it is seen again.

use std::future::IntoFuture;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use driver::{Defaults, Domain, Driver, Error, ErrorKind, Landing, MigrateOptions, Run};
use monitor_qmp::command::Cont;
use monitor_qmp::{Error as QmpError, Qmp, Reply, Request};
use remote_migrate::{Answer, Call, Owner, Peer, PeerError, Report, Request as Question};
use tokio::time::Instant;

use super::post_copy::{breaks, in_post_copy, is_in_post_copy, turned_to_post_copy, unlimited};
use super::{SECOND, at_full_speed, counts_on, is_performing, peer, slow};
use crate::between::{GoBetween, between};
use crate::recovery::{cut, cut_at};
use crate::rig::{Rig, Signal, boot, kill};

/// Waits until the driver has another connection to the guest's QEMU, or has noticed that it has none any more.
async fn is_noticed(domain: &Domain, than: u64) {
    let is_past = |seen: &driver::Observed| seen.generation > than;
    let noticed = domain.wait_for(is_past, Instant::now() + 20 * SECOND);
    noticed.await.expect("its connection is lost");
}

/// One owner, one guest, on the other side: nothing is left here or open.
async fn has_arrived(
    rig: &Rig,
    there: &Driver,
    domain: &Domain,
    moved: Result<Report, Error>,
) -> Domain {
    let report = moved.expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(domain.observed().run, Run::Off, "its QEMU here ended");
    let guest = there.by_uuid(domain.uuid()).expect("it is there");
    assert!(guest.query_status().await.expect("it answers").running);
    counts_on(rig, 2, 20 * SECOND).await;
    for driver in [&rig.driver, there] {
        let open = driver.migrations().await.expect("it can be read");
        assert!(open.is_empty(), "{open:?}");
    }
    guest
}

pub(super) async fn a_copy_that_is_out_of_sight_while_its_memory_comes_is_taken_once_it_is_seen(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let copy = there.driver.by_uuid(domain.uuid()).expect("it comes");
    let before = copy.observed();
    cut(&there, &copy);
    is_noticed(&copy, before.generation).await;
    assert_eq!(copy.observed().pid, before.pid, "it was not ended");
    at_full_speed(&domain).await;
    let moved = moving.await.expect("no panic");
    has_arrived(&rig, &there.driver, &domain, moved).await;
}

/// What goes wrong as a guest is let run.
#[derive(Clone, Copy)]
enum Fault {
    CutBefore,
    CutAfter,
    /// QEMU stands until nobody waits for its answer any more, and does it then.
    Late,
}

/// Has that go wrong once.
struct Fragile {
    fault: Fault,
    victim: Victim,
}

/// Where its monitor listens, and whose guest it is; until it has gone wrong.
type Victim = Arc<Mutex<Option<(PathBuf, Driver)>>>;

#[async_trait]
impl GoBetween for Fragile {
    async fn call(&self, monitor: &dyn Qmp, request: Request) -> Result<Reply, QmpError> {
        let is_the_one = request.name == "cont";
        let victim = is_the_one.then(|| self.victim.lock().expect("no panic").take());
        let Some((place, driver)) = victim.flatten() else {
            return monitor.call(request).await;
        };
        let deadline = request.deadline;
        match self.fault {
            Fault::CutBefore => {}
            Fault::CutAfter => drop(monitor.call(request).await.expect("it runs")),
            Fault::Late => {
                let copy = driver.by_name("web").expect("it is known");
                let qemu = copy.observed().pid.expect("it has a process");
                kill(qemu, Signal::STOP);
                let late = monitor.call(request).await;
                kill(qemu, Signal::CONT);
                return Err(late.expect_err("it stands"));
            }
        }
        cut_at(&place);
        monitor.closed().await;
        let lost = monitor.call(Request::new(&Cont, deadline)?).await;
        Err(lost.expect_err("it is closed"))
    }
}

pub(super) async fn a_destination_that_loses_sight_of_a_guest_before_it_lets_it_run_does_so_once_it_is_seen(
    rig: Rig,
) {
    arrives_past_a_cut(rig, Fault::CutBefore).await;
}

pub(super) async fn a_destination_that_loses_sight_of_a_guest_as_it_lets_it_run_owns_it_once_it_is_seen(
    rig: Rig,
) {
    arrives_past_a_cut(rig, Fault::CutAfter).await;
}

async fn arrives_past_a_cut(rig: Rig, fault: Fault) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let (there, left) = fragile(&rig, &domain, fault);
    let moved = domain.migrate(peer(&there), MigrateOptions::default());
    let moved = moved.await;
    assert!(left.lock().expect("no panic").is_none(), "it was cut");
    let guest = has_arrived(&rig, &there.driver, &domain, moved).await;
    guest.reset().await.expect("nobody holds it any more");
}

/// A driver with which that goes wrong once, for that guest.
fn fragile(rig: &Rig, domain: &Domain, fault: Fault) -> (Rig, Victim) {
    let run_dir = rig.dir.path().join("there");
    let socket = run_dir.join(format!("{}/monitor.sock", domain.uuid()));
    let victim = Victim::default();
    let fragile = Arc::new(Fragile {
        fault,
        victim: victim.clone(),
    });
    let transports = rig.env.transports().expect("they load");
    let there = Driver::builder(transports, run_dir)
        .state_dir(rig.dir.path().join("there-state"))
        .qemu(&rig.env.qemu)
        .defaults(Defaults {
            command: 3 * SECOND,
            ..Defaults::default()
        })
        .landing(Landing::unix())
        .wrap_monitor(between(fragile))
        .build();
    let there = rig.with_driver(there.expect("its directories are free"));
    let whose = (socket, there.driver.clone());
    *victim.lock().expect("no panic") = Some(whose);
    (there, victim)
}

pub(super) async fn a_post_copy_whose_guest_is_let_run_late_goes_on_over_another_stream(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let (there, _) = fragile(&rig, &domain, Fault::Late);
    let moving = turned_to_post_copy(&domain, peer(&there)).await;
    is_in_post_copy(&domain).await;
    breaks(&domain).await;
    unlimited(&domain).await;
    let moved = moving.await.expect("no panic");
    has_arrived(&rig, &there.driver, &domain, moved).await;
}

pub(super) async fn a_source_that_loses_sight_of_a_guest_while_memory_moves_keeps_it(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    cut(&rig, &domain);
    let error = moving.await.expect("no panic").expect_err("it stays");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    assert!(
        format!("{error:#}").contains("its owner is source"),
        "{error:#}"
    );
    assert!(domain.query_status().await.expect("it answers").running);
    counts_on(&rig, 2, 20 * SECOND).await;
    assert!(there.driver.by_uuid(domain.uuid()).is_none(), "it was told");
    let open = rig.driver.migrations().await.expect("it can be read");
    assert!(open.is_empty(), "{open:?}");
    let again = domain.migrate(peer(&there), MigrateOptions::default());
    has_arrived(&rig, &there.driver, &domain, again.await).await;
}

/// The way to a daemon whose answer to the offer of the guest is lost, with the connection to the source's own QEMU.
struct Blinding {
    there: Arc<dyn Peer>,
    /// The guest, until it was offered.
    place: Mutex<Option<(PathBuf, Domain)>>,
}

#[async_trait]
impl Peer for Blinding {
    async fn ask(&self, request: Question, deadline: Instant) -> Result<Answer, PeerError> {
        let is_the_one = request.call == Call::Finish;
        let answer = self.there.ask(request, deadline).await;
        let place = is_the_one.then(|| self.place.lock().expect("no panic").take());
        let Some((place, domain)) = place.flatten() else {
            return answer;
        };
        let before = domain.observed().generation;
        cut_at(&place);
        is_noticed(&domain, before).await;
        Err(PeerError::no_answer("its answer is lost"))
    }
}

pub(super) async fn a_source_that_loses_sight_of_a_guest_as_it_offers_it_ends_what_it_has_given_away(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let socket = format!("run/{}/monitor.sock", domain.uuid());
    let place = (rig.dir.path().join(socket), domain.clone());
    let blinding = Arc::new(Blinding {
        there: peer(&there),
        place: Mutex::new(Some(place)),
    });
    let moved = domain.migrate(blinding, MigrateOptions::default()).await;
    has_arrived(&rig, &there.driver, &domain, moved).await;
}

pub(super) async fn a_post_copy_that_both_sides_lose_sight_of_comes_to_its_end(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, moving) = in_post_copy(&rig, &there).await;
    let copy = there.driver.by_uuid(domain.uuid()).expect("it is there");
    for (rig, side) in [(&there, &copy), (&rig, &domain)] {
        let before = side.observed().generation;
        cut(rig, side);
        is_noticed(side, before).await;
    }
    // It runs there while most of its memory is here.
    counts_on(&rig, 1, 20 * SECOND).await;
    is_in_post_copy(&domain).await;
    unlimited(&domain).await;
    let moved = moving.await.expect("no panic");
    has_arrived(&rig, &there.driver, &domain, moved).await;
}
