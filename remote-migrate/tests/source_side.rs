//! The source's machine alone, one input after another.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use remote_migrate::{
    Call, Cookie, CopyState, Epoch, Fate, MigrationId, Owner, Phase, Prepared, Ran, Reason, Record,
    Reply, RunState, Side, SourceRecord, SourceStage, Status, Stopped,
    source::{EndWhy, Outcome, SourceAction, SourceEnd, SourceInput, SourceMachine},
    verdict::{GuestState, Ruling},
};
use uuid::Uuid;

fn machine() -> SourceMachine {
    SourceMachine::begin(
        SourceRecord {
            migration: MigrationId::from_uuid(Uuid::nil()),
            domain: Uuid::nil(),
            epoch: Epoch::FIRST,
            run: RunState::Running,
            peer: "".into(),
            stage: SourceStage::Begin,
        },
        "",
    )
}

fn prepared() -> Reply {
    Reply::Prepared(Prepared {
        connect: "tcp:b:1".into(),
        cookie: Cookie::empty(),
    })
}

fn begun() -> SourceInput {
    SourceInput::Begun {
        cookie: Cookie::empty(),
        run: RunState::Running,
    }
}

/// The inputs of a migration without trouble, in order.
fn good_run() -> Vec<SourceInput> {
    use SourceInput as In;
    vec![
        In::Recorded,
        begun(),
        In::Recorded,
        In::Answered(prepared()),
        In::Recorded,
        In::Performed(Stopped::ByHost),
        In::Recorded,
        In::Completed,
        In::Answered(Reply::Owned),
        In::Recorded,
        In::Confirmed,
        In::Answered(Reply::Closed),
        In::Forgotten,
    ]
}

fn after(steps: usize) -> SourceMachine {
    let mut machine = machine();
    for input in good_run().into_iter().take(steps) {
        machine.on(input);
    }
    machine
}

fn asks(machine: &SourceMachine) -> Option<Call> {
    match machine.action() {
        SourceAction::Ask(request) => Some(request.call),
        _ => None,
    }
}

#[test]
fn a_guest_that_is_paused_on_its_way_stands_still_wherever_it_ends_up() {
    let offers = |machine: &SourceMachine| match machine.action() {
        SourceAction::Ask(request) => (request.call, request.run),
        other => panic!("{other:?}"),
    };
    // Nothing new, nothing said.
    assert_eq!(offers(&after(8)), (Call::Finish, None));
    for steps in 5..=8 {
        let mut moved = after(steps);
        moved.pause();
        for input in good_run().into_iter().take(8).skip(steps) {
            moved.on(input);
        }
        assert_eq!(offers(&moved), (Call::Finish, Some(RunState::Paused)));
    }
    let mut kept = after(5);
    kept.pause();
    kept.on(SourceInput::PerformFailed);
    kept.on(SourceInput::Local(GuestState::Stopped));
    kept.on(SourceInput::Recorded);
    assert_eq!(
        kept.action(),
        SourceAction::Confirm(Outcome::Kept(RunState::Paused))
    );
}

#[test]
fn a_guest_that_is_paused_is_kept_from_a_destination_that_would_let_it_run() {
    let mut kept = after(8);
    kept.pause();
    for input in [
        SourceInput::Untold,
        SourceInput::Local(GuestState::Stopped),
        SourceInput::Recorded,
    ] {
        kept.on(input);
    }
    assert_eq!(
        kept.action(),
        SourceAction::Confirm(Outcome::Kept(RunState::Paused))
    );
}

#[test]
fn a_paused_guest_that_was_offered_once_is_offered_on_in_the_words_that_are_known_there() {
    let finish = |machine: &SourceMachine| match machine.action() {
        SourceAction::Ask(request) => (request.call, request.run),
        other => panic!("{other:?}"),
    };
    let mut offered = after(8);
    offered.pause();
    for input in [
        SourceInput::Silent { sent: true },
        SourceInput::Retry,
        SourceInput::Local(GuestState::Stopped),
        SourceInput::Answered(Reply::Status(Status {
            side: Side::Destination,
            phase: Phase::Perform,
            owner: Owner::Source,
            copy: Some(CopyState::Complete),
        })),
    ] {
        offered.on(input);
    }
    assert_eq!(finish(&offered), (Call::Finish, Some(RunState::Paused)));
    offered.on(SourceInput::Untold);
    assert_eq!(finish(&offered), (Call::Finish, None));
}

#[test]
fn a_migration_without_trouble_ends_at_the_destination() {
    let end = SourceEnd {
        owner: Owner::Destination,
        why: EndWhy::Protocol,
        settled: true,
    };
    assert_eq!(after(usize::MAX).action(), SourceAction::Done(end));
}

#[test]
fn the_guest_is_offered_only_after_the_journal_says_so() {
    let SourceAction::Record(record) = after(6).action() else {
        panic!("not recording")
    };
    assert_eq!(record.stage, SourceStage::HandingOver);
    assert_eq!(asks(&after(8)), Some(Call::Finish));
}

#[test]
fn cancel_undoes_up_to_the_point_of_return_and_is_too_late_from_there() {
    for steps in 0..good_run().len() {
        let mut machine = after(steps);
        match machine.cancel() {
            Ok(()) => {
                assert!(steps < 7, "cancelled after {steps} steps");
                assert_eq!(machine.action(), SourceAction::Inspect);
                machine.on(SourceInput::Local(GuestState::Stopped));
                assert!(matches!(machine.stage(), SourceStage::Kept { .. }));
            }
            Err(late) => {
                assert!(steps >= 7, "too late after {steps} steps");
                assert!(late.phase >= Phase::Finish);
            }
        }
    }
}

#[test]
fn a_lost_finish_answer_neither_resumes_nor_kills() {
    let mut machine = after(8);
    machine.on(SourceInput::Silent { sent: true });
    assert_eq!(machine.action(), SourceAction::Pause);
    machine.on(SourceInput::Retry);
    machine.on(SourceInput::Local(GuestState::Stopped));
    assert_eq!(asks(&machine), Some(Call::Status(Side::Destination)));
    machine.on(SourceInput::Silent { sent: false });
    machine.on(SourceInput::GiveUp);
    let doubt = SourceEnd {
        owner: Owner::InDoubt,
        why: EndWhy::Protocol,
        settled: false,
    };
    assert_eq!(machine.action(), SourceAction::Done(doubt));
}

#[test]
fn a_finish_that_never_left_keeps_the_guest_unless_an_earlier_one_may_have() {
    let mut first = after(8);
    first.on(SourceInput::Silent { sent: false });
    first.on(SourceInput::Local(GuestState::Stopped));
    assert_eq!(
        first.stage(),
        &SourceStage::Kept {
            tell: true,
            ended: false,
        }
    );

    let mut second = after(8);
    second.on(SourceInput::Answered(Reply::Busy(Reason::new(
        "still loading",
    ))));
    second.on(SourceInput::Retry);
    second.on(SourceInput::Local(GuestState::Stopped));
    second.on(SourceInput::Answered(Reply::Status(Status {
        side: Side::Destination,
        phase: Phase::Perform,
        owner: Owner::Source,
        copy: Some(CopyState::Incoming),
    })));
    assert_eq!(second.action(), SourceAction::Complete);
    second.on(SourceInput::CompleteFailed);
    assert_eq!(asks(&second), Some(Call::Finish));
    second.on(SourceInput::Silent { sent: false });
    assert_eq!(second.stage(), &SourceStage::HandingOver);
}

#[test]
fn a_source_that_died_in_the_middle_offers_the_copy_that_may_be_complete() {
    let mut machine = after(7);
    machine.on(SourceInput::CompleteFailed);
    machine.on(SourceInput::Local(GuestState::Gone));
    assert_eq!(asks(&machine), Some(Call::Status(Side::Destination)));
    machine.on(SourceInput::Answered(Reply::Status(Status {
        copy: Some(CopyState::Complete),
        side: Side::Destination,
        phase: Phase::Perform,
        owner: Owner::Source,
    })));
    assert_eq!(asks(&machine), Some(Call::Finish));
    machine.on(SourceInput::Answered(Reply::Refused(Reason::new(
        "half a guest",
    ))));
    machine.on(SourceInput::Local(GuestState::Gone));
    assert_eq!(
        asks(&machine),
        Some(Call::Status(Side::Destination)),
        "is there a copy?"
    );
    machine.on(SourceInput::Answered(Reply::Status(Status {
        copy: Some(CopyState::Gone(Ran::Never)),
        side: Side::Destination,
        phase: Phase::Confirm,
        owner: Owner::Source,
    })));
    assert_eq!(
        machine.stage(),
        &SourceStage::Lost {
            tell: true,
            nowhere: true,
            ended: false,
        }
    );
}

#[test]
fn a_restart_counts_the_epoch_up_before_it_speaks() {
    let SourceAction::Record(record) = after(6).action() else {
        panic!("not recording")
    };
    let machine = SourceMachine::recover(record);
    let SourceAction::Record(again) = machine.action() else {
        panic!("not recording")
    };
    assert_eq!(again.epoch, Epoch::FIRST.next());
}

#[test]
fn one_that_an_earlier_version_offered_is_not_ended_before_the_other_side_says_that_it_has_all() {
    let SourceAction::Record(record) = after(6).action() else {
        panic!("not recording")
    };
    let text = serde_json::to_string(&record).unwrap();
    assert!(text.contains("\"stage\":\"handing-over\""), "{text}");
    let mut machine = SourceMachine::recover(serde_json::from_str(&text).unwrap());
    let says = |phase, copy| {
        SourceInput::Answered(Reply::Status(Status {
            side: Side::Destination,
            phase,
            owner: Owner::Destination,
            copy: Some(copy),
        }))
    };
    machine.on(SourceInput::Recorded);
    machine.on(SourceInput::Local(GuestState::Stopped));
    machine.on(says(Phase::Finish, CopyState::Switched));
    assert_eq!(asks(&machine), Some(Call::Finish));
    machine.on(SourceInput::Answered(Reply::Owned));
    machine.on(SourceInput::Local(GuestState::Stopped));
    assert_eq!(asks(&machine), Some(Call::Status(Side::Destination)));
    machine.on(says(Phase::Confirm, CopyState::Partial));
    assert_eq!(machine.stage(), &SourceStage::PostCopy);
}

#[test]
fn a_lost_guest_is_started_anew_once_it_is_known_that_nothing_of_it_is_elsewhere() {
    use SourceInput as In;
    let stored = |machine: &SourceMachine| match machine.action() {
        SourceAction::Record(record) => record,
        other => panic!("{other:?}"),
    };
    // Its host went down; nobody could be asked, and an earlier version wrote that it is lost.
    let mut record = stored(&after(6));
    record.stage = SourceStage::Lost {
        tell: true,
        nowhere: false,
        ended: false,
    };
    let text = serde_json::to_string(&record).unwrap();
    let text = text.replace(",\"nowhere\":false,\"ended\":false", "");
    assert!(text.contains("{\"lost\":{\"tell\":true}}"), "{text}");
    let record: SourceRecord = serde_json::from_str(&text).unwrap();
    let mut machine = SourceMachine::recover(record.clone());
    for input in [In::Recorded, In::Local(GuestState::Gone), In::Confirmed] {
        assert!(Record::Source(record.clone()).refuses_start());
        machine.on(input);
    }
    assert_eq!(asks(&machine), Some(Call::Confirm(Fate::Discard)));
    // An operator there may have let it run.
    let mut taken = machine.clone();
    taken.on(In::Answered(Reply::Conflict));
    assert_eq!(taken.stage(), &SourceStage::Released);

    machine.on(In::Silent { sent: true });
    let mut ruled = machine.overruled(Ruling::PeerFenced);
    ruled.on(In::Recorded);
    ruled.on(In::Local(GuestState::Gone));
    assert_eq!(ruled.action(), SourceAction::Confirm(Outcome::Released));
    ruled.on(In::Confirmed);
    let ended = stored(&ruled);
    assert!(ended.stage.only_tells());
    let ended = Record::Source(ended);
    assert!(!ended.refuses_start() && !ended.refuses_migration());
    // The guest is somebody else's from here on, whatever the other side says.
    ruled.on(In::Recorded);
    ruled.on(In::Answered(Reply::Conflict));
    assert!(matches!(
        ruled.action(),
        SourceAction::Done(SourceEnd {
            why: EndWhy::Conflict,
            ..
        })
    ));
}

#[test]
fn an_input_that_answers_another_action_changes_nothing() {
    let mut machine = after(8);
    let before = machine.clone();
    for input in [
        SourceInput::Performed(Stopped::ByHost),
        SourceInput::Retry,
        SourceInput::Forgotten,
        begun(),
    ] {
        machine.on(input);
        assert_eq!(machine, before);
    }
}
