//! Post-copy, with scripted hosts: the guest runs at the destination before all of it is there.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[expect(dead_code, reason = "each suite uses a part of it")]
mod rig;

use remote_migrate::{Control, ErrorKind, Owner, Phase, Side, TooLate, verdict::Ruling};
use rig::{Fails, Link, Rig, Where, poll_times};

#[tokio::test(start_paused = true)]
async fn a_guest_moves_by_post_copy_and_nothing_is_left_behind() {
    let rig = Rig::new();
    let report = rig.migrate_by_post_copy(&rig.link).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(rig.runs(), Where::Destination);
    assert!(rig.forgotten().await && rig.clean());
    assert_eq!((rig.starts(), rig.resumes()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_in_post_copy_is_taken_up_again() {
    let rig = Rig::new();
    rig.fail(Fails::Drain);
    let report = rig.migrate_by_post_copy(&rig.link).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert!(rig.forgotten().await && rig.clean());
    assert_eq!((rig.starts(), rig.resumes()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_link_lost_in_post_copy_names_the_destination_and_ends_nothing() {
    let rig = Rig::new();
    rig.fail(Fails::Drain);
    rig.link.cut_before(Link::RESUME);
    let report = rig.migrate_by_post_copy(&rig.link).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, false));
    assert_eq!(rig.runs(), Where::Destination);
    assert!(!rig.clean(), "both halves are kept");
    let again = rig.migrate_anew().await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Unsettled);

    rig.link.heal();
    assert!(rig.recover().await.unwrap().settled);
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn a_half_that_is_needed_outlives_the_word_that_the_other_side_owns_the_guest() {
    for offered in [true, false] {
        let rig = Rig::new();
        rig.fail(Fails::Drain);
        if offered {
            rig.link.cut_after(Link::FINISH);
            let doubt = rig.migrate_by_post_copy(&rig.link).await.unwrap_err();
            assert_eq!(doubt.owner_now(), Owner::InDoubt);
        } else {
            rig.link.cut_before(Link::RESUME);
            rig.migrate_by_post_copy(&rig.link).await.unwrap();
        }
        assert_eq!(rig.runs(), Where::Destination);
        for _ in 0..2 {
            let report = rig.resolve(Ruling::PeerOwns).await.unwrap();
            assert_eq!((report.owner, report.settled), (Owner::Destination, false));
            assert!(!rig.is_ended_here(), "its memory may be needed");
        }
        rig.link.heal();
        assert!(rig.recover().await.unwrap().settled);
        assert_eq!(rig.runs(), Where::Destination);
        assert!(rig.forgotten().await && rig.clean());
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_is_ended_by_the_word_that_the_other_side_has_all() {
    let rig = Rig::new();
    // All was sent, and the other side cannot be asked whether it has that.
    rig.link.cut_before(Link::STATUS);
    let report = rig.migrate_by_post_copy(&rig.link).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, false));
    assert!(!rig.is_ended_here(), "a QEMU that says so may be mistaken");
    let report = rig.resolve(Ruling::PeerHasAll).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, false));
    assert!(rig.is_ended_here());
    rig.link.heal();
    assert!(rig.recover().await.unwrap().settled);
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn an_operator_who_is_mistaken_in_post_copy_loses_nothing() {
    let rig = Rig::new();
    rig.link.cut_before(Link::FINISH);
    rig.migrate_by_post_copy(&rig.link).await.unwrap_err();
    assert_eq!(rig.runs(), Where::Nowhere);
    let report = rig.resolve(Ruling::PeerOwns).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, false));
    rig.link.heal();
    let report = rig.recover().await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(rig.runs(), Where::Destination);
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn post_copy_that_does_not_begin_leaves_the_guest_where_it_was() {
    let rig = Rig::new();
    rig.fail(Fails::Switch);
    let error = rig.migrate_by_post_copy(&rig.link).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.phase()),
        (ErrorKind::Host, Phase::Perform)
    );
    assert_eq!(error.side(), Side::Source);
    assert_eq!(rig.runs(), Where::Source);
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_is_refused_in_post_copy_gives_the_guest_back() {
    let rig = Rig::new();
    rig.fail(Fails::StartRefused);
    let error = rig.migrate_by_post_copy(&rig.link).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(rig.runs(), Where::Source);
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn a_cancel_or_a_ruling_while_the_rest_of_the_memory_moves_is_not_taken() {
    let rig = Rig::new();
    rig.fail(Fails::PerformHangs);
    rig.fail(Fails::DrainHangs);
    let control = Control::new();
    let canceller = async {
        rig.reached(Fails::PerformHangs).await;
        control.post_copy();
        rig.reached(Fails::DrainHangs).await;
        assert!(!control.rule(Ruling::PeerFenced), "nobody waits for it");
        control.cancel()
    };
    let (outcome, cancelled) = tokio::join!(rig.migrate_under(&control), canceller);
    assert_eq!(
        cancelled,
        Err(TooLate {
            phase: Phase::Finish
        })
    );
    assert_eq!(outcome.unwrap().owner, Owner::Destination);
    assert_eq!(rig.runs(), Where::Destination);
}

#[tokio::test(start_paused = true)]
async fn post_copy_dropped_at_any_moment_is_brought_to_one_owner_from_the_journal() {
    let (mut moved, mut kept) = (0, 0);
    for polls in 0.. {
        let rig = Rig::new();
        rig.fail(Fails::Drain);
        let moving = rig.migrate_by_post_copy(&rig.link);
        if poll_times(moving, polls).await.is_some() {
            break;
        }
        match rig.owner_after(rig.recover().await, polls).await {
            Where::Source => kept += 1,
            _ => moved += 1,
        }
    }
    assert!(kept > 0 && moved > 0, "kept {kept}, moved {moved}");
}

#[tokio::test(start_paused = true)]
async fn a_cancel_before_post_copy_is_taken_up_again_changes_nothing_of_it() {
    for polls in 0.. {
        let rig = Rig::new();
        let moving = rig.migrate_by_post_copy(&rig.link);
        if poll_times(moving, polls).await.is_some() {
            break;
        }
        let control = Control::new();
        control.cancel().unwrap();
        let under_cancel = rig.recover_under(&control).await;
        let other = rig.owner_after(under_cancel, polls).await;

        let rig = Rig::new();
        let _dropped = poll_times(rig.migrate_by_post_copy(&rig.link), polls).await;
        let owner = rig.owner_after(rig.recover().await, polls).await;
        assert_eq!(other, owner, "after {polls} polls");
    }
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_fails_once_at_any_write_of_post_copy_ends_with_one_owner() {
    for side in [Side::Source, Side::Destination] {
        for write in 0..9 {
            for written in [false, true] {
                let rig = Rig::new();
                rig.journal(side).fail(write, written);
                let outcome = rig.migrate_by_post_copy(&rig.link).await;
                let expected = match outcome {
                    Ok(_) => Where::Destination,
                    Err(_) => Where::Source,
                };
                let story = format!("{side} write {write}, written: {written}");
                assert_eq!(rig.runs(), expected, "{story}");
                assert!(rig.forgotten().await && rig.clean(), "{story}");
            }
        }
    }
}
