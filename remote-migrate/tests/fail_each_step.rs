//! Both sides in one process, with scripted hosts: every step of a migration is broken once, and each
//! time exactly one side has the guest, or the doubt is named and later resolved.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[expect(dead_code, reason = "each suite uses a part of it")]
mod rig;

use std::{sync::Arc, time::Duration};

use remote_migrate::{
    Blame, Call, Control, ErrorKind, Limits, Owner, Peer, Phase, Side, Standing, TooLate,
    verdict::Ruling,
};
use rig::{Fails, Link, Rig, Where, poll_times};
use tokio::time::Instant;

#[tokio::test(start_paused = true)]
async fn a_guest_moves_and_nothing_is_left_behind() {
    let rig = Rig::new();
    let report = rig.migrate().await.unwrap();
    assert_eq!(report.owner, Owner::Destination);
    assert!(report.settled);
    assert_eq!(rig.runs(), Where::Destination);
    assert!(rig.forgotten().await);
}

/// Where a host can fail, and what must come of it.
const HOST_FAILURES: [(Fails, Phase, Side, Where); 7] = [
    (Fails::Begin, Phase::Begin, Side::Source, Where::Source),
    (
        Fails::Prepare,
        Phase::Prepare,
        Side::Destination,
        Where::Source,
    ),
    (Fails::Perform, Phase::Perform, Side::Source, Where::Source),
    (Fails::Complete, Phase::Finish, Side::Source, Where::Source),
    (Fails::Load, Phase::Finish, Side::Destination, Where::Source),
    (
        Fails::StartRefused,
        Phase::Finish,
        Side::Destination,
        Where::Source,
    ),
    (Fails::Cpu, Phase::Finish, Side::Destination, Where::Source),
];

#[tokio::test(start_paused = true)]
async fn a_host_that_fails_once_leaves_the_guest_where_it_was_and_is_named() {
    for (fails, phase, side, place) in HOST_FAILURES {
        let rig = Rig::new();
        rig.fail(fails);
        let error = rig.migrate().await.unwrap_err();
        assert_eq!(
            (error.phase(), error.side()),
            (phase, side),
            "{fails:?}: {error}"
        );
        assert_eq!(error.blame(), Blame::Host(side), "{fails:?}");
        assert_eq!(error.owner_now(), Owner::Source, "{fails:?}");
        assert!(
            std::error::Error::source(&error).is_some(),
            "{fails:?} has no cause"
        );
        assert_eq!(rig.runs(), place, "{fails:?}");
        assert!(rig.forgotten().await, "{fails:?} left a record");
        assert!(rig.clean(), "{fails:?} left a copy");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_tells_what_went_wrong_on_both_sides() {
    let rig = Rig::new();
    rig.fail(Fails::Perform);
    rig.fail(Fails::Copy);
    let error = rig.migrate().await.unwrap_err();
    let chain = |side| error.chain(side).unwrap().as_str();
    assert_eq!(chain(Side::Source), "Perform was told to fail");
    assert_eq!(chain(Side::Destination), "Copy was told to fail");
    let text = error.to_string();
    assert!(
        text.ends_with("; the destination says: Copy was told to fail"),
        "{text}"
    );
    let cause = std::error::Error::source(&error).unwrap();
    assert_eq!(cause.to_string(), "Perform was told to fail");
}

#[tokio::test(start_paused = true)]
async fn an_error_with_one_cause_tells_it_once() {
    let rig = Rig::new();
    rig.link.cut_before(Link::PREPARE);
    let error = rig.migrate().await.unwrap_err();
    assert!(error.chain(Side::Source).is_some());
    assert!(!error.to_string().contains("says"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_hangs_is_given_up_at_its_deadline() {
    for (fails, phase) in [
        (Fails::BeginHangs, Phase::Begin),
        (Fails::PrepareHangs, Phase::Prepare),
        (Fails::PerformHangs, Phase::Perform),
    ] {
        let rig = Rig::new();
        rig.fail(fails);
        let error = rig.migrate().await.unwrap_err();
        assert_eq!(error.phase(), phase, "{error}");
        assert_eq!(rig.runs(), Where::Source, "{fails:?}");
        assert!(rig.forgotten().await, "{fails:?} left a record");
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_or_a_confirm_that_fails_once_is_done_again() {
    for fails in [
        Fails::StartLost,
        Fails::StartHangs,
        Fails::Confirm,
        Fails::Inspect,
    ] {
        let rig = Rig::new();
        rig.fail(fails);
        let report = rig.migrate().await.unwrap();
        assert_eq!(report.owner, Owner::Destination, "{fails:?}");
        assert_eq!(rig.runs(), Where::Destination, "{fails:?}");
        assert!(rig.forgotten().await, "{fails:?} left a record");
    }
}

#[tokio::test(start_paused = true)]
async fn every_message_that_is_lost_once_in_either_direction_ends_with_one_owner() {
    for call in [Link::PREPARE, Link::FINISH, Link::CONFIRM] {
        for arrives in [false, true] {
            let rig = Rig::new();
            rig.link.lose_once(call, arrives);
            let outcome = rig.migrate().await;
            let place = if call == Link::PREPARE {
                Where::Source
            } else {
                Where::Destination
            };
            assert_eq!(rig.runs(), place, "{call} lost, arrives: {arrives}");
            assert_eq!(outcome.is_ok(), place == Where::Destination);
            assert!(
                rig.forgotten().await && rig.clean(),
                "{call} lost, arrives: {arrives}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_finish_answer_that_never_comes_is_in_doubt_until_the_link_heals() {
    let rig = Rig::new();
    rig.link.cut_after(Link::FINISH);
    let error = rig.migrate().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InDoubt);
    assert_eq!(error.owner_now(), Owner::InDoubt);
    assert!(!error.is_settled());
    assert_eq!(rig.runs(), Where::Destination, "the source does not resume");

    let again = rig.migrate_anew().await.unwrap_err();
    assert_eq!(
        again.kind(),
        ErrorKind::Unsettled,
        "nor is it moved elsewhere"
    );

    rig.link.heal();
    let report = rig.recover().await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn a_finish_that_never_arrives_is_in_doubt_until_an_operator_rules() {
    let rig = Rig::new();
    rig.link.cut_before(Link::FINISH);
    assert_eq!(rig.migrate().await.unwrap_err().kind(), ErrorKind::InDoubt);
    assert_eq!(rig.runs(), Where::Nowhere);

    let report = rig.resolve(Ruling::PeerFenced).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Source, false));
    assert_eq!(rig.runs(), Where::Source);

    // The fenced host returns, with its journal: it is told.
    rig.link.heal();
    assert!(rig.recover().await.unwrap().settled);
    assert_eq!(rig.runs(), Where::Source);
    assert!(rig.forgotten().await && rig.clean());
}

#[tokio::test(start_paused = true)]
async fn an_operator_need_not_wait_until_a_migration_in_doubt_has_lost_its_patience() {
    for (ruling, owner) in [
        (Ruling::PeerFenced, Owner::Source),
        (Ruling::PeerOwns, Owner::Destination),
    ] {
        let rig = Rig::new();
        if owner == Owner::Source {
            rig.link.cut_before(Link::FINISH);
        } else {
            rig.link.cut_after(Link::FINISH);
        }
        let control = Control::new();
        assert!(!control.rule(ruling), "it has not begun");
        let began = Instant::now();
        let operator = async {
            // The doubt begins with the first question that is not answered.
            let mut progress = control.progress();
            let finishing = progress.wait_for(|now| now.phase == Phase::Finish);
            finishing.await.unwrap();
            while !control.rule(ruling) {
                tokio::task::yield_now().await;
            }
            control.ended().await
        };
        let (outcome, ended) = tokio::join!(rig.migrate_under(&control), operator);
        assert!(began.elapsed() < Limits::default().patience);
        let report = ended.expect("the owner is known");
        assert_eq!((report.owner, report.settled), (owner, false));
        match outcome {
            Ok(moved) => assert_eq!(moved, report),
            Err(error) => {
                let told = (error.kind(), error.owner_now(), error.is_settled());
                assert_eq!(told, (ErrorKind::Ruled, Owner::Source, false));
            }
        }
        let place = match owner {
            Owner::Source => Where::Source,
            _ => Where::Destination,
        };
        assert_eq!(rig.runs(), place);
        // The other side is back, and told.
        rig.link.heal();
        assert!(rig.recover().await.unwrap().settled);
        assert_eq!(rig.runs(), place);
        assert!(rig.forgotten().await && rig.clean());
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_in_doubt_whose_hosts_are_both_lost_is_named_lost_by_an_operator() {
    let rig = Rig::new();
    rig.link.cut_before(Link::FINISH);
    assert_eq!(rig.migrate().await.unwrap_err().kind(), ErrorKind::InDoubt);
    rig.loses_power_here();
    let error = rig.resolve(Ruling::PeerFenced).await.unwrap_err();
    let told = (error.kind(), error.owner_now(), error.is_settled());
    assert_eq!(told, (ErrorKind::Lost, Owner::Nobody, false));
    // Nothing waits for the other host: the guest may be started anew, and moved.
    let again = rig.migrate_anew().await;
    assert_ne!(again.unwrap_err().kind(), ErrorKind::Unsettled);
    // It is back all the same, and told.
    rig.link.heal();
    assert!(rig.recover().await.unwrap_err().is_settled());
}

#[tokio::test(start_paused = true)]
async fn a_complete_copy_that_was_refused_is_not_let_run_by_the_word_that_its_source_is_gone() {
    let rig = Rig::new();
    rig.fail(Fails::StartRefused);
    rig.link.cut_after(Link::FINISH);
    assert_eq!(rig.migrate().await.unwrap_err().kind(), ErrorKind::InDoubt);
    let error = rig.resolve_there(Ruling::PeerFenced).await.unwrap_err();
    let told = (error.kind(), error.owner_now(), error.is_settled());
    assert_eq!(told, (ErrorKind::NotRuled, Owner::Source, false));
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("start it anew from its disks"), "{cause}");
    assert_eq!((rig.runs(), rig.starts()), (Where::Nowhere, 0));
    // What it says is possible is.
    assert!(rig.resolve_there(Ruling::PeerOwns).await.unwrap().settled);
}

#[tokio::test(start_paused = true)]
async fn cancel_undoes_every_phase_before_the_point_of_return() {
    for (phase, hangs) in [
        (Phase::Begin, Fails::BeginHangs),
        (Phase::Prepare, Fails::PrepareHangs),
        (Phase::Perform, Fails::PerformHangs),
    ] {
        let rig = Rig::new();
        rig.fail(hangs);
        let control = Control::new();
        let mut progress = control.progress();
        let canceller = async {
            progress
                .wait_for(|progress| progress.phase == phase)
                .await
                .unwrap();
            rig.reached(hangs).await;
            control.cancel()
        };
        let (outcome, cancelled) = tokio::join!(rig.migrate_under(&control), canceller);
        assert_eq!(cancelled, Ok(()));
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::Cancelled, phase));
        assert_eq!(error.blame(), Blame::Caller);
        assert_eq!(rig.runs(), Where::Source, "{phase}");
        assert!(rig.forgotten().await && rig.clean(), "{phase}");
    }
}

#[tokio::test(start_paused = true)]
async fn cancel_past_the_point_of_return_is_too_late_and_changes_nothing() {
    let rig = Rig::new();
    rig.fail(Fails::StartHangs);
    let control = Control::new();
    let canceller = async {
        rig.reached(Fails::StartHangs).await;
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
async fn a_journal_that_fails_once_at_any_write_ends_with_one_owner() {
    for side in [Side::Source, Side::Destination] {
        for write in 0..8 {
            for written in [false, true] {
                let rig = Rig::new();
                rig.journal(side).fail(write, written);
                let outcome = rig.migrate().await;
                let place = rig.runs();
                let expected = if outcome.is_ok() {
                    Where::Destination
                } else {
                    Where::Source
                };
                assert_eq!(place, expected, "{side} write {write}, written: {written}");
                assert!(
                    rig.forgotten().await && rig.clean(),
                    "{side} write {write} {written}"
                );
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_migration_dropped_at_any_moment_is_brought_to_one_owner_from_the_journal() {
    let mut moved = 0;
    let mut kept = 0;
    for polls in 0.. {
        let rig = Rig::new();
        if poll_times(rig.migrate(), polls).await.is_some() {
            break;
        }
        match rig.owner_after(rig.recover().await, polls).await {
            Where::Source => kept += 1,
            _ => moved += 1,
        }
    }
    assert!(
        kept > 0 && moved > 0,
        "kept {kept}, moved {moved}: the drops missed one half"
    );
}

#[tokio::test(start_paused = true)]
async fn a_destination_daemon_that_restarts_gives_the_stored_answer() {
    let rig = Rig::new();
    rig.link.cut_after(Link::FINISH);
    rig.migrate().await.unwrap_err();
    rig.restart_destination();
    rig.link.heal();
    assert_eq!(rig.recover().await.unwrap().owner, Owner::Destination);
    assert_eq!(rig.starts(), 1, "it is not started again");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_while_the_same_is_served_gets_the_same_answer() {
    let rig = Rig::new();
    let ask = || async {
        let deadline = Instant::now() + Duration::from_secs(9);
        rig.link
            .ask(rig.request(Link::prepare()), deadline)
            .await
            .unwrap()
            .reply
    };
    let (first, second) = tokio::join!(ask(), ask());
    assert_eq!(first, second);
    assert_eq!(rig.prepares(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_destination_refuses_a_guest_that_another_migration_brings_in() {
    let rig = Rig::new();
    let deadline = Instant::now() + Duration::from_secs(9);
    rig.link
        .ask(rig.request(Link::prepare()), deadline)
        .await
        .unwrap();
    let error = rig.migrate_anew().await.unwrap_err();
    assert_eq!(
        (error.kind(), error.phase()),
        (ErrorKind::Refused, Phase::Prepare)
    );
    assert_eq!(rig.runs(), Where::Source);
}

#[tokio::test(start_paused = true)]
async fn a_cancel_at_the_destination_refuses_the_guest_and_the_source_keeps_it() {
    let rig = Rig::new();
    rig.fail(Fails::PerformHangs);
    let destination = rig.destination();
    let deadline = Instant::now() + Duration::from_secs(9);
    let canceller = async {
        rig.reached(Fails::PerformHangs).await;
        destination.cancel(rig.id(), deadline).await
    };
    let (outcome, standing) = tokio::join!(rig.migrate(), canceller);
    let Standing { owner, settled, .. } = standing.unwrap();
    assert_eq!((owner, settled), (Some(Owner::Source), true));
    assert_eq!(outcome.unwrap_err().owner_now(), Owner::Source);
    assert_eq!(rig.runs(), Where::Source);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_names_another_epoch_decides_nothing() {
    let rig = Rig::new();
    rig.link.lie_about_epoch();
    let error = rig.migrate().await.unwrap_err();
    assert_eq!(
        (error.kind(), error.phase()),
        (ErrorKind::Silent, Phase::Prepare)
    );
    assert_eq!(rig.runs(), Where::Source);
}

#[tokio::test(start_paused = true)]
async fn futures_and_handles_travel_between_threads() {
    fn sent<T: Send>(value: T) -> T {
        value
    }
    let rig = Arc::new(Rig::new());
    let mover = Arc::clone(&rig);
    let report = tokio::spawn(sent(async move { mover.migrate().await }))
        .await
        .unwrap();
    assert!(report.is_ok());
    let _: &(dyn Send + Sync) = &rig.destination();
    let _: (Call, Limits) = (Call::Finish, Limits::default());
}

/// What became of a first migration is told to a destination that was not there, while a second one has the guest in doubt.
/// Wherever the first was dropped, it never lets the guest run that the second has given away: either the second does not
/// begin, or the first has nothing left to do here.
#[tokio::test(start_paused = true)]
async fn a_migration_that_is_still_to_be_told_never_lets_a_guest_run_that_the_next_one_gave_away() {
    let (mut refused, mut in_doubt) = (0, 0);
    for polls in 0.. {
        let rig = Rig::new();
        rig.link.cut_before(Link::PREPARE);
        let is_over = poll_times(rig.migrate(), polls).await.is_some();
        rig.link.cut_after(Link::FINISH);
        let second = rig.migrate_anew().await.unwrap_err();
        match second.kind() {
            ErrorKind::Unsettled => refused += 1,
            ErrorKind::InDoubt => {
                assert_eq!(rig.runs(), Where::Destination, "after {polls} polls");
                in_doubt += 1;
            }
            kind => panic!("{kind:?} after {polls} polls"),
        }
        rig.link.heal();
        match rig.recover().await {
            Ok(report) => assert_eq!(report.owner, Owner::Source, "after {polls} polls"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "after {polls} polls"),
        }
        let runs = if second.kind() == ErrorKind::Unsettled {
            Where::Source
        } else {
            Where::Destination
        };
        assert_eq!(rig.runs(), runs, "after {polls} polls");
        if is_over {
            assert_eq!(second.kind(), ErrorKind::InDoubt, "it is over here");
            break;
        }
    }
    assert!(refused > 0 && in_doubt > 1, "{refused} and {in_doubt}");
}
