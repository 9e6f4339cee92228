//! Snapshots inside a guest's qcow2 images, with its memory: made, gone back to, deleted, listed.
//!
//! QEMU's main loop is taken while it does one: it answers nobody and the guest stands still. So nothing but a destroy
//! passes, and there is no way to stop it: a request to cancel comes in time before QEMU is told, and too late after that.

use std::time::{Duration, SystemTime};

use job_core::{AsyncKind, JobKind, KindSet};
use monitor_qmp::command::{self, BlockNode};
use tokio::time::Instant;

use crate::block;
use crate::domain::Domain;
use crate::error::{Cause, Error, ErrorKind};
use crate::grouped::Group;
use crate::guest::{DiskFormat, Guest};
use crate::ops::block_jobs::refuse_beside;
use crate::ops::group::{dismiss_all, follow};
use crate::ops::start::as_it_runs;
use crate::ops::visit::Visits;
use crate::ops::{AsyncOp, Call};
use crate::records::{Inside, Work};
use crate::recovery::Standing;

/// QEMU's job, of which there is one at a time.
const JOB: &str = "inside";
const LONGEST_TAG: usize = 128;

/// A snapshot inside a guest's images.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InsideSnapshot {
    /// What it is called.
    pub tag: String,
    /// When it was made.
    pub made: SystemTime,
    /// Bytes of memory that are in it.
    pub memory: u64,
    /// Whether it is in all disks that the guest may write to; else the guest cannot go back to it.
    pub is_whole: bool,
}

impl Domain {
    /// Makes a snapshot of the guest, memory and all disks that it may write to, inside its images, which are all qcow2.
    /// The guest stands still meanwhile, and runs on if it ran. Refused as [`Exists`](crate::ErrorKind::Exists) if one of
    /// that name is there.
    ///
    /// Once QEMU has begun it cannot be cancelled; failed, nothing of it is left.
    pub fn snapshot_inside(&self, tag: impl Into<String>) -> Call<()> {
        self.inside("snapshot-inside", Inside::Save, tag.into())
    }

    /// Takes the guest back to a snapshot inside its images. It runs if it runs now; what it did since is lost.
    ///
    /// Refused if no snapshot of that name is whole. If QEMU fails half way, the guest stands still, neither here nor
    /// there: go back again, or end it.
    pub fn revert_inside(&self, tag: impl Into<String>) -> Call<()> {
        self.inside("revert-inside", Inside::Load, tag.into())
    }

    /// Deletes a snapshot inside the guest's images, from all that it is in.
    pub fn delete_inside(&self, tag: impl Into<String>) -> Call<()> {
        self.inside("delete-inside", Inside::Delete, tag.into())
    }

    /// The snapshots inside the guest's images, oldest first.
    pub fn list_inside(&self) -> Call<Vec<InsideSnapshot>> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.call, move |deadline| async move {
            let work = |mut op: crate::Op| async move {
                let guest = as_it_runs(op.domain()).await?;
                let images = images(&mut op, &guest).await?;
                Ok(listed(&images))
            };
            domain
                .run("list-inside", JobKind::Query, deadline, work)
                .await
        })
    }

    fn inside(&self, owner: &'static str, what: Inside, tag: String) -> Call<()> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let (kind, mask) = (AsyncKind::Snapshot, KindSet::DESTROY_ONLY);
            let work = move |op: AsyncOp| inside(op, what, tag);
            domain.run_async(owner, kind, mask, deadline, work).await
        })
    }
}

/// The nodes at the guest's disks that it may write to, in their order.
async fn images<V: Visits>(op: &mut V, guest: &Guest) -> Result<Vec<BlockNode>, Error> {
    let monitor = op.visit().await?;
    let nodes = block::nodes(&monitor).await?;
    let mut images = Vec::new();
    for disk in guest.disks.iter().filter(|disk| !disk.read_only) {
        if disk.format != DiskFormat::Qcow2 {
            let text = format!(
                "disk \"{}\" is no qcow2 image, which keeps snapshots",
                disk.name
            );
            return Err(Cause::State(text).into());
        }
        let name = block::node_at(&monitor, &disk.name).await?;
        let is_it = |node: &&BlockNode| node.node_name.as_ref() == Some(&name);
        let node = nodes.iter().find(is_it);
        images.push(
            node.ok_or_else(|| Cause::State(format!("QEMU has no node \"{name}\"")))?
                .clone(),
        );
    }
    if images.is_empty() {
        let text = "it has no disk that it may write to";
        return Err(Cause::State(text.into()).into());
    }
    Ok(images)
}

fn listed(images: &[BlockNode]) -> Vec<InsideSnapshot> {
    let mut all = Vec::<InsideSnapshot>::new();
    for snapshot in images.iter().flat_map(|image| &image.image.snapshots) {
        match all.iter_mut().find(|known| known.tag == snapshot.name) {
            Some(known) => known.memory = known.memory.max(snapshot.vm_state_size),
            None => {
                let since = Duration::from_secs(snapshot.date_sec.unsigned_abs());
                all.push(InsideSnapshot {
                    tag: snapshot.name.clone(),
                    made: SystemTime::UNIX_EPOCH + since,
                    memory: snapshot.vm_state_size,
                    is_whole: holders(images, &snapshot.name) == images.len(),
                });
            }
        }
    }
    all.sort_by_key(|snapshot| snapshot.made);
    all
}

/// In how many of the images a snapshot is.
fn holders(images: &[BlockNode], tag: &str) -> usize {
    let has = |image: &&BlockNode| image.image.snapshots.iter().any(|one| one.name == tag);
    images.iter().filter(has).count()
}

async fn inside(mut op: AsyncOp, what: Inside, tag: String) -> Result<(), Error> {
    op.set_phase("preparing");
    if tag.is_empty() || tag.len() > LONGEST_TAG || tag.chars().any(char::is_control) {
        let text = format!("{tag:?} cannot be the name of a snapshot");
        return Err(Cause::BadRequest(text).into());
    }
    refuse_beside(op.domain(), None).await?;
    let guest = as_it_runs(op.domain()).await?;
    let images = images(&mut op, &guest).await?;
    let holders = holders(&images, &tag);
    // QEMU would stop the guest before it finds out.
    let refused = match what {
        Inside::Save if holders > 0 => Some(Cause::Exists(format!("snapshot \"{tag}\" exists"))),
        Inside::Load if holders < images.len() => Some(Cause::State(format!(
            "there is no whole snapshot \"{tag}\""
        ))),
        Inside::Delete if holders == 0 => {
            Some(Cause::State(format!("there is no snapshot \"{tag}\"")))
        }
        _ => None,
    };
    if let Some(cause) = refused {
        return Err(cause.into());
    }
    // One that ended, and whose end nobody read.
    dismiss_all(&mut op, &[JOB.to_owned()]).await?;
    op.note_work(work(what, &tag, false)).await?;
    op.check_cancelled()?;
    op.job().pass_point_of_return();
    op.set_phase(match what {
        Inside::Save => "saving",
        Inside::Load => "loading",
        Inside::Delete => "deleting",
    });
    let ended = run(&mut op, what, &tag, &images).await;
    let ended = match ended {
        Ok(group) => group,
        Err(error) => {
            // QEMU may be at it still.
            op.leave_unsettled().await;
            return Err(error);
        }
    };
    match ended {
        Group::Done => {
            op.note_work(work(what, &tag, true)).await?;
            op.set_phase("ending");
            dismiss_all(&mut op, &[JOB.to_owned()]).await
        }
        Group::Failed(reason) if what == Inside::Load => {
            dismiss_all(&mut op, &[JOB.to_owned()]).await?;
            let text = format!("the guest stands still, neither here nor there: {reason}");
            Err(Cause::Failed(text).into())
        }
        Group::Failed(reason) => {
            remove(&mut op, &tag).await?;
            Err(Cause::Failed(reason).into())
        }
        _ => {
            op.leave_unsettled().await;
            Err(Cause::State("somebody else dismissed QEMU's job".into()).into())
        }
    }
}

fn work(what: Inside, tag: &str, is_done: bool) -> Work {
    let tag = tag.to_owned();
    Work::Inside { what, tag, is_done }
}

/// Has QEMU do it, and follows it to its end.
async fn run(
    op: &mut AsyncOp,
    what: Inside,
    tag: &str,
    images: &[BlockNode],
) -> Result<Group, Error> {
    let names: Vec<String> = images
        .iter()
        .filter_map(|image| image.node_name.clone())
        .collect();
    let monitor = op.monitor().await?;
    let begun = match what {
        Inside::Save => {
            let save = command::SnapshotSave::new(JOB, tag, names[0].clone(), names);
            monitor.execute(save).await.map(drop)
        }
        Inside::Load => {
            let load = command::SnapshotLoad::new(JOB, tag, names[0].clone(), names);
            monitor.execute(load).await.map(drop)
        }
        Inside::Delete => {
            let delete = command::SnapshotDelete::new(JOB, tag, names);
            monitor.execute(delete).await.map(drop)
        }
    };
    drop(monitor);
    match begun {
        // It is answered when the main loop is free again, and the list of jobs says the same.
        Err(error) if error.kind() != ErrorKind::TimedOut => return Err(error),
        _ => {}
    }
    ended(op).await
}

/// Waits until QEMU has ended its job, however long its main loop is taken.
async fn ended(op: &mut AsyncOp) -> Result<Group, Error> {
    loop {
        match follow(op, &[JOB.to_owned()]).await {
            Err(error) if error.kind() == ErrorKind::TimedOut && Instant::now() < op.deadline() => {
            }
            other => return other,
        }
    }
}

/// How far QEMU is with it: by its job, if that is on the list; else by what is in the images.
pub(crate) async fn standing(op: &mut AsyncOp, what: Inside, tag: &str) -> Result<Standing, Error> {
    let group = ended(op).await?;
    let guest = as_it_runs(op.domain()).await?;
    let images = images(op, &guest).await?;
    let (holders, all) = (holders(&images, tag), images.len());
    Ok(match (what, group) {
        (Inside::Save | Inside::Load, Group::Done) => Standing::Done,
        (Inside::Save, Group::Absent) if holders == all => Standing::Done,
        (Inside::Save, Group::Absent) if holders == 0 => Standing::Nothing,
        (Inside::Delete, _) if holders == 0 => Standing::Done,
        (Inside::Load, Group::Absent) => Standing::Nothing,
        _ => Standing::Failed,
    })
}

/// Takes QEMU's job off its list.
pub(crate) async fn forget(op: &mut AsyncOp) -> Result<(), Error> {
    dismiss_all(op, &[JOB.to_owned()]).await
}

/// Deletes what there is of a snapshot, and takes QEMU's job off its list.
pub(crate) async fn remove(op: &mut AsyncOp, tag: &str) -> Result<(), Error> {
    let job = [JOB.to_owned()];
    dismiss_all(op, &job).await?;
    let guest = as_it_runs(op.domain()).await?;
    let images = images(op, &guest).await?;
    if holders(&images, tag) == 0 {
        return Ok(());
    }
    let group = run(op, Inside::Delete, tag, &images).await?;
    dismiss_all(op, &job).await?;
    match group {
        Group::Failed(reason) => Err(Cause::Failed(reason).into()),
        _ => Ok(()),
    }
}
