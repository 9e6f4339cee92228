//! One QMP connection as plain data: who waits, what is in flight, what a reply answers.
//!
//! No clock, no stream, no waker lives here; [`Monitor`](crate::Monitor) and its task own
//! those. `W` is whatever tells a caller of its answer.
//!
//! ```text
//!  submit ──> waiting ──next_message──> in flight ──reply──> W
//!               │ depart                  │ depart
//!            withdrawn                 orphan, until its reply comes
//! ```
//!
//! Invariants:
//! 1. An id is used once. A reply reaches the one caller whose id it names, or nobody. A command that is sent while
//!    nothing is in flight goes without one, and a reply without one is its: nothing else is sent so before it is
//!    answered, and QEMU answers in order in band. The few bytes are a sixth of what a query costs (measured: QEMU reads
//!    them one by one).
//! 2. At most [`WINDOW`] commands are in flight in a lane, one fewer in band beside an
//!    out-of-band lane: QEMU queues eight requests and stops reading at the eighth (seen with
//!    7.2), and then a rescue could not get through.
//! 3. One command with descriptors is in flight at a time: QEMU keeps the newest set it
//!    received only, so a second would take the first one's place before it ran.
//! 4. Every command taken from the queue ends by a reply, a proof that its reply will not
//!    come, or the end of the connection.

use std::{borrow::Cow, collections::VecDeque, mem, os::fd::OwnedFd};

use crate::{
    error::Closed,
    message::{self, Id},
    qmp::{Health, Lane},
};

/// How many requests QEMU queues on one monitor.
pub(crate) const WINDOW: usize = 8;

/// A command on its way in.
pub(crate) struct Order<W> {
    pub(crate) name: Cow<'static, str>,
    /// The request up to its id, from [`message::begin`].
    pub(crate) line: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) lane: Lane,
    pub(crate) waiter: W,
}

/// What became of a command whose caller left. Gives the waiter back, to be dropped where no
/// lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Departure<W> {
    /// It never left this process.
    Withdrawn(W),
    /// QEMU may have it; its reply will reach nobody.
    Orphaned(W),
    /// It had ended before.
    Ended,
}

/// Whom a reply concerns.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Addressee<W> {
    One(W),
    /// An error without id, with several commands in flight.
    All(Vec<W>),
    Nobody,
}

/// Answers that reached nobody, since the connection was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Replies to commands whose callers had left.
    pub late: u64,
    /// Replies with an id that no command in flight has, and messages of no known shape.
    pub unknown: u64,
    /// Errors without an id.
    pub unattributed: u64,
}

pub(crate) struct Protocol<W> {
    last_id: u64,
    waiting: VecDeque<Waiting<W>>,
    urgent: VecDeque<Waiting<W>>,
    /// Short: the window bounds it, so it is searched from its front.
    in_flight: Vec<InFlight<W>>,
    negotiated: bool,
    oob: bool,
    /// Counts the probes; the running one, if any, is `listening`.
    probes: u64,
    listening: bool,
    silent: bool,
    closing: bool,
    closed: Option<Closed>,
    pub(crate) counters: Counters,
}

struct Waiting<W> {
    id: u64,
    name: Cow<'static, str>,
    line: Vec<u8>,
    fds: Vec<OwnedFd>,
    role: Role<W>,
}

struct InFlight<W> {
    id: u64,
    /// Whether it was sent without its id.
    unnamed: bool,
    name: Cow<'static, str>,
    lane: Lane,
    has_fds: bool,
    role: Role<W>,
}

enum Role<W> {
    /// Somebody waits for it.
    Awaited(W),
    /// Its caller left.
    Orphan { overdue: bool },
    /// An error without id may have been its reply.
    Doubtful,
    /// Ours: proves by its reply that QEMU lives, or that all before it were answered.
    Internal,
}

impl<W> Protocol<W> {
    /// `first_id` is what the first command gets.
    pub(crate) fn new(first_id: u64) -> Self {
        Self {
            last_id: first_id - 1,
            waiting: VecDeque::new(),
            urgent: VecDeque::new(),
            in_flight: Vec::new(),
            negotiated: false,
            oob: false,
            probes: 0,
            listening: false,
            silent: false,
            closing: false,
            closed: None,
            counters: Counters::default(),
        }
    }

    /// The negotiation is over. Ids start again at 1, to be short.
    ///
    /// The negotiation itself goes by a long random id. QEMU runs in-band commands one by one, so
    /// once that one is answered, no reply to a former client's command can come any more, named or not.
    pub(crate) fn negotiated(&mut self, oob: bool) {
        self.negotiated = true;
        self.oob = oob;
        self.last_id = 0;
    }

    /// Queues a command.
    pub(crate) fn submit(&mut self, order: Order<W>) -> Result<u64, Closed> {
        match &self.closed {
            Some(why) => Err(why.clone()),
            None if self.closing => Err(Closed::Local),
            None => Ok(self.enqueue(
                order.lane,
                order.name,
                order.line,
                order.fds,
                Role::Awaited(order.waiter),
            )),
        }
    }

    /// The caller of `id` left; `overdue` tells whether its deadline came.
    pub(crate) fn depart(&mut self, id: u64, overdue: bool) -> Departure<W> {
        let left = self.leave(id, overdue);
        let ended = matches!(left, Departure::Ended);
        if overdue && !ended && !self.in_flight.is_empty() {
            self.probe();
        }
        left
    }

    fn leave(&mut self, id: u64, overdue: bool) -> Departure<W> {
        for queue in [&mut self.waiting, &mut self.urgent] {
            if let Ok(at) = queue.binary_search_by_key(&id, |waiting| waiting.id) {
                let removed = queue.remove(at).map(|waiting| waiting.role);
                if let Some(Role::Awaited(waiter)) = removed {
                    return Departure::Withdrawn(waiter);
                }
            }
        }
        let Some(flight) = self.in_flight.iter_mut().find(|flight| flight.id == id) else {
            return Departure::Ended;
        };
        match mem::replace(&mut flight.role, Role::Orphan { overdue }) {
            Role::Awaited(waiter) => Departure::Orphaned(waiter),
            other => {
                flight.role = other;
                Departure::Ended
            }
        }
    }

    /// Appends the next message that may be sent to `out`, and gives its descriptors.
    ///
    /// One with descriptors is given only if `alone`: they ride on its first byte.
    pub(crate) fn next_message(&mut self, out: &mut Vec<u8>, alone: bool) -> Option<Vec<OwnedFd>> {
        let lane = if self.may_send(Lane::OutOfBand, alone) {
            Lane::OutOfBand
        } else if self.may_send(Lane::InBand, alone) {
            Lane::InBand
        } else {
            return None;
        };
        let Waiting {
            id,
            name,
            line,
            fds,
            role,
        } = self.queue(lane).pop_front()?;
        // The negotiation is named: a former client's command may be answered before it.
        let unnamed = self.negotiated && lane == Lane::InBand && self.in_flight.is_empty();
        message::finish(&line, (!unnamed).then_some(id), out);
        self.in_flight.push(InFlight {
            id,
            unnamed,
            name,
            lane,
            has_fds: !fds.is_empty(),
            role,
        });
        Some(fds)
    }

    fn may_send(&mut self, lane: Lane, alone: bool) -> bool {
        let reserved = usize::from(lane == Lane::InBand && self.oob);
        let out = self
            .in_flight
            .iter()
            .filter(|flight| flight.lane == lane)
            .count();
        let fds_out = self.in_flight.iter().any(|flight| flight.has_fds);
        match self.queue(lane).front() {
            None => false,
            Some(next) => out < WINDOW - reserved && (next.fds.is_empty() || (alone && !fds_out)),
        }
    }

    /// Whether a command waits to be sent.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty() || !self.urgent.is_empty()
    }

    /// Anything at all was read: QEMU lives.
    pub(crate) fn heard(&mut self) {
        self.listening = false;
        self.silent = false;
    }

    /// A return or, if `refused`, an error was read.
    pub(crate) fn reply(&mut self, id: Id, refused: bool) -> Addressee<W> {
        let of_it = |flight: &InFlight<W>| match id {
            Id::Number(id) => flight.id == id && !flight.unnamed,
            Id::Missing => flight.unnamed,
            Id::Foreign => false,
        };
        match self.in_flight.iter().position(of_it) {
            Some(at) => self.reply_at(at),
            None if refused && id == Id::Missing => self.blame(),
            None => {
                self.counters.unknown += 1;
                tracing::debug!(?id, "a reply to no command of ours");
                Addressee::Nobody
            }
        }
    }

    fn reply_at(&mut self, at: usize) -> Addressee<W> {
        // Not `swap_remove`: the order of sending is what `Doubtful` is judged by.
        let ended = self.in_flight.remove(at);
        if ended.lane == Lane::InBand {
            // QEMU answers in order in band and at once out of band, so whatever was sent before
            // has been answered.
            let mut place = 0;
            self.in_flight.retain(|flight| {
                place += 1;
                place > at || !matches!(flight.role, Role::Doubtful)
            });
        }
        match ended.role {
            Role::Awaited(waiter) => Addressee::One(waiter),
            Role::Orphan { .. } | Role::Doubtful => {
                self.counters.late += 1;
                tracing::debug!(id = ended.id, command = %ended.name, "a reply came after its caller left");
                Addressee::Nobody
            }
            Role::Internal => Addressee::Nobody,
        }
    }

    /// An error without id: QEMU could not read what some command said.
    fn blame(&mut self) -> Addressee<W> {
        self.counters.unattributed += 1;
        if !self.negotiated {
            // A former client's command, refused late. The negotiation is one that every QEMU can read.
            return Addressee::Nobody;
        }
        if self.in_flight.len() <= 1 {
            return match self.in_flight.pop().map(|flight| flight.role) {
                Some(Role::Awaited(waiter)) => Addressee::One(waiter),
                _ => Addressee::Nobody,
            };
        }
        let mut concerned = Vec::new();
        for flight in &mut self.in_flight {
            match mem::replace(&mut flight.role, Role::Doubtful) {
                Role::Awaited(waiter) => concerned.push(waiter),
                _ => continue,
            }
        }
        // All but one of them will still be answered. The reply to a command sent after them
        // tells when that is over; without it the next job would wait for the one that is not.
        self.send_internal(Lane::InBand, "query-version");
        Addressee::All(concerned)
    }

    /// Starts to listen for a sign of life, and asks for one where the main loop cannot stop it.
    fn probe(&mut self) {
        if self.listening || self.silent {
            return;
        }
        self.listening = true;
        self.probes += 1;
        let asked = self
            .in_flight
            .iter()
            .any(|flight| flight.lane == Lane::OutOfBand && matches!(flight.role, Role::Internal));
        if self.oob && !asked {
            self.send_internal(Lane::OutOfBand, "query-yank");
        }
    }

    /// The number of the probe that runs; whoever has a clock ends it by [`Self::probe_ended`].
    pub(crate) fn running_probe(&self) -> Option<u64> {
        self.listening.then_some(self.probes)
    }

    /// The time of probe `number` is over.
    pub(crate) fn probe_ended(&mut self, number: u64) {
        if self.running_probe() == Some(number) {
            self.listening = false;
            self.silent = true;
        }
    }

    /// Commands in flight whose callers left.
    pub(crate) fn orphans(&self) -> usize {
        let left =
            |flight: &&InFlight<W>| matches!(flight.role, Role::Orphan { .. } | Role::Doubtful);
        self.in_flight.iter().filter(left).count()
    }

    pub(crate) fn health(&self) -> Health {
        let overdue = |flight: &InFlight<W>| matches!(flight.role, Role::Orphan { overdue: true });
        if self.closed.is_some() || self.closing {
            Health::Closed
        } else if self.silent {
            Health::Unresponsive
        } else if self.listening || self.in_flight.iter().any(overdue) {
            Health::Busy
        } else {
            Health::Ok
        }
    }

    /// Nothing more is wanted from this connection.
    pub(crate) fn close_soon(&mut self) {
        self.closing = true;
    }

    pub(crate) fn closing(&self) -> bool {
        self.closing
    }

    pub(crate) fn closed(&self) -> Option<&Closed> {
        self.closed.as_ref()
    }

    /// Ends the connection. Gives everyone who waits, and whether QEMU may have their command.
    pub(crate) fn close(&mut self, why: Closed) -> Vec<(W, bool)> {
        self.closed.get_or_insert(why);
        let sent = mem::take(&mut self.in_flight)
            .into_iter()
            .map(|flight| (flight.role, true));
        let queued = mem::take(&mut self.urgent)
            .into_iter()
            .chain(mem::take(&mut self.waiting));
        let unsent = queued.map(|waiting| (waiting.role, false));
        sent.chain(unsent)
            .filter_map(|(role, sent)| match role {
                Role::Awaited(waiter) => Some((waiter, sent)),
                _ => None,
            })
            .collect()
    }

    fn queue(&mut self, lane: Lane) -> &mut VecDeque<Waiting<W>> {
        match lane {
            Lane::InBand => &mut self.waiting,
            Lane::OutOfBand => &mut self.urgent,
        }
    }

    fn enqueue(
        &mut self,
        lane: Lane,
        name: Cow<'static, str>,
        line: Vec<u8>,
        fds: Vec<OwnedFd>,
        role: Role<W>,
    ) -> u64 {
        self.last_id += 1;
        let id = self.last_id;
        self.queue(lane).push_back(Waiting {
            id,
            name,
            line,
            fds,
            role,
        });
        id
    }

    fn send_internal(&mut self, lane: Lane, name: &'static str) {
        let line = message::begin(name, lane, None::<&()>).expect("a plain name becomes JSON");
        self.enqueue(lane, Cow::Borrowed(name), line, Vec::new(), Role::Internal);
    }
}

#[cfg(test)]
mod tests;
