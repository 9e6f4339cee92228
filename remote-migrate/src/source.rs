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
//!  Inspect → verdict ◄── no answer ── Ask(Finish) ◄── Complete ◄───── Record(HandingOver)
//!       │                                        │                     the point of return
//!       ▼                                        ▼
//!  Record(Kept) → Confirm(Kept)            Record(Released) → Confirm(Released)
//!       └──► Record(Kept, ended)                 └──► Ask(Confirm Keep) → Forget
//!             └──► Ask(Confirm Discard) → Forget
//!
//!  Perform → Record(Switching) → Switch → Record(HandingOverHalf) → Ask(Finish) → Record(PostCopy)
//!             the point of return                                                   │
//!                 Ask(Resume) → Resume ◄──── broken ──── Drain ◄────────────────────┤
//!                      └──────► Inspect ◄── all sent ──────┘                        │
//!                                  └──► Ask(Status) ── partial ─────────────────────┘
//!                                            └── started ──► Record(Released), as above
//! ```
//!
//! Where QEMU has stopped the guest itself, and not its host, `Complete` comes before `Record(HandingOver)`.
//!
//! Invariants, each held by `tests/walk.rs`:
//! 1. `Finish` is asked only while the journal says `HandingOver` or `HandingOverHalf`. So is the last of the memory let go
//!    of a guest that its host has stopped: a copy that is complete is known as the guest as it was last, also if this host
//!    goes down.
//! 2. Once `Finish` may have been sent the guest is resumed only when the destination has said that it never will own it,
//!    and its copy is ended only when the destination has said that it does. An operator may say either in its place.
//! 3. Once post-copy may have begun its copy is ended only when the destination, or an operator in its place, has said that
//!    all of the memory is there, or when nothing that memory could help is left.
//! 4. Without an answer the machine asks again or ends in doubt; it never guesses.
//! 5. Once the journal says that it was kept, or lost, and has ended, the guest is not touched, not even looked at: another
//!    migration may have it by then, or it was started anew.
//!
//! What must outlive the machine is in its record: [`SourceMachine::recover`] and [`SourceMachine::overruled`] start from
//! that alone. What follows from a record that could not be written stands in one table, `unwritten`.

mod step;
mod unwritten;

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    host::Stopped,
    journal::{SourceRecord, SourceStage},
    message::{Call, CopyState, Fate, Guest, Prepared, Reply, Request, Status},
    phase::{Cookie, Epoch, MigrationId, Owner, Phase, RunState, Side, TooLate},
    verdict::{self, GuestState, Heard, Ruling, SourceVerdict},
};

use unwritten::{Unwritten, unwritten};

pub use step::{EndWhy, Outcome, SourceAction, SourceEnd, SourceInput};

/// The source side of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceMachine {
    record: SourceRecord,
    guest: Guest,
    /// What the destination was told in this life that the guest does there.
    said: Option<RunState>,
    /// The destination cannot be told that the guest was paused since.
    is_older: bool,
    prepared: Option<Prepared>,
    /// The journal may say `Switching` or `HandingOver` although the record here does not: a write failed. What is written
    /// next ends that.
    doubtful: bool,
    /// Nothing is held back any more: the host has let the last of the memory go, or has turned to post-copy.
    is_let_go: bool,
    at: At,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum At {
    Recording {
        before: SourceStage,
    },
    Reopening {
        heard: Heard,
    },
    Beginning,
    AskingPrepare,
    Performing(Prepared),
    Switching(Prepared),
    /// `first`: as below.
    Completing {
        first: bool,
    },
    /// The same, while the guest was not offered yet.
    CompletingUnoffered,
    /// `first`: no earlier `Finish` may be on its way, or have arrived.
    AskingFinish {
        first: bool,
    },
    Draining,
    AskingResume,
    Resuming(Prepared),
    Inspecting {
        heard: Heard,
    },
    AskingStatus {
        local: GuestState,
    },
    Confirming,
    Closing,
    Forgetting,
    Pausing(Again),
    Over(SourceEnd),
}

/// What is tried again after a pause.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Again {
    Reopen { heard: Heard },
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
        Self::reopen(record, Heard::NotAsked)
    }

    /// A migration that an operator decides in place of the destination.
    #[must_use]
    pub fn rule(record: SourceRecord, ruling: Ruling) -> Self {
        Self::reopen(record, Heard::Ruled(ruling))
    }

    /// The same, for one that is under way: what it waits for is given up, as if its daemon had died.
    #[must_use]
    pub fn overruled(&self, ruling: Ruling) -> Self {
        Self::rule(self.record.clone(), ruling)
    }

    fn reopen(mut record: SourceRecord, heard: Heard) -> Self {
        record.epoch = record.epoch.next();
        Self::at(record, "".into(), At::Reopening { heard })
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
            said: None,
            is_older: false,
            prepared: None,
            doubtful: false,
            is_let_go: false,
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
            At::Completing { .. } | At::CompletingUnoffered => SourceAction::Complete,
            At::AskingFinish { .. } => self.ask(Call::Finish),
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
            (At::Beginning, In::BeginFailed)
            | (At::Performing(_), In::PerformFailed)
            | (At::CompletingUnoffered, In::CompleteFailed) => self.look(),

            (At::AskingPrepare, In::Answered(Reply::Prepared(prepared))) => {
                self.prepared = Some(prepared);
                self.advance(SourceStage::Perform);
            }
            (At::AskingPrepare, In::Answered(Reply::Refused(_)) | In::Silent { sent: false }) => {
                // It knows nothing of this migration, and need not be told.
                self.record.stage = SourceStage::Begin;
                self.look();
            }
            (At::Performing(_), In::Performed(Stopped::ByHost)) => {
                self.advance(SourceStage::HandingOver);
            }
            (At::Performing(_), In::Performed(Stopped::ByHypervisor)) => {
                self.at = At::CompletingUnoffered;
            }
            (At::CompletingUnoffered, In::Completed) => {
                self.is_let_go = true;
                self.advance(SourceStage::HandingOver);
            }
            (At::Performing(to), In::Switch) => {
                self.prepared = Some(to);
                self.advance(SourceStage::Switching);
            }
            (At::Switching(_), In::Switched) => {
                self.is_let_go = true;
                self.advance(SourceStage::HandingOverHalf);
            }
            (At::Switching(_), In::SwitchFailed) => self.look(),

            (At::Completing { first }, In::Completed) => self.at = At::AskingFinish { first },
            // What was never offered gave nothing away.
            (At::Completing { first: true }, In::CompleteFailed)
                if self.record.stage == SourceStage::HandingOver =>
            {
                self.given_back();
            }
            // One that may have been offered is asked for; in two halves there is nothing to complete, and no way back.
            (At::Completing { first }, In::CompleteFailed) => {
                self.at = At::AskingFinish { first };
            }

            (At::Draining | At::Resuming(_), In::Drained) => self.look(),
            (At::Draining, In::DrainFailed) => self.at = At::AskingResume,
            (At::Resuming(_), In::DrainFailed) => self.at = At::Pausing(Again::Inspect),
            (At::AskingResume, In::Answered(Reply::Prepared(to))) => self.at = At::Resuming(to),

            (At::AskingFinish { first }, In::Answered(Reply::Owned)) => self.owned(first),
            (At::AskingFinish { .. }, In::Answered(Reply::Lost)) => {
                self.advance(SourceStage::Lost {
                    tell: true,
                    nowhere: true,
                    ended: false,
                });
            }
            (At::AskingFinish { .. }, In::Answered(Reply::Refused(_))) => self.given_back(),
            // It would let run a guest that was paused here. There is no way back from an offer or from post-copy, and a
            // guest that runs is worth more than one in doubt.
            (At::AskingFinish { first: true }, In::Untold)
                if self.said.is_some() && self.record.stage == SourceStage::HandingOver =>
            {
                self.given_back();
            }
            (At::AskingFinish { .. }, In::Untold) => self.is_older = true,
            // What never left this process gave nothing away.
            (At::AskingFinish { first: true }, In::Silent { sent: false })
                if self.record.stage == SourceStage::HandingOver =>
            {
                self.given_back();
            }

            (At::Inspecting { heard }, In::Local(local)) => {
                self.judge(local, heard);
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
                self.advance(SourceStage::Lost {
                    tell: false,
                    nowhere: true,
                    ended: false,
                });
            }
            // An operator has let the destination have what is dead here. Once it has ended here, who has it is not known.
            (At::Closing, In::Answered(Reply::Conflict))
                if matches!(self.record.stage, SourceStage::Lost { ended: false, .. }) =>
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
                | At::AskingFinish { .. }
                | At::AskingResume
                | At::AskingStatus { .. }
                | At::Closing,
                In::Answered(Reply::Stale { .. }),
            ) => self.end(EndWhy::Superseded),
            // Any other answer decides nothing and counts as none.
            (At::AskingPrepare, In::Answered(_) | In::Silent { .. }) => self.look(),
            (At::AskingFinish { .. } | At::AskingResume, In::Answered(_) | In::Silent { .. }) => {
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
                    Again::Inspect => At::Inspecting {
                        heard: Heard::NotAsked,
                    },
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
            At::Recording { .. } => match self.record.stage {
                // Post-copy may have begun.
                SourceStage::HandingOverHalf | SourceStage::PostCopy => false,
                ref stage => stage.phase() <= Phase::Finish,
            },
            At::Beginning | At::AskingPrepare | At::Performing(_) | At::CompletingUnoffered => true,
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
    }

    fn ask(&self, call: Call) -> SourceAction {
        // Told only where it is news, so that a peer that does not know of it is asked as it always was.
        let is_news = self.said != Some(self.record.run) && !self.is_older;
        let run = (call == Call::Finish && is_news).then_some(self.record.run);
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
        self.at = At::Inspecting {
            heard: Heard::NotAsked,
        };
    }

    /// The destination has taken it.
    fn owned(&mut self, first: bool) {
        match self.record.stage {
            // Whether all is there is the destination's word to say, not that of the QEMU here.
            SourceStage::HandingOverHalf => self.advance(SourceStage::PostCopy),
            // An earlier version may have begun it, in post-copy: it says that, too, if it is asked.
            _ if !first => self.look(),
            _ => self.advance(SourceStage::Released),
        }
    }

    /// The destination has not taken it, and never will.
    fn given_back(&mut self) {
        self.at = At::Inspecting {
            heard: Heard::Said(Status {
                side: Side::Destination,
                phase: Phase::Confirm,
                owner: Owner::Source,
                copy: None,
            }),
        };
    }

    fn recorded(&mut self) {
        self.doubtful = false;
        let inspecting = At::Inspecting {
            heard: Heard::NotAsked,
        };
        self.at = match self.record.stage {
            SourceStage::Begin => At::Beginning,
            SourceStage::Prepare => {
                self.guest.run = self.record.run;
                self.said = Some(self.record.run);
                At::AskingPrepare
            }
            SourceStage::Perform => self.prepared.take().map_or(inspecting, At::Performing),
            SourceStage::Switching => self.prepared.take().map_or(inspecting, At::Switching),
            SourceStage::HandingOver | SourceStage::HandingOverHalf if !self.is_let_go => {
                At::Completing { first: true }
            }
            SourceStage::HandingOver | SourceStage::HandingOverHalf => {
                At::AskingFinish { first: true }
            }
            SourceStage::PostCopy => At::Draining,
            ref stage if stage.only_tells() => At::Closing,
            SourceStage::Kept { .. } | SourceStage::Released | SourceStage::Lost { .. } => {
                At::Confirming
            }
        };
    }

    fn record_failed(&mut self, before: SourceStage) {
        match unwritten(&self.record.stage, &before, self.doubtful) {
            Unwritten::Forget => self.at = At::Forgetting,
            Unwritten::TurnBack { doubtful } => {
                self.record.stage = before;
                self.doubtful |= doubtful;
                self.look();
            }
            Unwritten::GoOn => self.recorded(),
            Unwritten::WriteAgain => self.at = At::Pausing(Again::Record { before }),
        }
    }

    fn judge(&mut self, local: GuestState, heard: Heard) {
        let stage = &self.record.stage;
        match verdict::source(stage, local, heard) {
            SourceVerdict::Keep => self.decide(SourceStage::Kept {
                tell: self.is_to_be_told(),
                ended: false,
            }),
            SourceVerdict::Serve if *stage == SourceStage::PostCopy => self.at = At::Draining,
            SourceVerdict::Serve => self.advance(SourceStage::PostCopy),
            SourceVerdict::Release => self.decide(SourceStage::Released),
            SourceVerdict::Lost { nowhere } => self.decide(SourceStage::Lost {
                tell: self.is_to_be_told(),
                nowhere,
                ended: false,
            }),
            SourceVerdict::HandOver => match stage {
                // An earlier life may not have come to let the last of it go.
                SourceStage::HandingOver | SourceStage::HandingOverHalf
                    if local == GuestState::Stopped && waits(heard) =>
                {
                    self.at = At::Completing { first: false };
                }
                SourceStage::HandingOver | SourceStage::HandingOverHalf => {
                    self.at = At::AskingFinish { first: false };
                }
                _ => self.advance(SourceStage::HandingOverHalf),
            },
            SourceVerdict::Ask => self.at = At::AskingStatus { local },
            SourceVerdict::InDoubt => self.at = At::Pausing(Again::Inspect),
        }
    }

    /// Whether the destination may know of this migration.
    fn is_to_be_told(&self) -> bool {
        match self.record.stage {
            SourceStage::Begin => false,
            SourceStage::Kept { tell, .. } | SourceStage::Lost { tell, .. } => tell,
            _ => true,
        }
    }

    fn decide(&mut self, stage: SourceStage) {
        if std::mem::discriminant(&self.record.stage) == std::mem::discriminant(&stage) {
            // What is known better now is written once it has ended.
            self.record.stage = stage;
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
            SourceStage::Lost {
                tell: true,
                nowhere: true,
                ..
            } => self.advance(SourceStage::Lost {
                tell: true,
                nowhere: true,
                ended: true,
            }),
            _ => self.close(),
        }
    }

    fn close(&mut self) {
        self.at = match self.record.stage {
            SourceStage::Kept { tell: false, .. } | SourceStage::Lost { tell: false, .. } => {
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

/// Whether the destination has said that it waits for memory.
fn waits(heard: Heard) -> bool {
    matches!(heard, Heard::Said(status) if status.copy == Some(CopyState::Incoming))
}
