//! What becomes of a guest, and of the async job that was at it, when a daemon comes back. Pure: record and findings in,
//! one action out; the table below is tested row by row, and [`ops::recover`](crate::ops) carries it out.
//!
//! | job | QEMU is gone | QEMU is there |
//! |---|---|---|
//! | none | it ended | it is kept |
//! | start | undone | finished: it runs, unless it was to stay paused |
//! | save, file not whole | the file goes, the guest died with QEMU | undone: the file goes, the guest runs if it ran |
//! | save, file whole | it was saved | finished: QEMU ends, the guest is in the file |
//! | restore, file unused | undone | undone: QEMU ends, the guest is in the file |
//! | restore, file missing | undone | kept as it is: an operator decides |
//! | restore, file used | the guest died with QEMU | finished: it runs if it ran when it was saved |
//! | dump, not whole | the file goes, the guest ended | undone: the file goes, the guest goes on |
//! | dump, whole | the guest ended, the file stays | finished: the guest goes on |
//! | snapshot, overlays not in place | not begun: the files go, the guest ended; else they stay, empty | undone: nodes and files go, the guest runs if it ran |
//! | snapshot, overlays in place | the guest ended, its disks are the overlays | finished: it runs if it ran |
//! | snapshot inside, done | the guest ended | finished |
//! | snapshot inside, made in part | the guest ended | undone: what there is of it goes |
//! | going back, not begun | the guest ended | undone: it goes on as it is |
//! | going back, failed | the guest ended | it stands still as it is: an operator decides |
//! | deleting, not done | the guest ended | finished: it is deleted |
//! | backup, whole | the guest ended, the copies stay | finished: the bitmaps go on from it |
//! | backup, under way | the copies go unless kept, the bitmaps hold all | it goes on |
//! | backup, failed | the same | undone: the same |
//! | migration out, in the journal | its journal decides | kept as it is: its journal decides |
//! | migration out, not in it | it ended | it is kept: nobody else was told of it, or all is settled |
//! | migration in, taken | its journal decides | kept: it is the guest |
//! | migration in, in the journal | its journal decides | kept as it is, complete or not: its journal decides |
//! | migration in, not in it | it ended | undone: QEMU ends, since the source never heard of it |

use crate::records::{Inside, Work};
use crate::save_file::State;

/// What was found of a guest and of what its job was at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Findings {
    /// Whether its QEMU runs, and answers.
    pub(crate) is_there: bool,
    /// How far the file of a save or restore is; none if there is none of that save.
    pub(crate) file: Option<State>,
    /// Whether the journal has a migration that brought it here, and whose source may know where it waits.
    pub(crate) is_arriving: bool,
    /// Whether the journal says that it was taken here.
    pub(crate) was_taken: bool,
    /// Whether the journal has a migration of it that left from here.
    pub(crate) is_leaving: bool,
    /// How far QEMU itself is with a snapshot or a backup.
    pub(crate) inside: Standing,
}

/// How far QEMU itself is with a job of storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Standing {
    /// It knows nothing of it.
    Nothing,
    /// It is at it.
    UnderWay,
    /// It has done all of it.
    Done,
    /// It has failed, or done a part of it.
    Failed,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Nothing: the guest goes on as it is found.
    Keep,
    /// The guest ended while nobody watched.
    Ended,
    /// The guest is let run.
    Run,
    /// The guest is left paused.
    LeavePaused,
    /// The save is given up: its file goes, and the guest runs if `run`.
    UndoSave { run: bool },
    /// The guest is in its file: its QEMU ends.
    EndSaved,
    /// The guest died during a save: the file that is not whole goes.
    DropFile,
    /// The guest was saved, and its QEMU has ended.
    Saved,
    /// QEMU was told to write nothing more into it: the file goes, and the guest goes on.
    UndoDump,
    /// Overlays are not in place: they go, and the guest runs if it ran.
    UndoSnapshot,
    /// Overlays are in place: the description is of them, and the guest runs if it ran.
    FinishSnapshot,
    /// The guest ended, and its disks are the overlays.
    OverlaysStay,
    /// A snapshot inside the images was made in part, or was to be deleted: what there is of it goes.
    DeleteInside,
    /// Nothing was begun: the guest goes on as it is found.
    Undone,
    /// All was copied: the bitmaps go on from there.
    FinishBackup,
    /// It is copied on.
    GoOn,
    /// The copies go unless they are kept; the bitmaps hold all that they held.
    UndoBackup,
    /// All was done but to say so: the guest goes on as it is found.
    Done,
    /// A guest that never ran here: its QEMU ends.
    EndUnborn,
    /// It never ran here, and its QEMU has ended.
    Unborn,
    /// The guest arrived and is ours. What is still to be done about that is its journal's.
    Taken,
    /// The guest is left as it is found until both daemons have spoken, or an operator.
    Unsettled,
}

/// Decides what becomes of a guest and of the job that was at it.
pub(crate) fn decide(work: Option<&Work>, found: Findings) -> Action {
    match (work, found.is_there) {
        (None, true) => Action::Keep,
        (None, false) => Action::Ended,
        (Some(Work::Start { paused: true }), true) => Action::LeavePaused,
        (Some(Work::Start { paused: false }), true) => Action::Run,
        (Some(Work::Start { .. }), false) => Action::Unborn,
        // A file that is whole has been on the disk before QEMU was told to end; it is the guest.
        (Some(Work::Save { .. }), true) if found.file == Some(State::Complete) => Action::EndSaved,
        (Some(Work::Save { was_running, .. }), true) => Action::UndoSave { run: *was_running },
        (Some(Work::Save { .. }), false) if found.file == Some(State::Complete) => Action::Saved,
        (Some(Work::Save { .. }), false) => Action::DropFile,
        // The file is marked before the guest runs: unmarked, the guest is in it and has not run here.
        (Some(Work::Restore { was_running, .. }), true) if found.file == Some(State::Restored) => {
            if *was_running {
                Action::Run
            } else {
                Action::LeavePaused
            }
        }
        (Some(Work::Restore { .. }), true) if found.file == Some(State::Complete) => {
            Action::EndUnborn
        }
        // Somebody took the file away: what QEMU has read may be all there is.
        (Some(Work::Restore { .. }), true) => Action::Unsettled,
        (Some(Work::Restore { .. }), false) if found.file == Some(State::Restored) => Action::Ended,
        (Some(Work::Restore { .. }), false) => Action::Unborn,
        (Some(Work::Dump { is_whole, .. }), true) => match is_whole {
            true => Action::Done,
            false => Action::UndoDump,
        },
        (Some(Work::Dump { is_whole, .. }), false) => match is_whole {
            true => Action::Ended,
            false => Action::DropFile,
        },
        (Some(Work::Snapshot(_)), true) => match found.inside {
            Standing::Done => Action::FinishSnapshot,
            _ => Action::UndoSnapshot,
        },
        // They may be in place, and then what the guest wrote since is in them; else they are empty, and as good as what
        // is behind them.
        (Some(Work::Snapshot(layers)), false) if layers.is_taking => Action::OverlaysStay,
        (Some(Work::Snapshot(_)), false) => Action::DropFile,
        (Some(Work::Inside { .. }), false) => Action::Ended,
        (Some(Work::Inside { is_done: true, .. }), true) => Action::Done,
        (Some(Work::Inside { what, .. }), true) => match (what, found.inside) {
            (_, Standing::Done) => Action::Done,
            (Inside::Save | Inside::Load, Standing::Nothing) => Action::Undone,
            (Inside::Save | Inside::Delete, _) => Action::DeleteInside,
            (Inside::Load, _) => Action::Unsettled,
        },
        (Some(Work::Backup(copies)), true) => match found.inside {
            _ if copies.is_whole => Action::FinishBackup,
            Standing::Done => Action::FinishBackup,
            Standing::UnderWay => Action::GoOn,
            _ => Action::UndoBackup,
        },
        (Some(Work::Backup(copies)), false) if copies.is_whole || copies.is_kept => Action::Ended,
        (Some(Work::Backup(_)), false) => Action::DropFile,
        (Some(Work::MigrationOut), _) if found.is_leaving => Action::Unsettled,
        (Some(Work::MigrationOut), true) => Action::Keep,
        (Some(Work::MigrationOut), false) => Action::Ended,
        (Some(Work::MigrationIn), _) if found.was_taken => Action::Taken,
        // A copy that is complete may be the last one. Only its source can say that it is not.
        (Some(Work::MigrationIn), _) if found.is_arriving => Action::Unsettled,
        (Some(Work::MigrationIn), true) => Action::EndUnborn,
        (Some(Work::MigrationIn), false) => Action::Unborn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::made::Made;
    use crate::records::{Copies, Layers};
    use uuid::Uuid;

    const FILES: [Option<State>; 4] = [
        None,
        Some(State::Partial),
        Some(State::Complete),
        Some(State::Restored),
    ];

    const STANDINGS: [Standing; 4] = [
        Standing::Nothing,
        Standing::UnderWay,
        Standing::Done,
        Standing::Failed,
    ];

    fn works() -> Vec<Option<Work>> {
        let (path, save) = ("/s".into(), Uuid::nil());
        let mut works = vec![None, Some(Work::MigrationOut), Some(Work::MigrationIn)];
        for flag in [false, true] {
            let (path, was_running): (std::path::PathBuf, _) =
                (std::path::PathBuf::clone(&path), flag);
            works.push(Some(Work::Start { paused: flag }));
            works.push(Some(Work::Save {
                path: path.clone(),
                save,
                was_running,
            }));
            works.push(Some(Work::Restore {
                path,
                save,
                was_running,
            }));
            works.push(Some(Work::Snapshot(Layers {
                overlays: Vec::new(),
                memory: None,
                was_running,
                in_definition: true,
                is_taking: flag,
            })));
            for what in [Inside::Save, Inside::Load, Inside::Delete] {
                works.push(Some(Work::Inside {
                    what,
                    tag: "t".into(),
                    is_done: flag,
                }));
            }
            for is_kept in [false, true] {
                works.push(Some(Work::Backup(Copies {
                    all: Vec::new(),
                    chain: None,
                    is_kept,
                    is_whole: flag,
                })));
            }
            works.push(Some(Work::Dump {
                file: Made::nowhere(),
                is_whole: flag,
                was_running,
            }));
        }
        works
    }

    /// Every row there can be.
    fn rows() -> Vec<(Option<Work>, Findings, Action)> {
        let mut rows = Vec::new();
        for work in works() {
            for is_there in [false, true] {
                for file in FILES {
                    for place in 0..32 {
                        let found = Findings {
                            is_there,
                            file,
                            is_arriving: place & 1 != 0,
                            is_leaving: place & 2 != 0,
                            was_taken: place & 4 != 0,
                            inside: STANDINGS[place >> 3],
                        };
                        rows.push((work.clone(), found, decide(work.as_ref(), found)));
                    }
                }
            }
        }
        rows
    }

    /// Whether the guest may run in a QEMU of ours after it.
    fn may_run(action: Action) -> bool {
        matches!(
            action,
            Action::Keep
                | Action::Run
                | Action::LeavePaused
                | Action::UndoSave { .. }
                | Action::UndoDump
                | Action::Done
        )
    }

    #[test]
    fn a_guest_that_is_whole_in_a_file_does_not_run_beside_it() {
        for (work, found, action) in rows() {
            let is_file = matches!(work, Some(Work::Save { .. } | Work::Restore { .. }));
            if is_file && found.file == Some(State::Complete) {
                assert!(!may_run(action), "{work:?} {found:?} {action:?}");
            }
        }
    }

    #[test]
    fn a_guest_that_is_only_in_its_qemu_is_not_ended() {
        for (work, found, action) in rows() {
            let only_there = match &work {
                Some(Work::Save { .. }) => found.file != Some(State::Complete),
                Some(Work::Restore { .. }) => found.file != Some(State::Complete),
                // The source's copy is the guest until its journal says otherwise.
                None
                | Some(
                    Work::MigrationOut
                    | Work::Dump { .. }
                    | Work::Snapshot(_)
                    | Work::Inside { .. }
                    | Work::Backup(_),
                ) => true,
                // And so may be the copy of one that was on its way.
                Some(Work::MigrationIn) => found.is_arriving || found.was_taken,
                Some(Work::Start { .. }) => false,
            };
            if found.is_there && only_there {
                let ends = matches!(action, Action::EndSaved | Action::EndUnborn);
                assert!(!ends, "{work:?} {found:?} {action:?}");
            }
        }
    }

    #[test]
    fn what_is_gone_is_not_kept_and_what_is_there_is_not_taken_for_gone() {
        for (work, found, action) in rows() {
            let is_of_the_gone = matches!(
                action,
                Action::Ended
                    | Action::DropFile
                    | Action::OverlaysStay
                    | Action::Saved
                    | Action::Unborn
            );
            if found.is_there {
                assert!(!is_of_the_gone, "{work:?} {found:?} {action:?}");
            } else {
                let is_open = matches!(action, Action::Unsettled | Action::Taken);
                assert!(is_of_the_gone || is_open, "{work:?} {found:?} {action:?}");
            }
        }
    }

    #[test]
    fn a_guest_runs_again_only_if_it_ran_or_was_to_run() {
        for (work, found, action) in rows() {
            let was_to_run = match &work {
                Some(Work::Start { paused }) => !paused,
                Some(Work::Save { was_running, .. } | Work::Restore { was_running, .. }) => {
                    *was_running
                }
                _ => false,
            };
            if matches!(action, Action::Run | Action::UndoSave { run: true }) {
                assert!(was_to_run, "{work:?} {found:?} {action:?}");
            }
        }
    }

    #[test]
    fn what_is_whole_or_in_place_is_neither_removed_nor_undone() {
        for (work, found, action) in rows() {
            let stays = match &work {
                // With QEMU gone nobody can tell whether they were: they are, or are empty.
                Some(Work::Snapshot(layers)) if !found.is_there => layers.is_taking,
                Some(Work::Snapshot(_)) => found.inside == Standing::Done,
                Some(Work::Backup(copies)) => {
                    copies.is_whole || found.is_there && found.inside == Standing::Done
                }
                Some(Work::Dump { is_whole, .. }) => *is_whole,
                _ => continue,
            };
            let is_removed = matches!(
                action,
                Action::DropFile | Action::UndoDump | Action::UndoSnapshot | Action::UndoBackup
            );
            assert!(!(stays && is_removed), "{work:?} {found:?} {action:?}");
            let is_kept = matches!(&work, Some(Work::Backup(copies)) if copies.is_kept);
            let goes_on = action == Action::GoOn || is_kept && action == Action::Ended;
            assert!(
                stays || is_removed || goes_on,
                "{work:?} {found:?} {action:?}"
            );
        }
    }

    #[test]
    fn a_guest_that_went_back_half_way_is_left_to_an_operator_and_its_snapshot_stays() {
        for (work, found, action) in rows() {
            if let Some(Work::Inside {
                what: Inside::Load,
                is_done: false,
                ..
            }) = work
                && found.is_there
            {
                assert_ne!(action, Action::DeleteInside, "{found:?}");
                let is_half = matches!(found.inside, Standing::Failed | Standing::UnderWay);
                assert_eq!(action == Action::Unsettled, is_half, "{found:?}");
            }
        }
    }

    #[test]
    fn every_action_has_its_row() {
        let all: std::collections::HashSet<_> = rows().into_iter().map(|row| row.2).collect();
        assert_eq!(all.len(), 23, "{all:?}");
    }
}
