//! What QEMU has at a guest's disks, by its own word, and images that it makes. Shared by all that changes storage while a
//! guest runs.
//!
//! Nothing here remembers: a snapshot, a commit or a mirror puts another node at a disk, and what was written down of it
//! may be of before. [`node_at`] asks. QEMU may not run programs (its sandbox), so no `qemu-img` makes images: QEMU's own
//! `blockdev-create` does ([`write_head`]), in a file that is there and empty.

use std::path::PathBuf;

use monitor_qmp::command::{self, BlockNode};
use serde_json::{Map, Value, json};

use crate::access::Monitor;
use crate::devices;
use crate::error::{Cause, Error, ErrorKind};
use crate::guest::DiskFormat;
use crate::ops::job_watch::JobWatch;
use crate::ops::visit::Visits;
use crate::qemu_job::End;

/// What the id of a job begins with that makes an image; the name of its node follows.
const CREATING: &str = "create-";

/// The name of the node that is at the disk of that name now. Filters that QEMU put there for a job are not counted.
pub(crate) async fn node_at(monitor: &Monitor<'_>, disk: &str) -> Result<String, Error> {
    let Some(found) = device(monitor, disk).await? else {
        return Err(Cause::State(format!("QEMU has no disk \"{disk}\"")).into());
    };
    let node = found.inserted.and_then(|node| node.node_name);
    Ok(node.ok_or_else(|| Cause::State(format!("nothing is in disk \"{disk}\"")))?)
}

/// The device of the disk of that name, if QEMU has it.
async fn device(monitor: &Monitor<'_>, disk: &str) -> Result<Option<command::BlockDevice>, Error> {
    let device = devices::disk_device(disk);
    // With an id a device lies below `peripheral`, and it is its inner one that has the disk.
    let path = format!("/machine/peripheral/{device}");
    let is_it = |qdev: &str| {
        qdev == device
            || qdev
                .strip_prefix(&path)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let devices = monitor.execute(command::QueryBlock).await?;
    Ok(devices
        .into_iter()
        .find(|found| found.qdev.as_deref().is_some_and(is_it)))
}

/// The file that is at the disk of that name now; none if nothing is, or QEMU has no such disk.
pub(crate) async fn file_at(monitor: &Monitor<'_>, disk: &str) -> Result<Option<PathBuf>, Error> {
    let found = device(monitor, disk)
        .await?
        .and_then(|found| found.inserted);
    Ok(found.map(|node| node.image.filename.into()))
}

/// One of the files of a disk.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) format: String,
    /// Bytes that it shows.
    pub(crate) size: u64,
    /// Its node, if it is one only.
    node: Option<String>,
}

impl Layer {
    /// Its node. QEMU 7.2 does not say which node lies behind which, so where two disks have the same file behind them
    /// it cannot be told.
    pub(crate) fn node(&self) -> Result<String, Error> {
        let path = self.path.display();
        let unclear = || Cause::State(format!("which of several nodes has {path} is not clear"));
        Ok(self.node.clone().ok_or_else(unclear)?)
    }
}

/// The files of a disk as they are now, the one that is written to first.
pub(crate) async fn chain(monitor: &Monitor<'_>, disk: &str) -> Result<Vec<Layer>, Error> {
    let top = device(monitor, disk)
        .await?
        .and_then(|found| found.inserted);
    let top = top.ok_or_else(|| Cause::State(format!("nothing is in disk \"{disk}\"")))?;
    let nodes = nodes(monitor).await?;
    let node_of = |image: &command::Image| {
        let mut nodes = nodes
            .iter()
            .filter(|node| node.file == image.filename && node.drv == image.format);
        let node = nodes.next().and_then(|node| node.node_name.clone());
        node.filter(|_| nodes.next().is_none())
    };
    let layer = |image: &command::Image, node| Layer {
        path: image.filename.clone().into(),
        format: image.format.clone(),
        size: image.virtual_size,
        node,
    };
    let mut layers = vec![layer(&top.image, top.node_name.clone())];
    let mut behind = top.image.backing_image.as_deref();
    while let Some(image) = behind {
        layers.push(layer(image, node_of(image)));
        behind = image.backing_image.as_deref();
    }
    Ok(layers)
}

/// Ends what is left of jobs that made images for a disk, and whose driver is gone.
pub(crate) async fn end_creations<V: Visits>(op: &mut V, disk: &str) -> Result<(), Error> {
    let jobs = op.visit().await?.execute(command::QueryJobs).await?;
    for job in jobs {
        let node = job.id.strip_prefix(CREATING);
        if node.is_some_and(|node| devices::is_node_of(node, disk)) {
            let mut watch = JobWatch::new(op.domain(), job.id);
            watch.finish(op, |_, _| {}).await?;
        }
    }
    Ok(())
}

/// Removes the nodes of a disk that are neither at it nor in use.
pub(crate) async fn prune(monitor: &Monitor<'_>, disk: &str) -> Result<(), Error> {
    let at = device(monitor, disk)
        .await?
        .and_then(|found| found.inserted);
    let at = at.and_then(|node| node.node_name);
    loop {
        let nodes = nodes(monitor).await?;
        let names = nodes.into_iter().filter_map(|node| node.node_name);
        let idle =
            names.filter(|node| devices::is_node_of(node, disk) && Some(node) != at.as_ref());
        let mut removed = 0;
        for node in idle {
            match remove_node(monitor, &node).await {
                Ok(()) => removed += 1,
                Err(error) if error.kind() == ErrorKind::Refused => {}
                Err(error) => return Err(error),
            }
        }
        // Those behind one that went may go now.
        if removed == 0 {
            return Ok(());
        }
    }
}

/// All nodes, each by itself.
pub(crate) async fn nodes(monitor: &Monitor<'_>) -> Result<Vec<BlockNode>, Error> {
    let mut query = command::QueryNamedBlockNodes::default();
    query.flat = Some(true);
    monitor.execute(query).await
}

/// Whether one of them has that name.
pub(crate) fn is_taken(nodes: &[BlockNode], name: &str) -> bool {
    find(nodes, name).is_some()
}

/// How much of the node of that name the guest sees.
pub(crate) fn size_of(nodes: &[BlockNode], name: &str) -> Result<u64, Error> {
    let node = find(nodes, name);
    let node = node.ok_or_else(|| Cause::State(format!("QEMU has no node \"{name}\"")))?;
    Ok(node.image.virtual_size)
}

fn find<'a>(nodes: &'a [BlockNode], name: &str) -> Option<&'a BlockNode> {
    nodes
        .iter()
        .find(|node| node.node_name.as_deref() == Some(name))
}

/// Adds a node with these arguments, as [`devices::image_node`] makes them.
pub(crate) async fn add_node(monitor: &Monitor<'_>, arguments: Value) -> Result<(), Error> {
    let add: command::BlockdevAdd =
        serde_json::from_value(arguments).map_err(|error| Cause::BadRequest(error.to_string()))?;
    monitor.execute(add).await.map(drop)
}

/// Removes a node that nothing uses.
pub(crate) async fn remove_node(monitor: &Monitor<'_>, node: &str) -> Result<(), Error> {
    let node_name = node.to_owned();
    let removed = monitor.execute(command::BlockdevDel { node_name });
    removed.await.map(drop)
}

/// Removes all nodes of a disk that no device uses any more, those on top first.
pub(crate) async fn remove_nodes_of(monitor: &Monitor<'_>, disk: &str) -> Result<(), Error> {
    loop {
        let mine: Vec<_> = nodes(monitor)
            .await?
            .into_iter()
            .filter_map(|node| node.node_name)
            .filter(|node| devices::is_node_of(node, disk))
            .collect();
        let (mut removed, mut refused) = (0, None);
        for node in &mine {
            match remove_node(monitor, node).await {
                Ok(()) => removed += 1,
                // Another one lies on top of it, and goes first.
                Err(error) if error.kind() == ErrorKind::Refused => refused = Some(error),
                Err(error) => return Err(error),
            }
        }
        match refused {
            None => return Ok(()),
            Some(error) if removed == 0 => return Err(error),
            Some(_) => {}
        }
    }
}

/// An image to be made.
#[derive(Clone, Debug)]
pub(crate) struct NewImage {
    /// Its file.
    pub(crate) path: PathBuf,
    pub(crate) format: DiskFormat,
    /// Bytes that the guest sees.
    pub(crate) size: u64,
    /// What it is told that lies behind it; a raw image has nothing behind it.
    pub(crate) backing: Option<(PathBuf, DiskFormat)>,
}

/// QEMU's job that writes an image whose file is opened under that name meanwhile.
pub(crate) fn creating(node: &str) -> String {
    format!("{CREATING}{node}")
}

/// Has QEMU write what an image of its own format begins with, into a file that is empty. Nothing of it is left open in QEMU.
///
/// A daemon that dies meanwhile leaves a node and a job `create-` of that node's name behind.
pub(crate) async fn write_head<V: Visits>(
    op: &mut V,
    disk: &str,
    image: &NewImage,
) -> Result<(), Error> {
    let mut options = Map::new();
    options.insert("driver".into(), image.format.name().into());
    options.insert("size".into(), image.size.into());
    if let Some((path, format)) = &image.backing {
        options.insert("backing-file".into(), json!(path));
        options.insert("backing-fmt".into(), format.name().into());
    }
    // In one visit, so that the name is free when it is used.
    let monitor = op.visit().await?;
    let nodes = nodes(&monitor).await?;
    let node = devices::fresh_node(disk, |name| is_taken(&nodes, name));
    let file = json!({"driver": "file", "node-name": node, "filename": image.path});
    add_node(&monitor, file).await?;
    drop(monitor);
    options.insert("file".into(), node.clone().into());
    let job = creating(&node);
    let create = command::BlockdevCreate::new(job.clone(), Value::Object(options));
    let mut watch = JobWatch::new(op.domain(), job);
    let begun = op.visit().await?.execute(create).await;
    let ended = match begun {
        Ok(_) => watch.finish(op, |_, _| {}).await,
        Err(error) => Err(error),
    };
    let removed = match op.visit().await {
        Ok(monitor) => remove_node(&monitor, &node).await,
        Err(error) => Err(error),
    };
    match ended? {
        End::Done => removed,
        End::Cancelled => Err(Cause::Cancelled("asked to stop".into()).into()),
        End::Failed(reason) => {
            let path = image.path.display();
            Err(Cause::Failed(format!("QEMU did not make {path}: {reason}")).into())
        }
        End::Unknown => Err(Cause::State("somebody else dismissed its job".into()).into()),
    }
}
