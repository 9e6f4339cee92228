//! Two drivers that reach each other over the network alone: both what they ask and the guest's memory pass under TLS.

use std::future::IntoFuture;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use driver::{Domain, Door, Notice, Subscription, What};
use job_core::Snapshot;
use monitor_qmp::Timestamp;
use remote_migrate::wire::{AllowList, Options, Tls, TlsDial, WirePeer};
use remote_migrate::{Downtime, Owner, Side};
use tokio::net::TcpListener;

use super::{SECOND, at_full_speed, counts_on, is_performing, slow};
use crate::authority::Authority;
use crate::rig::{Rig, boot, jobs_until};

/// A driver behind a door of its own.
struct Host {
    rig: Rig,
    name: &'static str,
    tls: Tls,
    at: std::net::SocketAddr,
}

impl Host {
    /// Lets in who is called `other`, and nobody else.
    async fn new(rig: &Rig, authority: &Authority, name: &'static str, other: &str) -> Self {
        let rig = Rig::at(&rig.env, authority.landing(name));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("a port");
        let at = listener.local_addr().expect("it has one");
        let tls = authority.tls(name);
        let options = Options::new(AllowList::nobody().name(other));
        let door = Door::tls(listener, tls.clone());
        rig.driver.serve_migrations(door, options);
        Self { rig, name, tls, at }
    }

    fn dials(&self, other: &Self) -> Arc<WirePeer> {
        let dial = TlsDial::new(other.at, other.name, self.tls.clone());
        let options = Options::new(AllowList::nobody().name(other.name));
        Arc::new(WirePeer::new(dial, options))
    }
}

/// What a driver tells of a guest that moves, until it has.
struct Told {
    /// The last of each, by QEMU's own clock, in nanoseconds.
    stopped: Option<i64>,
    resumed: Option<i64>,
    side: Side,
    downtime: Option<Downtime>,
}

async fn told(events: &mut Subscription) -> Told {
    let (mut stopped, mut resumed) = (None, None);
    loop {
        let Notice::News { news, .. } = events.next().await else {
            panic!("the test fell behind");
        };
        match &news.what {
            What::Qemu(event) if event.name == "STOP" => stopped = Some(nanos(event.timestamp)),
            What::Qemu(event) if event.name == "RESUME" => resumed = Some(nanos(event.timestamp)),
            &What::Moved { side, downtime } => {
                return Told {
                    stopped,
                    resumed,
                    side,
                    downtime,
                };
            }
            _ => {}
        }
    }
}

fn nanos(at: Timestamp) -> i64 {
    at.seconds * 1_000_000_000 + at.microseconds * 1_000
}

/// Moves it slowly until it was seen on both sides how far it is, and says how long it stood still.
async fn moves(domain: &Domain, from: &Host, to: &Host) -> Domain {
    let mut events = [from, to].map(|host| host.rig.driver.subscribe());
    let peer = from.dials(to);
    let moving = tokio::spawn(domain.migrate(peer, slow()).into_future());
    assert!(is_performing(domain).await);
    let copy = to.rig.driver.by_uuid(domain.uuid()).expect("it comes");
    for side in [domain, &copy] {
        assert!(is_performing(side).await, "its job says how far it is");
        let mut progress = side.migration_progress().expect("it is under way");
        let moves = progress.wait_for(|now| now.transfer.sent > 0).await;
        let transfer = moves.expect("it goes on").transfer;
        assert!(transfer.remaining < transfer.total && transfer.pass > 0);
    }
    at_full_speed(domain).await;
    let report = moving.await.expect("no panic").expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));

    let [here, there] = &mut events;
    let (here, there) = (told(here).await, told(there).await);
    assert_eq!((here.side, there.side), (Side::Source, Side::Destination));
    let downtime = report.downtime.expect("the clocks were compared");
    assert_eq!(here.downtime, Some(downtime));
    assert_eq!(there.downtime, Some(downtime));
    let (stopped, resumed) = (here.stopped, there.resumed);
    let truth = resumed.expect("it goes on there") - stopped.expect("it stops here");
    let truth = u64::try_from(truth).map(Duration::from_nanos);
    let truth = truth.expect("it is on one host, so on one clock");
    assert!(downtime.error > Duration::ZERO && downtime.error < SECOND);
    let (took, error) = (downtime.took, downtime.error);
    assert!(
        took.abs_diff(truth) <= error,
        "{took:?} give or take {error:?} is not {truth:?}"
    );
    copy
}

pub(super) async fn a_guest_moves_there_and_back_between_daemons_that_speak_under_tls_and_how_long_it_stood_still_is_told(
    rig: Rig,
) {
    let authority = Authority::new();
    let here = Host::new(&rig, &authority, "a.example", "b.example").await;
    let there = Host::new(&rig, &authority, "b.example", "a.example").await;
    let (domain, _) = boot(&here.rig, "web").await.expect("it boots");
    let moved = moves(&domain, &here, &there).await;
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&here.rig, 1, 20 * SECOND).await;
    moves(&moved, &there, &here).await;
    assert!(domain.query_status().await.expect("it answers").running);
    counts_on(&here.rig, 1, 20 * SECOND).await;
    for side in [&domain, &moved] {
        let is_over = |jobs: &Snapshot| jobs.asynchronous.is_none();
        assert!(jobs_until(side, 20 * SECOND, is_over).await);
        assert!(side.migration_progress().is_none(), "it is over");
    }
}
