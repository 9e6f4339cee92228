//! The rules as a caller meets them: what passes, who waits, who goes first, what the guest's death does.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::future::{pending, ready};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::executor::block_on;
use futures::task::noop_waker;
use job_core::{
    AgentKind, AsyncKind, BeginError, CancelError, Flow, GoneWhy, Guard, Guarded, Job, JobKind,
    Kind, KindSet, Limits, Outcome, Overdue, Scheduler, Stop,
};

type Begin = Pin<Box<dyn Future<Output = Result<Job, BeginError>>>>;

/// A queued request for a normal job.
fn queued(domain: &Scheduler, owner: &'static str, kind: JobKind) -> Begin {
    let mut begin: Begin = Box::pin(domain.caller(owner).begin(kind, pending()));
    assert!(poll(&mut begin).is_pending(), "{owner} should have to wait");
    begin
}

fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    future.poll_unpin(&mut Context::from_waker(&noop_waker()))
}

fn granted(begin: &mut Begin) -> Job {
    match poll(begin) {
        Poll::Ready(Ok(job)) => job,
        other => panic!("expected a grant, found {other:?}"),
    }
}

#[test]
fn every_kind_passes_beside_an_async_job_exactly_if_its_mask_says_so() {
    for asynchronous in AsyncKind::ALL {
        let domain = Scheduler::new("d");
        let _running = domain.caller("long").try_begin_async(asynchronous).unwrap();
        for kind in JobKind::ALL {
            let passes = domain.caller("short").try_begin(kind).is_ok();
            assert_eq!(
                passes,
                asynchronous.default_mask().contains(kind),
                "{kind:?} beside {asynchronous:?}"
            );
        }
    }
}

#[test]
fn agent_jobs_wait_only_for_agent_jobs() {
    let domain = Scheduler::new("d");
    let _long = domain
        .caller("migrate")
        .try_begin_async(AsyncKind::MigrationIn)
        .unwrap();
    let _short = domain
        .caller("destroy")
        .try_begin(JobKind::Destroy)
        .unwrap();
    let _ping = domain
        .caller("ping")
        .try_begin_agent(AgentKind::Query)
        .unwrap();
    let busy = domain
        .caller("exec")
        .try_begin_agent(AgentKind::Modify)
        .unwrap_err();
    assert!(
        matches!(
            busy,
            BeginError::Busy {
                wanted: Kind::Agent(AgentKind::Modify),
                ..
            }
        ),
        "{busy:?}"
    );
}

#[test]
fn the_oldest_goes_first_and_a_masked_waiter_is_in_nobodys_way() {
    let domain = Scheduler::new("d");
    let save = domain
        .caller("save")
        .try_begin_async(AsyncKind::Save)
        .unwrap();
    let mut masked = queued(&domain, "modify", JobKind::Modify);
    let first = domain.caller("query 1").try_begin(JobKind::Query).unwrap();
    let mut second = queued(&domain, "query 2", JobKind::Query);
    let mut third = queued(&domain, "query 3", JobKind::Query);
    drop(first);
    assert!(poll(&mut third).is_pending());
    drop(granted(&mut second));
    drop(granted(&mut third));
    assert!(poll(&mut masked).is_pending());
    drop(save);
    drop(granted(&mut masked));
}

#[test]
fn destroy_then_abort_go_first() {
    let domain = Scheduler::new("d");
    let holder = domain.caller("query").try_begin(JobKind::Query).unwrap();
    let mut modify = queued(&domain, "modify", JobKind::Modify);
    let mut abort = queued(&domain, "abort", JobKind::Abort);
    let mut destroy = queued(&domain, "destroy", JobKind::Destroy);
    drop(holder);
    assert!(poll(&mut abort).is_pending());
    drop(granted(&mut destroy));
    assert!(poll(&mut modify).is_pending());
    drop(granted(&mut abort));
    drop(granted(&mut modify));
}

#[test]
fn widening_a_mask_grants_at_once_and_narrowing_touches_no_granted_job() {
    let domain = Scheduler::new("d");
    let start = domain
        .caller("start")
        .try_begin_async(AsyncKind::Start)
        .unwrap();
    let mut query = queued(&domain, "query", JobKind::Query);
    start.set_mask(KindSet::DEFAULT);
    let query = granted(&mut query);
    start.set_mask(KindSet::DESTROY_ONLY);
    assert!(query.check().is_ok());
    drop(query);
    assert!(domain.caller("query").try_begin(JobKind::Query).is_err());
}

#[test]
fn a_timeout_names_the_holder_and_leaves_the_queue() {
    let domain = Scheduler::new("d");
    let mut migrate = domain
        .caller("migrate")
        .try_begin_async(AsyncKind::MigrationOut)
        .unwrap();
    migrate.set_phase("perform");
    let step = block_on(migrate.nested(pending())).unwrap();
    step.tell_command(Some("query-migrate".into()));
    let error = block_on(domain.caller("resize").begin(JobKind::Modify, ready(()))).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("cannot begin modify job: waited "),
        "{text}"
    );
    assert!(
        text.contains(", held by migration-out (perform, "),
        "{text}"
    );
    assert!(
        text.ends_with("in \"query-migrate\") for \"migrate\""),
        "{text}"
    );
    assert!(domain.snapshot().waiting.is_empty());
}

#[test]
fn a_nested_step_takes_its_turn_among_the_normal_jobs() {
    let domain = Scheduler::new("d");
    let mut save = domain
        .caller("save")
        .try_begin_async(AsyncKind::Save)
        .unwrap();
    let query = domain.caller("query").try_begin(JobKind::Query).unwrap();
    let mut step = pin!(save.nested(pending()));
    assert!(poll(&mut step).is_pending());
    let mut late = queued(&domain, "late", JobKind::Query);
    drop(query);
    let Poll::Ready(Ok(step)) = poll(&mut step) else {
        panic!("the step was first")
    };
    assert!(poll(&mut late).is_pending());
    drop(step);
    drop(granted(&mut late));
}

#[test]
fn one_flow_waiting_for_itself_is_told_at_once() {
    let domain = Scheduler::new("d");
    let flow = Flow::new();
    let job = domain
        .caller("op")
        .in_flow(flow)
        .try_begin(JobKind::Modify)
        .unwrap();
    let second = block_on(
        domain
            .caller("op")
            .in_flow(flow)
            .begin(JobKind::Query, pending()),
    )
    .unwrap_err();
    assert!(
        matches!(
            second,
            BeginError::WouldDeadlock {
                held: Kind::Normal(JobKind::Modify),
                ..
            }
        ),
        "{second:?}"
    );
    let both = block_on(
        domain
            .caller("op")
            .in_flow(flow)
            .begin_agent(AgentKind::Query, pending()),
    )
    .unwrap_err();
    assert!(matches!(both, BeginError::WouldDeadlock { .. }), "{both:?}");
    drop(job);
}

#[test]
fn one_flow_that_queued_for_both_slots_never_holds_both() {
    let domain = Scheduler::new("d");
    let flow = Flow::new();
    let normal = domain.caller("other").try_begin(JobKind::Query).unwrap();
    let agent = domain
        .caller("other")
        .try_begin_agent(AgentKind::Query)
        .unwrap();
    let mut job: Begin = Box::pin(
        domain
            .caller("op")
            .in_flow(flow)
            .begin(JobKind::Query, pending()),
    );
    let mut ping = Box::pin(
        domain
            .caller("op")
            .in_flow(flow)
            .begin_agent(AgentKind::Query, pending()),
    );
    assert!(poll(&mut job).is_pending());
    assert!(poll(&mut ping).is_pending());
    drop(normal);
    drop(agent);
    let _held = granted(&mut job);
    let Poll::Ready(Err(error)) = poll(&mut ping) else {
        panic!("the second must not be granted")
    };
    assert!(
        matches!(error, BeginError::WouldDeadlock { .. }),
        "{error:?}"
    );
}

#[test]
fn an_async_job_may_take_an_agent_job_for_a_moment() {
    let domain = Scheduler::new("d");
    let mut snapshot = domain
        .caller("snapshot")
        .try_begin_async(AsyncKind::Snapshot)
        .unwrap();
    let freeze = block_on(snapshot.agent(AgentKind::Modify, pending())).unwrap();
    drop(freeze);
    drop(block_on(snapshot.nested(pending())).unwrap());
}

#[test]
fn limits_spare_destroy_abort_nested_and_thaw() {
    let limits = Limits {
        normal: 1,
        asynchronous: 0,
        agent: 0,
    };
    let domain = Scheduler::with("d", limits, &Overdue::new());
    let mut save = domain
        .caller("save")
        .try_begin_async(AsyncKind::Save)
        .unwrap();
    let _query = domain.caller("query").try_begin(JobKind::Query).unwrap();
    let _agent = domain
        .caller("ping")
        .try_begin_agent(AgentKind::Query)
        .unwrap();
    let _waits = queued(&domain, "one", JobKind::Query);
    let full = block_on(domain.caller("two").begin(JobKind::Query, pending())).unwrap_err();
    assert!(
        matches!(full, BeginError::QueueFull { waiting: 1, .. }),
        "{full:?}"
    );
    let full = block_on(
        domain
            .caller("ping")
            .begin_agent(AgentKind::Query, pending()),
    )
    .unwrap_err();
    assert!(
        matches!(full, BeginError::QueueFull { waiting: 0, .. }),
        "{full:?}"
    );
    let _destroy = queued(&domain, "destroy", JobKind::Destroy);
    let _abort = queued(&domain, "abort", JobKind::Abort);
    let mut thaw = Box::pin(
        domain
            .caller("thaw")
            .begin_agent(AgentKind::Thaw, pending()),
    );
    assert!(poll(&mut thaw).is_pending());
    let mut step = pin!(save.nested(pending()));
    assert!(poll(&mut step).is_pending());
}

#[test]
fn the_guests_death_fails_waiters_fires_tokens_and_disarms_guards() {
    let domain = Scheduler::new("d");
    let state = Guarded::new(&domain, 1);
    let holder = domain.caller("modify").try_begin(JobKind::Modify).unwrap();
    let token = holder.token();
    let mut waiter = queued(&domain, "query", JobKind::Query);
    let why = GoneWhy::Died("killed by signal 9".into());
    let mut cleanup: Begin = Box::pin(
        domain
            .end_generation(why.clone(), "reaper")
            .begin(pending()),
    );
    assert!(poll(&mut cleanup).is_pending(), "the old guard still lives");

    let Poll::Ready(Err(error)) = poll(&mut waiter) else {
        panic!("waiters fail at once")
    };
    assert_eq!(
        error,
        BeginError::Gone {
            generation: 1,
            why: why.clone()
        }
    );
    assert_eq!(token.stopped(), Some(Stop::Gone { generation: 1, why }));
    assert!(holder.check().is_err());
    assert!(state.change(&holder, |value| *value = 2).is_err());
    assert_eq!(*state.get(), 1);

    let mut late = queued(&domain, "late", JobKind::Destroy);
    drop(holder);
    let cleanup = granted(&mut cleanup);
    assert_eq!(cleanup.generation(), 2);
    assert!(
        poll(&mut late).is_pending(),
        "clean-up is the first job of the new generation"
    );
    state.change(&cleanup, |value| *value = 3).unwrap();
}

#[test]
fn nothing_of_the_new_generation_runs_beside_what_is_left_of_the_old() {
    let domain = Scheduler::new("d");
    let mut save = domain
        .caller("save")
        .try_begin_async(AsyncKind::Save)
        .unwrap();
    let mut cleanup: Begin = Box::pin(
        domain
            .end_generation(GoneWhy::ShutDown, "reaper")
            .begin(pending()),
    );
    assert!(poll(&mut cleanup).is_pending());
    assert!(matches!(
        block_on(save.nested(pending())),
        Err(BeginError::Gone { .. })
    ));
    drop(save);
    drop(granted(&mut cleanup));
}

#[test]
fn a_closed_domain_fails_all_who_wait_and_all_who_come() {
    let domain = Scheduler::new("d");
    let holder = domain.caller("query").try_begin(JobKind::Query).unwrap();
    let mut waiter = queued(&domain, "modify", JobKind::Modify);
    domain.close();
    assert!(matches!(
        poll(&mut waiter),
        Poll::Ready(Err(BeginError::Closed))
    ));
    drop(holder);
    assert_eq!(
        domain
            .caller("late")
            .try_begin(JobKind::Destroy)
            .unwrap_err(),
        BeginError::Closed
    );
}

#[test]
fn cancelling_reaches_the_holder_until_its_point_of_return() {
    let domain = Scheduler::new("d");
    assert_eq!(
        domain.cancel_async("operator"),
        Err(CancelError::NotRunning)
    );
    let save = domain
        .caller("save")
        .try_begin_async(AsyncKind::Save)
        .unwrap();
    save.set_phase("writing");
    assert_eq!(domain.cancel_async("operator"), Ok(save.id()));
    assert_eq!(
        block_on(save.token().stop()),
        Stop::Cancelled("operator".into())
    );
    save.set_phase("finishing");
    save.pass_point_of_return();
    assert_eq!(
        domain.cancel(save.id(), "operator"),
        Err(CancelError::TooLate {
            phase: Some("finishing".into())
        })
    );
}

#[test]
fn the_history_keeps_every_kind_of_end() {
    let domain = Scheduler::new("d");
    domain
        .caller("a")
        .try_begin(JobKind::Query)
        .unwrap()
        .finish();
    domain
        .caller("b")
        .try_begin(JobKind::Modify)
        .unwrap()
        .end(Outcome::Failed("no space".into()));
    drop(
        domain
            .caller("c")
            .try_begin_agent(AgentKind::Query)
            .unwrap(),
    );
    let panicking = domain.clone();
    let panicked = std::thread::spawn(move || {
        let _job = panicking.caller("e").try_begin(JobKind::Query).unwrap();
        panic!("on purpose");
    });
    assert!(panicked.join().is_err());
    let ends: Vec<_> = domain
        .history()
        .into_iter()
        .map(|job| (job.owner.to_string(), job.outcome))
        .collect();
    let expected = [
        ("a", Outcome::Done),
        ("b", Outcome::Failed("no space".into())),
        ("c", Outcome::Dropped),
        ("e", Outcome::Panicked),
    ];
    assert_eq!(
        ends,
        expected.map(|(owner, outcome)| (owner.to_owned(), outcome))
    );
}

#[test]
fn the_history_is_a_ring() {
    let domain = Scheduler::new("d");
    for _ in 0..100 {
        domain
            .caller("query")
            .try_begin(JobKind::Query)
            .unwrap()
            .finish();
    }
    let ids: Vec<_> = domain.history().iter().map(|job| job.id).collect();
    assert_eq!(ids, (69..=100).collect::<Vec<_>>());
}

#[test]
fn a_restored_async_job_has_its_id_phase_and_mask() {
    let before = Scheduler::new("d");
    before
        .caller("earlier")
        .try_begin(JobKind::Query)
        .unwrap()
        .finish();
    let backup = before
        .caller("nightly")
        .try_begin_async(AsyncKind::Backup)
        .unwrap();
    backup.set_phase("copying");
    let record = backup.record().unwrap();

    let after = Scheduler::new("d");
    let restored = after.restore(record.clone()).unwrap();
    assert_eq!(restored.record(), Some(record));
    assert!(
        after
            .caller("next")
            .try_begin(JobKind::Modify)
            .unwrap()
            .id()
            > restored.id()
    );
}

#[test]
fn a_panic_in_a_change_leaves_the_last_whole_value() {
    let domain = Scheduler::new("d");
    let state = Guarded::new(&domain, vec![1, 2]);
    let job = domain.caller("op").try_begin(JobKind::Modify).unwrap();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        state.change(&job, |value| {
            value.clear();
            panic!("half way");
        })
    }));
    assert!(caught.is_err());
    assert_eq!(*state.get(), [1, 2]);
}

#[test]
fn a_guard_of_another_domain_changes_nothing() {
    let (one, other) = (Scheduler::new("d"), Scheduler::new("d"));
    let state = Guarded::new(&one, 1);
    let job = other.caller("op").try_begin(JobKind::Modify).unwrap();
    assert!(state.change(&job, |value| *value = 2).is_err());
    assert_eq!(*state.get(), 1);
}

#[test]
fn the_snapshot_says_who_waits_for_whom_and_at_which_place() {
    let domain = Scheduler::new("d");
    let save = domain
        .caller("nightly")
        .try_begin_async(AsyncKind::Save)
        .unwrap();
    assert!(save.report(30, 100).is_some());
    let _query = domain.caller("status").try_begin(JobKind::Query).unwrap();
    let _modify = queued(&domain, "resize", JobKind::Modify);
    let _second = queued(&domain, "list", JobKind::Query);
    let snapshot = domain.snapshot();
    assert_eq!(
        snapshot.asynchronous.unwrap().progress.unwrap().percent(),
        30.0
    );
    let waits: Vec<_> = snapshot
        .waiting
        .iter()
        .map(|waiter| {
            (
                &*waiter.owner,
                waiter.place,
                waiter.blocked_by.as_ref().unwrap().owner.to_string(),
            )
        })
        .collect();
    assert_eq!(
        waits,
        [
            ("resize", 1, "nightly".to_owned()),
            ("list", 2, "status".to_owned())
        ]
    );
}
