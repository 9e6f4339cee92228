//! The destination's machine alone, one input after another.
use remote_migrate::{
    Call, Cookie, CopyState, DestinationStage as Stage, Epoch, Fate, Guest, MigrationId, Phase,
    Prepared, Ran, Reason, Reply, Request, RunState, Side,
    destination::{DestinationAction, DestinationEnd, DestinationInput as In, DestinationMachine},
    verdict::Ruling,
};
use uuid::Uuid;

fn blank() -> DestinationMachine {
    DestinationMachine::new(MigrationId::from_uuid(Uuid::nil()), None)
}

fn ask_in(epoch: Epoch, call: Call) -> In {
    let migration = MigrationId::from_uuid(Uuid::nil());
    In::Request(Request {
        migration,
        epoch,
        domain: Uuid::nil(),
        call,
        run: None,
        downtime: None,
    })
}

fn ask(call: Call) -> In {
    ask_in(Epoch::FIRST, call)
}

fn prepare() -> Call {
    Call::Prepare(Guest {
        cookie: Cookie::empty(),
        run: RunState::Running,
        home: "".into(),
    })
}

fn place() -> Prepared {
    Prepared {
        connect: "tcp:b:1".into(),
        cookie: Cookie::empty(),
    }
}

fn fed(inputs: impl IntoIterator<Item = In>) -> DestinationMachine {
    let mut machine = blank();
    for input in inputs {
        machine.on(input);
    }
    machine
}

/// Prepared, answered, and idle again.
fn ready() -> Vec<In> {
    vec![
        ask(prepare()),
        In::Recorded,
        In::Prepared(place()),
        In::Recorded,
        In::Replied,
    ]
}

fn ready_and(more: impl IntoIterator<Item = In>) -> DestinationMachine {
    fed(ready().into_iter().chain(more))
}

fn reply(machine: &DestinationMachine) -> Option<Reply> {
    match machine.action() {
        DestinationAction::Reply(reply) => Some(reply),
        _ => None,
    }
}

fn recording(machine: &DestinationMachine) -> Option<Stage> {
    match machine.action() {
        DestinationAction::Record(record) => Some(record.stage),
        _ => None,
    }
}

#[test]
fn the_guest_is_started_only_after_the_journal_names_this_side() {
    let mut machine = ready_and([ask(Call::Finish), In::Loaded]);
    assert_eq!(recording(&machine), Some(Stage::Starting));
    machine.on(In::Recorded);
    assert_eq!(
        machine.action(),
        DestinationAction::Start(RunState::Running)
    );
    machine.on(In::Started);
    machine.on(In::Recorded);
    assert_eq!(reply(&machine), Some(Reply::Owned));
}

#[test]
fn what_the_guest_is_to_do_is_as_the_offer_says_until_it_is_taken() {
    let finish = |run, epoch| {
        let In::Request(request) = ask_in(epoch, Call::Finish) else {
            unreachable!("it is one");
        };
        In::Request(Request {
            run: Some(run),
            ..request
        })
    };
    let mut machine = ready_and([finish(RunState::Paused, Epoch::FIRST), In::Loaded]);
    let DestinationAction::Record(record) = machine.action() else {
        panic!("nothing is written");
    };
    assert_eq!(
        (record.stage, record.run),
        (Stage::Starting, RunState::Paused)
    );
    machine.on(In::Recorded);
    assert_eq!(machine.action(), DestinationAction::Start(RunState::Paused));
    // It is under way by then, and one that comes late is heard no more.
    machine.on(In::StartFailed {
        ran: Ran::Maybe,
        why: Reason::new("no answer"),
    });
    machine.on(In::Local(CopyState::Complete));
    machine.on(finish(RunState::Running, Epoch::FIRST));
    assert_eq!(machine.record().expect("it is there").run, RunState::Paused);
}

#[test]
fn every_request_that_comes_twice_gets_the_stored_answer() {
    let mut machine = ready_and([ask(prepare())]);
    assert_eq!(reply(&machine), Some(Reply::Prepared(place())));
    machine.on(In::Replied);
    for input in [
        ask(Call::Finish),
        In::Loaded,
        In::Recorded,
        In::Started,
        In::Recorded,
    ] {
        machine.on(input);
    }
    for _ in 0..2 {
        assert_eq!(reply(&machine), Some(Reply::Owned));
        machine.on(In::Replied);
        machine.on(ask(Call::Finish));
    }
    machine.on(In::Replied);
    for input in [
        ask(Call::Confirm(Fate::Keep)),
        In::Local(CopyState::Started),
        In::Forgotten,
    ] {
        machine.on(input);
    }
    assert_eq!(reply(&machine), Some(Reply::Closed));
    machine.on(In::Replied);
    machine.on(ask(prepare()));
    assert!(
        matches!(reply(&machine), Some(Reply::Refused(_))),
        "a late prepare makes nothing"
    );
}

#[test]
fn without_a_journal_the_guest_is_neither_taken_nor_refused() {
    let machine = ready_and([ask(Call::Finish), In::Loaded, In::RecordFailed]);
    assert!(matches!(reply(&machine), Some(Reply::Busy(_))));
    let why = Reason::new("half a guest");
    let machine = ready_and([ask(Call::Finish), In::LoadFailed(why), In::RecordFailed]);
    assert!(matches!(reply(&machine), Some(Reply::Busy(_))));
}

#[test]
fn a_guest_that_never_ran_is_given_back_but_its_copy_stays_until_the_source_confirms() {
    let why = Reason::new("no such cpu");
    let failed = In::StartFailed {
        ran: Ran::Never,
        why: why.clone(),
    };
    let mut machine = ready_and([ask(Call::Finish), In::Loaded, In::Recorded, failed]);
    assert_eq!(
        recording(&machine),
        Some(Stage::Refused {
            why: why.clone(),
            complete: true
        })
    );
    machine.on(In::Recorded);
    assert_eq!(reply(&machine), Some(Reply::Refused(why)));
    machine.on(In::Replied);
    machine.on(ask(Call::Confirm(Fate::Discard)));
    machine.on(In::Local(CopyState::Complete));
    assert_eq!(machine.action(), DestinationAction::Discard);
}

/// Its QEMU may be stopped, or stuck, for as long as it lives.
#[test]
fn a_copy_that_cannot_be_seen_is_discarded_once_the_source_has_the_guest_if_it_was_never_taken() {
    let mut untaken = ready_and([ask(Call::Confirm(Fate::Discard)), In::InspectFailed]);
    assert_eq!(untaken.action(), DestinationAction::Discard);
    untaken.on(In::Discarded);
    untaken.on(In::Forgotten);
    assert_eq!(reply(&untaken), Some(Reply::Closed));

    for call in [
        Call::Status(Side::Destination),
        Call::Confirm(Fate::Keep),
        Call::Resume,
    ] {
        let undecided = ready_and([ask(call), In::InspectFailed]);
        assert!(matches!(reply(&undecided), Some(Reply::Busy(_))));
    }
    let unknown = In::StartFailed {
        ran: Ran::Maybe,
        why: Reason::new("no answer to cont"),
    };
    let mut taken = ready_and([ask(Call::Finish), In::Loaded, In::Recorded, unknown]);
    taken.on(In::Replied);
    taken.on(ask(Call::Confirm(Fate::Discard)));
    taken.on(In::InspectFailed);
    assert!(matches!(reply(&taken), Some(Reply::Busy(_))));
}

#[test]
fn a_guest_that_may_have_run_is_never_given_back() {
    let failed = In::StartFailed {
        ran: Ran::Maybe,
        why: Reason::new("no answer to cont"),
    };
    let mut machine = ready_and([ask(Call::Finish), In::Loaded, In::Recorded, failed]);
    assert!(matches!(reply(&machine), Some(Reply::Busy(_))));
    machine.on(In::Replied);
    machine.on(ask(Call::Finish));
    machine.on(In::Local(CopyState::Gone(Ran::Maybe)));
    machine.on(In::Recorded);
    assert_eq!(reply(&machine), Some(Reply::Lost));
}

#[test]
fn a_second_attempt_to_start_gives_nothing_back_since_the_first_may_still_be_under_way() {
    let fails = |ran| In::StartFailed {
        ran,
        why: Reason::new(""),
    };
    let mut machine = ready_and([
        ask(Call::Finish),
        In::Loaded,
        In::Recorded,
        fails(Ran::Maybe),
    ]);
    machine.on(In::Replied);
    machine.on(ask(Call::Finish));
    machine.on(In::Local(CopyState::Complete));
    machine.on(fails(Ran::Never));
    assert!(matches!(reply(&machine), Some(Reply::Busy(_))));
}

#[test]
fn an_earlier_life_of_the_source_decides_nothing() {
    let later = Epoch::FIRST.next();
    let mut machine = ready_and([ask_in(later, Call::Status(Side::Destination))]);
    assert_eq!(
        recording(&machine),
        Some(Stage::Prepared),
        "the epoch is stored first"
    );
    machine.on(In::Recorded);
    machine.on(In::Local(CopyState::Complete));
    machine.on(In::Replied);
    machine.on(ask(Call::Finish));
    assert_eq!(reply(&machine), Some(Reply::Stale { seen: later }));
}

#[test]
fn cancel_refuses_half_a_copy_and_is_too_late_for_a_whole_one() {
    let mut half = ready_and([In::Cancel, In::Local(CopyState::Incoming), In::Recorded]);
    let settled = DestinationEnd::Settled;
    assert_eq!(half.action(), DestinationAction::Done(settled));
    half.on(In::Replied);
    half.on(ask(Call::Finish));
    assert!(matches!(reply(&half), Some(Reply::Refused(_))));

    let whole = ready_and([In::Cancel, In::Local(CopyState::Complete)]);
    let late = DestinationEnd::TooLate(Phase::Perform);
    assert_eq!(whole.action(), DestinationAction::Done(late));
}

#[test]
fn a_finish_for_a_migration_nobody_knows_is_not_refused_but_unknown() {
    assert_eq!(reply(&fed([ask(Call::Finish)])), Some(Reply::Unknown));
}

#[test]
fn a_ruling_that_does_nothing_says_so() {
    let refused = || {
        let failed = In::StartFailed {
            ran: Ran::Never,
            why: Reason::new("no such cpu"),
        };
        ready_and([
            ask(Call::Finish),
            In::Loaded,
            In::Recorded,
            failed,
            In::Recorded,
            In::Replied,
        ])
    };
    let fenced = || In::Rule(Ruling::PeerFenced);
    let waits = |machine: &DestinationMachine| match machine.action() {
        DestinationAction::Done(DestinationEnd::Waiting(why)) => why.as_str().to_owned(),
        other => panic!("{other:?}"),
    };
    let mut machine = refused();
    machine.on(fenced());
    machine.on(In::Local(CopyState::Complete));
    let why = waits(&machine);
    assert!(why.contains("older than its disks"), "{why}");
    // As it says.
    machine.on(In::Replied);
    machine.on(In::Rule(Ruling::PeerOwns));
    machine.on(In::Local(CopyState::Complete));
    assert_eq!(machine.action(), DestinationAction::Discard);

    let half = ready_and([fenced(), In::Loading]);
    assert!(waits(&half).contains("still loading"));
    let why = Reason::new("half a guest");
    let none = ready_and([fenced(), In::LoadFailed(why), In::Recorded, In::Discarded]);
    assert!(waits(&none).contains("half a guest"));

    let owned = [ask(Call::Finish), In::Loaded, In::Recorded, In::Started];
    let owned = owned.into_iter().chain([In::Recorded, In::Replied]);
    let again = owned.chain([fenced(), In::Local(CopyState::Started)]);
    assert!(waits(&ready_and(again)).contains("only to be told"));
}
