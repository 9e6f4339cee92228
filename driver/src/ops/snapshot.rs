//! Overlays on a guest's disks, all at one instant: what is behind them stays as it was. With the guest's memory of that
//! instant in a file, if it is asked for.
//!
//! ```text
//!  files ─► images ─► nodes ─► (memory) ─► description ─► (freeze) ─► one transaction ─► (thaw) ─► the guest runs on
//! ```
//!
//! The transaction is the point of return: until then all is undone, from then on all is finished. The description comes
//! first, so that a guest that dies at any instant is started from what it wrote last: an overlay that was not put in
//! place is empty, and shows what is below it.

use std::path::PathBuf;
use std::time::Duration;

use agent_qga::Thawed;
use job_core::{AsyncKind, Guard, KindSet};
use monitor_qmp::command::{self, RunState, Transaction, TransactionAction};
use tracing::warn;
use uuid::Uuid;

use crate::block::{self, NewImage};
use crate::devices::{fresh_node, image_node};
use crate::domain::Domain;
use crate::error::{Cause, Error, ErrorKind};
use crate::guest::{Disk, DiskFormat, Guest};
use crate::made::Made;
use crate::ops::disks::chosen;
use crate::ops::freeze::{FreezeOptions, thaw_lease};
use crate::ops::job_watch::dismiss;
use crate::ops::save::{SaveOptions, blocking, drop_memory, memory_into, stop_writing};
use crate::ops::visit::describe;
use crate::ops::{AsyncOp, Call};
use crate::parts::Scope;
use crate::records::{Layer, Layers, Memory, Work};

/// What undoing or finishing may take, whatever was left of the job's own time.
const UNDO: Duration = Duration::from_secs(30);

/// How overlays are put on a guest's disks.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..SnapshotOptions::default()`"
)]
pub struct SnapshotOptions {
    /// The guest's memory goes to this new file, and the guest runs on meanwhile; it stands still for the last of it. The
    /// file is one that [`Driver::restore`](crate::Driver::restore) takes once the guest is off. It starts the guest on
    /// the disks without the overlays, which are void from then on.
    pub memory: Option<PathBuf>,
    /// The guest's file systems are frozen while the overlays are put in place. Not with `memory`, which has in it what
    /// the guest has not written yet.
    pub freeze: Option<FreezeOptions>,
    /// Whether the definition has the overlays, too. Without it the next start of the guest is from the disks behind
    /// them, which makes the overlays void. True.
    pub in_definition: bool,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            memory: None,
            freeze: None,
            in_definition: true,
        }
    }
}

/// What became of a snapshot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Snapshotted {
    /// The file with the guest's memory.
    pub memory: Option<PathBuf>,
    /// How long the guest's file systems were frozen, and by whom they were thawed: if not by the holder, the freeze did
    /// not last to the end. None if none was asked for, or the agent has not said yet that they are thawed.
    pub frozen: Option<Thawed>,
}

impl Domain {
    /// Puts a new qcow2 overlay on each of these disks, by name, all at one instant. What the guest writes from then on
    /// goes there.
    ///
    /// Cancelled or failed, nothing has changed and no file is left. Once the overlays are in place there is no way back.
    /// A driver that is killed leaves to the next one what is needed for either.
    pub fn snapshot(
        &self,
        overlays: Vec<(String, PathBuf)>,
        options: SnapshotOptions,
    ) -> Call<Snapshotted> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::Snapshot.default_mask();
            let work = move |op: AsyncOp| snapshot(op, overlays, options);
            domain
                .run_async("snapshot", AsyncKind::Snapshot, mask, deadline, work)
                .await
        })
    }
}

/// An overlay to be, and what it is to lie on.
struct Plan {
    layer: Layer,
    base: String,
    image: NewImage,
}

async fn snapshot(
    mut op: AsyncOp,
    overlays: Vec<(String, PathBuf)>,
    options: SnapshotOptions,
) -> Result<Snapshotted, Error> {
    op.set_phase("preparing");
    if options.memory.is_some() && options.freeze.is_some() {
        let text = "memory and frozen file systems do not go together";
        return Err(Cause::BadRequest(text.into()).into());
    }
    let (plans, mut layers) = plan(&mut op, overlays, &options).await?;
    let bases: Vec<_> = plans.iter().map(|plan| plan.base.clone()).collect();
    op.note_work(Work::Snapshot(layers.clone())).await?;
    let taken = match make(&mut op, &plans, &mut layers).await {
        Ok(()) => take(&mut op, &bases, &mut layers, options.freeze).await,
        Err(error) => Err(error),
    };
    match taken {
        Ok(frozen) => {
            op.set_phase("finishing");
            op.extend(UNDO);
            if let Err(error) = finish(&mut op, &layers).await {
                // In place they are, and stay.
                op.leave_unsettled().await;
                return Err(error);
            }
            let memory = layers.memory.map(|memory| memory.path);
            Ok(Snapshotted { memory, frozen })
        }
        Err(error) => {
            op.extend(UNDO);
            op.set_phase("undoing");
            let undone = undo(&mut op, &layers).await;
            if let Err(error) = undone
                && op.job().check().is_ok()
            {
                let error = format!("{error:#}");
                warn!(
                    domain = op.domain().name(),
                    error, "a snapshot was not undone"
                );
                op.leave_unsettled().await;
            }
            Err(error)
        }
    }
}

/// What is to be done, before anything is.
async fn plan(
    op: &mut AsyncOp,
    overlays: Vec<(String, PathBuf)>,
    options: &SnapshotOptions,
) -> Result<(Vec<Plan>, Layers), Error> {
    let disks = chosen(op.domain(), overlays.iter().map(|(disk, _)| &**disk)).await?;
    let monitor = op.monitor().await?;
    let was_running = monitor.execute(command::QueryStatus).await?.running;
    let nodes = block::nodes(&monitor).await?;
    let mut plans = Vec::new();
    for (disk, (_, path)) in disks.into_iter().zip(overlays) {
        let base = block::node_at(&monitor, &disk.name).await?;
        let image = NewImage {
            path: path.clone(),
            format: DiskFormat::Qcow2,
            size: block::size_of(&nodes, &base)?,
            backing: Some((disk.path.clone(), disk.format)),
        };
        let file = blocking(move || Made::plan(&path)).await?;
        let layer = Layer {
            node: fresh_node(&disk.name, |name| block::is_taken(&nodes, name)),
            disk: disk.name,
            below: disk.path,
            below_format: disk.format,
            file,
        };
        plans.push(Plan { layer, base, image });
    }
    drop(monitor);
    let memory = options.memory.clone().map(|path| Memory {
        path,
        save: Uuid::new_v4(),
    });
    let layers = Layers {
        overlays: plans.iter().map(|plan| plan.layer.clone()).collect(),
        memory,
        was_running,
        in_definition: options.in_definition,
        is_taking: false,
    };
    Ok((plans, layers))
}

/// Makes the overlays' images and nodes, and saves the guest's memory.
async fn make(op: &mut AsyncOp, plans: &[Plan], layers: &mut Layers) -> Result<(), Error> {
    for (place, plan) in plans.iter().enumerate() {
        let mut file = plan.layer.file.clone();
        layers.overlays[place].file = blocking(move || file.make().map(|()| file)).await?;
    }
    op.note_work(Work::Snapshot(layers.clone())).await?;
    for (plan, layer) in plans.iter().zip(&layers.overlays) {
        op.check_cancelled()?;
        fill(op, &layer.disk, &layer.node, &layer.file, &plan.image).await?;
    }
    let Some(memory) = layers.memory.clone() else {
        return Ok(());
    };
    // As a migration does, and what tunes a migration tunes this.
    op.job().set_mask(KindSet::SNAPSHOT_SAVING_RAM);
    let options = SaveOptions {
        live: true,
        ..SaveOptions::default()
    };
    let saved = memory_into(op, memory, layers.was_running, options).await;
    op.job().set_mask(AsyncKind::Snapshot.default_mask());
    saved
}

/// Has QEMU write an image into a file that is there, and open it under that name.
pub(crate) async fn fill(
    op: &mut AsyncOp,
    disk: &str,
    node: &str,
    file: &Made,
    image: &NewImage,
) -> Result<(), Error> {
    let empty = file.clone();
    blocking(move || empty.empty().map(drop)).await?;
    block::write_head(op, disk, image).await?;
    let disk = Disk::new(disk, &image.path, image.format);
    // What is behind it comes with the transaction, if anything does.
    let arguments = image_node(&disk, node, Some(serde_json::Value::Null));
    block::add_node(&op.monitor().await?, arguments).await
}

/// Puts the overlays in place, all or none.
async fn take(
    op: &mut AsyncOp,
    bases: &[String],
    layers: &mut Layers,
    freeze: Option<FreezeOptions>,
) -> Result<Option<Thawed>, Error> {
    op.check_cancelled()?;
    let pairs = bases.iter().zip(&layers.overlays);
    let overlay = |(base, layer): (&String, &Layer)| {
        let snapshot = command::BlockdevSnapshot::new(base.clone(), layer.node.clone());
        TransactionAction::BlockdevSnapshot(snapshot)
    };
    let transaction = Transaction::of(pairs.map(overlay).collect());
    // Before the freeze, which is to be short.
    layers.is_taking = true;
    op.note_work(Work::Snapshot(layers.clone())).await?;
    describe_with(op, layers, put_on).await?;
    op.set_phase("taking");
    let lease = match freeze {
        Some(options) => Some(op.domain().take_freeze(options, op.deadline()).await?),
        None => None,
    };
    op.check_cancelled()?;
    op.job().pass_point_of_return();
    let taken = op.monitor().await?.execute(transaction).await;
    let frozen = thaw_lease(op.domain(), lease).await;
    match taken {
        Ok(_) => Ok(frozen),
        // An answer that did not come says nothing: QEMU is asked what is in place.
        Err(error) => match are_in_place(op, layers).await {
            Ok(true) => Ok(frozen),
            _ => Err(error),
        },
    }
}

/// Whether the overlays are at their disks.
pub(crate) async fn are_in_place(op: &mut AsyncOp, layers: &Layers) -> Result<bool, Error> {
    let monitor = op.monitor().await?;
    for layer in &layers.overlays {
        match block::node_at(&monitor, &layer.disk).await {
            Ok(node) if node == layer.node => {}
            Ok(_) => return Ok(false),
            // The guest let go of the disk since: what may have been written is not thrown away.
            Err(error) if error.kind() == ErrorKind::State && layers.is_taking => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// The overlays are in place: whoever asks is told so, and the guest runs if it ran.
pub(crate) async fn finish(op: &mut AsyncOp, layers: &Layers) -> Result<(), Error> {
    if layers.memory.is_some() && layers.was_running {
        let monitor = op.monitor().await?;
        let status = monitor.execute(command::QueryStatus).await?.status;
        if matches!(status, RunState::PostMigrate | RunState::Paused) {
            monitor.execute(command::Cont).await?;
        }
    }
    describe_with(op, layers, put_on).await
}

async fn describe_with(
    op: &mut AsyncOp,
    layers: &Layers,
    change: fn(&mut Guest, &Layers),
) -> Result<(), Error> {
    let scope = match layers.in_definition {
        true => Scope::LiveAndDefinition,
        false => Scope::Live,
    };
    let layers = layers.clone();
    describe(op, scope, move |guest| change(guest, &layers)).await
}

/// Changes a description to one with the overlays.
pub(crate) fn put_on(guest: &mut Guest, layers: &Layers) {
    for layer in &layers.overlays {
        let disks = guest.disks.iter_mut();
        for disk in disks.filter(|disk| disk.name == layer.disk) {
            layer.file.path.clone_into(&mut disk.path);
            disk.format = DiskFormat::Qcow2;
        }
    }
}

/// Changes a description back to one without the overlays.
fn take_off(guest: &mut Guest, layers: &Layers) {
    for layer in &layers.overlays {
        let disks = guest.disks.iter_mut();
        for disk in disks.filter(|disk| disk.path == layer.file.path) {
            layer.below.clone_into(&mut disk.path);
            disk.format = layer.below_format;
        }
    }
}

/// Leaves the guest as it was, and no node and no file behind.
pub(crate) async fn undo(op: &mut AsyncOp, layers: &Layers) -> Result<(), Error> {
    if layers.is_taking && are_in_place(op, layers).await? {
        return Err(Cause::State("its overlays are in place".into()).into());
    }
    if let Some(memory) = &layers.memory {
        stop_writing(op, layers.was_running).await?;
        drop_memory(memory.clone()).await?;
    }
    if layers.is_taking {
        describe_with(op, layers, take_off).await?;
    }
    for layer in &layers.overlays {
        drop_node(op, &layer.node).await?;
        let file = layer.file.clone();
        blocking(move || file.remove()).await?;
    }
    Ok(())
}

/// Removes a node that nothing uses, if it is there: an image's own, or that of its file while QEMU writes its head.
pub(crate) async fn drop_node(op: &mut AsyncOp, name: &str) -> Result<(), Error> {
    dismiss(op, &block::creating(name)).await?;
    let monitor = op.monitor().await?;
    if block::is_taken(&block::nodes(&monitor).await?, name) {
        block::remove_node(&monitor, name).await?;
    }
    Ok(())
}
