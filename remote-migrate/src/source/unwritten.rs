//! What follows when a stage could not be written down: one table. Pure; does nothing itself.
//!
//! | stage | the journal said | then |
//! |---|---|---|
//! | `Begin` | nothing | forgets: nothing was touched, and what may be there must go |
//! | `Prepare`, `Perform` | any | turns back |
//! | `Switching`, `HandingOver` | a stage before | turns back, and the journal may say it all the same |
//! | `HandingOverHalf`, `PostCopy` | any | writes it again: there is no way back |
//! | `Kept`, `Lost`, ended | the same | goes on: until it is written no other migration of the guest begins, or start |
//! | `Kept` | `Begin`, `Prepare`, `Perform` for certain | goes on: a daemon that read that would keep the guest, too |
//! | `Kept` | else | writes it again |
//! | `Released`, `Lost` | any | writes it again: nothing is ended before |

use crate::journal::SourceStage as Stage;

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unwritten {
    /// The record is removed, and all is over.
    Forget,
    /// The stage is as before, and the host is looked at. `doubtful`: a daemon that restarts may read the other one.
    TurnBack { doubtful: bool },
    /// As if it were written.
    GoOn,
    /// Nothing happens until it is.
    WriteAgain,
}

/// `before` is what the journal said until now; if `doubtful`, it may be one that gives the guest away.
pub(super) fn unwritten(stage: &Stage, before: &Stage, doubtful: bool) -> Unwritten {
    match (stage, before) {
        (Stage::Begin, _) => Unwritten::Forget,
        (Stage::Prepare | Stage::Perform, _) => Unwritten::TurnBack { doubtful: false },
        (Stage::Switching | Stage::HandingOver, _) => Unwritten::TurnBack { doubtful: true },
        (Stage::Kept { ended: true, .. } | Stage::Lost { ended: true, .. }, _) => Unwritten::GoOn,
        (Stage::Kept { .. }, Stage::Begin | Stage::Prepare | Stage::Perform) if !doubtful => {
            Unwritten::GoOn
        }
        (
            Stage::HandingOverHalf
            | Stage::PostCopy
            | Stage::Kept { .. }
            | Stage::Released
            | Stage::Lost { .. },
            _,
        ) => Unwritten::WriteAgain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        phase::Owner,
        verdict::{self, GuestState, Heard, SourceVerdict},
    };

    fn all() -> Vec<Stage> {
        let mut all = vec![
            Stage::Begin,
            Stage::Prepare,
            Stage::Perform,
            Stage::Switching,
            Stage::HandingOver,
            Stage::HandingOverHalf,
            Stage::PostCopy,
            Stage::Released,
        ];
        for tell in [false, true] {
            for ended in [false, true] {
                all.push(Stage::Kept { tell, ended });
                all.push(Stage::Lost {
                    tell,
                    nowhere: ended,
                    ended,
                });
            }
        }
        all
    }

    /// All that a daemon which restarts may read.
    fn on_disk(stage: &Stage, before: &Stage, doubtful: bool) -> Vec<Stage> {
        let mut read = vec![stage.clone(), before.clone()];
        if doubtful {
            read.extend([Stage::Switching, Stage::HandingOver]);
        }
        read
    }

    fn each(mut check: impl FnMut(&Stage, &Stage, bool, Unwritten)) {
        for stage in all() {
            for before in all() {
                for doubtful in [false, true] {
                    check(
                        &stage,
                        &before,
                        doubtful,
                        unwritten(&stage, &before, doubtful),
                    );
                }
            }
        }
    }

    #[test]
    fn the_guest_is_let_run_unwritten_only_where_any_daemon_would_do_the_same() {
        let mut goes_on = 0;
        each(|stage, before, doubtful, then| {
            if then != Unwritten::GoOn || stage.only_tells() {
                return;
            }
            goes_on += 1;
            for read in on_disk(stage, before, doubtful) {
                for local in [
                    GuestState::Running,
                    GuestState::Stopped,
                    GuestState::GivenUp,
                ] {
                    for heard in [Heard::NotAsked, Heard::Silence, Heard::NoRecord] {
                        let verdict = verdict::source(&read, local, heard);
                        assert_eq!(verdict, SourceVerdict::Keep, "{stage:?}, {read:?}");
                    }
                }
            }
        });
        assert!(goes_on > 0);
    }

    #[test]
    fn what_ends_the_guest_here_or_is_past_return_waits_until_it_is_written() {
        each(|stage, _, _, then| {
            let is_final =
                matches!(stage.owner(), Owner::Destination | Owner::Nobody) && !stage.only_tells();
            if is_final || *stage == Stage::HandingOverHalf {
                assert_eq!(then, Unwritten::WriteAgain, "{stage:?}");
            }
        });
    }

    #[test]
    fn whoever_turns_back_from_what_gives_the_guest_away_knows_that_it_may_be_written() {
        each(|stage, _, _, then| {
            let gives_away = matches!(stage, Stage::Switching | Stage::HandingOver);
            let doubtful = Unwritten::TurnBack { doubtful: true };
            assert_eq!(then == doubtful, gives_away, "{stage:?}");
            if let Unwritten::TurnBack { .. } = then {
                assert!(matches!(
                    stage,
                    Stage::Prepare | Stage::Perform | Stage::Switching | Stage::HandingOver
                ));
            }
        });
    }

    #[test]
    fn nothing_is_forgotten_but_what_was_never_begun() {
        each(|stage, _, _, then| {
            assert_eq!(then == Unwritten::Forget, *stage == Stage::Begin);
        });
    }
}
