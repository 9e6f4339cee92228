//! One connection as a plain value: messages in, messages and events out.
//!
//! No stream and no clock: whoever owns them hands in what came and what time it is, calls
//! [`Session::tick`] when [`Session::wake`] says so, and sends what [`Session::outgoing`] has. After an
//! error nothing more may be handed in.
//!
//! ```text
//!            Hello both ways            Request ─► Answer, one at a time
//!  greeting ────────────────► open ◄──────────────────────────────────────┐
//!     │                         │   Ping ─► Pong, both ways, every beat   │
//!     └── fault, breach ────────┴── fault, breach, silence ──► over       │
//!                               └─────────────────────────────────────────┘
//! ```
//!
//! Invariants, each held by the tests below:
//! 1. Nothing but a hello or a fault is taken before versions are settled.
//! 2. A request is handed up only if the one before it was answered, and never twice.
//! 3. An answer is handed up only if it names the request, the migration and the epoch that were asked.
//! 4. Whatever comes, at most one message goes out for each that came in.
//! 5. A side that is not heard for the silence limit, or does not answer a ping within it, is given up.

mod error;

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use crate::{
    message::{Answer, Request, Underway},
    phase::{Epoch, MigrationId, Reason, RunState},
};

use super::{
    clock::{ClockFilter, ClockOffset},
    message::{
        CLOCK, DOWNTIME, Hello, MAGIC, MAX_FEATURES, Message, PROGRESS, RUN, millis, shared_version,
    },
};

pub use error::SessionError;

/// Where a ping is wanted soon it comes after this part of a beat.
const BRISK: u32 = 16;
/// The first pings, which come soon: the first of all shares the wire with the greeting,
/// and a short migration must not depend on that one for its measure of the other clock. As NTP does at
/// its start.
const BURST: u64 = 8;

/// What time it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Since some moment before the session began; never goes back.
    pub elapsed: Duration,
    /// The host's clock, in nanoseconds since 1970. May be set at any time.
    pub wall: i64,
}

/// Which end of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a connection has two ends")]
pub enum Role {
    /// The side that dialled: it asks.
    Asks,
    /// The side that accepted: it answers.
    Answers,
}

/// How this side speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// What it says first.
    pub hello: Hello,
    /// How often it asks whether the other side is there.
    pub beat: Duration,
    /// How long it takes silence.
    pub silence: Duration,
}

/// What both sides settled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Agreed {
    /// The version in use.
    pub version: u16,
    /// What both sides can beyond it.
    pub features: BTreeSet<String>,
}

/// What a message meant to whoever owns the session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "an owner must know every event")]
pub enum Event {
    /// Versions are settled; requests may be asked.
    Open,
    /// To be served, and answered by [`Session::answer`].
    Request {
        /// What the asker waits at most.
        within: Duration,
        /// The question.
        request: Request,
    },
    /// The answer to what was asked.
    Answer(Answer),
    /// The other side is there; the round trip may have told something about its clock.
    Beat,
    /// How far a migration is that the other side drives.
    Underway(Underway),
}

/// One end of one connection.
#[derive(Clone, Debug)]
pub struct Session {
    role: Role,
    terms: Terms,
    agreed: Option<Agreed>,
    /// The number of the last request, asked or taken.
    requests: u64,
    /// The request without an answer yet.
    open: Option<(MigrationId, Epoch)>,
    heard: Duration,
    pings: u64,
    pinged: Option<Now>,
    last_ping: Duration,
    next_ping: Duration,
    /// The number of the last ping of the other side.
    their_pings: u64,
    clock: ClockFilter,
    /// What the next ping tells.
    underway: Option<Underway>,
    out: VecDeque<Message>,
}

impl Session {
    /// A connection that was just made. The hello is the first to go out.
    #[must_use]
    pub fn new(role: Role, terms: Terms, now: Now) -> Self {
        let hello = Message::Hello(terms.hello.clone());
        Self {
            role,
            // Shorter than two beats, silence would be taken for death between two beats.
            terms: Terms {
                silence: terms.silence.max(terms.beat.saturating_mul(2)),
                ..terms
            },
            agreed: None,
            requests: 0,
            open: None,
            heard: now.elapsed,
            pings: 0,
            pinged: None,
            last_ping: now.elapsed,
            next_ping: now.elapsed,
            their_pings: 0,
            clock: ClockFilter::default(),
            underway: None,
            out: VecDeque::from([hello]),
        }
    }

    /// What both sides settled, once they have.
    #[must_use]
    pub fn agreed(&self) -> Option<&Agreed> {
        self.agreed.as_ref()
    }

    /// The other side's clock, if it shows it.
    #[must_use]
    pub fn clock(&self) -> Option<ClockOffset> {
        self.clock.best()
    }

    /// The next message to send.
    pub fn outgoing(&mut self) -> Option<Message> {
        self.out.pop_front()
    }

    /// Takes a message.
    ///
    /// # Errors
    ///
    /// The session is over. [`SessionError::fault`] is what to tell the other side before hanging up.
    pub fn message(&mut self, message: Message, now: Now) -> Result<Option<Event>, SessionError> {
        self.heard = now.elapsed;
        match (message, self.role) {
            (Message::Fault(fault), _) => Err(SessionError::Fault(fault)),
            (Message::Hello(hello), _) if self.agreed.is_none() => {
                self.agreed = Some(self.settle(hello)?);
                self.beat(now);
                Ok(Some(Event::Open))
            }
            (message, _) if self.agreed.is_none() => Err(out_of_turn(&message)),
            (Message::Ping { id, underway }, role) => {
                let expected = self.their_pings + 1;
                numbered("ping", id, expected)?;
                self.their_pings = id;
                let clock = self.has(CLOCK).then_some(now.wall);
                self.out.push_back(Message::Pong { id, clock });
                let is_taken = role == Role::Answers && self.has(PROGRESS);
                match underway.filter(|_| is_taken) {
                    Some(Underway { epoch, .. }) if !epoch.is_believable() => {
                        Err(SessionError::NoEpoch { epoch })
                    }
                    underway => Ok(underway.map(Event::Underway)),
                }
            }
            (Message::Pong { id, clock }, _) => {
                numbered("pong", id, self.pings)?;
                let sent = self
                    .pinged
                    .take()
                    .ok_or(SessionError::OutOfTurn { what: "pong" })?;
                if let Some(theirs) = clock.filter(|_| self.has(CLOCK)) {
                    let round_trip = now.elapsed.saturating_sub(sent.elapsed);
                    self.clock.sample(sent.wall, round_trip, theirs);
                }
                Ok(Some(Event::Beat))
            }
            (
                Message::Request {
                    id,
                    within_ms,
                    request,
                },
                Role::Answers,
            ) => {
                numbered("request", id, self.requests + 1)?;
                if self.open.is_some() {
                    return Err(SessionError::OutOfTurn { what: "request" });
                }
                if !request.epoch.is_believable() {
                    return Err(SessionError::NoEpoch {
                        epoch: request.epoch,
                    });
                }
                self.requests = id;
                self.open = Some((request.migration, request.epoch));
                let within = Duration::from_millis(within_ms);
                Ok(Some(Event::Request { within, request }))
            }
            (Message::Answer { id, answer }, Role::Asks) => {
                numbered("answer", id, self.requests)?;
                let asked = self.open.take();
                let asked = asked.ok_or(SessionError::OutOfTurn { what: "answer" })?;
                let (migration, epoch) = (answer.migration, answer.epoch);
                if asked != (migration, epoch) {
                    return Err(SessionError::Mismatch { migration, epoch });
                }
                Ok(Some(Event::Answer(answer)))
            }
            (message, _) => Err(out_of_turn(&message)),
        }
    }

    /// Asks. Only the side that dialled may, once versions are settled, and one request at a time.
    ///
    /// # Errors
    ///
    /// [`SessionError::OutOfTurn`]: not now. [`SessionError::Untold`]: the other side would let a paused guest run. The session
    /// goes on.
    pub fn ask(&mut self, mut request: Request, within: Duration) -> Result<(), SessionError> {
        if self.role != Role::Asks || self.agreed.is_none() || self.open.is_some() {
            return Err(SessionError::OutOfTurn {
                what: "own request",
            });
        }
        if request.run == Some(RunState::Paused) && !self.has(RUN) {
            return Err(SessionError::Untold);
        }
        self.requests += 1;
        self.open = Some((request.migration, request.epoch));
        request.run = request.run.filter(|_| self.has(RUN));
        request.downtime = request.downtime.filter(|_| self.has(DOWNTIME));
        self.out.push_back(Message::Request {
            id: self.requests,
            within_ms: millis(within),
            request,
        });
        Ok(())
    }

    /// Answers the request that was handed up last.
    ///
    /// # Errors
    ///
    /// [`SessionError::OutOfTurn`]: there is none. The session goes on.
    pub fn answer(&mut self, mut answer: Answer) -> Result<(), SessionError> {
        if self.role != Role::Answers || self.open.take().is_none() {
            return Err(SessionError::OutOfTurn { what: "own answer" });
        }
        answer.resumed = answer.resumed.filter(|_| self.has(DOWNTIME));
        self.out.push_back(Message::Answer {
            id: self.requests,
            answer,
        });
        Ok(())
    }

    /// Has the next ping tell how far a migration is, which is not waited for as long as a beat then. Only the last is kept.
    pub fn tell(&mut self, underway: Underway) {
        self.underway = Some(underway);
        if self.has(PROGRESS) {
            let soon = self.last_ping.saturating_add(self.terms.beat / BRISK);
            self.next_ping = self.next_ping.min(soon);
        }
    }

    /// Until when nothing is due.
    #[must_use]
    pub fn wake(&self) -> Duration {
        let unheard = self.heard.saturating_add(self.terms.silence);
        let beat = match self.pinged {
            Some(sent) => sent.elapsed.saturating_add(self.terms.silence),
            None if self.agreed.is_some() => self.next_ping,
            None => unheard,
        };
        unheard.min(beat)
    }

    /// Does what is due. `unfinished` is what there is of a frame that is not whole.
    ///
    /// # Errors
    ///
    /// [`SessionError::Silent`], [`SessionError::Unfinished`]: the session is over.
    pub fn tick(
        &mut self,
        now: Now,
        unfinished: Option<(usize, usize)>,
    ) -> Result<(), SessionError> {
        let since = |then: Duration| now.elapsed.saturating_sub(then);
        let after = match self.pinged {
            Some(sent) => since(self.heard).max(since(sent.elapsed)),
            None => since(self.heard),
        };
        if after >= self.terms.silence {
            return Err(match unfinished {
                Some((have, of)) => SessionError::Unfinished { have, of, after },
                None => SessionError::Silent { after },
            });
        }
        if self.agreed.is_some() && self.pinged.is_none() && now.elapsed >= self.next_ping {
            self.beat(now);
        }
        Ok(())
    }

    fn beat(&mut self, now: Now) {
        self.pings += 1;
        self.pinged = Some(now);
        let pause = match self.pings {
            0..=BURST => self.terms.beat / BRISK,
            _ => self.terms.beat,
        };
        self.last_ping = now.elapsed;
        self.next_ping = now.elapsed.saturating_add(pause);
        let is_told = self.role == Role::Asks && self.has(PROGRESS);
        self.out.push_back(Message::Ping {
            id: self.pings,
            underway: self.underway.take().filter(|_| is_told),
        });
    }

    /// Whether both sides can do that.
    fn has(&self, feature: &str) -> bool {
        self.agreed
            .as_ref()
            .is_some_and(|agreed| agreed.features.contains(feature))
    }

    fn settle(&self, theirs: Hello) -> Result<Agreed, SessionError> {
        if theirs.magic != MAGIC {
            return Err(SessionError::NotAPeer);
        }
        let ours = &self.terms.hello;
        let version = shared_version(ours.version, theirs.version);
        let version = version.ok_or(SessionError::Version {
            ours: ours.version,
            theirs: theirs.version,
        })?;
        if theirs.features.len() > MAX_FEATURES {
            let why = "it names more features than there may be";
            return Err(SessionError::Malformed(Reason::new(why)));
        }
        let features = ours.features.intersection(&theirs.features).cloned();
        Ok(Agreed {
            version,
            features: features.collect(),
        })
    }
}

fn numbered(what: &'static str, id: u64, expected: u64) -> Result<(), SessionError> {
    if id == expected {
        Ok(())
    } else {
        Err(SessionError::Misnumbered { what, id, expected })
    }
}

fn out_of_turn(message: &Message) -> SessionError {
    let what = match message {
        Message::Hello(_) => "hello",
        Message::Request { .. } => "request",
        Message::Answer { .. } => "answer",
        Message::Ping { .. } => "ping",
        Message::Pong { .. } => "pong",
        Message::Fault(_) => "fault",
    };
    SessionError::OutOfTurn { what }
}

#[cfg(test)]
mod tests;
