//! What was found of a guest and of the job that was at it, and what the table says carried out.

use std::sync::Arc;

use monitor_qmp::command::{self, RunState};
use remote_migrate::{DestinationStage, Owner, Record, Side};
use tokio::time::timeout;

use super::{Became, ENDING};
use crate::domain::{Domain, Live};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::grouped::Group;
use crate::ops::dump::over as dump_over;
use crate::ops::save::{blocking, drop_memory, end as end_saved, stop_writing};
use crate::ops::start::give_up;
use crate::ops::{AsyncOp, backup, inside, snapshot};
use crate::records::{Inside, Memory, Work};
use crate::recovery::{Action, Findings, Standing, decide};
use crate::save_file::SaveFile;

/// Finishes or undoes the work that was at a guest whose monitor answers.
pub(crate) async fn settle(op: &mut AsyncOp, live: &Arc<Live>) -> Result<Became, Error> {
    let domain = op.domain().clone();
    let work = domain.0.noted().await.and_then(|record| record.job);
    let work = work.map(|job| job.work);
    let mut found = of_the_gone(&domain, work.as_ref()).await?;
    found.is_there = true;
    found.inside = standing(op, work.as_ref()).await?;
    let action = decide(work.as_ref(), found);
    op.set_phase("settling");
    let became = carry_out(op, live, work.as_ref(), action).await?;
    if !matches!(action, Action::EndSaved | Action::EndUnborn) {
        domain.0.tell(What::Started {
            generation: live.generation,
        });
    }
    // The job may be one that an earlier driver began: what is written of it goes by what it is, not by this op.
    // One that moves stays written down until it is settled, as does one that goes on.
    let moves = matches!(work, Some(Work::MigrationOut | Work::MigrationIn));
    let is_open = action == Action::GoOn || action == Action::Unsettled && moves;
    if !is_open {
        domain.0.work_is_over().await?;
    }
    Ok(became)
}

async fn carry_out(
    op: &mut AsyncOp,
    live: &Live,
    work: Option<&Work>,
    action: Action,
) -> Result<Became, Error> {
    Ok(match action {
        Action::Run => {
            let monitor = op.monitor().await?;
            let status = monitor.execute(command::QueryStatus).await?.status;
            // One that has run already, and stopped by itself, is not started again.
            if matches!(status, RunState::PreLaunch | RunState::Paused) {
                monitor.execute(command::Cont).await?;
            }
            Became::Finished
        }
        Action::UndoSave { run } => {
            stop_writing(op, run).await?;
            drop_files(work).await?;
            Became::Undone
        }
        Action::UndoDump => {
            // Its pipe ended with whoever read it.
            dump_over(op).await?;
            drop_files(work).await?;
            Became::Undone
        }
        Action::UndoSnapshot => {
            if let Some(Work::Snapshot(layers)) = work {
                snapshot::undo(op, layers).await?;
            }
            Became::Undone
        }
        Action::FinishSnapshot => {
            if let Some(Work::Snapshot(layers)) = work {
                snapshot::finish(op, layers).await?;
            }
            Became::Finished
        }
        Action::DeleteInside => {
            let Some(Work::Inside { what, tag, .. }) = work else {
                return Ok(Became::Undone);
            };
            inside::remove(op, tag).await?;
            match what {
                Inside::Delete => Became::Finished,
                Inside::Save | Inside::Load => Became::Undone,
            }
        }
        Action::FinishBackup => {
            if let Some(Work::Backup(copies)) = work {
                backup::finish(op, copies.clone()).await?;
            }
            Became::Finished
        }
        Action::UndoBackup => {
            if let Some(Work::Backup(copies)) = work {
                backup::undo(op, copies).await?;
            }
            Became::Undone
        }
        Action::GoOn => Became::GoesOn,
        Action::Undone => Became::Undone,
        Action::Done => {
            inside::forget(op).await?;
            Became::Finished
        }
        Action::EndSaved => {
            if let Some(Work::Save { path, .. }) = work {
                end_saved(op, path).await;
            }
            ended(live).await?;
            Became::Finished
        }
        Action::EndUnborn => {
            give_up(live);
            ended(live).await?;
            Became::Undone
        }
        Action::LeavePaused => Became::Finished,
        Action::Unsettled | Action::Taken => Became::InDoubt,
        _ => Became::Kept,
    })
}

/// What is left of the work of a guest whose QEMU has ended.
pub(crate) async fn remains(
    op: &AsyncOp,
    work: Option<&Work>,
    action: Action,
) -> Result<Became, Error> {
    match (action, work) {
        (Action::DropFile, work) => drop_files(work).await?,
        (Action::OverlaysStay, Some(Work::Snapshot(layers))) => {
            // They are in the definition, unless the kill came before QEMU could be told; then they are empty.
            let is_alive = op.check_cancelled().is_ok();
            if layers.in_definition && is_alive {
                op.with_state(|records| {
                    if let Some(guest) = &mut records.definition {
                        snapshot::put_on(guest, layers);
                    }
                })?;
                op.domain().0.store_definition().await?;
            }
        }
        _ => {}
    }
    Ok(match action {
        Action::Saved | Action::OverlaysStay => Became::Finished,
        Action::Unborn => Became::Undone,
        Action::Unsettled | Action::Taken => Became::InDoubt,
        _ => Became::Ended,
    })
}

/// Removes the files of a job that are not whole, if they are those that job wrote.
async fn drop_files(work: Option<&Work>) -> Result<(), Error> {
    match work.cloned() {
        Some(Work::Save { path, save, .. }) => drop_memory(Memory { path, save }).await,
        Some(Work::Dump { file, .. }) => blocking(move || file.remove()).await,
        Some(Work::Snapshot(layers)) => {
            for layer in layers.overlays {
                blocking(move || layer.file.remove()).await?;
            }
            match layers.memory {
                Some(memory) => drop_memory(memory).await,
                None => Ok(()),
            }
        }
        Some(Work::Backup(copies)) => backup::drop_files(&copies).await,
        _ => Ok(()),
    }
}

/// What files and the journal say, whoever runs.
pub(crate) async fn of_the_gone(domain: &Domain, work: Option<&Work>) -> Result<Findings, Error> {
    let file = match work {
        Some(Work::Save { path, save, .. } | Work::Restore { path, save, .. }) => {
            let (path, save) = (path.clone(), *save);
            blocking(move || Ok(SaveFile::state_of(&path, save))).await?
        }
        _ => None,
    };
    let (is_arriving, was_taken, is_leaving) = match work {
        Some(Work::MigrationIn | Work::MigrationOut) => {
            let records = domain.0.context.migrations().await?;
            // What its record says is not known, but that there is one is.
            let unread = domain.0.context.unreadable().await?;
            let is_unread =
                |side: Side| unread.iter().any(|bad| bad.may_be_at(domain.uuid(), side));
            let mine = || {
                records
                    .iter()
                    .filter(|record| record.domain() == domain.uuid())
            };
            // What only is to be told is no work at the guest.
            let leaves =
                |record: &Record| record.side() == Side::Source && record.refuses_migration();
            let (is_arriving, was_taken) = arrival(mine());
            (
                is_arriving || is_unread(Side::Destination),
                was_taken,
                mine().any(leaves) || is_unread(Side::Source),
            )
        }
        _ => (false, false, false),
    };
    Ok(Findings {
        is_there: false,
        file,
        is_arriving,
        was_taken,
        is_leaving,
        inside: Standing::Nothing,
    })
}

/// Whether the records tell of a QEMU here that waits for the guest, and whether of one that took it. One that was taken by
/// an earlier migration may have left since, and be on its way back.
fn arrival<'a>(records: impl Iterator<Item = &'a Record> + Clone) -> (bool, bool) {
    let stages = records.filter_map(|record| match record {
        Record::Destination(record) => Some(&record.stage),
        Record::Source(_) => None,
    });
    let is_open = |stage: &DestinationStage| {
        matches!(
            stage,
            DestinationStage::Preparing | DestinationStage::Prepared
        )
    };
    (
        stages
            .clone()
            .any(|stage| *stage != DestinationStage::Preparing),
        stages
            .clone()
            .any(|stage| stage.owner() == Owner::Destination)
            && !stages.clone().any(is_open),
    )
}

/// How far QEMU itself is with a job of storage.
async fn standing(op: &mut AsyncOp, work: Option<&Work>) -> Result<Standing, Error> {
    match work {
        Some(Work::Snapshot(layers)) => Ok(match snapshot::are_in_place(op, layers).await? {
            true => Standing::Done,
            false => Standing::Nothing,
        }),
        Some(Work::Inside { what, tag, .. }) => inside::standing(op, *what, tag).await,
        Some(Work::Backup(copies)) => {
            let jobs = op.monitor().await?.execute(command::QueryJobs).await?;
            Ok(match Group::of(&jobs, &copies.ids()) {
                Group::Absent => Standing::Nothing,
                Group::UnderWay => Standing::UnderWay,
                Group::Copied | Group::Done => Standing::Done,
                Group::Cancelled | Group::Failed(_) => Standing::Failed,
            })
        }
        _ => Ok(Standing::Nothing),
    }
}

async fn ended(live: &Live) -> Result<(), Error> {
    let Some(process) = &live.process else {
        return Ok(());
    };
    let ended = timeout(ENDING, process.exited()).await;
    ended.map(drop).map_err(|_| {
        Cause::TimedOut {
            what: "QEMU to end",
            waited: ENDING,
        }
        .into()
    })
}

#[cfg(test)]
mod tests {
    use remote_migrate::{DestinationRecord, Epoch, MigrationId, RunState};
    use uuid::Uuid;

    use super::*;

    fn at(stages: &[DestinationStage]) -> (bool, bool) {
        let record = |stage: &DestinationStage| {
            Record::Destination(DestinationRecord {
                migration: MigrationId::random(),
                domain: Uuid::nil(),
                epoch: Epoch::FIRST,
                run: RunState::Running,
                home: "there".into(),
                prepared: None,
                stage: stage.clone(),
            })
        };
        let records: Vec<_> = stages.iter().map(record).collect();
        arrival(records.iter())
    }

    #[test]
    fn a_guest_on_its_way_back_is_not_taken_for_one_that_has_arrived() {
        use DestinationStage::{Owned, Prepared, Preparing, Starting};
        assert_eq!(at(&[]), (false, false));
        assert_eq!(at(&[Preparing]), (false, false));
        assert_eq!(at(&[Prepared]), (true, false));
        assert_eq!(at(&[Starting]), (true, true));
        for open in [Preparing, Prepared] {
            assert_eq!(at(&[Owned, open.clone()]), (true, false));
            assert_eq!(at(&[open, Owned]), (true, false));
        }
        assert_eq!(at(&[Owned, Starting]), (true, true));
    }
}
