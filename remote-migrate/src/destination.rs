//! The destination side as a plain value: a request in, the next action out, a reply at the end.
//!
//! No clock, no I/O, as in [`source`](crate::source). The machine serves one thing at a time; while
//! [`DestinationMachine::action`] is not `Wait`, nothing new may be handed in.
//!
//! ```text
//!  Prepare ─► Record(Preparing) ─► Prepare ─► Record(Prepared) ─► Reply(Prepared)
//!  Finish  ─► Load ─► Record(Starting) ─► Start ─► Record(Owned) ─► Reply(Owned)
//!              │        the guest is the     │
//!              │        destination's now    └ never ran ─► Record(Refused) ─► Reply(Refused)
//!              └ failed ─► Record(Refused) ─► Discard ─► Reply(Refused)
//!  Confirm ─► Inspect ─► verdict ─► (Discard) ─► Forget ─► Reply(Closed)
//! ```
//!
//! Invariants, each held by `tests/walk.rs`:
//! 1. The guest is started only while the journal says `Starting`, and only once.
//! 2. A refusal is answered only when it is in the journal; from then on this copy never starts.
//! 3. A copy that may be complete is discarded only when the source is known to own the guest.
//! 4. What was answered once is answered again, until the source has confirmed.

use crate::{
    journal::{DestinationRecord, DestinationStage as Stage},
    message::{Call, CopyState, Fate, Guest, Prepared, Ran, Reply, Request, Status},
    phase::{Epoch, MigrationId, Owner, Phase, Reason, RunState, Side},
    verdict::{self, DestinationVerdict, Heard, Ruling},
};

const NO_JOURNAL: &str = "cannot write the journal";

/// What the destination does now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "an executor must know every action"
)]
pub enum DestinationAction {
    /// Nothing: a request, a cancel, a ruling or a look at the state may be handed in.
    Wait,
    /// Store the record; answer `Recorded` or `RecordFailed`.
    Record(DestinationRecord),
    /// Have the host make a QEMU that waits for the guest; answer `Prepared` or `PrepareFailed`.
    Prepare(Guest),
    /// Wait until all is loaded; answer `Loaded`, `Loading` or `LoadFailed`.
    Load,
    /// Have the host start the guest; answer `Started` or `StartFailed`.
    Start(RunState),
    /// Have the host look at its copy; answer `Local` or `InspectFailed`.
    Inspect,
    /// Have the host end its copy; answer `Discarded` or `DiscardFailed`.
    Discard,
    /// Remove the record; answer `Forgotten` or `ForgetFailed`.
    Forget,
    /// Answer the request; then `Replied`.
    Reply(Reply),
    /// What was begun without a request is over; then `Replied`.
    Done(DestinationEnd),
}

/// How something that no request began has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a caller must tell them apart")]
pub enum DestinationEnd {
    /// Nothing is left to do here, or nothing but to repeat the final answer to the source.
    Settled,
    /// Not decided, or not possible now: the source, an operator or a later try decides.
    Waiting,
    /// Cancel came when the copy was complete already: only the source can still turn back.
    TooLate(Phase),
    /// Both sides claim the guest.
    Conflict,
}

/// What is handed in, and what came of an action.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "the outcomes of the actions above")]
#[expect(missing_docs, reason = "each is named at its action")]
pub enum DestinationInput {
    /// A request of the source.
    Request(Request),
    /// Set right what a restart or a broken link left, given what the source says.
    Reconcile(Heard),
    /// The daemon here wants no part in it.
    Cancel,
    /// An operator decides in place of the source.
    Rule(Ruling),
    Recorded,
    RecordFailed,
    Prepared(Prepared),
    PrepareFailed(Reason),
    Loaded,
    Loading,
    LoadFailed(Reason),
    Started,
    StartFailed {
        ran: Ran,
        why: Reason,
    },
    Local(CopyState),
    InspectFailed,
    Discarded,
    DiscardFailed,
    Forgotten,
    ForgetFailed,
    Replied,
}

/// The destination side of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationMachine {
    migration: MigrationId,
    record: Option<DestinationRecord>,
    /// The last word, kept in memory only, for requests that come late although all was confirmed.
    closed: Option<Reply>,
    at: At,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum At {
    Idle,
    /// A later life of the source has spoken; `before` is the one known until now.
    Adopting {
        before: Epoch,
        job: Job,
    },
    /// A new stage is being stored; `before` is what the journal said until now.
    Recording {
        before: Stage,
        job: Job,
    },
    Preparing(Guest),
    Loading(Job),
    Starting(Job),
    Inspecting(Job),
    /// With a last word the migration is forgotten next; without one its record stays.
    Discarding {
        job: Job,
        last: Option<Reply>,
    },
    Forgetting {
        job: Job,
        last: Reply,
    },
    Replying(Reply),
    Ending(DestinationEnd),
}

/// What the machine works on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Job {
    Serve(Call),
    Reconcile(Heard),
    Cancel,
    Rule(Ruling),
}

impl Job {
    /// Whether the source still has a copy that it could go on with.
    fn can_give_back(&self) -> bool {
        !matches!(self, Self::Serve(Call::Confirm(_)) | Self::Rule(_))
    }
}

impl DestinationMachine {
    /// A migration that stands as the journal says, or that nobody here has heard of.
    #[must_use]
    pub fn new(migration: MigrationId, record: Option<DestinationRecord>) -> Self {
        Self {
            migration,
            record,
            closed: None,
            at: At::Idle,
        }
    }

    /// Which migration.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// What is remembered of it.
    #[must_use]
    pub fn record(&self) -> Option<&DestinationRecord> {
        self.record.as_ref()
    }

    /// Whether it is over and only a late request would still hear of it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.record.is_none() && self.closed.is_some()
    }

    /// What is to be done now.
    #[must_use]
    pub fn action(&self) -> DestinationAction {
        match &self.at {
            At::Idle => DestinationAction::Wait,
            At::Adopting { .. } | At::Recording { .. } => {
                DestinationAction::Record(self.known().clone())
            }
            At::Preparing(guest) => DestinationAction::Prepare(guest.clone()),
            At::Loading(_) => DestinationAction::Load,
            At::Starting(_) => DestinationAction::Start(self.known().run),
            At::Inspecting(_) => DestinationAction::Inspect,
            At::Discarding { .. } => DestinationAction::Discard,
            At::Forgetting { .. } => DestinationAction::Forget,
            At::Replying(reply) => DestinationAction::Reply(reply.clone()),
            At::Ending(end) => DestinationAction::Done(*end),
        }
    }

    /// Takes a request, or what came of the action. An input that fits neither changes nothing.
    pub fn on(&mut self, input: DestinationInput) {
        use DestinationInput as In;
        match (self.at.clone(), input) {
            (At::Idle, In::Request(request)) => self.request(request),
            (At::Idle, In::Reconcile(heard)) => self.dispatch(Job::Reconcile(heard)),
            (At::Idle, In::Cancel) => self.dispatch(Job::Cancel),
            (At::Idle, In::Rule(ruling)) => self.dispatch(Job::Rule(ruling)),

            (At::Adopting { job, .. }, In::Recorded) => self.dispatch(job),
            (At::Adopting { before, job }, In::RecordFailed) => {
                self.change(|record| record.epoch = before);
                self.postpone(job, NO_JOURNAL);
            }
            (At::Recording { job, .. }, In::Recorded) => self.recorded(job),
            (At::Recording { before, job }, In::RecordFailed) => self.record_failed(before, job),

            (At::Preparing(guest), In::Prepared(prepared)) => {
                self.change(|record| record.prepared = Some(prepared));
                self.advance(Stage::Prepared, Job::Serve(Call::Prepare(guest)));
            }
            (At::Preparing(guest), In::PrepareFailed(why)) => self.unprepare(guest, why),

            (At::Loading(job), In::Loaded) => self.advance(Stage::Starting, job),
            (At::Loading(job), In::Loading) => self.postpone(job, "still loading"),
            (At::Loading(job), In::LoadFailed(why)) => {
                self.advance(
                    Stage::Refused {
                        why,
                        complete: false,
                    },
                    job,
                );
            }

            (At::Starting(job), In::Started) => self.advance(Stage::Owned, job),
            (
                At::Starting(job),
                In::StartFailed {
                    ran: Ran::Never,
                    why,
                },
            ) if job.can_give_back() => {
                self.advance(
                    Stage::Refused {
                        why,
                        complete: true,
                    },
                    job,
                );
            }
            (At::Starting(job), In::StartFailed { why, .. }) => {
                self.postpone(job, why.as_str());
            }

            (At::Inspecting(job), In::Local(copy)) => self.inspected(job, copy),
            (At::Inspecting(job), In::InspectFailed) => {
                self.postpone(job, "cannot look at the copy");
            }

            (
                At::Discarding {
                    job,
                    last: Some(last),
                },
                In::Discarded,
            ) => {
                self.at = At::Forgetting { job, last };
            }
            (At::Discarding { job, last: Some(_) }, In::DiscardFailed) => {
                self.postpone(job, "cannot discard the copy");
            }
            // Refused already: the remains are cleared again when the source confirms.
            (At::Discarding { job, last: None }, In::Discarded | In::DiscardFailed) => {
                self.finish(job);
            }

            (At::Forgetting { job, last }, In::Forgotten) => {
                self.record = None;
                self.closed = Some(last);
                self.finish(job);
            }
            (At::Forgetting { job, .. }, In::ForgetFailed) => {
                self.postpone(job, NO_JOURNAL);
            }

            (At::Replying(_) | At::Ending(_), In::Replied) => self.at = At::Idle,
            (_, _) => {}
        }
    }

    fn request(&mut self, request: Request) {
        let job = Job::Serve(request.call);
        match &mut self.record {
            Some(record) if request.domain != record.domain => {
                self.at = At::Replying(Reply::Conflict);
            }
            Some(record) if request.epoch < record.epoch => {
                self.at = At::Replying(Reply::Stale { seen: record.epoch });
            }
            Some(record) if request.epoch > record.epoch => {
                let before = std::mem::replace(&mut record.epoch, request.epoch);
                self.at = At::Adopting { before, job };
            }
            None if self.closed.is_none() => match &job {
                Job::Serve(Call::Prepare(guest)) => {
                    self.record = Some(DestinationRecord {
                        migration: self.migration,
                        domain: request.domain,
                        epoch: request.epoch,
                        run: guest.run,
                        home: guest.home.clone(),
                        prepared: None,
                        stage: Stage::Preparing,
                    });
                    self.at = At::Recording {
                        before: Stage::Preparing,
                        job,
                    };
                }
                _ => self.dispatch(job),
            },
            _ => self.dispatch(job),
        }
    }

    /// Goes on with `job` from the stage the migration is at.
    fn dispatch(&mut self, job: Job) {
        let Some(record) = &self.record else {
            self.dispatch_closed(job);
            return;
        };
        if let (Job::Serve(Call::Prepare(_)), Some(prepared)) = (&job, &record.prepared) {
            self.at = At::Replying(Reply::Prepared(prepared.clone()));
            return;
        }
        self.at = match (&job, &record.stage) {
            // The daemon stopped in the middle of making it, and nobody was told where it waits.
            (Job::Serve(Call::Prepare(_) | Call::Finish), Stage::Preparing) => At::Discarding {
                job,
                last: Some(self.last_word()),
            },
            (Job::Serve(Call::Finish) | Job::Rule(Ruling::PeerFenced), Stage::Prepared) => {
                // Also of a source that is dead for good: what is complete here is the guest then.
                At::Loading(job)
            }
            (Job::Serve(Call::Finish), Stage::Owned) => At::Replying(Reply::Owned),
            (Job::Serve(Call::Finish), Stage::Lost) => At::Replying(Reply::Lost),
            (Job::Serve(Call::Prepare(_) | Call::Finish), Stage::Refused { why, .. }) => {
                At::Replying(Reply::Refused(why.clone()))
            }
            (Job::Cancel, Stage::Starting | Stage::Owned | Stage::Lost) => {
                At::Ending(DestinationEnd::TooLate(record.stage.phase()))
            }
            (Job::Cancel, Stage::Refused { .. }) => At::Ending(DestinationEnd::Settled),
            _ => At::Inspecting(job),
        };
    }

    /// The migration is over, or was never heard of.
    fn dispatch_closed(&mut self, job: Job) {
        let last = self.closed.clone();
        self.at = match job {
            Job::Serve(Call::Prepare(_)) => At::Replying(match last {
                Some(refused @ Reply::Refused(_)) => refused,
                _ => Reply::Refused(Reason::new("the migration is over")),
            }),
            Job::Serve(Call::Finish) => At::Replying(last.unwrap_or(Reply::Unknown)),
            Job::Serve(Call::Status(_)) => At::Replying(Reply::Unknown),
            Job::Serve(Call::Confirm(Fate::Keep)) => At::Replying(match last {
                Some(Reply::Lost) => Reply::Lost,
                // A stray prepare may have been refused since, because the guest lives here.
                _ => Reply::Closed,
            }),
            Job::Serve(Call::Confirm(Fate::Discard)) => {
                // A request to prepare may be on its way still: it must make nothing.
                if last.is_none() {
                    self.closed = Some(Reply::Refused(Reason::new("discarded")));
                }
                At::Replying(Reply::Closed)
            }
            Job::Reconcile(_) | Job::Cancel | Job::Rule(_) => At::Ending(DestinationEnd::Settled),
        };
    }

    fn inspected(&mut self, job: Job, copy: CopyState) {
        let stage = self.known().stage.clone();
        let heard = match &job {
            Job::Serve(Call::Status(_)) => {
                self.at = At::Replying(Reply::Status(stage.status(copy)));
                return;
            }
            Job::Cancel => return self.cancel(job, copy),
            Job::Serve(Call::Confirm(Fate::Discard)) | Job::Rule(Ruling::PeerOwns) => {
                decided(Owner::Source)
            }
            Job::Serve(Call::Confirm(Fate::Keep)) => decided(Owner::Destination),
            Job::Reconcile(heard) => *heard,
            Job::Serve(_) | Job::Rule(Ruling::PeerFenced) => Heard::Silence,
        };
        match verdict::destination(&stage, copy, heard) {
            DestinationVerdict::Discard => {
                self.at = At::Discarding {
                    job,
                    last: Some(self.last_word()),
                };
            }
            DestinationVerdict::Refuse => {
                let why = Reason::new("the copy is gone and never ran");
                self.advance(
                    Stage::Refused {
                        why,
                        complete: false,
                    },
                    job,
                );
            }
            DestinationVerdict::Start if stage == Stage::Starting => self.at = At::Starting(job),
            DestinationVerdict::Start => self.advance(Stage::Starting, job),
            DestinationVerdict::Own => self.advance(Stage::Owned, job),
            DestinationVerdict::Lose => self.advance(Stage::Lost, job),
            DestinationVerdict::Forget => {
                self.at = At::Forgetting {
                    job,
                    last: self.last_word(),
                };
            }
            DestinationVerdict::Wait => self.postpone(job, "not decided yet"),
            DestinationVerdict::Conflict => {
                self.at = match job {
                    Job::Serve(_) => At::Replying(Reply::Conflict),
                    _ => At::Ending(DestinationEnd::Conflict),
                };
            }
        }
    }

    /// The daemon here wants out: possible while the copy is not complete. It may become so any moment,
    /// so it is refused now, and discarded when the source is known to have the guest.
    fn cancel(&mut self, job: Job, copy: CopyState) {
        if matches!(copy, CopyState::Complete | CopyState::Started) {
            self.at = At::Ending(DestinationEnd::TooLate(Phase::Perform));
            return;
        }
        let why = Reason::new("cancelled at the destination");
        let complete = copy == CopyState::Incoming;
        self.advance(Stage::Refused { why, complete }, job);
    }

    fn advance(&mut self, stage: Stage, job: Job) {
        let record = self
            .record
            .as_mut()
            .expect("only a known migration advances");
        let before = std::mem::replace(&mut record.stage, stage);
        self.at = At::Recording { before, job };
    }

    fn recorded(&mut self, job: Job) {
        match (&self.known().stage, job) {
            (Stage::Preparing, Job::Serve(Call::Prepare(guest))) => self.at = At::Preparing(guest),
            (Stage::Starting, job) => self.at = At::Starting(job),
            (
                Stage::Refused {
                    complete: false, ..
                },
                job,
            ) => {
                self.at = At::Discarding { job, last: None };
            }
            (_, job) => self.finish(job),
        }
    }

    fn record_failed(&mut self, before: Stage, job: Job) {
        match (&self.known().stage, job) {
            // Nothing was answered yet; what may be on disk, or waits already, must go.
            (Stage::Preparing | Stage::Prepared, Job::Serve(Call::Prepare(guest))) => {
                self.change(|record| {
                    record.stage = Stage::Preparing;
                    record.prepared = None;
                });
                self.unprepare(guest, Reason::new(NO_JOURNAL));
            }
            // It runs: that is a fact, and a restart would find it out again.
            (Stage::Owned, job) => self.finish(job),
            // Neither taken nor refused: the answer waits for the disk.
            (_, job) => {
                self.change(|record| record.stage = before);
                self.postpone(job, NO_JOURNAL);
            }
        }
    }

    /// No copy could be made, for this reason: clears the remains and refuses.
    fn unprepare(&mut self, guest: Guest, why: Reason) {
        let job = Job::Serve(Call::Prepare(guest));
        self.at = At::Discarding {
            job,
            last: Some(Reply::Refused(why)),
        };
    }

    /// A stage was reached that answers `job`, or brings it on.
    fn finish(&mut self, job: Job) {
        match job {
            Job::Serve(_) => self.dispatch(job),
            _ => self.at = At::Ending(DestinationEnd::Settled),
        }
    }

    /// What a late request is answered once the migration is forgotten.
    fn last_word(&self) -> Reply {
        match &self.known().stage {
            Stage::Owned => Reply::Owned,
            Stage::Lost => Reply::Lost,
            Stage::Refused { why, .. } => Reply::Refused(why.clone()),
            Stage::Preparing | Stage::Prepared | Stage::Starting => {
                Reply::Refused(Reason::new("the copy was discarded"))
            }
        }
    }

    fn postpone(&mut self, job: Job, why: &str) {
        self.at = match job {
            Job::Serve(_) => At::Replying(Reply::Busy(Reason::new(why))),
            _ => At::Ending(DestinationEnd::Waiting),
        };
    }

    fn known(&self) -> &DestinationRecord {
        self.record
            .as_ref()
            .expect("a migration at work has a record")
    }

    fn change(&mut self, change: impl FnOnce(&mut DestinationRecord)) {
        change(
            self.record
                .as_mut()
                .expect("a migration at work has a record"),
        );
    }
}

fn decided(owner: Owner) -> Heard {
    Heard::Said(Status {
        side: Side::Source,
        phase: Phase::Confirm,
        owner,
        copy: None,
    })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::phase::Cookie;
    use DestinationInput as In;

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
}
