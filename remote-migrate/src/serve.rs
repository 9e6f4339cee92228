//! Serves the destination side: does what [`DestinationMachine`] says, on a host and a journal.
//!
//! One machine a migration, one request at a time each; migrations do not wait for each other. The
//! work runs on tasks of its own, so that a caller that goes away, or a connection that breaks, tears
//! nothing in the middle. Nothing is decided here.

mod slots;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::{
    destination::{DestinationAction, DestinationEnd, DestinationInput, DestinationMachine},
    drive::on_time,
    error::{Error, ErrorKind},
    host::{DestinationHost, Load, Step},
    journal::{DestinationRecord, Journal, Record},
    message::{Answer, Call, Fate, Ran, Reply, Request, Underway},
    peer::{self, Peer, Service},
    phase::{MigrationId, Owner, Phase, Reason, Side},
    verdict::{Heard, Ruling},
};

use slots::{Place, Slots};

/// A write to the journal, a look at or the end of a copy: 30 s, counted apart from the deadline of the
/// request, since what undoes must also run when that deadline has just passed.
const UPKEEP: Duration = Duration::from_secs(30);

/// The serving side of a daemon: takes guests in, and answers for the migrations it drives itself.
///
/// A clone is another handle to the same side. It is a [`Service`]: put an
/// [`InProcess`](crate::InProcess) or a wire in front of it.
#[derive(Clone)]
pub struct Destination {
    inner: Arc<Inner>,
}

/// How a migration stands here after something that no request began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Standing {
    /// Whom this side takes for the owner; `None` if nothing is remembered, or not any more.
    pub owner: Option<Owner>,
    /// Whether nothing is left to do here, but for repeating the final answer to the source.
    pub settled: bool,
}

struct Inner {
    host: Arc<dyn DestinationHost>,
    journal: Arc<dyn Journal>,
    slots: Slots,
}

enum Outcome {
    /// With what went wrong here so far.
    Reply(Reply, Option<Reason>),
    End(DestinationEnd, Standing),
}

impl Destination {
    /// The serving side on this host and journal.
    #[must_use]
    pub fn new(host: Arc<dyn DestinationHost>, journal: Arc<dyn Journal>) -> Self {
        Self {
            inner: Arc::new(Inner {
                host,
                journal,
                slots: Slots::default(),
            }),
        }
    }

    /// Sets right what a restart or a broken link left: looks at the copy, asks the source if there is
    /// one to ask, and does what follows for certain. Nothing is done upon silence.
    ///
    /// A daemon calls it for every record of its journal when it starts, before it serves, and later
    /// whenever a source was lost or is back.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Journal`], [`ErrorKind::Host`]: not done, try again. [`ErrorKind::Conflict`]: both
    /// sides claim the guest.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the waiting, not what was begun.
    pub async fn reconcile(
        &self,
        migration: MigrationId,
        source: Option<&dyn Peer>,
        deadline: Instant,
    ) -> Result<Standing, Error> {
        let heard = match (source, self.inner.load(migration).await) {
            (Some(source), Ok(Some(record))) => ask_source(source, &record, deadline).await,
            // Without a record there is nothing to ask about; an unreadable one is reported below.
            _ => Heard::NotAsked,
        };
        self.run(migration, DestinationInput::Reconcile(heard), deadline)
            .await
    }

    /// Refuses a guest that is on its way, if its copy here is not complete yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TooLate`]: the copy is complete; only the source can turn back, if it still can.
    /// Else as for [`Destination::reconcile`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the waiting, not what was begun.
    pub async fn cancel(
        &self,
        migration: MigrationId,
        deadline: Instant,
    ) -> Result<Standing, Error> {
        self.run(migration, DestinationInput::Cancel, deadline)
            .await
    }

    /// Decides a migration by the word of an operator, in place of the source.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotRuled`]: that was not done, and why, and what else can be. Else as for [`Destination::reconcile`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the waiting, not what was begun.
    pub async fn resolve(
        &self,
        migration: MigrationId,
        ruling: Ruling,
        deadline: Instant,
    ) -> Result<Standing, Error> {
        self.run(migration, DestinationInput::Rule(ruling), deadline)
            .await
    }

    async fn run(
        &self,
        migration: MigrationId,
        input: DestinationInput,
        deadline: Instant,
    ) -> Result<Standing, Error> {
        let fail = |kind, phase, owner| {
            Error::new(migration, (Side::Destination, phase), kind, owner).settled(false)
        };
        let in_doubt = |kind| fail(kind, Phase::Finish, Owner::InDoubt);
        let is_ruling = matches!(input, DestinationInput::Rule(_));
        match self.spawn(migration, input, deadline).await {
            Ok(Outcome::End(DestinationEnd::TooLate(phase), standing)) => Err(fail(
                ErrorKind::TooLate,
                phase,
                standing.owner.unwrap_or(Owner::InDoubt),
            )),
            Ok(Outcome::End(DestinationEnd::Conflict, _)) => Err(in_doubt(ErrorKind::Conflict)),
            Ok(Outcome::End(DestinationEnd::Waiting(why), standing)) if is_ruling => {
                let owner = standing.owner.unwrap_or(Owner::InDoubt);
                Err(fail(ErrorKind::NotRuled, Phase::Finish, owner)
                    .cause(Some(why.as_str().into())))
            }
            Ok(Outcome::End(_, standing)) => Ok(standing),
            Ok(Outcome::Reply(..)) => unreachable!("only a request is replied to"),
            Err((kind, why)) => Err(in_doubt(kind).cause(Some(why.as_str().into()))),
        }
    }

    /// Works on a task of its own, and waits for it until the deadline.
    async fn spawn(
        &self,
        migration: MigrationId,
        input: DestinationInput,
        deadline: Instant,
    ) -> Result<Outcome, (ErrorKind, Reason)> {
        let inner = Arc::clone(&self.inner);
        let task = tokio::spawn(async move { inner.work(migration, input, deadline).await });
        match timeout_at(deadline, task).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(panic)) => Err((ErrorKind::Host, Reason::of(&panic))),
            Err(late) => Err((ErrorKind::Host, Reason::of(&late))),
        }
    }
}

#[async_trait]
impl Service for Destination {
    async fn serve(&self, request: Request, deadline: Instant) -> Answer {
        let Request {
            migration,
            epoch,
            domain,
            ..
        } = request;
        let (reply, trouble) = if matches!(request.call, Call::Status(Side::Source)) {
            (self.inner.source_status(migration).await, None)
        } else {
            match self
                .spawn(migration, DestinationInput::Request(request), deadline)
                .await
            {
                Ok(Outcome::Reply(reply, trouble)) => (reply, trouble),
                Ok(Outcome::End(..)) => unreachable!("a request ends with a reply"),
                Err((_, why)) => (Reply::Busy(why), None),
            }
        };
        let owned = reply == Reply::Owned;
        let step = Step::new(migration, domain, deadline);
        let resumed = owned.then(|| self.inner.host.resumed_at(step)).flatten();
        Answer {
            migration,
            epoch,
            reply,
            trouble,
            resumed,
        }
    }

    fn hear(&self, underway: Underway) {
        let host = &self.inner.host;
        host.transferred(underway.migration, underway.transfer, underway.estimate);
    }
}

async fn ask_source(source: &dyn Peer, record: &DestinationRecord, deadline: Instant) -> Heard {
    let request = Request {
        migration: record.migration,
        epoch: record.epoch,
        domain: record.domain,
        call: Call::Status(Side::Source),
        run: None,
        downtime: None,
    };
    match peer::ask(source, request, deadline)
        .await
        .map(|answer| answer.reply)
    {
        Ok(Reply::Status(status)) if status.side == Side::Source => Heard::Said(status),
        Ok(Reply::Unknown) => Heard::NoRecord,
        Ok(_) | Err(_) => Heard::Silence,
    }
}

impl Inner {
    async fn work(
        &self,
        migration: MigrationId,
        input: DestinationInput,
        deadline: Instant,
    ) -> Result<Outcome, (ErrorKind, Reason)> {
        let place = self.slots.place(migration).ok_or_else(|| {
            (
                ErrorKind::Host,
                Reason::new("too many migrations are under way here"),
            )
        })?;
        let outcome = self.work_at(&place, migration, input, deadline).await;
        self.slots.leave(migration, place);
        outcome
    }

    async fn work_at(
        &self,
        place: &Place,
        migration: MigrationId,
        input: DestinationInput,
        deadline: Instant,
    ) -> Result<Outcome, (ErrorKind, Reason)> {
        let mut seat = timeout_at(deadline, place.lock()).await.map_err(|_| {
            (
                ErrorKind::Host,
                Reason::new("an earlier request is still served"),
            )
        })?;
        let mut machine = match seat.machine.take() {
            Some(machine) => machine,
            None => DestinationMachine::new(migration, self.load(migration).await?),
        };
        let refused = match &input {
            DestinationInput::Request(request) => self.admit(request, &machine).await,
            _ => None,
        };
        let moved = match &input {
            DestinationInput::Request(request)
                if request.call == Call::Confirm(Fate::Keep) && machine.record().is_some() =>
            {
                let step = Step::new(migration, request.domain, deadline);
                Some((step, request.downtime))
            }
            _ => None,
        };
        let outcome = match refused {
            Some(reply) => Outcome::Reply(reply, None),
            None => {
                machine.on(input);
                self.execute(&mut machine, &mut seat.trouble, deadline)
                    .await
            }
        };
        if let (Some((step, downtime)), Outcome::Reply(Reply::Closed, _)) = (moved, &outcome) {
            self.host.moved(step, downtime);
        }
        seat.machine = Some(machine);
        Ok(outcome)
    }

    /// Refuses a guest that another migration still moves.
    async fn admit(&self, request: &Request, machine: &DestinationMachine) -> Option<Reply> {
        let new = machine.record().is_none() && !machine.is_over();
        if !new || !matches!(request.call, Call::Prepare(_)) {
            return None;
        }
        let refusal = Reply::Refused(Reason::new(
            "an earlier migration of this guest is not settled",
        ));
        if !self.slots.claim(request) {
            return Some(refusal);
        }
        match on_time(Instant::now() + UPKEEP, self.journal.list()).await {
            Ok(records) => records
                .iter()
                .any(|record| {
                    record.domain() == request.domain
                        && record.migration() != request.migration
                        && record.refuses_start()
                })
                .then_some(refusal),
            Err(cause) => Some(Reply::Refused(Reason::of(&*cause))),
        }
    }

    /// Does what the machine says until it has an answer.
    async fn execute(
        &self,
        machine: &mut DestinationMachine,
        trouble: &mut Option<Reason>,
        deadline: Instant,
    ) -> Outcome {
        loop {
            let input = match machine.action() {
                DestinationAction::Reply(reply) => {
                    machine.on(DestinationInput::Replied);
                    return Outcome::Reply(reply, trouble.clone());
                }
                DestinationAction::Done(end) => {
                    machine.on(DestinationInput::Replied);
                    let owner = machine.record().map(|record| record.stage.owner());
                    let settled = end == DestinationEnd::Settled;
                    return Outcome::End(end, Standing { owner, settled });
                }
                action => self.act(action, machine, trouble, deadline).await,
            };
            machine.on(input);
        }
    }

    async fn act(
        &self,
        action: DestinationAction,
        machine: &DestinationMachine,
        trouble: &mut Option<Reason>,
        deadline: Instant,
    ) -> DestinationInput {
        use DestinationInput as In;
        let migration = machine.migration();
        let domain = machine.record().map_or(Uuid::nil(), |record| record.domain);
        let now = Step::new(migration, domain, deadline);
        let upkeep = Step::new(migration, domain, Instant::now() + UPKEEP);
        let mut note = |what: &'static str, why: &Reason| {
            tracing::warn!(%migration, %domain, %why, "{what}");
            trouble.get_or_insert_with(|| why.clone());
        };
        match action {
            DestinationAction::Record(record) => {
                let record = Record::Destination(record);
                match on_time(upkeep.deadline, self.journal.store(&record)).await {
                    Ok(()) => In::Recorded,
                    Err(cause) => {
                        note("migration record was not stored", &Reason::of(&*cause));
                        In::RecordFailed
                    }
                }
            }
            DestinationAction::Prepare(guest) => {
                match on_time(deadline, self.host.prepare(now, &guest)).await {
                    Ok(prepared) => In::Prepared(prepared),
                    Err(cause) => {
                        let why = Reason::of(&*cause);
                        note("copy was not prepared", &why);
                        In::PrepareFailed(why)
                    }
                }
            }
            DestinationAction::Resume => match on_time(deadline, self.host.resume(now)).await {
                Ok(prepared) => In::Prepared(prepared),
                Err(cause) => {
                    let why = Reason::of(&*cause);
                    note("post-copy was not taken up again", &why);
                    In::PrepareFailed(why)
                }
            },
            DestinationAction::Load => match on_time(deadline, self.host.load(now)).await {
                Ok(Load::Complete) => In::Loaded,
                Ok(Load::Failed(why)) => {
                    note("copy will not be complete", &why);
                    In::LoadFailed(why)
                }
                Ok(Load::Loading) => In::Loading,
                Err(cause) => {
                    note("loading guest cannot be seen", &Reason::of(&*cause));
                    In::Loading
                }
            },
            DestinationAction::Start(run) => {
                let (ran, why) = match timeout_at(deadline, self.host.start(now, run)).await {
                    Ok(Ok(())) => return In::Started,
                    Ok(Err(error)) => (error.ran, Reason::of(&error)),
                    Err(late) => (Ran::Maybe, Reason::of(&late)),
                };
                note("guest was not started", &why);
                In::StartFailed { ran, why }
            }
            DestinationAction::Inspect => {
                match on_time(upkeep.deadline, self.host.inspect(upkeep)).await {
                    Ok(copy) => In::Local(copy),
                    Err(cause) => {
                        note("copy cannot be seen", &Reason::of(&*cause));
                        In::InspectFailed
                    }
                }
            }
            DestinationAction::Discard => {
                let told = timeout_at(upkeep.deadline, self.host.trouble(upkeep));
                if let Ok(Some(why)) = told.await {
                    note("copy came to nothing", &why);
                }
                match on_time(upkeep.deadline, self.host.discard(upkeep)).await {
                    Ok(()) => In::Discarded,
                    Err(cause) => {
                        note("copy was not discarded", &Reason::of(&*cause));
                        In::DiscardFailed
                    }
                }
            }
            DestinationAction::Forget => {
                let gone = self.journal.remove(migration, Side::Destination);
                match on_time(upkeep.deadline, gone).await {
                    Ok(()) => In::Forgotten,
                    Err(cause) => {
                        note("migration record was not removed", &Reason::of(&*cause));
                        In::ForgetFailed
                    }
                }
            }
            DestinationAction::Wait | DestinationAction::Reply(_) | DestinationAction::Done(_) => {
                unreachable!("a machine at work has something to do")
            }
        }
    }

    async fn load(
        &self,
        migration: MigrationId,
    ) -> Result<Option<DestinationRecord>, (ErrorKind, Reason)> {
        let read = self.journal.load(migration, Side::Destination);
        match on_time(Instant::now() + UPKEEP, read).await {
            Ok(Some(Record::Destination(record))) => Ok(Some(record)),
            Ok(_) => Ok(None),
            Err(cause) => Err((ErrorKind::Journal, Reason::of(&*cause))),
        }
    }

    /// What this daemon's own journal says of a migration that it drives.
    async fn source_status(&self, migration: MigrationId) -> Reply {
        let read = self.journal.load(migration, Side::Source);
        match on_time(Instant::now() + UPKEEP, read).await {
            Ok(Some(Record::Source(record))) => Reply::Status(record.stage.status()),
            Ok(_) => Reply::Unknown,
            Err(cause) => Reply::Busy(Reason::of(&*cause)),
        }
    }
}
