//! Whole migrations over real sockets, and what can be seen of them from outside.

use std::time::Duration;

use remote_migrate::{
    Owner, Side,
    wire::{AllowList, Link, Options, PeerIdentity, UnixDial, WirePeer, serve_connection},
};
use tokio::net::UnixListener;

use crate::{
    ends::{Cut, Road},
    rig::{Fails, Rig, Where},
};

#[tokio::test]
async fn a_guest_moves_over_a_unix_socket_between_processes_of_allowed_users() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("migrate.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let rig = Rig::new();
    let destination = rig.destination();
    let arrivals = Link::new();
    let mut seen = arrivals.watch();
    let served = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let identity = PeerIdentity::of_unix(&stream).unwrap();
        let PeerIdentity::Unix { uid, .. } = identity else {
            panic!("{identity}");
        };
        let options = Options::new(AllowList::nobody().uid(uid));
        let serving = serve_connection(stream, &identity, &destination, &options, &arrivals);
        serving.await.map(|()| uid)
    });
    // Both ends are this process, so the destination's user is found out there.
    let probe = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&path).unwrap());
    let options = Options::new(AllowList::nobody().uid(probe));
    let peer = WirePeer::new(UnixDial::new(&path), options);
    let mut link = peer.link().watch();

    let report = rig.migrate_over(&peer).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(rig.runs(), Where::Destination);
    assert!(rig.forgotten().await && rig.clean());

    // One clock on both sides: what is measured is wrong by no more than it says.
    for side in [&mut link, &mut seen] {
        let state = side.wait_for(|state| state.clock.is_some()).await.unwrap();
        let clock = state.clock.unwrap();
        assert!(u128::from(clock.nanos.unsigned_abs()) <= clock.error.as_nanos());
    }
    drop(peer);
    assert_eq!(served.await.unwrap().unwrap(), probe);
    assert!(!seen.borrow().up && seen.borrow().lost.is_none());
}

#[tokio::test(start_paused = true)]
async fn what_went_wrong_there_is_told_here_over_the_wire() {
    let rig = Rig::new();
    rig.fail(Fails::Perform);
    rig.fail(Fails::Copy);
    let road = Road::new(rig.destination(), Cut::NEVER, false);
    let error = rig.migrate_over(&road.peer()).await.unwrap_err();
    let told = error.chain(Side::Destination).unwrap();
    assert_eq!(told.as_str(), "Copy was told to fail");
    assert_eq!(rig.runs(), Where::Source);
}

#[tokio::test(start_paused = true)]
async fn how_far_a_guest_is_is_told_there_over_the_wire() {
    let rig = Rig::new();
    let road = Road::new(rig.destination(), Cut::NEVER, false);
    let peer = road.peer();
    rig.migrate_over(&peer).await.unwrap();
    assert_eq!(rig.told().await.sent, 1);
}

#[tokio::test(start_paused = true)]
async fn post_copy_is_taken_up_again_over_the_wire() {
    let rig = Rig::new();
    rig.fail(Fails::Drain);
    let road = Road::new(rig.destination(), Cut::NEVER, false);
    let report = rig.migrate_by_post_copy(&road.peer()).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!((rig.starts(), rig.resumes()), (1, 1));
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn a_peer_beats_while_nobody_asks_and_shows_when_it_is_lost() {
    let rig = Rig::new();
    // Enough for the greeting and some beats; then nothing passes, and nobody is told.
    let cut = Cut {
        up: 5_200,
        heard: false,
        ..Cut::NEVER
    };
    let road = Road::new(rig.destination(), cut, false);
    let peer = road.peer();
    let mut link = peer.link().watch();
    rig.migrate_over(&peer).await.unwrap();
    assert!(link.borrow().up);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(link.borrow().up, "beats keep it up");
    let lost = link.wait_for(|state| !state.up).await.unwrap().lost.clone();
    let lost = lost.unwrap();
    assert_eq!(lost.as_str(), "hear peer: it was silent for 15s");
}
