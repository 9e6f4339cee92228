//! Both machines, their hosts and journals, and the channel between them, as one value.
//!
//! The hosts are models: a guest is running, stopped or dead, and a copy is nowhere, coming, complete
//! or started. What no daemon can see, but the law speaks of, is kept in [`Truth`].

use remote_migrate::{
    Call, Cookie, CopyState, DestinationRecord, DestinationStage, Epoch, Fate, MigrationId, Owner,
    Phase, Prepared, Ran, Reason, Reply, Request, RunState, Side, SourceRecord, SourceStage,
    Status, Stopped,
    destination::{DestinationAction, DestinationInput as DIn, DestinationMachine},
    source::{EndWhy, Outcome, SourceAction, SourceInput as SIn, SourceMachine},
    verdict::{GuestState, Heard, Ruling},
};
use uuid::Uuid;

/// How many faults of each sort one story may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Faults {
    /// Crashes of the source's daemon.
    pub(crate) source_crashes: u8,
    /// Crashes of the destination's daemon.
    pub(crate) destination_crashes: u8,
    /// Requests that arrive twice, or after nobody waits for them any more.
    pub(crate) strays: u8,
    /// Steps of a host, and writes, that fail.
    pub(crate) failures: u8,
    /// Cancels, at the source.
    pub(crate) cancels: u8,
    /// Times the source stops asking again.
    pub(crate) gives_up: u8,
    /// Guests that are killed.
    pub(crate) kills: u8,
    /// Turns to post-copy.
    pub(crate) post_copy: u8,
    /// Words of operators, but those that end what nothing else can.
    pub(crate) rulings: u8,
    /// Guests that are dead at the source, and started anew there.
    pub(crate) new_starts: u8,
}

impl Faults {
    /// A story without faults.
    pub(crate) const NONE: Self = Self {
        source_crashes: 0,
        destination_crashes: 0,
        strays: 0,
        failures: 0,
        cancels: 0,
        gives_up: 0,
        kills: 0,
        post_copy: 0,
        rulings: 0,
        new_starts: 0,
    };
}

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    Nothing,
    ResumeOnLostFinish,
    KillOnLostFinish,
    StartBeforeJournal,
    OfferBeforeJournal,
    RefuseBeforeJournal,
    CancelTooLate,
    DiscardOnSilence,
    ForgetUnconfirmed,
    CancelReachesPostCopy,
    TrustOwnQemuInPostCopy,
    TakenButNeverRan,
    LoseWhatWasNotTaken,
    ForgetThatItEnded,
    OwnsMeansHasAll,
    StartWhatWasRefused,
    StartAnewWhatMayBeThere,
    LastGoesUnwritten,
}

/// One thing that can happen next.
pub(crate) struct Step {
    pub(crate) label: &'static str,
    pub(crate) world: World,
    /// Not part of a run in which links heal and daemons return.
    pub(crate) fault: bool,
    /// The law that this step breaks.
    pub(crate) broken: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Life {
    Running,
    Stopped,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Copied {
    Nothing,
    Incoming,
    Complete,
    /// Can be started, and memory is missing.
    Switched,
    Started,
    /// Started, and memory is missing.
    Partial,
    Dead,
}

/// What only the world knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Truth {
    /// The destination's copy ran.
    ran_there: bool,
    /// The guest ran on at the source after the destination's copy was complete.
    ran_on: bool,
    /// QEMU stopped the guest itself, and would have let it run itself.
    by_qemu: bool,
    /// The destination's journal has named the destination once.
    taken: bool,
    /// The source has named itself the owner for good once.
    kept: bool,
    /// The source has written that the migration has ended here: another one may have the guest by now.
    ended: bool,
    /// The guest was killed at the source.
    killed_here: bool,
    /// The destination's copy was killed.
    killed_there: bool,
    /// An operator has said that the destination has the guest when it had not.
    misled: bool,
}

impl Truth {
    /// Whether the only complete copy that anybody may let run was killed. Of the destination's that can be said only once
    /// its journal has called the guest its own: until then the source's copy is the guest, and must not be lost.
    fn is_lost(&self) -> bool {
        self.killed_here || self.killed_there && self.taken
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    source: Option<SourceMachine>,
    source_journal: Option<SourceRecord>,
    guest: Life,
    destination: DestinationMachine,
    destination_journal: Option<DestinationRecord>,
    /// What the destination serves now.
    serving: Option<Request>,
    /// What it answers is waited for: an answer belongs to one question, and none to one that was asked again since.
    is_awaited: bool,
    copy: Copied,
    /// A request to start it is still inside QEMU.
    starting: bool,
    /// The copy became a guest like others: the migration that made it is forgotten.
    settled_there: bool,
    /// What the source waits for an answer to, once it was sent.
    question: Option<Request>,
    /// The question, while it is on its way.
    posted: Option<Request>,
    /// The answer to the question, on its way back.
    answer: Option<Reply>,
    /// Requests on their way that nobody waits for any more, and second copies.
    strays: Vec<Request>,
    faults: Faults,
    truth: Truth,
}

fn id() -> MigrationId {
    MigrationId::from_uuid(Uuid::nil())
}

fn why() -> Reason {
    Reason::new("")
}

impl World {
    pub(crate) fn new(faults: Faults) -> Self {
        let record = SourceRecord {
            migration: id(),
            domain: Uuid::nil(),
            epoch: Epoch::FIRST,
            run: RunState::Running,
            peer: "".into(),
            stage: SourceStage::Begin,
        };
        Self {
            source: Some(SourceMachine::begin(record, "")),
            source_journal: None,
            guest: Life::Running,
            destination: DestinationMachine::new(id(), None),
            destination_journal: None,
            serving: None,
            is_awaited: false,
            copy: Copied::Nothing,
            starting: false,
            settled_there: false,
            question: None,
            posted: None,
            answer: None,
            strays: Vec::new(),
            faults,
            truth: Truth::default(),
        }
    }

    /// Nobody remembers anything, nothing is left over, and one guest runs, or its loss is no surprise.
    pub(crate) fn is_settled(&self) -> bool {
        let forgotten = self.source_journal.is_none()
            && self.destination_journal.is_none()
            && self.source.is_none()
            && self.destination.action() == DestinationAction::Wait;
        let clean =
            matches!(self.copy, Copied::Nothing | Copied::Dead) && self.guest != Life::Stopped;
        let owners = usize::from(self.guest == Life::Running) + usize::from(self.settled_there);
        forgotten && clean && (owners == 1 || owners == 0 && self.truth.is_lost())
    }

    pub(crate) fn steps(&self, mutation: Break) -> Vec<Step> {
        let mut steps = Steps {
            from: self,
            mutation,
            out: Vec::new(),
        };
        steps.source();
        steps.destination();
        steps.channel();
        steps.world();
        steps.out
    }
}

struct Steps<'a> {
    from: &'a World,
    mutation: Break,
    out: Vec<Step>,
}

impl Steps<'_> {
    /// What the source's daemon does, or what becomes of it.
    fn source(&mut self) {
        let Some(machine) = &self.from.source else {
            if let Some(record) = self.from.source_journal.clone() {
                let stage = record.stage.clone();
                self.start_anew(&stage);
                let ruled = record.clone();
                self.add("source daemon returns", false, move |world| {
                    world.source = Some(SourceMachine::recover(record));
                    None
                });
                self.rule_source(&stage, |ruling| SourceMachine::rule(ruled.clone(), ruling));
            }
            return;
        };
        let waits = match machine.action() {
            SourceAction::Ask(request) => !matches!(request.call, Call::Prepare(_)),
            SourceAction::Pause => true,
            _ => false,
        };
        if waits {
            self.rule_source(machine.stage(), |ruling| machine.overruled(ruling));
        }
        if machine.cancellable() || self.mutation == Break::CancelTooLate {
            self.costs(
                |faults| &mut faults.cancels,
                "cancel",
                |world| {
                    let machine = world.source.as_mut().unwrap();
                    if machine.cancel().is_err() {
                        machine.on(SIn::Answered(Reply::Refused(why())));
                    }
                    world.hang_up();
                    None
                },
            );
        }
        match machine.action() {
            SourceAction::Record(record) => {
                let skip = self.mutation == Break::OfferBeforeJournal
                    && record.stage == SourceStage::HandingOver;
                let forgets = self.mutation == Break::ForgetThatItEnded;
                let stored = record.clone();
                self.source_does("source records", move |world| {
                    world.truth.ended |= record.stage.only_tells();
                    let skip = skip || forgets && record.stage.only_tells();
                    if !skip {
                        world.store_source(record);
                    }
                    (SIn::Recorded, None)
                });
                self.source_fails("source's journal fails", |_| (SIn::RecordFailed, None));
                self.source_fails(
                    "source's journal fails after all was written",
                    move |world| {
                        world.store_source(stored);
                        (SIn::RecordFailed, None)
                    },
                );
            }
            SourceAction::Begin => {
                self.source_does("source begins", |_| {
                    (
                        SIn::Begun {
                            cookie: Cookie::empty(),
                            run: RunState::Running,
                        },
                        None,
                    )
                });
                self.source_fails("begin fails", |_| (SIn::BeginFailed, None));
            }
            SourceAction::Ask(request) => self.ask(request),
            SourceAction::Perform(_) => self.perform(),
            SourceAction::Complete => self.complete(),
            SourceAction::Switch(_) => self.switch(),
            SourceAction::Drain => self.drain(false),
            SourceAction::Resume(_) => self.drain(true),
            SourceAction::Inspect => {
                let seen = match self.from.guest {
                    Life::Running => GuestState::Running,
                    Life::Stopped => GuestState::Stopped,
                    Life::Dead => GuestState::Gone,
                };
                self.source_does("source looks", move |world| {
                    (SIn::Local(seen), world.touches_no_more())
                });
                if seen == GuestState::Stopped
                    && matches!(self.from.copy, Copied::Dead | Copied::Complete)
                {
                    self.source_does("source looks, and QEMU has given up", move |world| {
                        (SIn::Local(GuestState::GivenUp), world.touches_no_more())
                    });
                }
                self.source_fails("source cannot look", |_| (SIn::InspectFailed, None));
            }
            SourceAction::Confirm(outcome) => {
                self.source_does("source confirms", move |world| world.confirm(outcome));
                self.source_fails("source's confirm fails", |_| (SIn::ConfirmFailed, None));
            }
            SourceAction::Forget => {
                self.source_does("source forgets", |world| {
                    world.source_journal = None;
                    (SIn::Forgotten, None)
                });
                self.source_fails("source cannot forget", |_| (SIn::ForgetFailed, None));
            }
            SourceAction::Pause => {
                self.source_does("source asks again", |_| (SIn::Retry, None));
                self.costs(
                    |faults| &mut faults.gives_up,
                    "source gives up",
                    |world| {
                        world.source.as_mut().unwrap().on(SIn::GiveUp);
                        None
                    },
                );
            }
            SourceAction::Done(end) => self.add("source is done", false, move |world| {
                world.source = None;
                let truth = &world.truth;
                let right = match end.owner {
                    Owner::Source => !truth.ran_there,
                    Owner::Destination => {
                        truth.taken || truth.killed_here || truth.misled && !end.settled
                    }
                    Owner::Nobody => truth.is_lost(),
                    Owner::InDoubt => !end.settled,
                };
                let expected = right && end.why == EndWhy::Protocol;
                (!expected).then_some("the end that is named is the end there is")
            }),
        }
        self.costs(
            |faults| &mut faults.source_crashes,
            "source daemon crashes",
            |world| {
                world.crash_source();
                None
            },
        );
    }

    /// Between two looks at a migration that is only to be told, the guest is its user's.
    fn start_anew(&mut self, stage: &SourceStage) {
        let may_be_there = matches!(stage, SourceStage::Lost { nowhere: false, .. });
        let is_mistaken = may_be_there && self.mutation == Break::StartAnewWhatMayBeThere;
        if (stage.only_tells() || is_mistaken) && self.from.guest == Life::Dead {
            self.costs(
                |faults| &mut faults.new_starts,
                "the guest is started anew at the source",
                |world| {
                    world.guest = Life::Running;
                    if is_mistaken {
                        let record = world.source_journal.as_mut().unwrap();
                        record.stage = SourceStage::Lost {
                            tell: true,
                            nowhere: true,
                            ended: true,
                        };
                        world.truth.ended = true;
                    }
                    None
                },
            );
        }
    }

    fn ask(&mut self, request: Request) {
        if self.from.question.is_some() {
            let lost_finish = request.call == Call::Finish;
            let mutation = self.mutation;
            self.source_does("source hears nothing", move |_| {
                let input = match mutation {
                    Break::ResumeOnLostFinish if lost_finish => {
                        SIn::Answered(Reply::Refused(why()))
                    }
                    Break::KillOnLostFinish if lost_finish => SIn::Answered(Reply::Owned),
                    Break::ForgetUnconfirmed if matches!(request.call, Call::Confirm(_)) => {
                        SIn::Answered(Reply::Closed)
                    }
                    _ => SIn::Silent { sent: true },
                };
                (input, None)
            });
        } else {
            self.add("source asks", false, move |world| {
                world.question = Some(request.clone());
                world.posted = Some(request);
                None
            });
            self.add("source cannot send", true, |world| {
                world
                    .source
                    .as_mut()
                    .unwrap()
                    .on(SIn::Silent { sent: false });
                None
            });
        }
    }

    fn perform(&mut self) {
        let flows = self.from.copy == Copied::Incoming && self.from.guest != Life::Dead;
        if flows {
            let unwritten = self.mutation == Break::LastGoesUnwritten;
            self.source_does("memory moves, but for the last of it", move |world| {
                world.guest = Life::Stopped;
                if unwritten {
                    world.copy = Copied::Complete;
                }
                (SIn::Performed(Stopped::ByHost), None)
            });
            self.source_fails("the guest is stopped and it is not seen", |world| {
                world.guest = Life::Stopped;
                (SIn::PerformFailed, None)
            });
            self.source_does("memory moves until QEMU stops the guest itself", |world| {
                world.guest = Life::Stopped;
                world.truth.by_qemu = true;
                (SIn::Performed(Stopped::ByHypervisor), None)
            });
            self.source_fails("memory breaks off", |world| {
                world.copy = Copied::Dead;
                (SIn::PerformFailed, None)
            });
        } else {
            self.source_does("memory goes nowhere", |_| (SIn::PerformFailed, None));
        }
        self.costs(
            |faults| &mut faults.post_copy,
            "post-copy is wanted",
            |world| {
                world.source.as_mut().unwrap().on(SIn::Switch);
                None
            },
        );
    }

    fn complete(&mut self) {
        let flows = matches!(self.from.copy, Copied::Incoming | Copied::Complete);
        if self.from.guest != Life::Stopped || !flows {
            self.source_does("the last of the memory goes nowhere", |_| {
                (SIn::CompleteFailed, None)
            });
            return;
        }
        let stage = self.from.source.as_ref().map(SourceMachine::stage);
        let is_half = stage == Some(&SourceStage::HandingOverHalf);
        if is_half && self.from.copy == Copied::Incoming {
            self.source_does("what waited for post-copy to begin is let go", |world| {
                world.copy = Copied::Switched;
                (SIn::CompleteFailed, None)
            });
        }
        self.source_does("the last of the memory moves", move |world| {
            world.copy = Copied::Complete;
            world.truth.by_qemu |= is_half;
            (SIn::Completed, None)
        });
        self.source_fails(
            "the last of the memory moves but its end is not seen",
            |world| {
                world.copy = Copied::Complete;
                (SIn::CompleteFailed, None)
            },
        );
        if self.from.copy == Copied::Incoming {
            self.source_fails("the last of the memory breaks off", |world| {
                world.copy = Copied::Dead;
                (SIn::CompleteFailed, None)
            });
        }
        if stage == Some(&SourceStage::Perform) {
            self.source_fails("QEMU resumes the guest at the end", |world| {
                world.copy = Copied::Complete;
                world.guest = Life::Running;
                (SIn::CompleteFailed, None)
            });
        }
    }

    fn switch(&mut self) {
        if self.from.copy != Copied::Incoming || self.from.guest == Life::Dead {
            self.source_does("nothing to turn to post-copy", |_| {
                (SIn::SwitchFailed, None)
            });
            return;
        }
        for (label, copy) in [
            ("post-copy begins", Copied::Switched),
            ("all has moved before post-copy begins", Copied::Complete),
        ] {
            self.source_does(label, move |world| {
                world.guest = Life::Stopped;
                world.copy = copy;
                world.truth.by_qemu |= copy == Copied::Complete;
                (SIn::Switched, None)
            });
        }
        self.source_fails("post-copy begins and is not seen", |world| {
            world.guest = Life::Stopped;
            world.copy = Copied::Switched;
            (SIn::SwitchFailed, None)
        });
        self.source_does(
            "the guest is stopped, and what begins post-copy waits",
            |world| {
                world.guest = Life::Stopped;
                (SIn::SwitchFailed, None)
            },
        );
        self.source_fails("post-copy does not begin", |_| (SIn::SwitchFailed, None));
        self.source_fails("memory breaks off at the turn", |world| {
            world.copy = Copied::Dead;
            (SIn::SwitchFailed, None)
        });
    }

    fn drain(&mut self, anew: bool) {
        if self.mutation == Break::CancelReachesPostCopy && self.from.guest == Life::Stopped {
            // As some QEMUs allow it.
            self.source_fails("QEMU is told to cancel, and to go on", |world| {
                world.guest = Life::Running;
                (SIn::DrainFailed, None)
            });
        }
        if self.from.guest == Life::Stopped
            && matches!(self.from.copy, Copied::Partial | Copied::Started)
        {
            self.source_does("the rest of the memory is sent", |world| {
                world.copy = Copied::Started;
                (SIn::Drained, None)
            });
        } else {
            self.source_does("the rest of the memory goes nowhere", |_| {
                (SIn::DrainFailed, None)
            });
        }
        self.source_fails(
            if anew {
                "the stream breaks again"
            } else {
                "the stream breaks"
            },
            |_| (SIn::DrainFailed, None),
        );
    }

    /// An operator at the source, who knows the truth wherever a ruling needs it to be true.
    fn rule_source(&mut self, stage: &SourceStage, ruled: impl Fn(Ruling) -> SourceMachine) {
        let World { guest, copy, .. } = *self.from;
        let truth = &self.from.truth;
        // Which of the two copies, if any, is the guest as it was last, is known to nobody else.
        let is_unoffered = matches!(stage, SourceStage::Perform | SourceStage::Switching);
        if guest == Life::Dead && is_unoffered && truth.by_qemu {
            let ruling = match copy {
                _ if truth.ran_on => Some(Ruling::PeerFenced),
                Copied::Complete => Some(Ruling::PeerOwns),
                _ => None,
            };
            if let Some(ruling) = ruling {
                let machine = ruled(ruling);
                self.add("an operator rules at the source", false, |world| {
                    world.ruled_at_source(machine);
                    None
                });
            }
        }
        if matches!(stage, SourceStage::Kept { .. } | SourceStage::Released) || stage.only_tells() {
            return;
        }
        let has_all = copy == Copied::Started || self.from.settled_there;
        let owns = has_all || copy == Copied::Partial;
        let is_lost = matches!(stage, SourceStage::Lost { .. });
        let never_ran = !truth.ran_there && !self.from.settled_there;
        if !is_lost && (owns || stage.may_be_halved()) {
            let machine = ruled(match self.mutation {
                Break::OwnsMeansHasAll if owns => Ruling::PeerHasAll,
                _ => Ruling::PeerOwns,
            });
            self.costs(
                |faults| &mut faults.rulings,
                "an operator rules that the destination owns the guest",
                |world| {
                    world.truth.misled |= !owns;
                    world.ruled_at_source(machine);
                    None
                },
            );
        }
        if !is_lost && has_all {
            let machine = ruled(Ruling::PeerHasAll);
            self.costs(
                |faults| &mut faults.rulings,
                "an operator rules that the destination has all of the guest",
                |world| {
                    world.ruled_at_source(machine);
                    None
                },
            );
        }
        // Where it is known to have run, or to be lost, nothing of it can go back in time.
        let is_known = *stage == SourceStage::PostCopy || is_lost;
        if never_ran || is_known && !self.from.settled_there {
            let machine = ruled(Ruling::PeerFenced);
            self.costs(
                |faults| &mut faults.rulings,
                "an operator fences the destination, and rules so",
                |world| {
                    if world.copy != Copied::Nothing {
                        world.copy = Copied::Dead;
                        world.truth.killed_there = true;
                    }
                    world.starting = false;
                    world.crash_destination();
                    world.ruled_at_source(machine);
                    None
                },
            );
        }
    }

    /// What the destination's daemon does, or what becomes of it.
    fn destination(&mut self) {
        match self.from.destination.action() {
            DestinationAction::Wait => self.idle(),
            DestinationAction::Record(record) => {
                let skip = match self.mutation {
                    Break::StartBeforeJournal => record.stage == DestinationStage::Starting,
                    Break::RefuseBeforeJournal => {
                        matches!(record.stage, DestinationStage::Refused { .. })
                    }
                    _ => false,
                };
                let stored = record.clone();
                self.destination_does("destination records", move |world| {
                    if !skip {
                        world.store_destination(record);
                    }
                    (DIn::Recorded, None)
                });
                self.destination_fails("destination's journal fails", |_| {
                    (DIn::RecordFailed, None)
                });
                self.destination_fails("destination's journal fails after all", move |world| {
                    world.store_destination(stored);
                    (DIn::RecordFailed, None)
                });
            }
            DestinationAction::Prepare(_) => {
                if matches!(self.from.copy, Copied::Nothing | Copied::Dead)
                    && !self.from.settled_there
                {
                    self.destination_does("destination prepares", |world| {
                        world.copy = Copied::Incoming;
                        let place = Prepared {
                            connect: "".into(),
                            cookie: Cookie::empty(),
                        };
                        (DIn::Prepared(place), None)
                    });
                    self.destination_fails("prepare fails", |_| (DIn::PrepareFailed(why()), None));
                } else {
                    self.destination_does("there is such a guest already", |_| {
                        (DIn::PrepareFailed(why()), None)
                    });
                }
            }
            DestinationAction::Resume => {
                self.destination_does("destination listens again", |_| {
                    let place = Prepared {
                        connect: "".into(),
                        cookie: Cookie::empty(),
                    };
                    (DIn::Prepared(place), None)
                });
                self.destination_fails("destination cannot listen again", |_| {
                    (DIn::PrepareFailed(why()), None)
                });
            }
            DestinationAction::Load => match self.from.copy {
                Copied::Complete | Copied::Switched => {
                    self.destination_does("all is loaded", |_| (DIn::Loaded, None));
                }
                Copied::Incoming => {
                    self.destination_does("not all is loaded", |_| (DIn::Loading, None));
                }
                _ => self.destination_does("nothing loads", |_| (DIn::LoadFailed(why()), None)),
            },
            DestinationAction::Start(_) => self.start(),
            DestinationAction::Inspect => {
                let seen = match self.from.copy {
                    Copied::Nothing | Copied::Dead => CopyState::Gone(Ran::Maybe),
                    Copied::Incoming => CopyState::Incoming,
                    Copied::Complete => CopyState::Complete,
                    Copied::Switched => CopyState::Switched,
                    Copied::Started => CopyState::Started,
                    Copied::Partial => CopyState::Partial,
                };
                self.destination_does("destination looks", move |_| (DIn::Local(seen), None));
                if seen == CopyState::Gone(Ran::Maybe)
                    && (!self.from.truth.ran_there || self.mutation == Break::TakenButNeverRan)
                {
                    self.destination_does(
                        "destination looks, and can prove that nothing ran",
                        |_| (DIn::Local(CopyState::Gone(Ran::Never)), None),
                    );
                }
                self.destination_fails("destination cannot look", |_| (DIn::InspectFailed, None));
            }
            DestinationAction::Discard => {
                self.destination_does("destination discards", |world| world.discard());
                self.destination_fails("discard fails", |_| (DIn::DiscardFailed, None));
            }
            DestinationAction::Forget => {
                self.destination_does("destination forgets", |world| {
                    world.destination_journal = None;
                    let left = matches!(
                        world.copy,
                        Copied::Incoming | Copied::Complete | Copied::Switched | Copied::Partial
                    );
                    if world.copy == Copied::Started {
                        world.copy = Copied::Nothing;
                        world.settled_there = true;
                    }
                    (DIn::Forgotten, left.then_some("nothing is left behind"))
                });
                self.destination_fails("destination cannot forget", |_| (DIn::ForgetFailed, None));
            }
            DestinationAction::Reply(reply) => {
                self.destination_does("destination answers", move |world| {
                    world.serving = None;
                    if std::mem::take(&mut world.is_awaited) {
                        world.answer = Some(reply);
                    }
                    (DIn::Replied, None)
                });
            }
            DestinationAction::Done(_) => {
                self.destination_does("destination is done", |_| (DIn::Replied, None));
            }
        }
        if self.from.destination_journal.is_some() || self.from.serving.is_some() {
            self.costs(
                |faults| &mut faults.destination_crashes,
                "destination daemon crashes",
                |world| {
                    world.crash_destination();
                    None
                },
            );
        }
    }

    /// Between two requests.
    fn idle(&mut self) {
        let Some(record) = &self.from.destination_journal else {
            return;
        };
        let heard = match &self.from.source_journal {
            Some(record) => Heard::Said(record.stage.status()),
            None => Heard::NoRecord,
        };
        let silence = match self.mutation {
            Break::DiscardOnSilence => Heard::Said(Status {
                side: Side::Source,
                phase: Phase::Confirm,
                owner: Owner::Source,
                copy: None,
            }),
            _ => Heard::Silence,
        };
        let orphaned = self.from.guest == Life::Dead
            && self.from.source.is_none()
            && self.from.source_journal.is_some()
            && self.from.copy == Copied::Complete
            && record.stage == DestinationStage::Prepared
            && self.from.truth.by_qemu
            && !self.from.truth.ran_on;
        for (label, heard) in [("asks the source", heard), ("hears no source", silence)] {
            self.add(label, false, move |world| {
                world.destination.on(DIn::Reconcile(heard));
                None
            });
        }
        self.rule_destination(&record.stage);
        if orphaned {
            self.add(
                "an operator rules that the source is dead",
                false,
                |world| {
                    world.destination.on(DIn::Rule(Ruling::PeerFenced));
                    None
                },
            );
        }
        self.costs(
            |faults| &mut faults.failures,
            "cancel at the destination",
            |world| {
                world.destination.on(DIn::Cancel);
                None
            },
        );
    }

    /// An operator at the destination, of one that was refused. Whether its source went on with it since is hard to know, so
    /// nothing may depend on that.
    fn rule_destination(&mut self, stage: &DestinationStage) {
        if !matches!(stage, DestinationStage::Refused { .. }) {
            return;
        }
        let Truth { ran_on, kept, .. } = self.from.truth;
        if self.from.guest == Life::Dead && self.from.source.is_none() {
            let word = match self.mutation {
                Break::StartWhatWasRefused => DIn::Reconcile(Heard::Said(Status {
                    side: Side::Source,
                    phase: Phase::Confirm,
                    owner: Owner::Destination,
                    copy: None,
                })),
                _ => DIn::Rule(Ruling::PeerFenced),
            };
            self.costs(
                |faults| &mut faults.rulings,
                "an operator rules that the source of what was refused is dead",
                |world| {
                    world.destination.on(word);
                    None
                },
            );
        }
        if kept || ran_on {
            self.costs(
                |faults| &mut faults.rulings,
                "an operator rules that the source owns what was refused",
                |world| {
                    world.destination.on(DIn::Rule(Ruling::PeerOwns));
                    None
                },
            );
        }
    }

    fn start(&mut self) {
        match self.from.copy {
            Copied::Complete | Copied::Switched => {
                self.destination_does("destination starts the guest", |world| {
                    let broken = world.start();
                    (DIn::Started, broken)
                });
                self.destination_fails("QEMU refuses to start", |_| {
                    (
                        DIn::StartFailed {
                            ran: Ran::Never,
                            why: why(),
                        },
                        None,
                    )
                });
                self.destination_fails("start is slow", |world| {
                    world.starting = true;
                    (
                        DIn::StartFailed {
                            ran: Ran::Maybe,
                            why: why(),
                        },
                        None,
                    )
                });
                self.destination_fails("start's answer is lost", |world| {
                    let broken = world.start();
                    (
                        DIn::StartFailed {
                            ran: Ran::Maybe,
                            why: why(),
                        },
                        broken,
                    )
                });
            }
            Copied::Started | Copied::Partial => {
                self.destination_does("it runs already", |_| (DIn::Started, None));
            }
            _ => self.destination_does("nothing to start", |_| {
                (
                    DIn::StartFailed {
                        ran: Ran::Maybe,
                        why: why(),
                    },
                    None,
                )
            }),
        }
    }

    /// What the link does. Whoever waits may hear nothing at any time, so a loss needs no step of its own.
    fn channel(&mut self) {
        if let Some(mut reply) = self.from.answer.clone() {
            if let Reply::Status(status) = &mut reply
                && self.mutation == Break::TrustOwnQemuInPostCopy
                && status.copy == Some(CopyState::Partial)
            {
                status.copy = Some(CopyState::Started);
            }
            if self.mutation == Break::LoseWhatWasNotTaken
                && matches!(reply, Reply::Refused(_))
                && self.from.copy == Copied::Dead
            {
                reply = Reply::Lost;
            }
            self.source_does("an answer arrives", |_| (SIn::Answered(reply), None));
        }
        if self.from.destination.action() != DestinationAction::Wait {
            return;
        }
        if let Some(request) = self.from.posted.clone() {
            let label = label(&request.call);
            self.add(label, false, |world| {
                world.posted = None;
                world.deliver(request.clone());
                None
            });
            self.costs(
                |faults| &mut faults.strays,
                "a first copy arrives",
                |world| {
                    world.posted = None;
                    world.stray(request.clone());
                    world.deliver(request);
                    None
                },
            );
        }
        for (at, request) in self.from.strays.iter().enumerate() {
            self.add("a stray request arrives", true, |world| {
                world.strays.remove(at);
                world.deliver(request.clone());
                None
            });
        }
    }

    /// What happens to guests.
    fn world(&mut self) {
        if self.from.guest == Life::Stopped {
            let arrived = match self.from.copy {
                Copied::Switched => Some(Copied::Complete),
                Copied::Partial => Some(Copied::Started),
                _ => None,
            };
            if let Some(copy) = arrived {
                self.add("the rest of the memory arrives", false, |world| {
                    world.copy = copy;
                    world.truth.by_qemu |= copy == Copied::Complete;
                    None
                });
            }
        }
        if self.from.starting && matches!(self.from.copy, Copied::Complete | Copied::Switched) {
            self.add("the slow start is done", true, World::start);
        }
        if self.from.guest == Life::Dead && self.from.copy == Copied::Incoming {
            self.add("the stream ends early", false, |world| {
                world.copy = Copied::Dead;
                None
            });
        }
        if self.from.guest != Life::Dead && !self.from.settled_there {
            self.costs(
                |faults| &mut faults.kills,
                "the source's guest is killed",
                |world| {
                    world.guest = Life::Dead;
                    world.truth.killed_here = true;
                    None
                },
            );
        }
        if matches!(
            self.from.copy,
            Copied::Incoming
                | Copied::Complete
                | Copied::Switched
                | Copied::Started
                | Copied::Partial
        ) {
            self.costs(
                |faults| &mut faults.kills,
                "the destination's copy is killed",
                |world| {
                    world.copy = Copied::Dead;
                    world.truth.killed_there = true;
                    None
                },
            );
        }
    }

    /// The source's action was carried out: with its outcome known, or with a crash before it is.
    fn source_does(
        &mut self,
        label: &'static str,
        effect: impl FnOnce(&mut World) -> (SIn, Option<&'static str>),
    ) {
        let mut world = self.from.clone();
        let (input, broken) = effect(&mut world);
        let mut crashed = world.clone();
        world.source.as_mut().unwrap().on(input);
        world.hang_up();
        self.push(label, false, world, broken);
        if crashed.faults.source_crashes > 0 && crashed != *self.from {
            crashed.faults.source_crashes -= 1;
            crashed.crash_source();
            self.push("source daemon crashes in the middle", true, crashed, broken);
        }
    }

    fn source_fails(
        &mut self,
        label: &'static str,
        effect: impl FnOnce(&mut World) -> (SIn, Option<&'static str>),
    ) {
        self.costs(
            |faults| &mut faults.failures,
            label,
            |world| {
                let (input, broken) = effect(world);
                world.source.as_mut().unwrap().on(input);
                broken
            },
        );
    }

    fn destination_does(
        &mut self,
        label: &'static str,
        effect: impl FnOnce(&mut World) -> (DIn, Option<&'static str>),
    ) {
        let mut world = self.from.clone();
        let (input, broken) = effect(&mut world);
        let mut crashed = world.clone();
        world.destination.on(input);
        self.push(label, false, world, broken);
        if crashed.faults.destination_crashes > 0 && crashed != *self.from {
            crashed.faults.destination_crashes -= 1;
            crashed.crash_destination();
            self.push(
                "destination daemon crashes in the middle",
                true,
                crashed,
                broken,
            );
        }
    }

    fn destination_fails(
        &mut self,
        label: &'static str,
        effect: impl FnOnce(&mut World) -> (DIn, Option<&'static str>),
    ) {
        self.costs(
            |faults| &mut faults.failures,
            label,
            |world| {
                let (input, broken) = effect(world);
                world.destination.on(input);
                broken
            },
        );
    }

    /// A fault, while the story may still have one of its sort.
    fn costs(
        &mut self,
        budget: impl FnOnce(&mut Faults) -> &mut u8,
        label: &'static str,
        effect: impl FnOnce(&mut World) -> Option<&'static str>,
    ) {
        let mut world = self.from.clone();
        let left = budget(&mut world.faults);
        if *left > 0 {
            *left -= 1;
            let broken = effect(&mut world);
            self.push(label, true, world, broken);
        }
    }

    fn add(
        &mut self,
        label: &'static str,
        fault: bool,
        effect: impl FnOnce(&mut World) -> Option<&'static str>,
    ) {
        let mut world = self.from.clone();
        let broken = effect(&mut world);
        self.push(label, fault, world, broken);
    }

    fn push(
        &mut self,
        label: &'static str,
        fault: bool,
        mut world: World,
        broken: Option<&'static str>,
    ) {
        if world.guest == Life::Running && matches!(world.copy, Copied::Complete | Copied::Switched)
        {
            world.truth.ran_on = true;
        }
        let there = matches!(world.copy, Copied::Started | Copied::Partial) || world.settled_there;
        let twice = (world.guest == Life::Running && there)
            .then_some("the guest never runs twice at any instant");
        let broken = twice.or(broken);
        // A question given up while it is on its way is lost, or arrives later all the same.
        if world.question.is_none()
            && let Some(request) = world.posted.take()
            && world.faults.strays > 0
        {
            let mut late = world.clone();
            late.faults.strays -= 1;
            late.stray(request);
            self.out.push(Step {
                label,
                world: late,
                fault: true,
                broken,
            });
        }
        self.out.push(Step {
            label,
            world,
            fault,
            broken,
        });
    }
}

impl World {
    fn store_source(&mut self, record: SourceRecord) {
        self.truth.kept |= matches!(record.stage, SourceStage::Kept { .. });
        self.source_journal = Some(record);
    }

    fn store_destination(&mut self, record: DestinationRecord) {
        self.truth.taken |= record.stage == DestinationStage::Starting;
        self.destination_journal = Some(record);
    }

    fn confirm(&mut self, outcome: Outcome) -> (SIn, Option<&'static str>) {
        // Whether it is written or not: from here on the source acts as the owner.
        self.truth.kept |= outcome != Outcome::Released;
        match outcome {
            Outcome::Kept(_) if self.guest == Life::Dead => (SIn::ConfirmFailed, None),
            Outcome::Kept(_) => {
                self.guest = Life::Running;
                let back = self.truth.ran_there;
                let back = back.then_some("the guest never goes back in time");
                (SIn::Confirmed, self.touches_no_more().or(back))
            }
            Outcome::Released => {
                let complete = std::mem::replace(&mut self.guest, Life::Dead) != Life::Dead;
                let lost = complete && !self.truth.taken;
                let needed = complete && matches!(self.copy, Copied::Switched | Copied::Partial);
                let broken = lost.then_some("a complete copy is not discarded too early");
                let broken = needed
                    .then_some("memory that is needed is not discarded")
                    .or(broken);
                (SIn::Confirmed, broken)
            }
        }
    }

    /// The law that is broken if the source looks at its guest now, or lets it run.
    fn touches_no_more(&self) -> Option<&'static str> {
        let ended = self.truth.ended;
        ended.then_some("a migration that has ended here touches the guest no more")
    }

    fn start(&mut self) -> Option<&'static str> {
        self.copy = match self.copy {
            Copied::Switched => Copied::Partial,
            _ => Copied::Started,
        };
        self.starting = false;
        self.truth.ran_there = true;
        self.truth
            .ran_on
            .then_some("the guest never goes back in time")
    }

    fn discard(&mut self) -> (DIn, Option<&'static str>) {
        let broken = match self.copy {
            Copied::Started => Some("a running guest is not discarded"),
            Copied::Partial if self.guest != Life::Dead => Some("a running guest is not discarded"),
            // Where the guest ran on at the source, this copy is of no use to anybody.
            Copied::Complete if !self.truth.kept && !self.truth.ran_on => {
                Some("a complete copy is not discarded too early")
            }
            _ => None,
        };
        if self.copy != Copied::Nothing {
            self.copy = Copied::Dead;
        }
        (DIn::Discarded, broken)
    }

    /// Nobody waits for the answer any more.
    fn hang_up(&mut self) {
        self.question = None;
        self.answer = None;
        self.is_awaited = false;
    }

    fn stray(&mut self, request: Request) {
        self.strays.push(request);
        // In which order they were sent makes no difference: any may arrive first.
        self.strays
            .sort_by_key(|request| (request.epoch, label(&request.call)));
    }

    fn deliver(&mut self, request: Request) {
        self.is_awaited = self.question.as_ref() == Some(&request);
        self.serving = Some(request.clone());
        self.destination.on(DIn::Request(request));
    }

    fn ruled_at_source(&mut self, machine: SourceMachine) {
        self.source = Some(machine);
        self.hang_up();
    }

    fn crash_source(&mut self) {
        self.source = None;
        self.hang_up();
    }

    fn crash_destination(&mut self) {
        self.serving = None;
        self.is_awaited = false;
        self.destination = DestinationMachine::new(id(), self.destination_journal.clone());
    }
}

fn label(call: &Call) -> &'static str {
    match call {
        Call::Prepare(_) => "prepare arrives",
        Call::Finish => "finish arrives",
        Call::Resume => "resume arrives",
        Call::Confirm(Fate::Keep) => "confirm (keep) arrives",
        Call::Confirm(Fate::Discard) => "confirm (discard) arrives",
        Call::Status(_) => "status arrives",
    }
}
