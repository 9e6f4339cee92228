//! Who owns the guest, given a journal record, a look at the local host, and the peer's word or silence.
//!
//! Two pure functions, one a side. They serve a daemon that restarts and a migration that goes wrong
//! under a daemon that does not: the machines come here for every verdict, so there is one table, not
//! two. Neither function ever takes silence for an answer.

use crate::{
    journal::{DestinationStage, SourceStage},
    message::{CopyState, Ran, Status},
    phase::Owner,
};

/// What the source's host sees of its own copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a copy is in one of these states")]
pub enum GuestState {
    /// QEMU is alive and the guest runs.
    Running,
    /// QEMU is alive, at the migration or through with it, and the guest is stopped.
    Stopped,
    /// QEMU is alive and has given the migration up, and the guest is stopped: it is let run by whoever may, and not by QEMU.
    GivenUp,
    /// QEMU is dead. Whether the guest had run on after its memory was complete on the other side the record says: not, if
    /// the guest was stopped before the last of it went.
    Gone,
}

/// What is known of the other side's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "a question was asked or not, and answered or not"
)]
pub enum Heard {
    /// Nobody asked yet.
    NotAsked,
    /// Asked, and no answer came.
    Silence,
    /// It has no record of this migration.
    NoRecord,
    /// It said so.
    Said(Status),
    /// It was not asked: an operator says what became of it.
    Ruled(Ruling),
}

impl Heard {
    /// The owner that the other side named for good.
    fn decided(self) -> Option<Owner> {
        match self {
            Self::Said(status) if status.decided() => Some(status.owner),
            _ => None,
        }
    }
}

/// What an operator declares where the other side cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the other side runs the guest or it cannot, and may need what is here"
)]
pub enum Ruling {
    /// The other host is off, or cut from power and disks: nothing runs there, and what returns
    /// returns empty. If that is not true, the guest will run twice.
    ///
    /// At the source it says of a guest that was offered, too, that it has not run there: if it has, the memory here is older
    /// than its disks. In post-copy it is known to have run there, and this names it lost.
    ///
    /// At the destination it lets a complete copy run. Not one that was refused: the source may have heard that and gone on
    /// with the guest before it was lost, and then this copy is older than its disks. Such a one is only discarded, by
    /// [`PeerOwns`](Self::PeerOwns), and the guest started anew from its disks.
    PeerFenced,
    /// The other side owns the guest. What is here is ended, unless post-copy may have begun: then the guest may need its
    /// memory from here still, so that waits, and only the other side's own word or [`PeerHasAll`](Self::PeerHasAll) ends
    /// it. If it is not true before post-copy, the guest is lost; in post-copy nothing is.
    PeerOwns,
    /// The other side owns the guest and needs nothing from here any more: what is here is ended, in post-copy too. If that
    /// is not true, the guest is lost.
    PeerHasAll,
}

/// What the source does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the machine must know every verdict"
)]
pub enum SourceVerdict {
    /// The destination owns it and needs the rest of the memory: send that.
    Serve,
    /// The guest stays: record it, let it run again, have the other copy discarded.
    Keep,
    /// The destination owns it: record it, kill the copy here.
    Release,
    /// Offer it to the destination (again).
    HandOver,
    /// No complete copy is left. `nowhere`: nor has the destination anything of it that may run, or be let run.
    Lost {
        /// Whether that is known.
        nowhere: bool,
    },
    /// Ask the destination how it stands.
    Ask,
    /// Neither start nor end anything; ask again later.
    InDoubt,
}

/// What the source does with a migration that stands at `stage`.
#[must_use]
pub fn source(stage: &SourceStage, local: GuestState, heard: Heard) -> SourceVerdict {
    use SourceVerdict::{Keep, Lost, Release};
    let gone = is_gone(local);
    let is_fenced = heard == Heard::Ruled(Ruling::PeerFenced);
    match (stage, heard) {
        (SourceStage::Released, _) => Release,
        (SourceStage::Lost { nowhere, .. }, _) => Lost {
            nowhere: *nowhere || is_fenced,
        },
        // The destination was not told yet: what an operator has let run there meanwhile is the guest.
        (SourceStage::Kept { ended: false, .. }, _) if gone => Lost { nowhere: is_fenced },
        (SourceStage::Kept { .. }, _) => Keep,
        (_, Heard::Ruled(ruling)) => ruled_source(stage, local, ruling),
        (_, Heard::Said(status)) if heard.decided() == Some(Owner::Destination) => {
            taken(stage, gone, status.copy)
        }
        // No memory has left.
        (SourceStage::Begin | SourceStage::Prepare, _) if gone => Lost { nowhere: true },
        (SourceStage::Begin | SourceStage::Prepare, _) => Keep,
        (SourceStage::Perform | SourceStage::Switching, _) => unoffered(stage, local, heard),
        (SourceStage::HandingOver | SourceStage::HandingOverHalf | SourceStage::PostCopy, _) => {
            offered(local, heard)
        }
    }
}

fn is_gone(local: GuestState) -> bool {
    local == GuestState::Gone
}

/// An operator speaks in the destination's place.
fn ruled_source(stage: &SourceStage, local: GuestState, ruling: Ruling) -> SourceVerdict {
    use SourceVerdict::{InDoubt, Keep, Lost, Release, Serve};
    match (ruling, stage) {
        (Ruling::PeerHasAll, _) => Release,
        // What runs here was not stopped by post-copy: one of the two is mistaken.
        (Ruling::PeerOwns, SourceStage::Switching) if local == GuestState::Running => InDoubt,
        // Whether all of it is there the operator did not say, so the half that is here waits for who knows.
        (Ruling::PeerOwns, SourceStage::Switching | SourceStage::HandingOverHalf) => Serve,
        (Ruling::PeerOwns, SourceStage::PostCopy) => InDoubt,
        (Ruling::PeerOwns, _) => Release,
        // The half over there is gone, and the one here is not enough.
        (Ruling::PeerFenced, SourceStage::PostCopy) => Lost { nowhere: true },
        (Ruling::PeerFenced, _) if is_gone(local) => Lost { nowhere: true },
        (Ruling::PeerFenced, _) => Keep,
    }
}

/// The destination has named itself for good. Of one that was never offered only an operator there can have made it so.
fn taken(stage: &SourceStage, gone: bool, copy: Option<CopyState>) -> SourceVerdict {
    match copy {
        // It runs there until it is told.
        Some(CopyState::Partial) if gone => SourceVerdict::Lost { nowhere: false },
        Some(CopyState::Partial) => SourceVerdict::Serve,
        None if stage.may_be_halved() => SourceVerdict::InDoubt,
        // All is there, or nothing that memory could help.
        _ => SourceVerdict::Release,
    }
}

fn unoffered(stage: &SourceStage, local: GuestState, heard: Heard) -> SourceVerdict {
    use SourceVerdict::{Ask, HandOver, InDoubt, Keep, Lost};
    match (local, heard) {
        // In post-copy QEMU does not let it run again, or on half of its memory: only forward.
        (GuestState::Stopped, _) if *stage == SourceStage::Switching => HandOver,
        (GuestState::Running | GuestState::Stopped | GuestState::GivenUp, _) => Keep,
        (GuestState::Gone, Heard::NotAsked | Heard::Ruled(_)) => Ask,
        (GuestState::Gone, Heard::Silence) => InDoubt,
        (GuestState::Gone, Heard::NoRecord) => Lost { nowhere: true },
        (GuestState::Gone, Heard::Said(status)) => match status.copy {
            Some(CopyState::Gone(_)) => Lost { nowhere: true },
            None | Some(CopyState::Switched | CopyState::Partial) => Lost { nowhere: false },
            // Complete, or still reading what is in flight: then QEMU had stopped the guest itself, and resumes one itself when
            // it takes a migration for failed. It may be older than what ran here last, so it is neither started nor
            // discarded without a person.
            Some(_) => InDoubt,
        },
    }
}

fn offered(local: GuestState, heard: Heard) -> SourceVerdict {
    use SourceVerdict::{Ask, HandOver, InDoubt, Keep, Lost, Release};
    match (heard.decided(), heard) {
        (Some(Owner::Nobody), _) => Lost { nowhere: true },
        // Refused, but the copy here died while it waited: one that is complete there is the last.
        (Some(_), Heard::Said(status)) if is_gone(local) => match status.copy {
            None => Ask,
            Some(CopyState::Complete) => Release,
            Some(copy) => Lost {
                nowhere: matches!(copy, CopyState::Gone(_)),
            },
        },
        // Refused, for ever. Where the journal says post-copy, an operator was mistaken.
        (Some(_), _) => Keep,
        (None, Heard::NotAsked | Heard::Ruled(_)) => Ask,
        (None, Heard::Silence | Heard::NoRecord) => InDoubt,
        // Somebody let it run behind our back: the other copy is older, so it is not offered again.
        (None, Heard::Said(_)) if local == GuestState::Running => InDoubt,
        (None, Heard::Said(_)) => HandOver,
    }
}

/// What the destination does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the machine must know every verdict"
)]
pub enum DestinationVerdict {
    /// End the copy and forget the migration.
    Discard,
    /// Record that this copy never runs, so that the source hears it.
    Refuse,
    /// Take the guest (recording that first, if it is not yet) and start it.
    Start,
    /// It was started: record that.
    Own,
    /// It was taken and is dead: record that.
    Lose,
    /// Forget the migration; the copy, if any, is a guest like others now.
    Forget,
    /// Leave all as it is; the source or an operator decides.
    Wait,
    /// Both sides claim the guest. Touch nothing.
    Conflict,
}

/// What the destination does with a migration that stands at `stage`.
#[must_use]
pub fn destination(stage: &DestinationStage, local: CopyState, heard: Heard) -> DestinationVerdict {
    use DestinationVerdict::{Conflict, Discard, Forget, Lose, Own, Refuse, Start, Wait};
    let owner = heard.decided();
    // The source is known to have the guest, or to know that nobody has.
    let kept = matches!(owner, Some(Owner::Source | Owner::Nobody))
        || matches!(heard, Heard::Ruled(Ruling::PeerOwns | Ruling::PeerHasAll));
    let released = owner == Some(Owner::Destination);
    let forgotten = heard == Heard::NoRecord;
    match (stage, local) {
        (DestinationStage::Preparing, _) => Discard,
        // The source has nothing more to send: a stray request made this one after all was over.
        (DestinationStage::Prepared | DestinationStage::Refused { .. }, CopyState::Incoming)
            if released =>
        {
            Discard
        }

        (DestinationStage::Prepared, CopyState::Started | CopyState::Partial) => Conflict,
        (DestinationStage::Prepared, _) if kept => Discard,
        (DestinationStage::Prepared, CopyState::Complete) if released => Start,
        // Without the source's record it cannot be known whether the guest ran on there.
        (DestinationStage::Prepared, CopyState::Complete) => Wait,
        (
            DestinationStage::Prepared,
            CopyState::Incoming | CopyState::Switched | CopyState::Gone(_),
        ) if forgotten => Discard,
        (DestinationStage::Prepared, CopyState::Gone(_)) => Refuse,
        (DestinationStage::Prepared, CopyState::Incoming | CopyState::Switched) => Wait,

        (DestinationStage::Starting, CopyState::Gone(_)) if kept => Discard,
        // Both took it, by somebody's ruling. A start may be under way inside QEMU, so it is left alone.
        (DestinationStage::Starting, _) if kept => Conflict,
        (DestinationStage::Starting, CopyState::Started | CopyState::Partial) => Own,
        (DestinationStage::Starting, CopyState::Complete | CopyState::Switched) => Start,
        (DestinationStage::Starting, CopyState::Gone(Ran::Never)) => Refuse,
        // Its host went down after the guest was taken, and whether QEMU was told to let it run first is written nowhere: a
        // note of that would have to be made before, as this one was. It may have run, and written to its disks, so the
        // older memory that is still whole at the source would go back in time on newer disks. With `Starting` the guest
        // was this copy, and it is lost with it.
        (DestinationStage::Starting, CopyState::Gone(Ran::Maybe)) => Lose,
        (DestinationStage::Starting, CopyState::Incoming) => Wait,

        // The source has lost the rest of its memory: it waits for that for ever.
        (DestinationStage::Owned, CopyState::Partial) if kept => Discard,
        (DestinationStage::Owned, CopyState::Partial) => Wait,
        (DestinationStage::Owned, CopyState::Gone(_)) if kept => Forget,
        (DestinationStage::Owned, _) if kept => Conflict,
        (DestinationStage::Owned, _) if released || forgotten => Forget,
        (DestinationStage::Owned, _) => Wait,

        (DestinationStage::Refused { .. }, _) if kept || forgotten => Discard,
        // It never ran, and the source has lost its own since: the refusal is moot.
        (DestinationStage::Refused { .. }, CopyState::Complete) if released => Start,
        (DestinationStage::Refused { .. }, CopyState::Gone(_)) if released => Lose,
        (DestinationStage::Refused { .. }, _) if released => Conflict,
        (DestinationStage::Refused { .. }, _) => Wait,

        (DestinationStage::Lost, _) if owner.is_some() || kept || forgotten => Forget,
        (DestinationStage::Lost, _) => Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phase::{Phase, Side};

    const LOCAL: [GuestState; 4] = [
        GuestState::GivenUp,
        GuestState::Running,
        GuestState::Stopped,
        GuestState::Gone,
    ];

    const OFFERED: [SourceStage; 3] = [
        SourceStage::HandingOver,
        SourceStage::HandingOverHalf,
        SourceStage::PostCopy,
    ];

    fn said(phase: Phase, owner: Owner) -> Heard {
        Heard::Said(Status {
            side: Side::Destination,
            phase,
            owner,
            copy: Some(CopyState::Complete),
        })
    }

    #[test]
    fn silence_after_the_hand_over_leaves_the_source_in_doubt_whatever_it_sees() {
        for local in LOCAL {
            for stage in OFFERED {
                for heard in [Heard::Silence, Heard::NoRecord] {
                    let verdict = source(&stage, local, heard);
                    assert_eq!(verdict, SourceVerdict::InDoubt, "{local:?} {heard:?}");
                }
            }
        }
    }

    #[test]
    fn a_destination_that_is_about_to_start_is_not_yet_an_answer() {
        let starting = said(Phase::Finish, Owner::Destination);
        let verdict = source(&SourceStage::HandingOver, GuestState::Stopped, starting);
        assert_eq!(verdict, SourceVerdict::HandOver);
    }

    #[test]
    fn the_source_kills_only_what_the_destination_certainly_owns() {
        let stages = [
            SourceStage::Begin,
            SourceStage::Prepare,
            SourceStage::Perform,
            SourceStage::Switching,
            SourceStage::HandingOver,
            SourceStage::HandingOverHalf,
        ];
        let phases = [
            Phase::Begin,
            Phase::Prepare,
            Phase::Perform,
            Phase::Finish,
            Phase::Confirm,
        ];
        let owners = [
            Owner::Source,
            Owner::Destination,
            Owner::InDoubt,
            Owner::Nobody,
        ];
        for stage in &stages {
            for local in LOCAL {
                for phase in phases {
                    for owner in owners {
                        let verdict = source(stage, local, said(phase, owner));
                        let gone = is_gone(local);
                        let certain = phase == Phase::Confirm
                            && (owner == Owner::Destination
                                || gone && OFFERED.contains(stage) && owner != Owner::Nobody);
                        assert_eq!(verdict == SourceVerdict::Release, certain);
                    }
                }
            }
        }
    }

    #[test]
    fn in_post_copy_the_source_is_needed_until_the_destination_has_all() {
        let says = |copy| {
            Heard::Said(Status {
                side: Side::Destination,
                phase: Phase::Confirm,
                owner: Owner::Destination,
                copy: Some(copy),
            })
        };
        for stage in OFFERED {
            let verdict = |copy| source(&stage, GuestState::Stopped, says(copy));
            assert_eq!(verdict(CopyState::Partial), SourceVerdict::Serve);
            assert_eq!(verdict(CopyState::Started), SourceVerdict::Release);
        }
        let gone = GuestState::Gone;
        let verdict = source(&SourceStage::PostCopy, gone, says(CopyState::Partial));
        assert_eq!(verdict, SourceVerdict::Lost { nowhere: false });
    }

    #[test]
    fn an_operator_ends_a_half_only_by_saying_that_it_is_not_needed() {
        let halves = [
            SourceStage::Switching,
            SourceStage::HandingOverHalf,
            SourceStage::PostCopy,
        ];
        for local in LOCAL {
            for stage in &halves {
                let ruled = |ruling| source(stage, local, Heard::Ruled(ruling));
                assert_ne!(ruled(Ruling::PeerOwns), SourceVerdict::Release);
                assert_ne!(ruled(Ruling::PeerFenced), SourceVerdict::Release);
                assert_eq!(ruled(Ruling::PeerHasAll), SourceVerdict::Release);
            }
            let whole = source(
                &SourceStage::HandingOver,
                local,
                Heard::Ruled(Ruling::PeerOwns),
            );
            assert_eq!(whole, SourceVerdict::Release);
        }
    }

    #[test]
    fn a_guest_is_lost_everywhere_only_by_the_word_of_who_knows() {
        let stages = [
            SourceStage::Perform,
            SourceStage::Switching,
            SourceStage::HandingOver,
            SourceStage::HandingOverHalf,
            SourceStage::PostCopy,
            SourceStage::Kept {
                tell: true,
                ended: false,
            },
            SourceStage::Lost {
                tell: true,
                nowhere: false,
                ended: false,
            },
        ];
        let nowhere = SourceVerdict::Lost { nowhere: true };
        for stage in &stages {
            for local in LOCAL {
                for heard in [Heard::NotAsked, Heard::Silence] {
                    assert_ne!(source(stage, local, heard), nowhere, "{stage:?}");
                }
            }
            let gone = GuestState::Gone;
            let fenced = Heard::Ruled(Ruling::PeerFenced);
            assert_eq!(source(stage, gone, fenced), nowhere, "{stage:?}");
        }
    }

    #[test]
    fn whoever_rules_that_the_peer_is_fenced_ends_all_doubt() {
        let stages = [
            SourceStage::Begin,
            SourceStage::Prepare,
            SourceStage::Perform,
            SourceStage::Switching,
            SourceStage::HandingOver,
            SourceStage::HandingOverHalf,
            SourceStage::PostCopy,
        ];
        for local in LOCAL {
            for stage in &stages {
                let lost = is_gone(local) || *stage == SourceStage::PostCopy;
                let verdict = source(stage, local, Heard::Ruled(Ruling::PeerFenced));
                let expected = if lost {
                    SourceVerdict::Lost { nowhere: true }
                } else {
                    SourceVerdict::Keep
                };
                assert_eq!(verdict, expected, "{stage:?} {local:?}");
            }
        }
    }

    #[test]
    fn what_post_copy_has_stopped_is_not_resumed_before_the_destination_has_refused_it() {
        for heard in [Heard::NotAsked, Heard::Silence, Heard::NoRecord] {
            let stopped = source(&SourceStage::Switching, GuestState::Stopped, heard);
            assert_eq!(stopped, SourceVerdict::HandOver);
            let running = source(&SourceStage::Switching, GuestState::Running, heard);
            assert_eq!(running, SourceVerdict::Keep);
        }
    }

    #[test]
    fn a_complete_copy_waits_until_the_source_is_known_to_own_the_guest() {
        for heard in [
            Heard::NotAsked,
            Heard::Silence,
            Heard::NoRecord,
            said(Phase::Perform, Owner::Source),
            said(Phase::Finish, Owner::InDoubt),
        ] {
            let verdict = destination(&DestinationStage::Prepared, CopyState::Complete, heard);
            assert_eq!(verdict, DestinationVerdict::Wait, "{heard:?}");
        }
        let kept = said(Phase::Confirm, Owner::Source);
        let verdict = destination(&DestinationStage::Prepared, CopyState::Complete, kept);
        assert_eq!(verdict, DestinationVerdict::Discard);
    }
}
