//! The end of a block job: the disk moves to the new file, or not, and nothing is left of the job.

use std::path::PathBuf;

use monitor_qmp::command;

use crate::block;
use crate::block_job::{BlockJobEnd, Noted, Stage, verdict};
use crate::domain::{Domain, Inner};
use crate::error::{Cause, Error, ErrorKind};
use crate::events::What;
use crate::guest::{DiskFormat, Guest};
use crate::ops::Op;
use crate::ops::job_watch::{JobWatch, dismiss};
use crate::ops::save::blocking;
use crate::qemu_job::End;
use crate::records::Running;

/// Has the disk move to the new file, while the guest stands still, and ends the job. Also takes up a move that failed half
/// way, or that an earlier driver began: a guest that stands still for it is let run by whoever brings it to its end.
pub(super) async fn pivot(op: &mut Op, noted: &Noted) -> Result<BlockJobEnd, Error> {
    let record = op.domain().0.noted().await;
    let mut jobs = record.into_iter().flat_map(|record| record.block_jobs);
    let now = jobs.find(|job| job.id == noted.id);
    // Whoever waited for this job may have been overtaken.
    let Some(mut noted) = now.filter(|job| job.stage != Stage::Cancelling) else {
        return Err(Cause::State("it was asked to stop first".into()).into());
    };
    if noted.stage == Stage::Begun {
        let status = op.monitor()?.execute(command::QueryStatus).await?;
        let was_running = status.running;
        noted.stage = Stage::Pivoting { was_running };
        set_stage(op.domain(), &noted.id, noted.stage).await?;
    }
    // What the guest writes from the move on would be in the new file alone, and the descriptions name the old one yet.
    op.monitor()?.execute(command::Stop).await?;
    let mut watch = JobWatch::new(op.domain(), noted.id.clone());
    let id = noted.id.clone();
    let completed = op.monitor()?.execute(command::JobComplete { id }).await;
    if let Err(error) = &completed
        && error.kind() != ErrorKind::Refused
    {
        return completed.map(|_| BlockJobEnd::Unknown);
    }
    // Refused, it has ended by itself, or was told before.
    let ended = watch.finish(op, |_, _| {}).await?;
    end(op, &noted, &ended).await
}

pub(super) async fn set_stage(domain: &Domain, id: &str, stage: Stage) -> Result<(), Cause> {
    let id = id.to_owned();
    let noted = domain.0.note(move |record| {
        let jobs = record.iter_mut().flat_map(|record| &mut record.block_jobs);
        for job in jobs.filter(|job| job.id == id) {
            job.stage = stage;
        }
    });
    noted.await
}

/// Does what is left to do for a job that ended so, and tells. Each step may be repeated.
pub(super) async fn end(op: &mut Op, noted: &Noted, ended: &End) -> Result<BlockJobEnd, Error> {
    dismiss(op, &noted.id).await?;
    block::end_creations(op, &noted.disk).await?;
    let file = block::file_at(&op.monitor()?, &noted.disk).await?;
    let is_there = match (noted.pivots_to(), &file) {
        (Some((path, _)), Some(file)) => path == file,
        _ => false,
    };
    let verdict = verdict(noted, ended, is_there);
    if let (true, Some((path, format))) = (verdict.follow, noted.pivots_to()) {
        follow(op, &noted.disk, path.to_owned(), format).await?;
    }
    block::prune(&op.monitor()?, &noted.disk).await?;
    if let (true, Some(copy)) = (verdict.drop_copy, noted.copy()) {
        let copy = copy.clone();
        blocking(move || copy.remove()).await?;
    }
    if verdict.run {
        let monitor = op.monitor()?;
        if !monitor.execute(command::QueryStatus).await?.running {
            monitor.execute(command::Cont).await?;
        }
    }
    let id = noted.id.clone();
    let forgotten = op.domain().0.note(move |record| {
        if let Some(record) = record {
            record.block_jobs.retain(|job| job.id != id);
        }
    });
    forgotten.await?;
    tell(op.domain(), noted, &verdict.end);
    Ok(verdict.end)
}

pub(super) fn tell(domain: &Domain, noted: &Noted, end: &BlockJobEnd) {
    domain.0.tell(What::BlockJobEnded {
        id: noted.id.clone().into(),
        disk: noted.disk.clone().into(),
        kind: noted.kind(),
        end: end.clone(),
    });
}

/// Both descriptions name the new file. The definition first, and only if the disk was the same file there: from then on
/// [`drop_copies`] leaves that file alone.
async fn follow(op: &Op, disk: &str, path: PathBuf, format: DiskFormat) -> Result<(), Error> {
    let domain = op.domain();
    let old = domain.description().and_then(|guest| file_of(&guest, disk));
    let records = domain.records();
    let defined = records.definition.as_ref();
    let defined = defined.and_then(|guest| file_of(guest, disk));
    let moved = {
        let (disk, path) = (disk.to_owned(), path.clone());
        move |guest: &mut Guest| {
            for disk in guest.disks.iter_mut().filter(|found| found.name == disk) {
                disk.path.clone_from(&path);
                disk.format = format;
            }
        }
    };
    if defined.is_some() && defined == old {
        let before = op.with_state(|records| {
            let before = records.definition.clone();
            if let Some(definition) = &mut records.definition {
                moved(definition);
            }
            before
        })?;
        if let Err(cause) = domain.0.store_definition().await {
            op.with_state(|records| records.definition = before)?;
            return Err(cause.into());
        }
    }
    let noted = domain.0.note(move |record| {
        if let Some(record) = record {
            moved(&mut record.guest);
        }
    });
    Ok(noted.await?)
}

fn file_of(guest: &Guest, disk: &str) -> Option<PathBuf> {
    let disk = guest.disks.iter().find(|found| found.name == disk);
    disk.map(|disk| disk.path.clone())
}

/// Removes the copies of mirrors whose QEMU has ended: what was not the disk then is of no use. One that a description
/// names is the disk.
pub(crate) async fn drop_copies(domain: &Inner, record: &Running) -> Result<(), Error> {
    let records = domain.records.get();
    let is_named = |copy: &PathBuf| {
        let guests = records.definition.iter().chain([&record.guest]);
        let mut disks = guests.flat_map(|guest| &guest.disks);
        disks.any(|disk| disk.path == *copy)
    };
    let copies = record.block_jobs.iter().filter_map(Noted::copy);
    let copies: Vec<_> = copies
        .filter(|copy| !is_named(&copy.path))
        .cloned()
        .collect();
    if copies.is_empty() {
        return Ok(());
    }
    blocking(move || copies.iter().try_for_each(|copy| copy.remove())).await
}
