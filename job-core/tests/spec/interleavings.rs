//! The models: two or three threads that meet at one domain, and what must be true however they meet.

use std::future::pending;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::task::noop_waker;
use job_core::{
    AgentKind, AsyncKind, BeginError, GoneWhy, Guard, Job, JobKind, Limits, Overdue, Scheduler,
    Stop,
};
use loom::future::{AtomicWaker, block_on};
use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;

/// Runs a model to its end and says how many interleavings that took.
fn explore(name: &str, model: impl Fn() + Send + Sync + 'static) {
    let runs = std::sync::Arc::new(AtomicU64::new(0));
    let count = runs.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.max_branches = 20_000;
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let runs = runs.load(Ordering::Relaxed);
    let name = name.replace(' ', "-");
    println!("\nfigure interleavings:{name} {runs} runs bar > 1 ok");
}

/// A deadline that comes when a thread says so.
#[derive(Clone, Default)]
struct Alarm(Arc<(AtomicBool, AtomicWaker)>);

impl Alarm {
    fn ring(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        self.0.1.wake();
    }
}

impl Future for Alarm {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.1.register_by_ref(cx.waker());
        if self.0.0.load(Ordering::SeqCst) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

fn begin(domain: &Scheduler, owner: &'static str, kind: JobKind) -> Result<Job, BeginError> {
    block_on(domain.caller(owner).begin(kind, pending()))
}

/// Nobody holds or waits any more.
fn assert_free(domain: &Scheduler) {
    let snapshot = domain.snapshot();
    assert!(snapshot.waiting.is_empty(), "{snapshot:?}");
    let job = domain.caller("last").try_begin_async(AsyncKind::Save);
    drop(job.unwrap());
    let ping = domain.caller("last").try_begin_agent(AgentKind::Query);
    drop(ping.unwrap());
}

#[test]
fn a_grant_that_meets_a_drop_goes_to_the_next() {
    explore("grant against drop", || {
        let domain = Scheduler::new("d");
        let holder = domain.caller("holder").try_begin(JobKind::Query).unwrap();
        let fickle = domain.clone();
        let fickle = thread::spawn(move || {
            let mut begin = fickle
                .caller("fickle")
                .begin(JobKind::Modify, pending())
                .boxed();
            let _ = begin.poll_unpin(&mut Context::from_waker(&noop_waker()));
        });
        let release = thread::spawn(move || drop(holder));
        begin(&domain, "next", JobKind::Modify).unwrap().finish();
        fickle.join().unwrap();
        release.join().unwrap();
        assert_free(&domain);
    });
}

#[test]
fn a_deadline_that_meets_a_release_leaves_nothing_behind() {
    explore("drop against deadline", || {
        let domain = Scheduler::new("d");
        let alarm = Alarm::default();
        let holder = domain.caller("holder").try_begin(JobKind::Query).unwrap();
        let release = thread::spawn(move || drop(holder));
        let clock = thread::spawn({
            let alarm = alarm.clone();
            move || alarm.ring()
        });
        match block_on(domain.caller("late").begin(JobKind::Modify, alarm)) {
            Ok(job) => job.finish(),
            Err(error) => assert!(matches!(error, BeginError::TimedOut { .. }), "{error:?}"),
        }
        release.join().unwrap();
        clock.join().unwrap();
        assert_free(&domain);
    });
}

#[test]
fn a_deadline_that_meets_its_own_grant_passes_it_on() {
    explore("deadline against grant while one more waits", || {
        let domain = Scheduler::new("d");
        let alarm = Alarm::default();
        let holder = domain.caller("holder").try_begin(JobKind::Query).unwrap();
        let late = thread::spawn({
            let (domain, alarm) = (domain.clone(), alarm.clone());
            move || {
                drop(block_on(
                    domain.caller("late").begin(JobKind::Modify, alarm),
                ))
            }
        });
        let clock = thread::spawn(move || {
            drop(holder);
            alarm.ring();
        });
        begin(&domain, "next", JobKind::Modify).unwrap().finish();
        late.join().unwrap();
        clock.join().unwrap();
        assert_free(&domain);
    });
}

#[test]
fn a_grant_that_meets_a_close_is_kept_or_refused() {
    explore("close against grant", || {
        let domain = Scheduler::new("d");
        let holder = domain.caller("holder").try_begin(JobKind::Query).unwrap();
        let release = thread::spawn(move || drop(holder));
        let remove = thread::spawn({
            let domain = domain.clone();
            move || domain.close()
        });
        match begin(&domain, "waiter", JobKind::Modify) {
            Ok(job) => job.finish(),
            Err(error) => assert_eq!(error, BeginError::Closed),
        }
        release.join().unwrap();
        remove.join().unwrap();
        let late = domain.caller("late").try_begin(JobKind::Destroy);
        assert_eq!(late.unwrap_err(), BeginError::Closed);
    });
}

#[test]
fn whichever_of_two_holders_ends_last_grants() {
    explore("two releases", || {
        let domain = Scheduler::new("d");
        let save = domain
            .caller("save")
            .try_begin_async(AsyncKind::Save)
            .unwrap();
        let query = domain.caller("query").try_begin(JobKind::Query).unwrap();
        let one = thread::spawn(move || save.finish());
        let other = thread::spawn(move || query.finish());
        // The mask of a save holds it back, and so does the query.
        begin(&domain, "modify", JobKind::Modify).unwrap().finish();
        one.join().unwrap();
        other.join().unwrap();
        assert_free(&domain);
    });
}

#[test]
fn a_job_that_meets_the_guests_death_is_of_one_generation() {
    explore("end of generation against begin", || {
        let domain = Scheduler::new("d");
        let reaper = thread::spawn({
            let domain = domain.clone();
            move || {
                let cleanup = domain.end_generation(GoneWhy::ShutDown, "reaper");
                let job = block_on(cleanup.begin(pending())).unwrap();
                assert_eq!(job.generation(), 2);
            }
        });
        match begin(&domain, "query", JobKind::Query) {
            Ok(job) => {
                // The clean-up waits for this job, and this job is told.
                if job.generation() == 1 {
                    let stop = block_on(job.token().stop());
                    assert!(matches!(stop, Stop::Gone { generation: 1, .. }), "{stop:?}");
                    assert!(job.check().is_err());
                }
            }
            Err(error) => assert!(
                matches!(error, BeginError::Gone { generation: 1, .. }),
                "{error:?}"
            ),
        }
        reaper.join().unwrap();
        assert_free(&domain);
    });
}

#[test]
fn a_nested_step_that_meets_the_guests_death_fails_or_ends() {
    explore("end of generation against a nested step", || {
        let domain = Scheduler::new("d");
        let mut save = domain
            .caller("save")
            .try_begin_async(AsyncKind::Save)
            .unwrap();
        let query = domain.caller("query").try_begin(JobKind::Query).unwrap();
        let holder = thread::spawn(move || match block_on(save.nested(pending())) {
            Ok(step) => drop(step),
            Err(error) => assert!(matches!(error, BeginError::Gone { .. }), "{error:?}"),
        });
        let release = thread::spawn(move || drop(query));
        let cleanup = domain.end_generation(GoneWhy::ShutDown, "reaper");
        drop(block_on(cleanup.begin(pending())).unwrap());
        holder.join().unwrap();
        release.join().unwrap();
        assert_free(&domain);
    });
}

#[test]
fn a_token_that_fires_while_two_begin_to_wait_wakes_both() {
    explore("token fire against wait", || {
        let domain = Scheduler::new("d");
        let save = domain
            .caller("save")
            .try_begin_async(AsyncKind::Save)
            .unwrap();
        let token = save.token();
        let cancel = thread::spawn({
            let domain = domain.clone();
            move || domain.cancel_async("operator").unwrap()
        });
        let other = thread::spawn({
            let token = token.clone();
            move || block_on(token.stop())
        });
        let by = Stop::Cancelled("operator".into());
        assert_eq!(block_on(token.stop()), by);
        assert_eq!(other.join().unwrap(), by);
        cancel.join().unwrap();
    });
}

#[test]
fn a_timer_hears_of_a_hand_over_whenever_it_began_to_wait() {
    explore("hand-over against the overdue list", || {
        let overdue = Overdue::new();
        let domain = Scheduler::with("d", Limits::default(), &overdue);
        let holder = domain.caller("holder").try_begin(JobKind::Query).unwrap();
        let mut next = domain
            .caller("next")
            .begin(JobKind::Query, pending())
            .boxed();
        assert!(
            next.poll_unpin(&mut Context::from_waker(&noop_waker()))
                .is_pending()
        );
        let release = thread::spawn(move || drop(holder));
        block_on(overdue.filled());
        overdue.sweep();
        release.join().unwrap();
        drop(block_on(next).unwrap());
        overdue.sweep();
        assert_free(&domain);
    });
}
