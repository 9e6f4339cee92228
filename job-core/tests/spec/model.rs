//! The rules as a specification: two plain lists, scanned from scratch after every step.
//!
//! The way of libvirt's QEMU driver, in which everybody who waits wakes at each change, looks whether the rules let him
//! in, and waits again if not. It is made orderly by looking in the order of precedence. Written from the rules alone;
//! knows no lanes, keys or links, nor anything else of how the crate does it.

use crate::kind::{AgentKind, AsyncKind, JobKind, Kind};

/// Numbers those who ask, in order.
pub(crate) type Ticket = u64;

/// What passes beside an async job: one flag a kind, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mask([bool; 7]);

impl Mask {
    pub(crate) fn of(kinds: &[JobKind]) -> Self {
        let mut mask = [false; 7];
        for kind in kinds {
            mask[*kind as usize] = true;
        }
        mask[JobKind::Destroy as usize] = true;
        Self(mask)
    }

    /// The row of the table.
    pub(crate) fn row(kind: AsyncKind) -> Self {
        use JobKind::{Abort, MigrationOp, Modify, ModifyMigrationSafe, Query, Suspend};
        Self::of(match kind {
            AsyncKind::Save | AsyncKind::Dump | AsyncKind::Snapshot => &[Query, Abort],
            AsyncKind::Start => &[],
            AsyncKind::MigrationIn => &[ModifyMigrationSafe],
            AsyncKind::MigrationOut => &[Query, Abort, Suspend, MigrationOp, ModifyMigrationSafe],
            AsyncKind::Backup => &[Query, Abort, Suspend, Modify],
        })
    }

    pub(crate) fn lets_pass(self, kind: JobKind) -> bool {
        self.0[kind as usize]
    }

    pub(crate) fn kinds(self) -> impl Iterator<Item = JobKind> {
        JobKind::ALL
            .into_iter()
            .filter(move |kind| self.lets_pass(*kind))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ask {
    Normal(JobKind),
    /// A step of the async job of that ticket.
    Nested(Ticket),
    /// An agent job, perhaps a part of the async job of that ticket.
    Agent(AgentKind, Option<Ticket>),
    Async(AsyncKind, Mask),
}

impl Ask {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Normal(kind) => Kind::Normal(kind),
            Self::Nested(_) => Kind::Nested,
            Self::Agent(kind, _) => Kind::Agent(kind),
            Self::Async(kind, _) => Kind::Async(kind),
        }
    }

    pub(crate) fn is_agent(self) -> bool {
        matches!(self, Self::Agent(..))
    }

    pub(crate) fn is_async(self) -> bool {
        matches!(self, Self::Async(..))
    }

    pub(crate) fn parent(self) -> Option<Ticket> {
        match self {
            Self::Nested(parent) => Some(parent),
            Self::Agent(_, parent) => parent,
            Self::Normal(_) | Self::Async(..) => None,
        }
    }

    /// Who is looked at first.
    pub(crate) fn precedence(self) -> u8 {
        match self {
            Self::Normal(JobKind::Destroy) | Self::Agent(AgentKind::Thaw, _) => 0,
            Self::Normal(JobKind::Abort) => 1,
            _ => 2,
        }
    }

    fn meets_limit(self) -> bool {
        self.precedence() == 2 && !matches!(self, Self::Nested(_))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiter {
    pub(crate) ticket: Ticket,
    pub(crate) flow: u64,
    pub(crate) ask: Ask,
    /// Its grant was taken back and it has not looked since.
    pub(crate) asleep: bool,
}

impl Waiter {
    pub(crate) fn place(&self) -> (u8, Ticket) {
        (self.ask.precedence(), self.ticket)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) ticket: Ticket,
    pub(crate) flow: u64,
    pub(crate) ask: Ask,
    /// Its generation has ended.
    pub(crate) stale: bool,
    pub(crate) claimed: bool,
    pub(crate) since: u64,
}

/// Why one was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum No {
    Closed,
    Gone,
    WouldDeadlock(Kind),
    Full(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Held(Ticket),
    Waits(Ticket),
    Refused(No),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caps {
    pub(crate) normal: u32,
    pub(crate) asynchronous: u32,
    pub(crate) agent: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) holders: Vec<Holder>,
    pub(crate) waiters: Vec<Waiter>,
    pub(crate) failed: Vec<(Ticket, No)>,
    pub(crate) closed: bool,
    pub(crate) generation: u64,
    pub(crate) next: Ticket,
    pub(crate) caps: Caps,
    /// Those whom the last call granted or failed although they were not the one who called.
    pub(crate) moved: Vec<Ticket>,
}

impl Model {
    pub(crate) fn new(caps: Caps) -> Self {
        Self {
            holders: Vec::new(),
            waiters: Vec::new(),
            failed: Vec::new(),
            closed: false,
            generation: 1,
            next: 1,
            caps,
            moved: Vec::new(),
        }
    }

    pub(crate) fn request(&mut self, ask: Ask, flow: Option<u64>, now: u64) -> Answer {
        self.moved.clear();
        if self.closed {
            return Answer::Refused(No::Closed);
        }
        let is_alive = |parent| {
            self.holders
                .iter()
                .any(|holder| holder.ticket == parent && !holder.stale)
        };
        if ask.parent().is_some_and(|parent| !is_alive(parent)) {
            return Answer::Refused(No::Gone);
        }
        if let Some(held) = flow.and_then(|flow| self.held_by(flow, ask)) {
            return Answer::Refused(No::WouldDeadlock(held));
        }
        let ticket = self.next;
        let flow = flow.unwrap_or(!ticket);
        if may_run(&self.holders, ask) {
            self.holders.push(Holder {
                ticket,
                flow,
                ask,
                stale: false,
                claimed: true,
                since: now,
            });
            self.next += 1;
            return Answer::Held(ticket);
        }
        let class = |other: Ask| (other.is_agent(), other.is_async());
        let waiting = self
            .waiters
            .iter()
            .filter(|waiter| !waiter.asleep && class(waiter.ask) == class(ask))
            .count() as u32;
        let cap = match ask {
            Ask::Agent(..) => self.caps.agent,
            Ask::Async(..) => self.caps.asynchronous,
            Ask::Normal(_) | Ask::Nested(_) => self.caps.normal,
        };
        if ask.meets_limit() && waiting >= cap {
            return Answer::Refused(No::Full(waiting));
        }
        self.next += 1;
        self.waiters.push(Waiter {
            ticket,
            flow,
            ask,
            asleep: false,
        });
        Answer::Waits(ticket)
    }

    /// One who waits looks whether his turn came. `None`: not yet.
    pub(crate) fn look(&mut self, ticket: Ticket, now: u64) -> Option<Result<(), No>> {
        self.moved.clear();
        if let Some(waiter) = self.waiters.iter_mut().find(|one| one.ticket == ticket)
            && waiter.asleep
        {
            waiter.asleep = false;
            self.look_around(now);
        }
        if let Some(index) = self.failed.iter().position(|one| one.0 == ticket) {
            return Some(Err(self.failed.remove(index).1));
        }
        let holder = self.holders.iter_mut().find(|one| one.ticket == ticket)?;
        holder.claimed = true;
        Some(Ok(()))
    }

    /// One who waits, or was granted and has not looked, goes away.
    pub(crate) fn leave(&mut self, ticket: Ticket, now: u64) {
        self.moved.clear();
        self.waiters.retain(|one| one.ticket != ticket);
        self.failed.retain(|one| one.0 != ticket);
        self.holders.retain(|one| one.ticket != ticket);
        self.look_around(now);
    }

    /// A holder ends.
    pub(crate) fn end(&mut self, ticket: Ticket, now: u64) {
        self.leave(ticket, now);
    }

    pub(crate) fn set_mask(&mut self, ticket: Ticket, mask: Mask, now: u64) {
        self.moved.clear();
        if let Some(holder) = self.holders.iter_mut().find(|one| one.ticket == ticket)
            && let Ask::Async(kind, _) = holder.ask
        {
            holder.ask = Ask::Async(kind, mask);
        }
        self.look_around(now);
    }

    /// Grants made at or before `limit` that nobody has looked at are taken back.
    pub(crate) fn take_back(&mut self, limit: u64, now: u64) -> u32 {
        self.moved.clear();
        let is_due = |holder: &Holder| !holder.claimed && holder.since <= limit;
        let due: Vec<Holder> = self.holders.iter().copied().filter(is_due).collect();
        self.holders.retain(|holder| !is_due(holder));
        self.waiters.extend(due.iter().map(|holder| Waiter {
            ticket: holder.ticket,
            flow: holder.flow,
            ask: holder.ask,
            asleep: true,
        }));
        self.look_around(now);
        due.len() as u32
    }

    pub(crate) fn end_generation(&mut self) {
        self.fail_all(No::Gone);
        self.generation += 1;
        for holder in &mut self.holders {
            holder.stale = true;
        }
    }

    pub(crate) fn evict(&mut self, now: u64) -> Vec<Ticket> {
        self.moved.clear();
        let stale = self.holders.iter().filter(|holder| holder.stale);
        let evicted = stale.map(|holder| holder.ticket).collect();
        self.holders.retain(|holder| !holder.stale);
        self.look_around(now);
        evicted
    }

    pub(crate) fn close(&mut self) {
        self.fail_all(No::Closed);
        self.closed = true;
    }

    /// All who wait and could not run if they looked now, whatever their turn.
    pub(crate) fn held_back(&self) -> impl Iterator<Item = &Waiter> {
        self.waiters
            .iter()
            .filter(|waiter| !may_run(&self.holders, waiter.ask))
    }

    /// Everybody wakes and looks, in the order of precedence, until nobody gets in any more.
    fn look_around(&mut self, now: u64) {
        while !self.closed {
            let could = |waiter: &&Waiter| !waiter.asleep && may_run(&self.holders, waiter.ask);
            let first = self
                .waiters
                .iter()
                .filter(could)
                .min_by_key(|one| one.place());
            let Some(&Waiter {
                ticket, flow, ask, ..
            }) = first
            else {
                return;
            };
            self.waiters.retain(|one| one.ticket != ticket);
            self.moved.push(ticket);
            match self.held_by(flow, ask) {
                Some(held) => self.failed.push((ticket, No::WouldDeadlock(held))),
                None => self.holders.push(Holder {
                    ticket,
                    flow,
                    ask,
                    stale: false,
                    claimed: false,
                    since: now,
                }),
            }
        }
    }

    /// A job that the flow holds and that cannot be held beside `ask`. All but the async job that `ask` is a part of.
    /// Of several, the one that libvirt's structure names first: normal, async, agent.
    fn held_by(&self, flow: u64, ask: Ask) -> Option<Kind> {
        let order = |holder: &&Holder| (holder.ask.is_agent(), holder.ask.is_async());
        self.holders
            .iter()
            .filter(|holder| holder.flow == flow && ask.parent() != Some(holder.ticket))
            .min_by_key(order)
            .map(|holder| holder.ask.kind())
    }

    fn fail_all(&mut self, why: No) {
        self.moved.clear();
        let unseen = self.holders.iter().filter(|holder| !holder.claimed);
        let waiting = self.waiters.iter().map(|waiter| waiter.ticket);
        self.moved
            .extend(waiting.chain(unseen.map(|holder| holder.ticket)));
        self.holders.retain(|holder| holder.claimed);
        self.waiters.clear();
        let failed = self.moved.iter().map(|ticket| (*ticket, why));
        self.failed.extend(failed);
    }
}

/// Whether the rules let `ask` run beside these.
pub(crate) fn may_run(holders: &[Holder], ask: Ask) -> bool {
    let agent = holders.iter().any(|holder| holder.ask.is_agent());
    let normal = holders
        .iter()
        .any(|holder| matches!(holder.ask, Ask::Normal(_) | Ask::Nested(_)));
    let asynchronous = holders.iter().find(|holder| holder.ask.is_async());
    match (ask, asynchronous) {
        (Ask::Agent(..), _) => !agent,
        _ if normal => false,
        (Ask::Normal(_) | Ask::Async(..), None) => true,
        (_, Some(holder)) if holder.stale => false,
        (Ask::Normal(kind), Some(holder)) => {
            matches!(holder.ask, Ask::Async(_, mask) if mask.lets_pass(kind))
        }
        (Ask::Nested(parent), Some(holder)) => holder.ticket == parent,
        (Ask::Nested(_), None) | (Ask::Async(..), Some(_)) => false,
    }
}
