//! Copies of a guest's disks as they were at one instant, while the guest runs on. Whole ones, or what changed since the
//! one before.
//!
//! ```text
//!  files ─► images ─► nodes ─► (freeze) one transaction (thaw) ─► copied ─► written down ─► finalized ─► closed
//!                                                                   │            └ from here on the copies stay
//!                                                                   └ QEMU waits here: the bitmaps still hold all
//! ```
//!
//! A bitmap in the image holds what was written since the last good copy. QEMU lets it go on from the new copy only when it
//! is told so, and it is told once that copy is whole and written down: whatever is interrupted before loses nothing of
//! it. A bitmap does not outlive a QEMU that was killed; then the chain begins anew with a whole copy.

use std::path::PathBuf;
use std::time::Duration;

use agent_qga::Thawed;
use job_core::{AsyncKind, Guard};
use monitor_qmp::command::{self, BlockNode, SyncMode, Transaction, TransactionAction};
use tracing::warn;

use crate::block::{self, NewImage};
use crate::devices::fresh_node;
use crate::domain::Domain;
use crate::error::{Cause, Error};
use crate::grouped::Group;
use crate::guest::DiskFormat;
use crate::made::Made;
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
    /// The same, and from then on the bitmap of that name holds what is written: a chain begins, or begins anew. The disks
    /// are qcow2 images.
    EverythingAnd(String),
    /// What was written since the last good backup with the bitmap of that name.
    Since(String),
}

impl BackupOf {
    fn bitmap(&self) -> Option<&str> {
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
    /// What the new image is told that lies behind it: the copy before, for one of what changed since.
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
    /// Cancelled or failed, the copies are removed unless they are to be kept, and each bitmap holds all that was written
    /// since the last good backup. So it is when this driver and QEMU are both killed; if this driver alone is, the next
    /// one copies on.
    pub fn backup(&self, targets: Vec<BackupTarget>, options: BackupOptions) -> Call<BackedUp> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::Backup.default_mask();
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
}

async fn backup(
    mut op: AsyncOp,
    targets: Vec<BackupTarget>,
    options: BackupOptions,
) -> Result<BackedUp, Error> {
    op.set_phase("preparing");
    let (plans, mut copies) = plan(&mut op, targets, &options).await?;
    op.note_work(Work::Backup(copies.clone())).await?;
    let begun = match make(&mut op, &plans, &mut copies).await {
        Ok(()) => begin(&mut op, &copies, options).await,
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
    let monitor = op.monitor().await?;
    let nodes = block::nodes(&monitor).await?;
    let (mut plans, mut all) = (Vec::new(), Vec::new());
    for (disk, target) in disks.into_iter().zip(targets) {
        let source = block::node_at(&monitor, &disk.name).await?;
        let mut is_bitmap_new = false;
        if let Some(name) = options.of.bitmap() {
            let is_whole = options.of != BackupOf::Since(name.to_owned());
            if is_whole && disk.format != DiskFormat::Qcow2 {
                let text = format!(
                    "disk \"{}\" is no qcow2 image, which keeps bitmaps",
                    disk.name
                );
                return Err(Cause::BadRequest(text).into());
            }
            is_bitmap_new = look_at_bitmap(&nodes, &source, &disk.name, name, is_whole)?;
        }
        let path = target.path.clone();
        let file = blocking(move || Made::plan(&path)).await?;
        let node = fresh_node(&disk.name, |name| block::is_taken(&nodes, name));
        all.push(Copied {
            job: format!("backup-{node}"),
            source: source.clone(),
            node,
            file,
            is_bitmap_new,
        });
        plans.push(Plan {
            disk: disk.name,
            image: NewImage {
                path: target.path,
                format: DiskFormat::Qcow2,
                size: block::size_of(&nodes, &source)?,
                backing: target.behind.map(|path| (path, DiskFormat::Qcow2)),
            },
        });
    }
    let copies = Copies {
        all,
        bitmap: options.of.bitmap().map(str::to_owned),
        is_kept: options.keep_partial,
        is_whole: false,
    };
    Ok((plans, copies))
}

/// Whether the bitmap is to be made for this copy. Refused if a copy of what changed needs one, and there is none to trust.
fn look_at_bitmap(
    nodes: &[BlockNode],
    source: &str,
    disk: &str,
    name: &str,
    is_whole: bool,
) -> Result<bool, Error> {
    let mut bitmaps = nodes
        .iter()
        .filter(|node| node.node_name.as_deref() == Some(source))
        .flat_map(|node| &node.dirty_bitmaps);
    let bitmap = bitmaps.find(|bitmap| bitmap.name.as_deref() == Some(name));
    let is_trusted = bitmap.is_some_and(|bitmap| !bitmap.inconsistent && bitmap.recording);
    if is_trusted || is_whole {
        return Ok(!is_trusted);
    }
    let why = match bitmap {
        None => "has no bitmap of that name",
        Some(_) => "has a bitmap of that name that was not put away in good order",
    };
    let text =
        format!("disk \"{disk}\" {why} (\"{name}\"): a chain begins with a backup of everything");
    Err(Cause::State(text).into())
}

/// Makes the images and their nodes, and the bitmaps that there are not.
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
    let Some(name) = &copies.bitmap else {
        return Ok(());
    };
    drop_new_bitmaps(op, copies).await?;
    let new = copies.all.iter().filter(|copy| copy.is_bitmap_new);
    let add = |copy: &Copied| {
        let add = command::BlockDirtyBitmapAdd::new(copy.source.clone(), name.clone());
        TransactionAction::BlockDirtyBitmapAdd(add.persistent(true))
    };
    let adding = Transaction::of(new.map(add).collect());
    op.monitor().await?.execute(adding).await?;
    Ok(())
}

/// Begins all copies at one instant.
async fn begin(
    op: &mut AsyncOp,
    copies: &Copies,
    options: BackupOptions,
) -> Result<Option<Thawed>, Error> {
    let sync = match options.of {
        BackupOf::Since(_) => SyncMode::Incremental,
        _ => SyncMode::Full,
    };
    let copy = |copy: &Copied| {
        let mut backup =
            command::BlockdevBackup::new(copy.source.clone(), copy.node.clone(), sync.clone())
                .job_id(copy.job.clone())
                .auto_finalize(false)
                .auto_dismiss(false);
        backup.speed = options.speed;
        if let Some(name) = &copies.bitmap {
            backup = backup.bitmap(name.clone()).bitmap_mode("on-success");
        }
        TransactionAction::BlockdevBackup(backup)
    };
    let transaction = Transaction::grouped(copies.all.iter().map(copy).collect());
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

/// The copies are whole: that is written down, then the bitmaps go on from there, then the copies are closed.
pub(crate) async fn finish(op: &mut AsyncOp, mut copies: Copies) -> Result<(), Error> {
    copies.is_whole = true;
    op.amend_work(Work::Backup(copies.clone())).await?;
    op.set_phase("ending");
    let ids = copies.ids();
    let jobs = op.monitor().await?.execute(command::QueryJobs).await?;
    if Group::of(&jobs, &ids) == Group::Copied {
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
pub(crate) async fn undo(op: &mut AsyncOp, copies: &Copies) -> Result<(), Error> {
    cancel_all(op, &copies.ids()).await?;
    for copy in &copies.all {
        drop_node(op, &copy.node).await?;
    }
    drop_new_bitmaps(op, copies).await?;
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

/// Without the copy it began with, a bitmap says nothing.
async fn drop_new_bitmaps(op: &mut AsyncOp, copies: &Copies) -> Result<(), Error> {
    let Some(name) = &copies.bitmap else {
        return Ok(());
    };
    let monitor = op.monitor().await?;
    let nodes = block::nodes(&monitor).await?;
    for copy in copies.all.iter().filter(|copy| copy.is_bitmap_new) {
        let is_there = nodes.iter().any(|node| {
            node.node_name.as_ref() == Some(&copy.source)
                && node
                    .dirty_bitmaps
                    .iter()
                    .any(|bitmap| bitmap.name.as_ref() == Some(name))
        });
        if is_there {
            let remove = command::BlockDirtyBitmapRemove::new(copy.source.clone(), name.clone());
            monitor.execute(remove).await?;
        }
    }
    Ok(())
}
