//! The source side as a plain value: an input in, the next action out.
//!
//! No clock, no I/O: [`SourceMachine::action`] says what is to be done now, whoever does it feeds the
//! outcome to [`SourceMachine::on`]. An input that does not answer the action changes nothing. The
//! machine can be dropped at any point; [`SourceMachine::recover`] goes on from the journal.
//!
//! ```text
//!  Record(Begin) → Begin → Record(Prepare) → Ask(Prepare) → Record(Perform) → Perform
//!       │ any failure, or cancel                                                 │
//!       ▼                                                                        ▼
//!  Inspect → verdict ◄──────── no answer ── Ask(Finish) ◄──────────── Record(HandingOver)
//!       │                                        │                     the point of return
//!       ▼                                        ▼
//!  Record(Kept) → Confirm(Kept)            Record(Released) → Confirm(Released)
//!       └──► Record(Kept, ended)                 └──► Ask(Confirm Keep) → Forget
//!             └──► Ask(Confirm Discard) → Forget
//!
//!  Perform → Record(Switching) → Switch → Record(HandingOver) → Ask(Finish) → Record(PostCopy)
//!             the point of return                                                   │
//!                 Ask(Resume) → Resume ◄──── broken ──── Drain ◄────────────────────┤
//!                      └──────► Inspect ◄── all sent ──────┘                        │
//!                                  └──► Ask(Status) ── partial ─────────────────────┘
//!                                            └── started ──► Record(Released), as above
//! ```
//!
//! Invariants, each held by `tests/walk.rs`:
//! 1. `Finish` is asked only while the journal says `HandingOver`.
//! 2. After that the guest is resumed only when the destination has said that it never will own it,
//!    and its copy is ended only when the destination has said that it does.
//! 3. In post-copy its copy is ended only when the destination has said that all of the memory is there,
//!    or when nothing that memory could help is left.
//! 4. Without an answer the machine asks again or ends in doubt; it never guesses.
//! 5. Once the journal says that it was kept and has ended, the guest is not touched, not even looked at: another
//!    migration may have it by then.

mod step;

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    journal::{SourceRecord, SourceStage},
    message::{Call, Fate, Guest, Prepared, Reply, Request, Status},
    phase::{Cookie, Epoch, MigrationId, Owner, Phase, RunState, Side, TooLate},
    verdict::{self, GuestState, Heard, Ruling, SourceVerdict},
};

pub use step::{EndWhy, Outcome, SourceAction, SourceEnd, SourceInput};

/// The source side of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceMachine {
    record: SourceRecord,
    guest: Guest,
    prepared: Option<Prepared>,
    /// The destination may know of this migration.
    told: bool,
    /// A `Finish` may be on its way, or may have arrived.
    offered: bool,
    /// The journal may say `Switching` or `HandingOver` although the record here does not.
    doubtful: bool,
    /// Post-copy may have begun.
    switched: bool,
    at: At,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum At {
    Recording { before: SourceStage },
    Reopening { heard: Option<Status> },
    Beginning,
    AskingPrepare,
    Performing(Prepared),
    Switching(Prepared),
    AskingFinish,
    Draining,
    AskingResume,
    Resuming(Prepared),
    Inspecting { heard: Option<Status> },
    AskingStatus { local: GuestState },
    Confirming,
    Closing,
    Forgetting,
    Pausing(Again),
    Over(SourceEnd),
}

/// What is tried again after a pause.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Again {
    Reopen { heard: Option<Status> },
    Record { before: SourceStage },
    Inspect,
    Close,
    Forget,
}

impl SourceMachine {
    /// A migration that begins: `record` stands at `Begin`, `home` is where this daemon can be asked.
    #[must_use]
    pub fn begin(record: SourceRecord, home: impl Into<Arc<str>>) -> Self {
        let before = record.stage.clone();
        Self::at(record, home.into(), At::Recording { before })
    }

    /// A migration that goes on from what the journal says, in a new epoch.
    #[must_use]
    pub fn recover(record: SourceRecord) -> Self {
        Self::reopen(record, None)
    }

    /// A migration that an operator decides in place of the destination.
    #[must_use]
    pub fn rule(record: SourceRecord, ruling: Ruling) -> Self {
        let owner = match ruling {
            Ruling::PeerFenced => Owner::Source,
            Ruling::PeerOwns => Owner::Destination,
        };
        Self::reopen(record, Some(decided(owner)))
    }

    /// The same, for one that is under way: what it waits for is given up, as if its daemon had died.
    #[must_use]
    pub fn overruled(&self, ruling: Ruling) -> Self {
        Self::rule(self.record.clone(), ruling)
    }

    fn reopen(mut record: SourceRecord, heard: Option<Status>) -> Self {
        record.epoch = record.epoch.next();
        let stage = record.stage.clone();
        let mut machine = Self::at(record, "".into(), At::Reopening { heard });
        machine.told = stage != SourceStage::Begin;
        machine.offered = stage == SourceStage::HandingOver;
        machine.switched = matches!(stage, SourceStage::Switching | SourceStage::HandingOver);
        machine
    }

    fn at(record: SourceRecord, home: Arc<str>, at: At) -> Self {
        let guest = Guest {
            cookie: Cookie::empty(),
            run: record.run,
            home,
        };
        Self {
            record,
            guest,
            prepared: None,
            told: false,
            offered: false,
            doubtful: false,
            switched: false,
            at,
        }
    }

    /// Which migration.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        self.record.migration
    }

    /// Which life of this daemon drives it.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.record.epoch
    }

    /// Which guest.
    #[must_use]
    pub fn domain(&self) -> Uuid {
        self.record.domain
    }

    /// How far the migration came.
    #[must_use]
    pub fn stage(&self) -> &SourceStage {
        &self.record.stage
    }

    /// What is to be done now.
    #[must_use]
    pub fn action(&self) -> SourceAction {
        match &self.at {
            At::Recording { .. } | At::Reopening { .. } => {
                SourceAction::Record(self.record.clone())
            }
            At::Beginning => SourceAction::Begin,
            At::AskingPrepare => self.ask(Call::Prepare(self.guest.clone())),
            At::Performing(to) => SourceAction::Perform(to.clone()),
            At::Switching(to) => SourceAction::Switch(to.clone()),
            At::AskingFinish => self.ask(Call::Finish),
            At::Draining => SourceAction::Drain,
            At::AskingResume => self.ask(Call::Resume),
            At::Resuming(to) => SourceAction::Resume(to.clone()),
            At::Inspecting { .. } => SourceAction::Inspect,
            At::AskingStatus { .. } => self.ask(Call::Status(Side::Destination)),
            At::Confirming => SourceAction::Confirm(match self.record.stage {
                SourceStage::Kept { .. } => Outcome::Kept(self.record.run),
                _ => Outcome::Released,
            }),
            At::Closing => self.ask(Call::Confirm(match self.record.stage {
                SourceStage::Released => Fate::Keep,
                _ => Fate::Discard,
            })),
            At::Forgetting => SourceAction::Forget,
            At::Pausing(_) => SourceAction::Pause,
            At::Over(end) => SourceAction::Done(*end),
        }
    }

    /// Takes what came of the action.
    pub fn on(&mut self, input: SourceInput) {
        use SourceInput as In;
        match (self.at.clone(), input) {
            (At::Recording { .. }, In::Recorded) => self.recorded(),
            (At::Recording { before }, In::RecordFailed) => self.record_failed(before),
            // How the guest is by now is no business of this migration any more.
            (At::Reopening { .. }, In::Recorded) if self.record.stage.only_tells() => self.close(),
            (At::Reopening { heard }, In::Recorded) => self.at = At::Inspecting { heard },
            (At::Reopening { heard }, In::RecordFailed) => {
                self.at = At::Pausing(Again::Reopen { heard });
            }

            (At::Beginning, In::Begun { cookie, run }) => {
                self.record.run = run;
                self.guest.run = run;
                self.guest.cookie = cookie;
                self.advance(SourceStage::Prepare);
            }
            (At::Beginning, In::BeginFailed) | (At::Performing(_), In::PerformFailed) => {
                self.look();
            }

            (At::AskingPrepare, In::Answered(Reply::Prepared(prepared))) => {
                self.prepared = Some(prepared);
                self.advance(SourceStage::Perform);
            }
            (At::AskingPrepare, In::Answered(Reply::Refused(_)) | In::Silent { sent: false }) => {
                self.told = false;
                self.look();
            }
            (At::Performing(_), In::Performed) => self.advance(SourceStage::HandingOver),
            (At::Performing(to), In::Switch) => {
                self.prepared = Some(to);
                self.advance(SourceStage::Switching);
            }
            (At::Switching(_), In::Switched) => {
                self.switched = true;
                self.advance(SourceStage::HandingOver);
            }
            (At::Switching(_), In::SwitchFailed) => {
                self.switched = true;
                self.look();
            }

            // Whether all is there is the destination's word to say, not that of the QEMU here.
            (At::AskingFinish, In::Answered(Reply::Owned)) if self.switched => {
                self.advance(SourceStage::PostCopy);
            }
            (At::Draining | At::Resuming(_), In::Drained) => self.look(),
            (At::Draining, In::DrainFailed) => self.at = At::AskingResume,
            (At::Resuming(_), In::DrainFailed) => self.at = At::Pausing(Again::Inspect),
            (At::AskingResume, In::Answered(Reply::Prepared(to))) => self.at = At::Resuming(to),

            (At::AskingFinish, In::Answered(Reply::Owned)) => self.advance(SourceStage::Released),
            (At::AskingFinish, In::Answered(Reply::Lost)) => {
                self.advance(SourceStage::Lost { tell: true });
            }
            (At::AskingFinish, In::Answered(Reply::Refused(_))) => {
                self.at = At::Inspecting {
                    heard: Some(decided(Owner::Source)),
                };
            }
            // What never left this process gave nothing away.
            (At::AskingFinish, In::Silent { sent: false }) if !self.offered && !self.switched => {
                self.at = At::Inspecting {
                    heard: Some(decided(Owner::Source)),
                };
            }

            (At::Inspecting { heard }, In::Local(local)) => {
                self.judge(local, heard.map_or(Heard::NotAsked, Heard::Said));
            }
            (At::Inspecting { .. }, In::InspectFailed) => self.at = At::Pausing(Again::Inspect),
            (At::AskingStatus { local }, In::Answered(Reply::Status(status))) => {
                self.judge(local, Heard::Said(status));
            }
            (At::AskingStatus { local }, In::Answered(Reply::Unknown)) => {
                self.judge(local, Heard::NoRecord);
            }

            (At::Confirming, In::Confirmed) => self.confirmed(),
            // The copy may have died meanwhile, which changes the verdict.
            (At::Confirming, In::ConfirmFailed) => self.at = At::Pausing(Again::Inspect),
            (At::Closing, In::Answered(Reply::Closed)) => self.at = At::Forgetting,
            // What was given away died before it could be started.
            (At::Closing, In::Answered(Reply::Lost))
                if self.record.stage == SourceStage::Released =>
            {
                self.advance(SourceStage::Lost { tell: false });
            }
            // An operator has let the destination have what is dead here.
            (At::Closing, In::Answered(Reply::Conflict))
                if matches!(self.record.stage, SourceStage::Lost { .. }) =>
            {
                self.advance(SourceStage::Released);
            }
            (At::Closing, In::Answered(Reply::Conflict)) => self.end(EndWhy::Conflict),
            (At::Forgetting, In::Forgotten) => {
                self.at = At::Over(SourceEnd {
                    owner: self.owner(),
                    why: EndWhy::Protocol,
                    settled: true,
                });
            }
            (At::Forgetting, In::ForgetFailed) => self.at = At::Pausing(Again::Forget),

            (
                At::AskingPrepare
                | At::AskingFinish
                | At::AskingResume
                | At::AskingStatus { .. }
                | At::Closing,
                In::Answered(Reply::Stale { .. }),
            ) => self.end(EndWhy::Superseded),
            // Any other answer decides nothing and counts as none.
            (At::AskingPrepare, In::Answered(_) | In::Silent { .. }) => self.look(),
            (At::AskingFinish, In::Answered(_) | In::Silent { .. }) => {
                self.offered = true;
                self.at = At::Pausing(Again::Inspect);
            }
            (At::AskingResume, In::Answered(_) | In::Silent { .. }) => {
                self.at = At::Pausing(Again::Inspect);
            }
            (At::AskingStatus { local }, In::Answered(_) | In::Silent { .. }) => {
                self.judge(local, Heard::Silence);
            }
            (At::Closing, In::Answered(_) | In::Silent { .. }) => {
                self.at = At::Pausing(Again::Close);
            }

            (At::Pausing(again), In::Retry) => {
                self.at = match again {
                    Again::Reopen { heard } => At::Reopening { heard },
                    Again::Record { before } => At::Recording { before },
                    Again::Inspect => At::Inspecting { heard: None },
                    Again::Close => At::Closing,
                    Again::Forget => At::Forgetting,
                };
            }
            (At::Pausing(_), In::GiveUp) => self.end(EndWhy::Protocol),

            (_, _) => {}
        }
    }

    /// Whether [`SourceMachine::cancel`] would turn back now.
    #[must_use]
    pub fn cancellable(&self) -> bool {
        match &self.at {
            At::Recording {
                before: SourceStage::Switching,
            } => false,
            At::Recording { .. } => {
                self.record.stage.phase() <= Phase::Finish
                    && self.record.stage != SourceStage::PostCopy
            }
            At::Beginning | At::AskingPrepare | At::Performing(_) => true,
            _ => false,
        }
    }

    /// Turns back, if the guest was not offered yet. The action at hand must not have been begun if it
    /// is a `Record`, and may be abandoned half done if it is any other.
    ///
    /// # Errors
    ///
    /// [`TooLate`]: the guest was offered, or the migration is turning back or over already.
    pub fn cancel(&mut self) -> Result<(), TooLate> {
        if !self.cancellable() {
            return Err(TooLate {
                phase: self.record.stage.phase(),
            });
        }
        if let At::Recording { before } = &self.at {
            self.record.stage = before.clone();
        }
        self.look();
        Ok(())
    }

    /// Somebody has paused the guest since it was described: whoever ends up with it lets it stand, and what is written
    /// from here on says so.
    pub fn pause(&mut self) {
        self.record.run = RunState::Paused;
        self.guest.run = RunState::Paused;
    }

    fn ask(&self, call: Call) -> SourceAction {
        let run = (call == Call::Finish).then_some(self.record.run);
        SourceAction::Ask(Request {
            run,
            migration: self.record.migration,
            epoch: self.record.epoch,
            domain: self.record.domain,
            call,
            downtime: None,
        })
    }

    fn advance(&mut self, stage: SourceStage) {
        let before = std::mem::replace(&mut self.record.stage, stage);
        self.at = At::Recording { before };
    }

    fn look(&mut self) {
        self.at = At::Inspecting { heard: None };
    }

    fn recorded(&mut self) {
        self.at = match self.record.stage {
            SourceStage::Begin => At::Beginning,
            SourceStage::Prepare => {
                self.told = true;
                At::AskingPrepare
            }
            SourceStage::Perform => match self.prepared.take() {
                Some(to) => At::Performing(to),
                None => At::Inspecting { heard: None },
            },
            SourceStage::Switching => match self.prepared.take() {
                Some(to) => At::Switching(to),
                None => At::Inspecting { heard: None },
            },
            SourceStage::HandingOver => At::AskingFinish,
            SourceStage::PostCopy => At::Draining,
            SourceStage::Kept { ended: true, .. } => At::Closing,
            SourceStage::Kept { .. } | SourceStage::Released | SourceStage::Lost { .. } => {
                At::Confirming
            }
        };
    }

    fn record_failed(&mut self, before: SourceStage) {
        match self.record.stage {
            // Nothing was touched; what may be on disk must go.
            SourceStage::Begin => self.at = At::Forgetting,
            SourceStage::Prepare | SourceStage::Perform => {
                self.record.stage = before;
                self.look();
            }
            // There is no way back from post-copy, so the offer waits for the disk.
            SourceStage::HandingOver if before == SourceStage::Switching => {
                self.at = At::Pausing(Again::Record { before });
            }
            SourceStage::Switching | SourceStage::HandingOver => {
                self.record.stage = before;
                self.doubtful = true;
                self.look();
            }
            // Until it is on disk no other migration of the guest begins. The destination need not wait for that.
            SourceStage::Kept { ended: true, .. } => self.at = At::Closing,
            // A record of any earlier stage would lead a restarted daemon to keep the guest as well,
            // so the guest need not wait for the disk.
            SourceStage::Kept { .. }
                if !matches!(before, SourceStage::Switching | SourceStage::HandingOver)
                    && !self.doubtful =>
            {
                self.at = At::Confirming;
            }
            SourceStage::PostCopy
            | SourceStage::Kept { .. }
            | SourceStage::Released
            | SourceStage::Lost { .. } => {
                self.at = At::Pausing(Again::Record { before });
            }
        }
    }

    fn judge(&mut self, local: GuestState, heard: Heard) {
        match verdict::source(&self.record.stage, local, heard) {
            SourceVerdict::Keep => self.decide(SourceStage::Kept {
                tell: self.told,
                ended: false,
            }),
            SourceVerdict::Serve if self.record.stage == SourceStage::PostCopy => {
                self.at = At::Draining;
            }
            SourceVerdict::Serve => self.advance(SourceStage::PostCopy),
            SourceVerdict::Release => self.decide(SourceStage::Released),
            SourceVerdict::Lost => self.decide(SourceStage::Lost { tell: self.told }),
            SourceVerdict::HandOver if self.record.stage == SourceStage::HandingOver => {
                self.at = At::AskingFinish;
            }
            SourceVerdict::HandOver => self.advance(SourceStage::HandingOver),
            SourceVerdict::Ask => self.at = At::AskingStatus { local },
            SourceVerdict::InDoubt => self.at = At::Pausing(Again::Inspect),
        }
    }

    fn decide(&mut self, stage: SourceStage) {
        if std::mem::discriminant(&self.record.stage) == std::mem::discriminant(&stage) {
            self.at = At::Confirming;
        } else {
            self.advance(stage);
        }
    }

    fn confirmed(&mut self) {
        match self.record.stage {
            SourceStage::Kept { tell: true, .. } => self.advance(SourceStage::Kept {
                tell: true,
                ended: true,
            }),
            _ => self.close(),
        }
    }

    fn close(&mut self) {
        self.at = match self.record.stage {
            SourceStage::Kept { tell: false, .. } | SourceStage::Lost { tell: false } => {
                At::Forgetting
            }
            _ => At::Closing,
        };
    }

    fn end(&mut self, why: EndWhy) {
        self.at = At::Over(SourceEnd {
            owner: self.owner(),
            why,
            settled: false,
        });
    }

    /// Whom this side may name without its journal: a stage that leaves doubt is in doubt.
    fn owner(&self) -> Owner {
        match self.record.stage {
            // It ends here only if the host could not say how its copy is.
            SourceStage::Perform | SourceStage::Switching => Owner::InDoubt,
            ref stage => stage.owner(),
        }
    }
}

fn decided(owner: Owner) -> Status {
    Status {
        side: Side::Destination,
        phase: Phase::Confirm,
        owner,
        copy: None,
    }
}
