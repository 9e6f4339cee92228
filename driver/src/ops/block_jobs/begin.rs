//! Beginning a block job: it is written down, QEMU begins it, and a task follows it from then on.

use std::path::{Path, PathBuf};

use monitor_qmp::command::{self, SyncMode};
use uuid::Uuid;

use super::over::end;
use super::{BlockJob, CommitOptions, MirrorOptions, StreamOptions, refuse_beside, track::Tracked};
use crate::block::{self, Layer, NewImage};
use crate::block_job::{BlockJobKind, Job, Noted, Stage};
use crate::devices;
use crate::error::{Cause, Error};
use crate::guest::{Disk, DiskFormat};
use crate::made::Made;
use crate::ops::Op;
use crate::ops::parts::refuse_unsettled_part;
use crate::ops::save::blocking;
use crate::ops::start::as_it_runs;
use crate::parts::PartKind;
use crate::qemu_job::End;

pub(super) async fn commit(
    op: &mut Op,
    name: String,
    options: CommitOptions,
) -> Result<BlockJob, Error> {
    free_disk(op, &name).await?;
    let chain = block::chain(&op.monitor()?, &name).await?;
    let top = place(&chain, options.top.as_deref(), 0)?;
    let base = place(&chain, options.base.as_deref(), chain.len() - 1)?;
    if base <= top {
        let text = format!("nothing lies behind {}", chain[top].path.display());
        return Err(Cause::State(text).into());
    }
    let (top_node, base_node) = (chain[top].node()?, chain[base].node()?);
    let device = chain[0].node()?;
    let id = new_id(BlockJobKind::Commit, &name);
    let mut begin = command::BlockCommit::new(device)
        .job_id(id.clone())
        .base_node(base_node)
        .auto_dismiss(false);
    begin.speed = options.bandwidth;
    let pivot_to = if top == 0 {
        Some(image(&chain[base])?)
    } else {
        begin = begin.top_node(top_node);
        None
    };
    let noted = note(op, id, name, Job::Commit { pivot_to }).await?;
    let begun = async { op.monitor()?.execute(begin).await.map(drop) }.await;
    begun_or_undone(op, noted, begun).await
}

pub(super) async fn stream(
    op: &mut Op,
    name: String,
    options: StreamOptions,
) -> Result<BlockJob, Error> {
    free_disk(op, &name).await?;
    let chain = block::chain(&op.monitor()?, &name).await?;
    if chain.len() < 2 {
        let text = format!("nothing lies behind {}", chain[0].path.display());
        return Err(Cause::State(text).into());
    }
    let id = new_id(BlockJobKind::Stream, &name);
    let mut begin = command::BlockStream::new(chain[0].node()?)
        .job_id(id.clone())
        .auto_dismiss(false);
    begin.speed = options.bandwidth;
    if let Some(base) = &options.base {
        let base = place(&chain, Some(base), 0)?;
        begin = begin.base_node(chain[base].node()?);
    }
    let noted = note(op, id, name, Job::Stream).await?;
    let begun = async { op.monitor()?.execute(begin).await.map(drop) }.await;
    begun_or_undone(op, noted, begun).await
}

pub(super) async fn mirror(
    op: &mut Op,
    name: String,
    options: MirrorOptions,
) -> Result<BlockJob, Error> {
    let disk = free_disk(op, &name).await?;
    let size = block::chain(&op.monitor()?, &name).await?[0].size;
    let MirrorOptions {
        path,
        format,
        pivot,
        bandwidth,
    } = options;
    if path.to_str().is_none() {
        let text = format!("{path:?} is not valid UTF-8, which QEMU's options need");
        return Err(Cause::BadRequest(text).into());
    }
    let copy = blocking(move || Made::plan(&path)).await?;
    let id = new_id(BlockJobKind::Mirror, &name);
    let work = Job::Mirror {
        copy,
        format,
        pivot,
    };
    let mut noted = note(op, id, name, work).await?;
    let begun = fill(op, &mut noted, &disk, size, bandwidth).await;
    begun_or_undone(op, noted, begun).await
}

/// Makes the copy's file and node, and begins to fill it.
async fn fill(
    op: &mut Op,
    noted: &mut Noted,
    disk: &Disk,
    size: u64,
    bandwidth: Option<u64>,
) -> Result<(), Error> {
    let Job::Mirror { copy, format, .. } = &mut noted.work else {
        return Err(Cause::BadRequest("only a mirror has a copy".into()).into());
    };
    let (mut planned, format) = (copy.clone(), *format);
    let made = blocking(move || planned.make().map(|()| planned)).await?;
    *copy = made.clone();
    let path = made.path.clone();
    // Which file it is, before there is anything in it by which it could not be known.
    write_down(op, noted).await?;
    let length = if format == DiskFormat::Raw { size } else { 0 };
    let sized = blocking(move || {
        let file = made.empty()?;
        file.set_len(length)
            .map_err(crate::error::io("size", made.path))
    });
    sized.await?;
    let image = NewImage {
        path: path.clone(),
        format,
        size,
        backing: None,
    };
    if format == DiskFormat::Qcow2 {
        block::write_head(op, &disk.name, &image).await?;
    }
    let copy = Disk {
        path,
        format,
        read_only: false,
        ..disk.clone()
    };
    let monitor = op.monitor()?;
    let nodes = block::nodes(&monitor).await?;
    let node = devices::fresh_node(&disk.name, |name| block::is_taken(&nodes, name));
    block::add_node(&monitor, devices::image_node(&copy, &node, None)).await?;
    let source = block::node_at(&monitor, &disk.name).await?;
    let mut begin = command::BlockdevMirror::new(source, node, SyncMode::Full)
        .job_id(noted.id.clone())
        .auto_dismiss(false);
    begin.speed = bandwidth;
    monitor.execute(begin).await.map(drop)
}

/// The disk of that name, if no other job is at it.
async fn free_disk(op: &mut Op, name: &str) -> Result<Disk, Error> {
    refuse_beside(op.domain(), Some(name)).await?;
    refuse_unsettled_part(op.domain(), PartKind::Disk, name).await?;
    let guest = as_it_runs(op.domain()).await?;
    let disk = guest.disks.into_iter().find(|disk| disk.name == name);
    Ok(disk.ok_or_else(|| Cause::State(format!("it has no disk \"{name}\"")))?)
}

/// The place of a layer in the chain, by its file.
fn place(chain: &[Layer], path: Option<&Path>, otherwise: usize) -> Result<usize, Error> {
    let Some(path) = path else {
        return Ok(otherwise);
    };
    let found = chain.iter().position(|layer| layer.path == path);
    Ok(found.ok_or_else(|| {
        let layers: Vec<_> = chain.iter().map(|layer| layer.path.display()).collect();
        Cause::BadRequest(format!(
            "{} is none of the disk's files: {layers:?}",
            path.display()
        ))
    })?)
}

/// A layer as the file of a disk.
fn image(layer: &Layer) -> Result<(PathBuf, DiskFormat), Error> {
    let format = match layer.format.as_str() {
        "raw" => DiskFormat::Raw,
        "qcow2" => DiskFormat::Qcow2,
        other => {
            let text = format!("{} is {other}, which no disk may be", layer.path.display());
            return Err(Cause::State(text).into());
        }
    };
    if !layer.path.is_absolute() {
        let text = format!("{} is not an absolute path", layer.path.display());
        return Err(Cause::State(text).into());
    }
    Ok((layer.path.clone(), format))
}

fn new_id(kind: BlockJobKind, disk: &str) -> String {
    let unique = Uuid::new_v4().simple().to_string();
    format!("{}-{disk}-{}", kind.name(), &unique[..8])
}

async fn note(op: &Op, id: String, disk: String, work: Job) -> Result<Noted, Error> {
    let noted = Noted {
        id,
        disk,
        work,
        stage: Stage::Begun,
    };
    write_down(op, &noted).await?;
    Ok(noted)
}

/// Writes down what is known of a job.
async fn write_down(op: &Op, noted: &Noted) -> Result<(), Error> {
    let noted = noted.clone();
    let written = op.domain().0.note(move |record| {
        if let Some(record) = record {
            record.block_jobs.retain(|job| job.id != noted.id);
            record.block_jobs.push(noted);
        }
    });
    Ok(written.await?)
}

/// The job that was begun, or why it was not. What a failure left is undone at once, or, where QEMU does not answer, by the
/// task that follows it.
async fn begun_or_undone(
    op: &mut Op,
    noted: Noted,
    begun: Result<(), Error>,
) -> Result<BlockJob, Error> {
    let domain = op.domain().clone();
    let failure = match begun {
        Ok(()) => None,
        Err(error) => {
            let end_of_it = End::Failed(format!("{error:#}"));
            let is_known = error.effect() != crate::Effect::Unknown;
            if is_known && end(op, &noted, &end_of_it).await.is_ok() {
                return Err(error);
            }
            Some(error)
        }
    };
    let tracked = Tracked::begin(&domain, &noted);
    match failure {
        None => Ok(BlockJob::new(domain, tracked)),
        Some(error) => Err(error),
    }
}
