//! Copies of a guest's disks as they were at one instant, while the guest runs on. Whole ones, or what changed since the
//! one before.
//!
//! ```text
//!  files ─► images ─► nodes ─► (freeze) one transaction (thaw) ─► copied ─► written down ─► finalized ─► closed
//!                       │                                           │            │            └ older bitmaps go
//!                       └ a bitmap for each new copy                │            └ from here on the copies stay
//!                                                                   └ QEMU waits here: each copy is marked
//! ```
//!
//! A bitmap in the image holds what was written since a copy, and is known by that copy's [mark](crate::marks) alone. The one
//! for a new copy records beside the one before, which goes once the new copy is whole, written down and closed:
//! whatever is interrupted before loses nothing of it. A bitmap does not outlive a QEMU that was killed; then the chain
//! begins anew with a whole copy.

use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_qga::Thawed;
use job_core::{AsyncKind, Guard, KindSet};
use monitor_qmp::command::{
    self, BlockNode, DirtyBitmap, SyncMode, Transaction, TransactionAction,
};
use tracing::warn;

use crate::block::{self, NewImage};
use crate::devices::fresh_node;
use crate::domain::Domain;
use crate::error::{Cause, Error};
use crate::grouped::Group;
use crate::guest::DiskFormat;
use crate::made::Made;
use crate::marks;
use crate::ops::disks::chosen;
use crate::ops::freeze::{FreezeOptions, thaw_lease};
use crate::ops::group::{cancel_all, dismiss_all, follow};
use crate::ops::save::blocking;
use crate::ops::snapshot::{drop_node, fill};
use crate::ops::{AsyncOp, Call};
use crate::records::{Copied, Copies, Work};

/// What undoing or finishing may take, whatever was left of the job's own time.
const UNDO: Duration = Duration::from_secs(60);

/// What is copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackupOf {
    /// All that the guest sees on a disk.
    #[default]
    Everything,
    /// The same, and from then on a bitmap in each disk's image holds what is written: the chain of that name begins, or
    /// begins anew. The disks are qcow2 images.
    EverythingAnd(String),
    /// What was written since the copy [behind](BackupTarget::behind), which is the last good one of the chain of that
    /// name. Refused where the disk's image does not tell what changed since that very copy.
    Since(String),
}

impl BackupOf {
    fn chain(&self) -> Option<&str> {
        match self {
            Self::Everything => None,
            Self::EverythingAnd(name) | Self::Since(name) => Some(name),
        }
    }
}

/// How disks are copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..BackupOptions::default()`"
)]
pub struct BackupOptions {
    /// What is copied.
    pub of: BackupOf,
    /// At most so many bytes a second of each disk.
    pub speed: Option<u64>,
    /// The guest's file systems are frozen at the instant of the copies.
    pub freeze: Option<FreezeOptions>,
    /// Whether copies that are not whole stay, when it was cancelled, failed or QEMU died.
    pub keep_partial: bool,
}

/// Where a copy of a disk goes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "plain data; checked before use")]
pub struct BackupTarget {
    /// Which disk, by name.
    pub disk: String,
    /// The new qcow2 image.
    pub path: PathBuf,
    /// What the new image is told that lies behind it. Needed for a copy of what changed since: the copy before. This
    /// driver reads in it which copy it is.
    pub behind: Option<PathBuf>,
}

/// What became of a backup.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackedUp {
    /// How long the guest's file systems were frozen, as of a [snapshot](crate::Snapshotted::frozen).
    pub frozen: Option<Thawed>,
}

impl Domain {
    /// Copies these disks as they are at one instant into new images. The guest runs on and may write.
    ///
    /// Cancelled or failed, the copies are removed unless they are to be kept, and each chain goes on from the last good
    /// backup. A driver that is killed leaves the next one to copy on. If QEMU is killed the copies go as well, and the
    /// chains of its disks begin anew.
    pub fn backup(&self, targets: Vec<BackupTarget>, options: BackupOptions) -> Call<BackedUp> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            // A block job that begins at one of its disks meanwhile could not know yet that it must not.
            let mask = KindSet::DEFAULT;
            let work = move |op: AsyncOp| backup(op, targets, options);
            domain
                .run_async("backup", AsyncKind::Backup, mask, deadline, work)
                .await
        })
    }
}

/// A copy to be.
struct Plan {
    disk: String,
    image: NewImage,
    /// The bitmap that tells what is copied; all is, without one.
    since: Option<String>,
}

async fn backup(
    mut op: AsyncOp,
    targets: Vec<BackupTarget>,
    options: BackupOptions,
) -> Result<BackedUp, Error> {
    op.set_phase("preparing");
    let (plans, mut copies) = plan(&mut op, targets, &options).await?;
    op.note_work(Work::Backup(copies.clone())).await?;
    op.job().set_mask(AsyncKind::Backup.default_mask());
    let begun = match make(&mut op, &plans, &mut copies).await {
        Ok(()) => begin(&mut op, &plans, &copies, options).await,
        Err(error) => Err(error),
    };
    let frozen = match begun {
        Ok(frozen) => frozen,
        Err(error) => {
            undo_or_leave(&mut op, &copies).await;
            return Err(error);
        }
    };
    to_the_end(&mut op, copies).await?;
    Ok(BackedUp { frozen })
}

/// What is to be done, before anything is.
async fn plan(
    op: &mut AsyncOp,
    targets: Vec<BackupTarget>,
    options: &BackupOptions,
) -> Result<(Vec<Plan>, Copies), Error> {
    let disks = chosen(op.domain(), targets.iter().map(|target| &*target.disk)).await?;
    // Files of others are read with no step of the guest's held.
    let mut marks_behind = Vec::new();
    for target in &targets {
        marks_behind.push(match &options.of {
            BackupOf::Since(chain) => Some(mark_behind(target, chain).await?),
            _ => None,
        });
    }
    let monitor = op.monitor().await?;
    let nodes = block::nodes(&monitor).await?;
    let (mut plans, mut all) = (Vec::new(), Vec::new());
    for ((disk, target), since) in disks.into_iter().zip(targets).zip(marks_behind) {
        let source = block::node_at(&monitor, &disk.name).await?;
        if options.of.chain().is_some() && disk.format != DiskFormat::Qcow2 {
            let text = format!(
                "disk \"{}\" is no qcow2 image, which keeps bitmaps",
                disk.name
            );
            return Err(Cause::BadRequest(text).into());
        }
        if let Some(mark) = &since {
            refuse_untrusted(&nodes, &source, &disk.name, mark)?;
        }
        let path = target.path.clone();
        let file = blocking(move || Made::plan(&path)).await?;
        let node = fresh_node(&disk.name, |name| block::is_taken(&nodes, name));
        all.push(Copied {
            job: format!("backup-{node}"),
            source: source.clone(),
            node,
            file,
            mark: options.of.chain().map(marks::fresh),
        });
        plans.push(Plan {
            disk: disk.name,
            image: NewImage {
                path: target.path,
                format: DiskFormat::Qcow2,
                size: block::size_of(&nodes, &source)?,
                backing: target.behind.map(|path| (path, DiskFormat::Qcow2)),
            },
            since,
        });
    }
    let copies = Copies {
        all,
        chain: options.of.chain().map(str::to_owned),
        is_kept: options.keep_partial,
        is_whole: false,
    };
    Ok((plans, copies))
}

/// What is said of a copy of what changed that is refused: what would do.
const ANEW: &str = "a chain begins with a backup of everything";

/// The mark of the copy that one of what changed is to go on from.
async fn mark_behind(target: &BackupTarget, chain: &str) -> Result<String, Error> {
    let Some(behind) = &target.behind else {
        let disk = &target.disk;
        let text = format!(
            "a copy of what changed on disk \"{disk}\" is told of no copy behind it: {ANEW}"
        );
        return Err(Cause::State(text).into());
    };
    // As QEMU reads one that is not absolute.
    let folder = target.path.parent().unwrap_or_else(|| Path::new("/"));
    let behind = folder.join(behind);
    let name = chain.to_owned();
    let path = behind.clone();
    let read = blocking(move || {
        let mark = marks::of_copy(&path, &name);
        mark.map_err(crate::error::io("read", path))
    });
    let none = || {
        let behind = behind.display();
        Cause::State(format!(
            "{behind} is no whole copy of the chain \"{chain}\": {ANEW}"
        ))
    };
    Ok(read.await?.ok_or_else(none)?)
}

/// Refuses what the bitmap of that mark would not tell, or not for certain.
fn refuse_untrusted(
    nodes: &[BlockNode],
    source: &str,
    disk: &str,
    mark: &str,
) -> Result<(), Error> {
    let why = match bitmaps_of(nodes, source).find(|bitmap| bitmap.name.as_deref() == Some(mark)) {
        Some(bitmap) if !bitmap.inconsistent && bitmap.recording => return Ok(()),
        None => "does not tell what changed since the copy behind",
        Some(_) => "has a bitmap that was not put away in good order",
    };
    Err(Cause::State(format!("disk \"{disk}\" {why} (\"{mark}\"): {ANEW}")).into())
}

fn bitmaps_of<'a>(nodes: &'a [BlockNode], name: &str) -> impl Iterator<Item = &'a DirtyBitmap> {
    let node = nodes
        .iter()
        .filter(move |node| node.node_name.as_deref() == Some(name));
    node.flat_map(|node| &node.dirty_bitmaps)
}

/// Makes the images and their nodes, and the bitmaps that go on from the copies.
async fn make(op: &mut AsyncOp, plans: &[Plan], copies: &mut Copies) -> Result<(), Error> {
    for copy in &mut copies.all {
        let mut file = copy.file.clone();
        copy.file = blocking(move || file.make().map(|()| file)).await?;
    }
    op.note_work(Work::Backup(copies.clone())).await?;
    for (plan, copy) in plans.iter().zip(&copies.all) {
        op.check_cancelled()?;
        fill(op, &plan.disk, &copy.node, &copy.file, &plan.image).await?;
    }
    let add = |copy: &Copied| {
        let mark = copy.mark.clone()?;
        let add = command::BlockDirtyBitmapAdd::new(copy.source.clone(), mark);
        Some(TransactionAction::BlockDirtyBitmapAdd(add.persistent(true)))
    };
    // What is written until the copies begin is in them and will be told as changed, too. QEMU puts no bitmap into a
    // transaction whose jobs belong together.
    let adding: Vec<_> = copies.all.iter().filter_map(add).collect();
    if !adding.is_empty() {
        op.monitor().await?.execute(Transaction::of(adding)).await?;
    }
    Ok(())
}

/// Begins all copies at one instant.
async fn begin(
    op: &mut AsyncOp,
    plans: &[Plan],
    copies: &Copies,
    options: BackupOptions,
) -> Result<Option<Thawed>, Error> {
    let copy = |(plan, copy): (&Plan, &Copied)| {
        let sync = match plan.since {
            Some(_) => SyncMode::Bitmap,
            None => SyncMode::Full,
        };
        let mut backup = command::BlockdevBackup::new(copy.source.clone(), copy.node.clone(), sync)
            .job_id(copy.job.clone())
            .auto_finalize(false)
            .auto_dismiss(false);
        backup.speed = options.speed;
        if let Some(mark) = &plan.since {
            backup = backup.bitmap(mark.clone()).bitmap_mode("never");
        }
        TransactionAction::BlockdevBackup(backup)
    };
    let transaction = Transaction::grouped(plans.iter().zip(&copies.all).map(copy).collect());
    op.check_cancelled()?;
    op.set_phase("beginning");
    let lease = match options.freeze {
        Some(options) => Some(op.domain().take_freeze(options, op.deadline()).await?),
        None => None,
    };
    let begun = op.monitor().await?.execute(transaction).await;
    let frozen = thaw_lease(op.domain(), lease).await;
    begun?;
    Ok(frozen)
}

/// Follows the copies until they are whole, and closes them; else undoes them.
pub(crate) async fn to_the_end(op: &mut AsyncOp, copies: Copies) -> Result<(), Error> {
    op.set_phase("copying");
    let ids = copies.ids();
    let copied = match follow(op, &ids).await {
        Ok(Group::Copied | Group::Done) => Ok(()),
        Ok(Group::Failed(reason)) => Err(Cause::Failed(reason).into()),
        Ok(Group::Cancelled) => Err(Cause::Cancelled("QEMU's job was cancelled".into()).into()),
        Ok(_) => Err(Cause::Failed("QEMU knows nothing of its jobs any more".into()).into()),
        Err(error) => Err(error),
    };
    if let Err(error) = copied {
        undo_or_leave(op, &copies).await;
        return Err(error);
    }
    op.job().pass_point_of_return();
    op.set_phase("finishing");
    op.extend(UNDO);
    let finished = finish(op, copies).await;
    if finished.is_err() && op.job().check().is_ok() {
        // The copies are whole, and stay.
        op.leave_unsettled().await;
    }
    finished
}

/// The copies are whole: that is written down, each is marked and closed, and the chains go on from there.
pub(crate) async fn finish(op: &mut AsyncOp, mut copies: Copies) -> Result<(), Error> {
    copies.is_whole = true;
    op.amend_work(Work::Backup(copies.clone())).await?;
    op.set_phase("ending");
    let ids = copies.ids();
    let jobs = op.monitor().await?.execute(command::QueryJobs).await?;
    if Group::of(&jobs, &ids) == Group::Copied {
        mark(op, &copies).await?;
        // One takes the others along.
        let id = ids[0].clone();
        op.monitor()
            .await?
            .execute(command::JobFinalize { id })
            .await?;
        follow(op, &ids).await?;
    }
    dismiss_all(op, &ids).await?;
    for copy in &copies.all {
        drop_node(op, &copy.node).await?;
        let file = copy.file.clone();
        blocking(move || file.flush()).await?;
    }
    let Some(chain) = copies.chain.clone() else {
        return Ok(());
    };
    let is_older = |name: &str, copy: &Copied| {
        marks::is_of(name, &chain) && copy.mark.as_deref() != Some(name)
    };
    drop_bitmaps(op, &copies, is_older).await
}

/// Has each copy say which it is. In the file that is once it is closed.
async fn mark(op: &mut AsyncOp, copies: &Copies) -> Result<(), Error> {
    let monitor = op.monitor().await?;
    let nodes = block::nodes(&monitor).await?;
    for copy in &copies.all {
        let Some(mark) = &copy.mark else { continue };
        let mut bitmaps = bitmaps_of(&nodes, &copy.node);
        if bitmaps.any(|bitmap| bitmap.name.as_ref() == Some(mark)) {
            continue;
        }
        let add = command::BlockDirtyBitmapAdd::new(copy.node.clone(), mark.clone());
        let add = add.persistent(true).disabled(true);
        monitor.execute(add).await?;
    }
    Ok(())
}

async fn undo_or_leave(op: &mut AsyncOp, copies: &Copies) {
    op.extend(UNDO);
    op.set_phase("undoing");
    if let Err(error) = undo(op, copies).await
        && op.job().check().is_ok()
    {
        let error = format!("{error:#}");
        warn!(
            domain = op.domain().name(),
            error, "a backup was not undone"
        );
        op.leave_unsettled().await;
    }
}

/// Ends the jobs and removes what they made; bitmaps that were there before hold all that they held, and what came since.
/// Without the copy it began with, a bitmap says nothing.
pub(crate) async fn undo(op: &mut AsyncOp, copies: &Copies) -> Result<(), Error> {
    cancel_all(op, &copies.ids()).await?;
    for copy in &copies.all {
        drop_node(op, &copy.node).await?;
    }
    let is_new = |name: &str, copy: &Copied| copy.mark.as_deref() == Some(name);
    drop_bitmaps(op, copies, is_new).await?;
    drop_files(copies).await
}

/// Removes the copies, unless they are to be kept.
pub(crate) async fn drop_files(copies: &Copies) -> Result<(), Error> {
    for copy in copies.all.iter().filter(|_| !copies.is_kept) {
        let file = copy.file.clone();
        blocking(move || file.remove()).await?;
    }
    Ok(())
}

/// Removes these bitmaps of the disks that are copied.
async fn drop_bitmaps(
    op: &mut AsyncOp,
    copies: &Copies,
    is_one: impl Fn(&str, &Copied) -> bool,
) -> Result<(), Error> {
    let monitor = op.monitor().await?;
    let nodes = block::nodes(&monitor).await?;
    for copy in &copies.all {
        // One that somebody else uses stays, and is true all the same.
        let idle = bitmaps_of(&nodes, &copy.source).filter(|bitmap| !bitmap.busy);
        let names = idle.filter_map(|bitmap| bitmap.name.clone());
        for name in names.filter(|name| is_one(name, copy)) {
            let remove = command::BlockDirtyBitmapRemove::new(copy.source.clone(), name);
            monitor.execute(remove).await?;
        }
    }
    Ok(())
}
