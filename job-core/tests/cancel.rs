//! Every future of the crate, dropped after every number of polls, before and after those in its way have gone. Whoever
//! waits behind it must be woken, nothing of it may be left, and the next hundred operations must go through.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::any::Any;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::executor::block_on;
use futures::future::BoxFuture;
use futures::task::{ArcWake, noop_waker, waker};
use job_core::{
    AgentKind, Ask, AsyncKind, BeginError, GoneWhy, Guard, Job, JobKind, Jobs, KindSet, Limits,
    Overdue, Scheduler, Steps,
};

/// Guards, most of them.
type Obstacles = Vec<Box<dyn Any>>;

type Event = Box<dyn FnOnce(&mut Obstacles)>;

/// A future among others: what is in its way, and what happens between its polls.
struct Scene {
    domain: Scheduler,
    future: BoxFuture<'static, ()>,
    in_the_way: Obstacles,
    /// After the first poll, the second, ...
    between: Vec<Event>,
}

impl Scene {
    fn new(domain: &Scheduler, future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self {
            domain: domain.clone(),
            future: future.boxed(),
            in_the_way: Vec::new(),
            between: Vec::new(),
        }
    }

    fn behind(mut self, guard: impl Any) -> Self {
        self.in_the_way.push(Box::new(guard));
        self
    }

    fn then(mut self, event: impl FnOnce(&mut Obstacles) + 'static) -> Self {
        self.between.push(Box::new(event));
        self
    }

    /// Nothing happens, and then all that is in the way goes.
    fn then_freed(self) -> Self {
        self.then(|_| ()).then(Vec::clear)
    }
}

#[derive(Default)]
struct Bell(AtomicUsize);

impl ArcWake for Bell {
    fn wake_by_ref(bell: &Arc<Self>) {
        bell.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    future.poll_unpin(&mut Context::from_waker(&noop_waker()))
}

/// Plays the scene up to every poll, drops the future there, and looks what is left.
fn dropped_at_every_poll(name: &str, scene: impl Fn() -> Scene) {
    let mut polls = 0;
    loop {
        let mut done = false;
        for freed_first in [false, true] {
            let Scene {
                domain,
                mut future,
                mut in_the_way,
                between,
            } = scene();
            let mut between = between.into_iter();
            for _ in 0..polls {
                done |= poll(&mut future).is_ready();
                if done {
                    break;
                }
                if let Some(event) = between.next() {
                    event(&mut in_the_way);
                }
            }
            let bell = Arc::new(Bell::default());
            let mut next = domain
                .caller("next")
                .begin(JobKind::Modify, pending())
                .boxed();
            let waker = waker(bell.clone());
            let mut outcome = next.poll_unpin(&mut Context::from_waker(&waker));
            let had_to_wait = outcome.is_pending();
            if freed_first {
                in_the_way.clear();
                drop(future);
            } else {
                drop(future);
                in_the_way.clear();
            }
            if had_to_wait {
                assert!(
                    bell.0.load(Ordering::Relaxed) > 0,
                    "{name}, poll {polls}: nobody woke the next"
                );
                outcome = next.poll_unpin(&mut Context::from_waker(&waker));
            }
            match outcome {
                Poll::Ready(Ok(job)) => job.finish(),
                other => panic!("{name}, poll {polls}: {other:?} instead of a grant"),
            }
            assert_works(&domain, name);
        }
        if done {
            break;
        }
        polls += 1;
        assert!(polls < 20, "{name} never ends");
    }
    let name = name.replace(' ', "-");
    println!("\nfigure dropped:{name} {polls} polls bar > 1 ok");
}

/// A hundred operations of every kind, each of which must do what it does on a new domain.
fn assert_works(domain: &Scheduler, name: &str) {
    let begin = |owner, kind| domain.caller(owner).begin(kind, pending()).boxed();
    for round in 0..20 {
        let free = domain.snapshot();
        assert!(
            free.normal.is_none()
                && free.asynchronous.is_none()
                && free.agent.is_none()
                && free.waiting.is_empty(),
            "{name}, round {round}: {free:?}"
        );
        // One: a hand-over, in order.
        let holder = domain.caller("holder").try_begin(JobKind::Query).unwrap();
        let (mut first, mut second) = (
            begin("first", JobKind::Modify),
            begin("second", JobKind::Query),
        );
        assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
        drop(holder);
        assert!(poll(&mut second).is_pending());
        let Poll::Ready(Ok(first)) = poll(&mut first) else {
            panic!("{name}: not granted")
        };
        drop(first);
        assert!(matches!(poll(&mut second), Poll::Ready(Ok(_))), "{name}");
        // Two: an async job with both kinds of parts.
        let mut save = domain
            .caller("save")
            .try_begin_async(AsyncKind::Save)
            .unwrap();
        drop(block_on(save.nested(pending())).unwrap());
        drop(block_on(save.agent(AgentKind::Thaw, pending())).unwrap());
        // Three: what the mask holds back is held back, and what it lets pass passes.
        let late = block_on(domain.caller("late").begin(JobKind::Modify, async {}));
        assert!(
            matches!(late, Err(BeginError::TimedOut { .. })),
            "{name}: {late:?}"
        );
        drop(domain.caller("query").try_begin(JobKind::Query).unwrap());
        // Four: a cancellation.
        assert_eq!(domain.cancel_async("operator"), Ok(save.id()));
        block_on(save.token().stop());
        save.finish();
        // Five: the agent.
        drop(
            domain
                .caller("ping")
                .try_begin_agent(AgentKind::Query)
                .unwrap(),
        );
    }
}

fn query(domain: &Scheduler) -> Job {
    domain
        .caller("in the way")
        .try_begin(JobKind::Query)
        .unwrap()
}

/// Pending for that many polls.
fn after(polls: usize) -> impl Future<Output = ()> + Send + 'static {
    let mut left = polls;
    poll_fn(move |_| {
        left = left.saturating_sub(1);
        if left == 0 {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
}

#[test]
fn a_caller_dropped_at_any_poll_leaves_nothing_behind() {
    dropped_at_every_poll("Caller::begin", || {
        let domain = Scheduler::new("d");
        let caller = domain.caller("dropped");
        let future = async move { drop(caller.begin(JobKind::Suspend, pending()).await) };
        Scene::new(&domain, future)
            .behind(query(&domain))
            .then_freed()
    });
    dropped_at_every_poll("Caller::begin until its deadline", || {
        let domain = Scheduler::new("d");
        let caller = domain.caller("dropped");
        let future = async move { drop(caller.begin(JobKind::Suspend, after(4)).await) };
        Scene::new(&domain, future).behind(query(&domain))
    });
    dropped_at_every_poll("Caller::begin_async", || {
        let domain = Scheduler::new("d");
        let caller = domain.caller("dropped");
        let future = async move { drop(caller.begin_async(AsyncKind::Backup, pending()).await) };
        Scene::new(&domain, future)
            .behind(query(&domain))
            .then_freed()
    });
    dropped_at_every_poll("Caller::begin_async_with", || {
        let domain = Scheduler::new("d");
        let caller = domain.caller("dropped");
        let future = async move {
            let begin = caller.begin_async_with(AsyncKind::Dump, KindSet::ALL, pending());
            drop(begin.await);
        };
        Scene::new(&domain, future)
            .behind(query(&domain))
            .then_freed()
    });
    dropped_at_every_poll("Caller::begin_agent", || {
        let domain = Scheduler::new("d");
        let caller = domain.caller("dropped");
        let ping = domain
            .caller("ping")
            .try_begin_agent(AgentKind::Query)
            .unwrap();
        let future = async move { drop(caller.begin_agent(AgentKind::Modify, pending()).await) };
        Scene::new(&domain, future).behind(ping).then_freed()
    });
    dropped_at_every_poll("Jobs::begin", || {
        let domain = Scheduler::new("d");
        let jobs: Arc<dyn Jobs> = Arc::new(domain.clone());
        let future = async move {
            drop(
                jobs.begin(Ask::new("dropped", pending()), JobKind::Modify)
                    .await,
            );
        };
        Scene::new(&domain, future)
            .behind(query(&domain))
            .then_freed()
    });
}

#[test]
fn a_part_dropped_at_any_poll_leaves_nothing_behind() {
    let saving = |domain: &Scheduler| {
        domain
            .caller("save")
            .try_begin_async(AsyncKind::Save)
            .unwrap()
    };
    dropped_at_every_poll("AsyncJob::nested", || {
        let domain = Scheduler::new("d");
        let mut save = saving(&domain);
        let future = async move { drop(save.nested(pending()).await.unwrap()) };
        Scene::new(&domain, future)
            .behind(query(&domain))
            .then_freed()
    });
    dropped_at_every_poll("AsyncJob::agent", || {
        let domain = Scheduler::new("d");
        let mut save = saving(&domain);
        let ping = domain
            .caller("ping")
            .try_begin_agent(AgentKind::Query)
            .unwrap();
        let future = async move { drop(save.agent(AgentKind::Modify, pending()).await.unwrap()) };
        Scene::new(&domain, future).behind(ping).then_freed()
    });
    dropped_at_every_poll("AsyncJob::remote", || {
        let domain = Scheduler::new("d");
        let mut save = saving(&domain);
        let future = async move { save.remote(after(3)).await.unwrap() };
        Scene::new(&domain, future)
    });
    dropped_at_every_poll("Steps::step", || {
        let domain = Scheduler::new("d");
        let mut save = saving(&domain);
        let future = async move { drop(save.step(pending()).await.unwrap()) };
        Scene::new(&domain, future)
            .behind(query(&domain))
            .then_freed()
    });
}

#[test]
fn a_clean_up_dropped_at_any_poll_gives_its_place_away() {
    dropped_at_every_poll("Cleanup::begin", || {
        let domain = Scheduler::new("d");
        let old = query(&domain);
        let cleanup = domain.end_generation(GoneWhy::Destroyed, "reaper");
        let future = async move { drop(cleanup.begin(pending()).await.unwrap()) };
        Scene::new(&domain, future).behind(old).then_freed()
    });
}

#[test]
fn a_signal_waited_for_and_dropped_at_any_poll_still_reaches_the_others() {
    type Wait = fn(job_core::Token) -> Pin<Box<dyn Future<Output = ()> + Send>>;
    let waits: [(&str, Wait); 2] = [
        ("Token::stop", |token| {
            Box::pin(async move { drop(token.stop().await) })
        }),
        ("Token::gone", |token| {
            Box::pin(async move { drop(token.gone().await) })
        }),
    ];
    for (name, wait) in waits {
        dropped_at_every_poll(name, || {
            let domain = Scheduler::new("d");
            let save = domain
                .caller("save")
                .try_begin_async(AsyncKind::Save)
                .unwrap();
            let token = save.token();
            let (reaped, bell) = (domain.clone(), Arc::new(Bell::default()));
            let mut other = wait(token.clone());
            let rung = waker(bell.clone());
            assert!(
                other
                    .poll_unpin(&mut Context::from_waker(&rung))
                    .is_pending()
            );
            Scene::new(&domain, wait(token))
                .behind(save)
                .then(move |_| {
                    drop(reaped.end_generation(GoneWhy::ShutDown, "reaper"));
                    assert!(bell.0.load(Ordering::Relaxed) > 0, "the other one is woken");
                    assert!(poll(&mut other).is_ready());
                })
        });
    }
}

#[test]
fn a_timer_dropped_at_any_poll_leaves_the_list_to_the_next() {
    dropped_at_every_poll("Overdue::filled", || {
        let overdue = Overdue::new();
        let domain = Scheduler::with("d", Limits::default(), &overdue);
        let (listed, list) = (domain.clone(), overdue.clone());
        Scene::new(&domain, async move { overdue.filled().await }).then(move |_| {
            let holder = query(&listed);
            let mut next = listed
                .caller("next")
                .begin(JobKind::Query, pending())
                .boxed();
            assert!(poll(&mut next).is_pending());
            drop(holder);
            assert!(
                poll(&mut Box::pin(list.filled())).is_ready(),
                "a hand-over is on the list"
            );
        })
    });
}
