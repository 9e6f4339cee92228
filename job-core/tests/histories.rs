//! Long random histories over the public API, against the specification. A failure shrinks to a short one.
//!
//! Each actor is a task as a daemon has them: it begins a job, obeys orders while it holds it, and is polled only when
//! the history says so. After every step the snapshot must be what the specification has, and every actor whose turn
//! came must have been woken.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::{Either, select};
use futures::task::{ArcWake, waker};
use job_core::{
    BeginError, Caller, CancelError, Cleanup, Flow, GoneWhy, Guard, KindSet, Limits, Overdue,
    Scheduler,
};
use proptest::prelude::*;
use proptest::sample::select as one_of;
use proptest::test_runner::TestCaseError;

mod kind {
    pub(crate) use job_core::{AgentKind, AsyncKind, JobKind, Kind};
}
#[expect(dead_code, reason = "nothing is taken back or evicted within a moment")]
#[path = "spec/model.rs"]
mod model;

use kind::{AgentKind, AsyncKind, JobKind};
use model::{Answer, Ask, Caps, Mask, Model, Ticket};

const ACTORS: usize = 6;
const CAPS: Caps = Caps {
    normal: 3,
    asynchronous: 1,
    agent: 2,
};
/// A grant that nobody picks up for a second is taken back. A machine that stalls for so long tells nothing.
const STALLED: Duration = Duration::from_millis(900);

#[derive(Clone, Debug)]
enum Op {
    Ask(usize, Ask, bool),
    AskPart(usize, Option<AgentKind>),
    /// The task is polled, woken or not.
    Poll(usize),
    /// Its deadline comes.
    Expire(usize),
    /// It is dropped, with all that it has.
    Drop(usize),
    EndPart(usize),
    End(usize),
    SetMask(usize, Mask),
    Cancel,
    /// The clean-up is this one's, if it has nothing else to do.
    EndGeneration(usize),
    Close,
}

fn ops() -> impl Strategy<Value = Op> {
    let actor = || 0..ACTORS;
    let mask = || {
        proptest::collection::vec(one_of(&JobKind::ALL[..]), 0..5)
            .prop_map(|kinds| Mask::of(&kinds))
    };
    let ask = prop_oneof![
        6 => one_of(&JobKind::ALL[..]).prop_map(Ask::Normal),
        2 => one_of(&AgentKind::ALL[..]).prop_map(|kind| Ask::Agent(kind, None)),
        2 => one_of(&AsyncKind::ALL[..]).prop_map(|kind| Ask::Async(kind, Mask::row(kind))),
        1 => (one_of(&AsyncKind::ALL[..]), mask()).prop_map(|(kind, mask)| Ask::Async(kind, mask)),
    ];
    prop_oneof![
        240 => (actor(), ask, prop::bool::weighted(0.2)).prop_map(|(actor, ask, shared)| Op::Ask(actor, ask, shared)),
        60 => (actor(), prop::option::of(one_of(&AgentKind::ALL[..]))).prop_map(|(actor, part)| Op::AskPart(actor, part)),
        240 => actor().prop_map(Op::Poll),
        30 => actor().prop_map(Op::Expire),
        60 => actor().prop_map(Op::Drop),
        60 => actor().prop_map(Op::EndPart),
        120 => actor().prop_map(Op::End),
        40 => (actor(), mask()).prop_map(|(actor, mask)| Op::SetMask(actor, mask)),
        20 => Just(Op::Cancel),
        12 => actor().prop_map(Op::EndGeneration),
        1 => Just(Op::Close),
    ]
}

enum Order {
    Nested,
    Agent(AgentKind),
    EndPart,
    Mask(KindSet),
    End,
}

/// How far an actor is with one thing it asked for.
#[derive(Clone, Debug, Default, PartialEq)]
enum Stage {
    #[default]
    Idle,
    Waits,
    Holds(Ticket),
    Failed(BeginError),
}

/// What an actor and the history tell each other.
#[derive(Default)]
struct Desk {
    main: RefCell<Stage>,
    part: RefCell<Stage>,
    orders: RefCell<VecDeque<Order>>,
    late: Cell<bool>,
}

impl Desk {
    async fn order(&self) -> Order {
        poll_fn(|_| match self.orders.borrow_mut().pop_front() {
            Some(order) => Poll::Ready(order),
            None => Poll::Pending,
        })
        .await
    }

    async fn deadline(&self) {
        poll_fn(|_| {
            if self.late.get() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    fn settle<G: Guard>(&self, stage: &RefCell<Stage>, result: Result<G, BeginError>) -> Option<G> {
        let (next, guard) = match result {
            Ok(guard) => (Stage::Holds(guard.id()), Some(guard)),
            Err(error) => (Stage::Failed(error), None),
        };
        stage.replace(next);
        guard
    }
}

/// An actor that holds one job until it is told to end it.
async fn simple<G: Guard>(desk: Rc<Desk>, begin: impl Future<Output = Result<G, BeginError>>) {
    if let Some(guard) = desk.settle(&desk.main, begin.await) {
        while !matches!(desk.order().await, Order::End) {}
        drop(guard);
    }
}

async fn asynchronous(desk: Rc<Desk>, caller: Caller, kind: AsyncKind, mask: Mask) {
    let begin = caller.begin_async_with(kind, mask.kinds().collect(), desk.deadline());
    let Some(mut job) = desk.settle(&desk.main, begin.await) else {
        return;
    };
    loop {
        match desk.order().await {
            Order::End => return,
            Order::EndPart => {}
            Order::Mask(mask) => job.set_mask(mask),
            Order::Nested => part(&desk, job.nested(desk.deadline())).await,
            Order::Agent(kind) => part(&desk, job.agent(kind, desk.deadline())).await,
        }
    }
}

/// One part of an async job, until it is told to end it, be it granted or not.
async fn part<G: Guard>(desk: &Desk, begin: impl Future<Output = Result<G, BeginError>>) {
    let told = async { while !matches!(desk.order().await, Order::EndPart) {} };
    let mut told = pin!(told);
    if let Either::Left((result, _)) = select(pin!(begin), told.as_mut()).await
        && let Some(guard) = desk.settle(&desk.part, result)
    {
        told.await;
        drop(guard);
    }
}

#[derive(Default)]
struct Bell(AtomicBool);

impl ArcWake for Bell {
    fn wake_by_ref(bell: &Arc<Self>) {
        bell.0.store(true, Ordering::Relaxed);
    }
}

/// A task, and what the specification knows it by.
#[derive(Default)]
struct Actor {
    task: Option<Pin<Box<dyn Future<Output = ()>>>>,
    desk: Rc<Desk>,
    bell: Arc<Bell>,
    main: Option<Ticket>,
    part: Option<Ticket>,
}

impl Actor {
    fn poll(&mut self) {
        self.bell.0.store(false, Ordering::Relaxed);
        let waker = waker(self.bell.clone());
        let task = self.task.as_mut().map(|task| task.as_mut());
        if let Some(task) = task
            && task.poll(&mut Context::from_waker(&waker)).is_ready()
        {
            self.task = None;
        }
    }

    fn order(&mut self, order: Order) {
        self.desk.orders.borrow_mut().push_back(order);
    }
}

struct History {
    domain: Scheduler,
    flow: Flow,
    model: Model,
    actors: Vec<Actor>,
    ended: Vec<Ticket>,
}

type Verdict = Result<(), TestCaseError>;

impl History {
    fn new() -> Self {
        let limits = Limits {
            normal: CAPS.normal,
            asynchronous: CAPS.asynchronous,
            agent: CAPS.agent,
        };
        Self {
            domain: Scheduler::with("d", limits, &Overdue::new()),
            flow: Flow::new(),
            model: Model::new(CAPS),
            actors: (0..ACTORS).map(|_| Actor::default()).collect(),
            ended: Vec::new(),
        }
    }

    fn play(&mut self, op: Op) -> Verdict {
        match op {
            Op::Ask(index, ask, shared) => self.ask(index, ask, shared)?,
            Op::AskPart(index, kind) => self.ask_part(index, kind)?,
            Op::Poll(index) => {
                self.actors[index].poll();
                self.look(index, false)?;
            }
            Op::Expire(index) => {
                self.actors[index].desk.late.set(true);
                self.actors[index].poll();
                self.actors[index].desk.late.set(false);
                self.look(index, true)?;
            }
            Op::Drop(index) => {
                let actor = std::mem::take(&mut self.actors[index]);
                drop(actor.task);
                for ticket in [actor.part, actor.main].into_iter().flatten() {
                    self.gone(ticket);
                }
            }
            Op::EndPart(index) => {
                if let Some(ticket) = self.actors[index].part {
                    self.actors[index].order(Order::EndPart);
                    self.actors[index].poll();
                    self.model.look(ticket, 0);
                    self.gone(ticket);
                    self.actors[index].part = None;
                    self.actors[index].desk.part.take();
                }
            }
            Op::End(index) => {
                if let Some((ticket, _)) = self.holds(index) {
                    self.end(index, ticket);
                }
            }
            Op::SetMask(index, mask) => {
                let is_alone = self.actors[index].part.is_none();
                if let Some((ticket, Ask::Async(..))) = self.holds(index).filter(|_| is_alone) {
                    self.actors[index].order(Order::Mask(mask.kinds().collect()));
                    self.actors[index].poll();
                    self.model.set_mask(ticket, mask, 0);
                }
            }
            Op::Cancel => {
                let running = self.model.holders.iter().find(|one| one.ask.is_async());
                let expected = running.map(|one| one.ticket).ok_or(CancelError::NotRunning);
                prop_assert_eq!(self.domain.cancel_async("operator"), expected);
            }
            Op::EndGeneration(index) => self.end_generation(index)?,
            Op::Close => {
                self.domain.close();
                self.model.close();
            }
        }
        self.agree()
    }

    fn ask(&mut self, index: usize, ask: Ask, shared: bool) -> Verdict {
        let actor = &mut self.actors[index];
        if actor.task.is_some() {
            return Ok(());
        }
        let caller = self.domain.caller("actor");
        let caller = if shared {
            caller.in_flow(self.flow)
        } else {
            caller
        };
        let desk = actor.desk.clone();
        desk.main.replace(Stage::Waits);
        let late = desk.clone();
        let late = async move { late.deadline().await };
        actor.task = Some(match ask {
            Ask::Normal(kind) => Box::pin(simple(desk, caller.begin(kind, late))),
            Ask::Agent(kind, _) => Box::pin(simple(desk, caller.begin_agent(kind, late))),
            Ask::Async(kind, mask) => Box::pin(asynchronous(desk, caller, kind, mask)),
            Ask::Nested(_) => return Err(TestCaseError::fail("nobody begins with a nested step")),
        });
        actor.poll();
        let answer = self.model.request(ask, shared.then_some(0), 0);
        let stage = self.actors[index].desk.main.borrow().clone();
        self.actors[index].main = answered(answer, &stage)?;
        if self.actors[index].main.is_none() {
            self.actors[index].desk.main.take();
        }
        Ok(())
    }

    fn ask_part(&mut self, index: usize, kind: Option<AgentKind>) -> Verdict {
        let Some((parent, Ask::Async(..))) = self.holds(index) else {
            return Ok(());
        };
        if self.actors[index].part.is_some() {
            return Ok(());
        }
        let actor = &mut self.actors[index];
        actor.desk.part.replace(Stage::Waits);
        actor.order(kind.map_or(Order::Nested, Order::Agent));
        actor.poll();
        let holder = self.model.holders.iter().find(|one| one.ticket == parent);
        let flow = holder.map(|one| one.flow);
        let ask = kind.map_or(Ask::Nested(parent), |kind| Ask::Agent(kind, Some(parent)));
        let answer = self.model.request(ask, flow, 0);
        let stage = self.actors[index].desk.part.borrow().clone();
        self.actors[index].part = answered(answer, &stage)?;
        if self.actors[index].part.is_none() {
            self.actors[index].desk.part.take();
        }
        Ok(())
    }

    fn end(&mut self, index: usize, ticket: Ticket) {
        let part = self.actors[index].part.take();
        if part.is_some() {
            self.actors[index].order(Order::EndPart);
        }
        self.actors[index].order(Order::End);
        self.actors[index].poll();
        if let Some(part) = part {
            self.model.look(part, 0);
            self.gone(part);
        }
        self.gone(ticket);
        self.actors[index] = Actor::default();
    }

    fn end_generation(&mut self, index: usize) -> Verdict {
        let cleanup: Cleanup = self.domain.end_generation(GoneWhy::ShutDown, "reaper");
        self.model.end_generation();
        let answer = self.model.request(Ask::Normal(JobKind::Destroy), None, 0);
        let actor = &mut self.actors[index];
        if actor.task.is_some() {
            drop(cleanup);
            if let Answer::Held(ticket) | Answer::Waits(ticket) = answer {
                self.gone(ticket);
            }
            return Ok(());
        }
        let desk = actor.desk.clone();
        desk.main.replace(Stage::Waits);
        let late = desk.clone();
        let late = async move { late.deadline().await };
        actor.task = Some(Box::pin(simple(desk, cleanup.begin(late))));
        actor.poll();
        let stage = actor.desk.main.borrow().clone();
        actor.main = answered(answer, &stage)?;
        if actor.main.is_none() {
            actor.desk.main.take();
        }
        Ok(())
    }

    /// The task was polled: what it waited for is as the specification has it.
    fn look(&mut self, index: usize, late: bool) -> Verdict {
        let actor = &mut self.actors[index];
        for (seat, stage) in [
            (&mut actor.main, &actor.desk.main),
            (&mut actor.part, &actor.desk.part),
        ] {
            let Some(ticket) = *seat else { continue };
            let now = stage.borrow().clone();
            let looked = self.model.look(ticket, 0);
            match (looked, &now) {
                (Some(Ok(())), Stage::Holds(id)) => prop_assert_eq!(*id, ticket),
                (Some(Err(no)), Stage::Failed(error)) => {
                    prop_assert!(is_that(no, error), "{:?}", error);
                }
                (None, Stage::Failed(BeginError::TimedOut { .. })) if late => {
                    self.model.leave(ticket, 0);
                }
                (None, Stage::Waits) if !late => {}
                _ => prop_assert!(false, "{now:?}, by the specification {looked:?}"),
            }
            if matches!(now, Stage::Failed(_)) {
                *seat = None;
                stage.take();
            }
        }
        Ok(())
    }

    /// A waiter leaves or a holder ends; of holders the history is told, but not of nested steps.
    fn gone(&mut self, ticket: Ticket) {
        let held = self
            .model
            .holders
            .iter()
            .find(|one| one.ticket == ticket && one.claimed);
        if held.is_some_and(|one| !matches!(one.ask, Ask::Nested(_))) {
            self.ended.push(ticket);
        }
        self.model.leave(ticket, 0);
    }

    fn holds(&self, index: usize) -> Option<(Ticket, Ask)> {
        let Stage::Holds(ticket) = *self.actors[index].desk.main.borrow() else {
            return None;
        };
        let holder = self.model.holders.iter().find(|one| one.ticket == ticket)?;
        Some((ticket, holder.ask))
    }

    /// Snapshot and history are as the specification has them, and nobody whose turn came sleeps on.
    fn agree(&self) -> Verdict {
        let snapshot = self.domain.snapshot();
        let slots = [&snapshot.normal, &snapshot.asynchronous, &snapshot.agent];
        for (slot, at) in slots.into_iter().zip(0..) {
            let seen = slot.as_ref().map(|held| {
                (
                    held.holder.id,
                    held.holder.kind,
                    held.claimed,
                    held.generation != snapshot.generation,
                )
            });
            let mut holders = self.model.holders.iter();
            let one = holders.find(|one| {
                if one.ask.is_agent() {
                    at == 2
                } else {
                    at == i32::from(one.ask.is_async())
                }
            });
            prop_assert_eq!(
                seen,
                one.map(|one| (one.ticket, one.ask.kind(), one.claimed, one.stale))
            );
        }
        let mut queue: Vec<_> = self
            .model
            .waiters
            .iter()
            .map(|one| (one.place(), one.ask.kind()))
            .collect();
        queue.sort_by_key(|one| one.0);
        let queue: Vec<_> = queue
            .into_iter()
            .map(|((_, ticket), kind)| (ticket, kind))
            .collect();
        let seen: Vec<_> = snapshot
            .waiting
            .iter()
            .map(|one| (one.id, one.kind))
            .collect();
        prop_assert_eq!(seen, queue);
        prop_assert!(
            snapshot.waiting.iter().all(|one| one.blocked_by.is_some()),
            "{:?}",
            snapshot
        );
        prop_assert_eq!(snapshot.generation, self.model.generation);
        prop_assert_eq!(snapshot.closed, self.model.closed);

        let seen: Vec<_> = self.domain.history().iter().map(|one| one.id).collect();
        prop_assert_eq!(
            &seen[..],
            &self.ended[self.ended.len().saturating_sub(32)..]
        );

        for actor in &self.actors {
            for (seat, stage) in [
                (actor.main, &actor.desk.main),
                (actor.part, &actor.desk.part),
            ] {
                let waits = *stage.borrow() == Stage::Waits;
                let moved = |ticket| !self.model.waiters.iter().any(|one| one.ticket == ticket);
                if waits && seat.is_some_and(moved) {
                    prop_assert!(
                        actor.bell.0.load(Ordering::Relaxed),
                        "{:?} was not woken",
                        seat
                    );
                }
            }
        }
        Ok(())
    }
}

/// What an actor got for its first poll. Yields its ticket if it waits or holds.
fn answered(answer: Answer, stage: &Stage) -> Result<Option<Ticket>, TestCaseError> {
    match (answer, stage) {
        (Answer::Held(ticket), Stage::Holds(id)) if ticket == *id => Ok(Some(ticket)),
        (Answer::Waits(ticket), Stage::Waits) => Ok(Some(ticket)),
        (Answer::Refused(no), Stage::Failed(error)) if is_that(no, error) => Ok(None),
        _ => Err(TestCaseError::fail(format!(
            "{stage:?}, by the specification {answer:?}"
        ))),
    }
}

fn is_that(no: model::No, error: &BeginError) -> bool {
    use model::No;
    match (no, error) {
        // A guard of a dead guest is told so first, even where the domain is closed as well.
        (No::Closed, BeginError::Closed | BeginError::Gone { .. })
        | (No::Gone, BeginError::Gone { .. }) => true,
        (No::WouldDeadlock(kind), BeginError::WouldDeadlock { held, .. }) => kind == *held,
        (No::Full(count), BeginError::QueueFull { waiting, .. }) => count as usize == *waiting,
        _ => false,
    }
}

/// Ends with how many steps were checked, for `cargo xtask verify`.
#[test]
fn random_histories_agree_with_the_specification() {
    let cases = std::env::var("JOB_CORE_HISTORIES")
        .ok()
        .and_then(|text| text.parse().ok());
    let config = ProptestConfig {
        cases: cases.unwrap_or(100),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let steps = Cell::new(0_u64);
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let played = runner.run(&proptest::collection::vec(ops(), 1..400), |ops| {
        let started = Instant::now();
        let mut history = History::new();
        for op in ops {
            steps.set(steps.get() + 1);
            match history.play(op) {
                Err(_) if started.elapsed() > STALLED => return Ok(()),
                verdict => verdict?,
            }
        }
        Ok(())
    });
    if let Err(failure) = played {
        panic!("{failure}");
    }
    println!("\nfigure history-steps {} steps bar > 1000 ok", steps.get());
}
