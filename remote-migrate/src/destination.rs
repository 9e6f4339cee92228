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
//!  Resume  ─► Inspect ─► Resume ─► Reply(Prepared)       post-copy, while memory is missing
//!  Confirm ─► Inspect ─► verdict ─► (Discard) ─► Forget ─► Reply(Closed)
//! ```
//!
//! Invariants, each held by `tests/walk.rs`:
//! 1. The guest is started only while the journal says `Starting`, and only once.
//! 2. A refusal is answered only when it is in the journal; from then on this copy never starts, unless
//!    the source has lost its own and gives this one away for good.
//! 3. A copy that may be complete is discarded only when the source is known to own the guest.
//! 4. A copy that was started while memory was missing is discarded only when the source has lost the rest.
//! 5. What was answered once is answered again, until the source has confirmed.

mod step;

use crate::{
    journal::{DestinationRecord, DestinationStage as Stage},
    message::{Call, CopyState, Fate, Guest, Ran, Reply, Request, Status},
    phase::{Epoch, MigrationId, Owner, Phase, Reason, Side},
    verdict::{self, DestinationVerdict, Heard, Ruling},
};

pub use step::{DestinationAction, DestinationEnd, DestinationInput};

const NO_JOURNAL: &str = "cannot write the journal";

/// The destination side of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationMachine {
    migration: MigrationId,
    record: Option<DestinationRecord>,
    /// The last word, kept in memory only, for requests that come late although all was confirmed.
    closed: Option<Reply>,
    /// A write failed, and the journal may say something else than `record`.
    unsure: bool,
    at: At,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum At {
    Idle,
    /// A later life of the source has spoken, `before` is the one known until now; or the journal may
    /// not say what it should. Nothing is done upon a record that may not be there.
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
    /// `first` is false where an earlier request to start may still be inside QEMU.
    Starting {
        job: Job,
        first: bool,
    },
    Resuming,
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
            unsure: false,
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
            At::Starting { .. } => DestinationAction::Start(self.known().run),
            At::Resuming => DestinationAction::Resume,
            At::Inspecting(_) => DestinationAction::Inspect,
            At::Discarding { .. } => DestinationAction::Discard,
            At::Forgetting { .. } => DestinationAction::Forget,
            At::Replying(reply) => DestinationAction::Reply(reply.clone()),
            At::Ending(end) => DestinationAction::Done(end.clone()),
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

            (At::Adopting { job, .. }, In::Recorded) => {
                self.unsure = false;
                self.dispatch(job);
            }
            (At::Adopting { before, job }, In::RecordFailed) => {
                self.change(|record| record.epoch = before);
                self.unsure = true;
                self.postpone(job, NO_JOURNAL);
            }
            (At::Recording { job, .. }, In::Recorded) => self.recorded(job),
            (At::Recording { before, job }, In::RecordFailed) => self.record_failed(before, job),

            (At::Preparing(guest), In::Prepared(prepared)) => {
                self.change(|record| record.prepared = Some(prepared));
                self.advance(Stage::Prepared, Job::Serve(Call::Prepare(guest)));
            }
            (At::Preparing(guest), In::PrepareFailed(why)) => self.unprepare(guest, why),

            (At::Resuming, In::Prepared(prepared)) => {
                self.at = At::Replying(Reply::Prepared(prepared));
            }
            (At::Resuming, In::PrepareFailed(why)) => self.at = At::Replying(Reply::Busy(why)),

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

            (At::Starting { job, .. }, In::Started) => self.advance(Stage::Owned, job),
            (
                At::Starting { job, first: true },
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
            (At::Starting { job, .. }, In::StartFailed { why, .. }) => {
                self.postpone(job, why.as_str());
            }

            (At::Inspecting(job), In::Local(copy)) => self.inspected(job, copy),
            (At::Inspecting(job), In::InspectFailed) => self.unseen(job),

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
                self.unsure = false;
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
        if let (Some(run), Some(record)) = (request.run, &mut self.record)
            && (request.domain, &record.stage) == (record.domain, &Stage::Prepared)
            && request.epoch >= record.epoch
        {
            record.run = run;
        }
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
        if self.unsure {
            let before = record.epoch;
            self.at = At::Adopting { before, job };
            return;
        }
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
            Job::Serve(Call::Status(_) | Call::Resume) => At::Replying(Reply::Unknown),
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
            // It was taken here, and is over since.
            Job::Cancel if matches!(last, Some(Reply::Owned | Reply::Lost)) => {
                At::Ending(DestinationEnd::TooLate(Phase::Confirm))
            }
            Job::Reconcile(_) | Job::Cancel | Job::Rule(_) => At::Ending(DestinationEnd::Settled),
        };
    }

    fn inspected(&mut self, job: Job, copy: CopyState) {
        let stage = self.known().stage.clone();
        match &job {
            Job::Serve(Call::Resume) if stage == Stage::Owned && copy == CopyState::Partial => {
                self.at = At::Resuming;
                return;
            }
            Job::Serve(Call::Status(_) | Call::Resume) => {
                self.at = At::Replying(Reply::Status(stage.status(copy)));
                return;
            }
            Job::Cancel => return self.cancel(job, copy),
            _ => {}
        }
        let heard = heard(&job);
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
            DestinationVerdict::Start if stage == Stage::Starting => {
                self.at = At::Starting { job, first: false };
            }
            DestinationVerdict::Start => self.advance(Stage::Starting, job),
            DestinationVerdict::Own => self.advance(Stage::Owned, job),
            DestinationVerdict::Lose => self.advance(Stage::Lost, job),
            DestinationVerdict::Forget => {
                self.at = At::Forgetting {
                    job,
                    last: self.last_word(),
                };
            }
            DestinationVerdict::Wait => {
                let why = match job {
                    Job::Rule(_) => why_not_ruled(&stage, copy),
                    _ => "not decided yet",
                };
                self.postpone(job, why);
            }
            DestinationVerdict::Conflict => {
                self.at = match job {
                    Job::Serve(_) => At::Replying(Reply::Conflict),
                    _ => At::Ending(DestinationEnd::Conflict),
                };
            }
        }
    }

    /// The copy does not say how it stands: its QEMU may be stopped, or stuck. One that was never taken was not let run from
    /// here, so whatever it holds nobody needs it once the source is known to have the guest.
    fn unseen(&mut self, job: Job) {
        let stage = &self.known().stage;
        let is_untaken = matches!(stage, Stage::Prepared | Stage::Refused { .. });
        let if_whole = verdict::destination(stage, CopyState::Complete, heard(&job));
        if is_untaken && if_whole == DestinationVerdict::Discard {
            let last = Some(self.last_word());
            self.at = At::Discarding { job, last };
        } else {
            self.postpone(job, "cannot look at the copy");
        }
    }

    /// The daemon here wants out: possible while the copy is not complete. It may become so any moment,
    /// so it is refused now, and discarded when the source is known to have the guest.
    fn cancel(&mut self, job: Job, copy: CopyState) {
        if !matches!(copy, CopyState::Incoming | CopyState::Gone(_)) {
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
        self.unsure = false;
        match (&self.known().stage, job) {
            (Stage::Preparing, Job::Serve(Call::Prepare(guest))) => self.at = At::Preparing(guest),
            (Stage::Starting, job) => self.at = At::Starting { job, first: true },
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
        self.unsure = true;
        match (&self.known().stage, job) {
            // Nothing was answered yet; what may be on disk, or waits already, must go.
            (Stage::Preparing | Stage::Prepared, Job::Serve(Call::Prepare(guest))) => {
                self.change(|record| {
                    record.stage = Stage::Preparing;
                    record.prepared = None;
                });
                self.unprepare(guest, Reason::new(NO_JOURNAL));
            }
            // It runs, and nothing takes that back; only the answer waits for the disk.
            (Stage::Owned, job) => self.postpone(job, NO_JOURNAL),
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
        match (job, self.record.as_ref().map(|record| &record.stage)) {
            (job @ Job::Serve(_), _) => self.dispatch(job),
            // It was to run here.
            (job @ Job::Rule(Ruling::PeerFenced), Some(Stage::Refused { why, .. })) => {
                let why = why.clone();
                self.postpone(job, why.as_str());
            }
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
            _ => At::Ending(DestinationEnd::Waiting(Reason::new(why))),
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

/// What an operator is told whose word does nothing to a migration at this stage.
fn why_not_ruled(stage: &Stage, copy: CopyState) -> &'static str {
    match (stage, copy) {
        (Stage::Refused { .. }, CopyState::Gone(_)) => "it was refused, and no copy of it is here",
        // The refusal may have arrived, and the guest have run on, before the source was lost.
        (Stage::Refused { .. }, _) => {
            "it was refused, and its source may have gone on with it since: what is here may be older than its disks. \
             Rule that the source owns it, which discards this, and start it anew from its disks"
        }
        (Stage::Owned, CopyState::Partial) => {
            "it was started here, and only its source has the rest of its memory: without that it can only be ended"
        }
        (Stage::Owned, _) => "it was started here, and its source is only to be told",
        (Stage::Lost, _) => "it was taken here and is dead, and its source is only to be told",
        (Stage::Preparing | Stage::Prepared | Stage::Starting, _) => "its copy is not whole yet",
    }
}

/// What is known of the source where this is to be done.
fn heard(job: &Job) -> Heard {
    match job {
        Job::Serve(Call::Confirm(Fate::Discard)) => decided(Owner::Source),
        Job::Serve(Call::Confirm(Fate::Keep)) => decided(Owner::Destination),
        Job::Reconcile(heard) => *heard,
        Job::Rule(ruling) => Heard::Ruled(*ruling),
        Job::Serve(_) | Job::Cancel => Heard::Silence,
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
