//! Drives the source side: does what [`SourceMachine`] says, on a host, a peer and a journal.
//!
//! All waiting of the source is here, each wait with a deadline; nothing is decided here. Dropping one
//! of these futures is like a crash of the daemon: the journal has all that matters, and [`recover`]
//! goes on from it. A daemon runs them on a task of its own and lets its callers wait for that.

mod outcome;

use std::{convert::Infallible, error::Error as StdError, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    control::{Control, Progress},
    error::{Error, ErrorKind},
    host::{HostError, SourceHost, Step},
    journal::{Journal, Record, SourceRecord, SourceStage},
    message::{Answer, Call, Downtime, Prepared, Reply, Request, Underway},
    peer::{self, Effect, Peer, PeerError},
    phase::{Epoch, MigrationId, Owner, Phase, Reason, RunState, Side},
    plan::{Limits, Plan, Report},
    source::{EndWhy, SourceAction, SourceEnd, SourceInput, SourceMachine},
    verdict::Ruling,
};

use outcome::{Cause, Chains, Concluded, Trouble};

/// Moves a guest to `peer`.
///
/// `Ok` means that the destination has said that the guest is its own. Every error names the owner
/// ([`Error::owner_now`]).
///
/// # Errors
///
/// - [`ErrorKind::Unsettled`]: an earlier migration of this guest is in the journal still, and not only because its
///   destination was not told yet.
/// - [`ErrorKind::Cancelled`], [`ErrorKind::Host`], [`ErrorKind::Refused`], [`ErrorKind::Silent`],
///   [`ErrorKind::Journal`], [`ErrorKind::TooOld`]: it failed before the point of return, or was refused after; the
///   source keeps the guest.
/// - [`ErrorKind::InDoubt`]: no final answer came; the guest is stopped here, and may run there.
/// - [`ErrorKind::Ruled`]: none came, and by the word of an operator ([`Control::rule`]) the source keeps the guest.
/// - [`ErrorKind::Lost`]: the last complete copy was killed from outside.
/// - [`ErrorKind::Superseded`], [`ErrorKind::Conflict`]: as they say.
///
/// # Cancel safety
///
/// Dropping the future is a crash of the daemon as far as this migration goes: nothing is undone and
/// nothing is lost. Call [`recover`] with the same id. To stop a migration, use [`Control::cancel`].
pub async fn migrate(
    plan: &Plan,
    host: &dyn SourceHost,
    peer: &dyn Peer,
    journal: &dyn Journal,
    control: &Control,
) -> Result<Report, Error> {
    let fail = |kind| {
        Error::new(
            plan.migration,
            (Side::Source, Phase::Begin),
            kind,
            Owner::Source,
        )
    };
    let deadline = Instant::now() + plan.limits.look;
    let records = on_time(deadline, journal.list())
        .await
        .map_err(|cause| fail(ErrorKind::Journal).cause(Some(cause)))?;
    let unsettled = |record: &Record| record.domain() == plan.domain && record.refuses_migration();
    if records.iter().any(unsettled) {
        return Err(fail(ErrorKind::Unsettled));
    }
    let record = SourceRecord {
        migration: plan.migration,
        domain: plan.domain,
        epoch: Epoch::FIRST,
        // What the guest does is known only once the host has described it.
        run: RunState::Running,
        peer: plan.peer.clone(),
        stage: SourceStage::Begin,
    };
    let machine = SourceMachine::begin(record, plan.home.clone());
    Drive::new(machine, plan.limits, host, peer, journal, control)
        .run()
        .await?
        .moved()
}

/// Takes up a migration that this daemon drove before, and brings it to an end if it can.
///
/// For a daemon that starts, for a future that was dropped, and for a peer that is back.
///
/// # Errors
///
/// As for [`migrate`], but a guest that is kept is no failure here; and [`ErrorKind::NotFound`]: the
/// journal has nothing of it, so it is settled, or never was.
///
/// # Cancel safety
///
/// As for [`migrate`].
pub async fn recover(
    migration: MigrationId,
    limits: Limits,
    host: &dyn SourceHost,
    peer: &dyn Peer,
    journal: &dyn Journal,
    control: &Control,
) -> Result<Report, Error> {
    let machine = SourceMachine::recover(load(migration, limits, journal).await?);
    Ok(Drive::new(machine, limits, host, peer, journal, control)
        .run()
        .await?
        .report)
}

/// Ends a migration in doubt by the word of an operator. The peer is not asked, nor told: that is
/// left to [`recover`], should it return.
///
/// # Errors
///
/// As for [`recover`].
///
/// # Cancel safety
///
/// As for [`migrate`].
pub async fn resolve(
    migration: MigrationId,
    ruling: Ruling,
    limits: Limits,
    host: &dyn SourceHost,
    journal: &dyn Journal,
) -> Result<Report, Error> {
    let machine = SourceMachine::rule(load(migration, limits, journal).await?, ruling);
    let limits = Limits {
        patience: Duration::ZERO,
        ..limits
    };
    let control = Control::new();
    let mut drive = Drive::new(machine, limits, host, &Nobody, journal, &control);
    drive.is_ruled = true;
    Ok(drive.run().await?.report)
}

async fn load(
    migration: MigrationId,
    limits: Limits,
    journal: &dyn Journal,
) -> Result<SourceRecord, Error> {
    let fail = |kind, owner| Error::new(migration, (Side::Source, Phase::Begin), kind, owner);
    let deadline = Instant::now() + limits.look;
    match on_time(deadline, journal.load(migration, Side::Source)).await {
        Ok(Some(Record::Source(record))) => Ok(record),
        Ok(_) => Err(fail(ErrorKind::NotFound, Owner::Source)),
        Err(cause) => Err(fail(ErrorKind::Journal, Owner::InDoubt)
            .settled(false)
            .cause(Some(cause))),
    }
}

/// The peer of an operator's ruling: it is not there.
struct Nobody;

#[async_trait::async_trait]
impl Peer for Nobody {
    async fn ask(&self, _request: Request, _deadline: Instant) -> Result<Answer, PeerError> {
        Err(PeerError::not_sent("an operator answers in its place"))
    }
}

/// Tells the other side how the memory moves, for as long as it does.
fn tell<'a>(
    control: &Control,
    peer: &'a dyn Peer,
    machine: &SourceMachine,
) -> impl Future<Output = Infallible> + use<'a> {
    let (migration, epoch) = (machine.migration(), machine.epoch());
    let mut progress = control.progress();
    async move {
        // The sender lives in the control, which lives as long as the drive.
        while progress.changed().await.is_ok() {
            let Progress {
                transfer, estimate, ..
            } = *progress.borrow_and_update();
            peer.tell(Underway {
                migration,
                epoch,
                transfer,
                estimate,
            });
        }
        std::future::pending().await
    }
}

struct Drive<'a> {
    machine: SourceMachine,
    limits: Limits,
    host: &'a dyn SourceHost,
    peer: &'a dyn Peer,
    journal: &'a dyn Journal,
    control: &'a Control,
    began: Instant,
    /// When trying again ends; set by the first pause.
    patience: Option<Instant>,
    turned_back: bool,
    is_ruled: bool,
    trouble: Option<Trouble>,
    chains: Chains,
    downtime: Option<Downtime>,
    leaving: Leaving<'a>,
}

/// Tells whoever waits for the end of this drive that it is over, also if it was dropped.
struct Leaving<'a>(&'a Control);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.left(None);
    }
}

impl<'a> Drive<'a> {
    fn new(
        machine: SourceMachine,
        limits: Limits,
        host: &'a dyn SourceHost,
        peer: &'a dyn Peer,
        journal: &'a dyn Journal,
        control: &'a Control,
    ) -> Self {
        Self {
            machine,
            limits,
            host,
            peer,
            journal,
            control,
            began: Instant::now(),
            patience: None,
            turned_back: false,
            is_ruled: false,
            trouble: None,
            chains: Chains::default(),
            downtime: None,
            leaving: Leaving(control),
        }
    }

    async fn run(mut self) -> Result<Concluded, Error> {
        if self.phase() >= Phase::Finish {
            self.control.over(self.phase());
        }
        loop {
            if self.host.was_paused() {
                self.machine.pause();
            }
            let action = self.machine.action();
            if let SourceAction::Done(end) = action {
                return self.conclude(end);
            }
            self.control.enter(self.phase());
            let control = self.control;
            let acted = if self.waits_for_a_word(&action) {
                tokio::select! {
                    biased;
                    ruling = control.ruled() => {
                        self.ruled(ruling);
                        continue;
                    }
                    acted = self.act(action) => acted,
                }
            } else {
                // The rest of the memory may take minutes, and a word that came meanwhile would be of another time.
                if matches!(action, SourceAction::Drain | SourceAction::Resume(_)) {
                    control.deaf();
                }
                self.act(action).await
            };
            match acted {
                Some(input) => self.machine.on(input),
                None => {
                    self.turned_back = true;
                    self.note(Side::Source, ErrorKind::Cancelled, None);
                    self.machine
                        .cancel()
                        .expect("only a cancellable action is given up");
                }
            }
        }
    }

    /// Whether an operator's word may take the place of what is waited for.
    fn waits_for_a_word(&self, action: &SourceAction) -> bool {
        let is_open = match action {
            SourceAction::Ask(request) => !matches!(request.call, Call::Prepare(_)),
            SourceAction::Pause => true,
            _ => false,
        };
        is_open && !self.is_ruled
    }

    /// Goes on as [`resolve`] does. The question that was under way is dropped, as by a daemon that dies.
    fn ruled(&mut self, ruling: Ruling) {
        let cause = self.trouble.take().and_then(|trouble| trouble.cause);
        self.note(Side::Destination, ErrorKind::Ruled, cause);
        self.machine = self.machine.overruled(ruling);
        self.control.over(self.phase());
        self.is_ruled = true;
        self.peer = &Nobody;
        self.limits.patience = Duration::ZERO;
        self.patience = None;
    }

    /// Does the action. `None`: a cancel came first.
    async fn act(&mut self, action: SourceAction) -> Option<SourceInput> {
        use SourceInput as In;
        let control = self.control;
        let heeds_cancel = self.machine.cancellable() && !self.turned_back;
        if heeds_cancel && control.is_cancelled() {
            return None;
        }
        let cancelled = async {
            if heeds_cancel {
                control.cancelled().await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        Some(match action {
            // A write is never abandoned: what is on disk must be known.
            SourceAction::Record(record) => {
                let last = matches!(
                    record.stage,
                    SourceStage::Switching
                        | SourceStage::HandingOver
                        | SourceStage::HandingOverHalf
                );
                // A cancel that came before one that is past that point is taken up again changes nothing of it.
                if last && !control.shut(record.stage.phase()) && heeds_cancel {
                    return None;
                }
                self.record(record).await
            }
            SourceAction::Begin => {
                let host = self.host;
                let step = self.step(self.limits.begin);
                tokio::select! {
                    biased;
                    () = cancelled => return None,
                    begun = on_time(step.deadline, host.begin(step)) => match begun {
                        Ok(begun) => In::Begun { cookie: begun.cookie, run: begun.run },
                        Err(cause) => self.host_failed(cause, In::BeginFailed),
                    },
                }
            }
            SourceAction::Ask(mut request) => {
                request.downtime = self
                    .downtime
                    .filter(|_| matches!(request.call, Call::Confirm(_)));
                let deadline = Instant::now() + self.limit_of(&request.call);
                tokio::select! {
                    biased;
                    () = cancelled => return None,
                    answer = peer::ask(self.peer, request, deadline) => self.answered(answer),
                }
            }
            SourceAction::Perform(to) => {
                let host = self.host;
                let step = self.step(self.limits.perform);
                let meter = control.meter();
                let moving = self.told(step, host.perform(step, &to, &meter));
                tokio::select! {
                    biased;
                    () = cancelled => return None,
                    done = moving => match done {
                        Ok(stopped) => In::Performed(stopped),
                        Err(cause) => self.host_failed(cause, In::PerformFailed),
                    },
                    () = control.post_copy_wanted() => In::Switch,
                }
            }
            SourceAction::Complete => {
                let (host, step) = (self.host, self.step(self.limits.perform));
                let meter = control.meter();
                let completing = self.told(step, host.complete(step, &meter));
                tokio::select! {
                    biased;
                    // Of a guest that was not offered yet.
                    () = cancelled => return None,
                    done = completing => match done {
                        Ok(()) => In::Completed,
                        Err(cause) => self.host_failed(cause, In::CompleteFailed),
                    },
                }
            }
            SourceAction::Switch(to) => {
                let step = self.step(self.limits.confirm);
                match on_time(step.deadline, self.host.switch(step, &to)).await {
                    Ok(()) => In::Switched,
                    Err(cause) => self.host_failed(cause, In::SwitchFailed),
                }
            }
            // An operator's word does not wait for that. QEMU sends what it can by itself.
            SourceAction::Drain if self.is_ruled => In::DrainFailed,
            SourceAction::Drain => self.drain(None).await,
            SourceAction::Resume(to) => self.drain(Some(&to)).await,
            SourceAction::Inspect => {
                let step = self.step(self.limits.look);
                match on_time(step.deadline, self.host.inspect(step)).await {
                    Ok(state) => In::Local(state),
                    Err(cause) => self.host_failed(cause, In::InspectFailed),
                }
            }
            SourceAction::Confirm(outcome) => {
                let step = self.step(self.limits.confirm);
                match on_time(step.deadline, self.host.confirm(step, outcome)).await {
                    Ok(()) => In::Confirmed,
                    Err(cause) => self.host_failed(cause, In::ConfirmFailed),
                }
            }
            SourceAction::Forget => self.forget().await,
            SourceAction::Pause => self.pause().await,
            SourceAction::Done(_) => unreachable!("the loop ends with it"),
        })
    }

    async fn drain(&mut self, to: Option<&Prepared>) -> SourceInput {
        let step = self.step(self.limits.perform);
        let (host, meter) = (self.host, self.control.meter());
        match self.told(step, host.drain(step, to, &meter)).await {
            Ok(()) => SourceInput::Drained,
            Err(cause) => self.host_failed(cause, SourceInput::DrainFailed),
        }
    }

    /// Waits for a step that moves memory, and tells the other side meanwhile how it does.
    async fn told<T>(
        &self,
        step: Step,
        moving: impl Future<Output = Result<T, HostError>>,
    ) -> Result<T, Cause> {
        let telling = tell(self.control, self.peer, &self.machine);
        tokio::select! {
            biased;
            moved = on_time(step.deadline, moving) => moved,
            never = telling => match never {},
        }
    }

    async fn record(&mut self, record: SourceRecord) -> SourceInput {
        let deadline = Instant::now() + self.limits.look;
        match on_time(deadline, self.journal.store(&Record::Source(record))).await {
            Ok(()) => SourceInput::Recorded,
            Err(cause) => {
                self.chain(&*cause);
                self.note(Side::Source, ErrorKind::Journal, Some(cause));
                SourceInput::RecordFailed
            }
        }
    }

    async fn forget(&mut self) -> SourceInput {
        let deadline = Instant::now() + self.limits.look;
        let id = self.machine.migration();
        match on_time(deadline, self.journal.remove(id, Side::Source)).await {
            Ok(()) => SourceInput::Forgotten,
            Err(cause) => {
                self.chain(&*cause);
                self.note(Side::Source, ErrorKind::Journal, Some(cause));
                SourceInput::ForgetFailed
            }
        }
    }

    async fn pause(&mut self) -> SourceInput {
        let now = Instant::now();
        let until = *self.patience.get_or_insert(now + self.limits.patience);
        if now + self.limits.pause > until {
            return SourceInput::GiveUp;
        }
        sleep(self.limits.pause).await;
        SourceInput::Retry
    }

    fn answered(&mut self, answer: Result<Answer, PeerError>) -> SourceInput {
        match answer {
            Ok(Answer {
                reply,
                trouble,
                resumed,
                ..
            }) => {
                if let Some(resumed) = resumed.filter(|_| reply == Reply::Owned)
                    && let Some(stopped) = self.host.stopped_at()
                    && let Some(clock) = self.peer.clock()
                {
                    self.downtime = clock.downtime(stopped, resumed);
                }
                let told = trouble.or_else(|| match &reply {
                    Reply::Refused(why) | Reply::Busy(why) => Some(why.clone()),
                    _ => None,
                });
                if self.chains.destination.is_none() {
                    self.chains.destination = told;
                }
                let why = match &reply {
                    Reply::Refused(why) => Some((ErrorKind::Refused, Some(why))),
                    Reply::Busy(why) => Some((ErrorKind::Silent, Some(why))),
                    Reply::Lost => Some((ErrorKind::Lost, None)),
                    Reply::Unknown => Some((ErrorKind::InDoubt, None)),
                    _ => None,
                };
                if let Some((kind, why)) = why {
                    let cause = why.map(|why| Cause::from(why.as_str()));
                    self.note(Side::Destination, kind, cause);
                }
                SourceInput::Answered(reply)
            }
            Err(error) => {
                let sent = error.effect() == Effect::Unknown;
                let (kind, input) = match error.is_untold() {
                    true => (ErrorKind::TooOld, SourceInput::Untold),
                    false => (ErrorKind::Silent, SourceInput::Silent { sent }),
                };
                self.chain(&error);
                self.note(Side::Destination, kind, Some(error.into()));
                input
            }
        }
    }

    fn host_failed(&mut self, cause: Cause, input: SourceInput) -> SourceInput {
        self.chain(&*cause);
        self.note(Side::Source, ErrorKind::Host, Some(cause));
        input
    }

    /// Keeps the first thing that went wrong as this side saw it.
    fn chain(&mut self, error: &(dyn StdError + 'static)) {
        self.chains.source.get_or_insert_with(|| Reason::of(error));
    }

    fn note(&mut self, side: Side, kind: ErrorKind, cause: Option<Cause>) {
        let phase = self.phase();
        let migration = self.machine.migration();
        let reason = cause.as_ref().map(tracing::field::display);
        tracing::warn!(%migration, %phase, %side, ?kind, reason, "migration in trouble");
        if self.trouble.is_none() {
            self.trouble = Some(Trouble {
                phase,
                side,
                kind,
                cause,
            });
        }
    }

    fn conclude(self, end: SourceEnd) -> Result<Concluded, Error> {
        let migration = self.machine.migration();
        let phase = self.phase();
        self.control.over(phase);
        let kind = match (end.why, end.owner) {
            (EndWhy::Superseded, _) => ErrorKind::Superseded,
            (EndWhy::Conflict, _) => ErrorKind::Conflict,
            (EndWhy::Protocol, Owner::InDoubt) => ErrorKind::InDoubt,
            (EndWhy::Protocol, Owner::Nobody) => ErrorKind::Lost,
            (EndWhy::Protocol, owner) => {
                let took = self.began.elapsed();
                let report = Report {
                    migration,
                    owner,
                    settled: end.settled,
                    took,
                    downtime: self.downtime,
                };
                self.leaving.0.left(Some(report));
                return Ok(Concluded {
                    report,
                    trouble: self.trouble,
                    chains: self.chains,
                });
            }
        };
        let (side, phase, cause) = match self.trouble {
            Some(trouble) => (trouble.side, trouble.phase, trouble.cause),
            None => (Side::Source, phase, None),
        };
        Err(Error::new(migration, (side, phase), kind, end.owner)
            .settled(end.settled)
            .chains(self.chains.source, self.chains.destination)
            .cause(cause))
    }

    fn phase(&self) -> Phase {
        self.machine.stage().phase()
    }

    fn step(&self, limit: Duration) -> Step {
        Step::new(
            self.machine.migration(),
            self.machine.domain(),
            Instant::now() + limit,
        )
    }

    fn limit_of(&self, call: &Call) -> Duration {
        match call {
            Call::Prepare(_) => self.limits.prepare,
            Call::Finish => self.limits.finish,
            Call::Confirm(_) => self.limits.confirm,
            Call::Resume => self.limits.prepare,
            Call::Status(_) => self.limits.look,
        }
    }
}

/// Waits for a local step until its deadline.
pub(crate) async fn on_time<T, E>(
    deadline: Instant,
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, Cause>
where
    E: Into<Cause>,
{
    match timeout_at(deadline, step).await {
        Ok(done) => done.map_err(Into::into),
        Err(late) => Err(late.into()),
    }
}
