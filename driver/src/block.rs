//! What QEMU has at a guest's disks, by its own word, and images that it makes. Shared by all that changes storage while a
//! guest runs.
//!
//! Nothing here remembers: a snapshot, a commit or a mirror puts another node at a disk, and what was written down of it
//! may be of before. [`node_at`] asks. QEMU may not run programs (its sandbox), so no `qemu-img` makes images: QEMU's own
//! `blockdev-create` does ([`create_image`]).

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use monitor_qmp::command::{self, BlockNode};
use serde_json::{Map, Value, json};

use crate::access::Monitor;
use crate::devices;
use crate::error::{Cause, Error, ErrorKind, io};
use crate::guest::DiskFormat;
use crate::ops::job_watch::JobWatch;
use crate::ops::save::blocking;
use crate::ops::visit::Visits;
use crate::qemu_job::End;

/// The name of the node that is at the disk of that name now. Filters that QEMU put there for a job are not counted.
pub(crate) async fn node_at(monitor: &Monitor<'_>, disk: &str) -> Result<String, Error> {
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
    let found = devices
        .into_iter()
        .find(|found| found.qdev.as_deref().is_some_and(is_it));
    let Some(found) = found else {
        return Err(Cause::State(format!("QEMU has no disk \"{disk}\"")).into());
    };
    let node = found.inserted.and_then(|node| node.node_name);
    Ok(node.ok_or_else(|| Cause::State(format!("nothing is in disk \"{disk}\"")))?)
}

/// All nodes, each by itself.
pub(crate) async fn nodes(monitor: &Monitor<'_>) -> Result<Vec<BlockNode>, Error> {
    let mut query = command::QueryNamedBlockNodes::default();
    query.flat = Some(true);
    monitor.execute(query).await
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
    /// A file that does not exist yet.
    pub(crate) path: PathBuf,
    pub(crate) format: DiskFormat,
    /// Bytes that the guest sees.
    pub(crate) size: u64,
    /// What it is told that lies behind it; a raw image has nothing behind it.
    pub(crate) backing: Option<(PathBuf, DiskFormat)>,
}

/// Makes an image, and the file it is in. Fails with [`Exists`](crate::ErrorKind::Exists) if there is a file of that name;
/// whatever else fails, the file is gone again. Nothing of it is left open in QEMU.
///
/// A daemon that dies meanwhile leaves the file behind, and QEMU's job on its list: write the path down before, and remove
/// the file if nothing uses it.
pub(crate) async fn create_image<V: Visits>(
    op: &mut V,
    disk: &str,
    image: &NewImage,
) -> Result<(), Error> {
    let (path, length) = (image.path.clone(), image.size);
    let is_raw = image.format == DiskFormat::Raw;
    blocking(move || make(&path, if is_raw { length } else { 0 })).await?;
    if is_raw {
        return Ok(());
    }
    let written = write_head(op, disk, image).await;
    if written.is_err() {
        let path = image.path.clone();
        blocking(move || std::fs::remove_file(&path).map_err(io("remove", &path))).await?;
    }
    written
}

fn make(path: &Path, length: u64) -> Result<(), Cause> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = file.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Cause::Exists(format!("{} exists already", path.display()))
        }
        _ => io("make", path)(error),
    })?;
    let sized = file.set_len(length).map_err(io("size", path));
    if sized.is_err() {
        // Its name is known to nobody else yet.
        let _left = std::fs::remove_file(path);
    }
    sized
}

/// Has QEMU write what an image of its own format begins with.
async fn write_head<V: Visits>(op: &mut V, disk: &str, image: &NewImage) -> Result<(), Error> {
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
    let is_taken = |name: &str| {
        nodes
            .iter()
            .any(|node| node.node_name.as_deref() == Some(name))
    };
    let node = devices::fresh_node(disk, is_taken);
    let file = json!({"driver": "file", "node-name": node, "filename": image.path});
    add_node(&monitor, file).await?;
    drop(monitor);
    options.insert("file".into(), node.clone().into());
    let job = format!("create-{node}");
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
