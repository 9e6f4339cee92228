//! Every public future of the wire is dropped after each of its polls: nothing hangs, nothing is served
//! twice, and what was begun is found again.

use std::time::Duration;

use remote_migrate::{
    Peer as _, Reply,
    wire::{Link, serve_connection},
};
use tokio::time::{Instant, timeout};

use crate::{
    ends::{Cut, Road, US, options, peer_over},
    rig::{self, Rig, Where, poll_times},
    strangers::Authority,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[tokio::test(start_paused = true)]
async fn a_question_dropped_at_any_moment_leaves_a_peer_that_can_be_asked() {
    let mut drops = 0;
    for polls in 0.. {
        let rig = Rig::new();
        let road = Road::new(rig.destination(), Cut::NEVER, false);
        let peer = road.peer();
        let prepare = rig.request(rig::Link::prepare());
        let first = poll_times(peer.ask(prepare.clone(), soon()), polls).await;
        let again = peer.ask(prepare, soon()).await.unwrap();
        assert!(
            matches!(again.reply, Reply::Prepared(_)),
            "after {polls} polls"
        );
        assert_eq!(rig.prepares(), 1, "after {polls} polls");
        if first.is_some() {
            break;
        }
        drops += 1;
    }
    assert!(drops > 2, "only {drops} drops");
}

#[tokio::test(start_paused = true)]
async fn a_served_connection_dropped_at_any_moment_tells_its_asker() {
    let mut answered = 0;
    let mut unanswered = 0;
    for polls in 0..40 {
        let rig = Rig::new();
        let (near, far) = tokio::io::duplex(64 * 1024);
        let peer = peer_over(near);
        let (destination, options, link) = (rig.destination(), options(), Link::new());
        let serving = serve_connection(far, &US, &destination, &options, &link);
        let asking = async {
            let answer = peer.ask(rig.request(rig::Link::prepare()), soon()).await;
            drop(peer);
            answer
        };
        let (answer, _) = tokio::join!(asking, poll_times(serving, polls));
        match answer {
            Ok(_) => answered += 1,
            Err(_) => unanswered += 1,
        }
        assert!(!link.watch().borrow().up, "after {polls} polls");
        // What was begun goes on without its connection, and is not begun again.
        let road = Road::new(rig.destination(), Cut::NEVER, false);
        let peer = road.peer();
        let again = peer.ask(rig.request(rig::Link::prepare()), soon()).await;
        assert!(matches!(again.unwrap().reply, Reply::Prepared(_)));
        assert_eq!(rig.prepares(), 1, "after {polls} polls");
    }
    assert!(answered > 0 && unanswered > 0, "{answered} {unanswered}");
}

#[tokio::test(start_paused = true)]
async fn a_migration_over_a_wire_dropped_at_any_moment_is_brought_to_one_owner() {
    let (mut moved, mut kept) = (0, 0);
    for polls in 0.. {
        let rig = Rig::new();
        let road = Road::new(rig.destination(), Cut::NEVER, false);
        let peer = road.peer();
        if poll_times(rig.migrate_over(&peer), polls).await.is_some() {
            break;
        }
        match rig.owner_after(rig.recover_over(&peer).await, polls).await {
            Where::Source => kept += 1,
            _ => moved += 1,
        }
    }
    assert!(kept > 0 && moved > 0, "kept {kept}, moved {moved}");
}

#[tokio::test(start_paused = true)]
async fn a_handshake_dropped_at_any_moment_on_either_side_ends_the_other() {
    let authority = Authority::new();
    let (here, there) = (authority.tls("a.example"), authority.tls("b.example"));
    let mut done = [false; 2];
    for dropped in [0, 1] {
        for polls in 0..12 {
            let (near, far) = tokio::io::duplex(16 * 1024);
            let limit = |side| if side == dropped { polls } else { usize::MAX };
            let dialled = poll_times(here.connect(near, "b.example", soon()), limit(0));
            let accepted = poll_times(there.accept(far, soon()), limit(1));
            let both = async { tokio::join!(dialled, accepted) };
            let (dialled, accepted) = timeout(Duration::from_secs(90), both).await.unwrap();
            let fine = matches!(dialled, Some(Ok(_))) && matches!(accepted, Some(Ok(_)));
            done[dropped] |= fine;
        }
    }
    assert_eq!(done, [true; 2], "the drops missed the end");
}
