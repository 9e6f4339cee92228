//! Guests with qcow2 images, and what the tests of snapshots and backups ask of both.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use driver::{Became, Disk, DiskFormat, Domain, Guest, Notice, Subscription, What};
use tokio::time::timeout;

use crate::guests::up;
use crate::rig::{Rig, ext4};

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// A guest with two disks: an ext4 that it mounts, in a qcow2 image, and one of raw bytes or a second image.
pub(crate) async fn booted(rig: &Rig, second: DiskFormat) -> Domain {
    let root = rig.dir.path().join("root.qcow2");
    let raw = ext4(rig.dir.path());
    let words = ["convert", "-O", "qcow2", text(&raw), text(&root)];
    rig.env.qemu_img(&words).expect("an image can be made");
    fs::remove_file(raw).expect("it is there");
    let data = rig.dir.path().join("data");
    match second {
        DiskFormat::Qcow2 => {
            let words = ["create", "-q", "-f", "qcow2", text(&data), "8M"];
            rig.env.qemu_img(&words).expect("an image can be made");
        }
        _ => File::create(&data)
            .and_then(|file| file.set_len(8 << 20))
            .expect("a file has room"),
    }
    let guest = Guest {
        disks: vec![
            Disk::new("root", root, DiskFormat::Qcow2),
            Disk::new("data", data, second),
        ],
        ..rig.guest("web")
    };
    let web = rig.driver.define(guest).await.expect("it is free");
    up(&web).await;
    web
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("our own paths are text")
}

/// Whether the guest counts on, with no number twice and none left out.
pub(crate) async fn counts_on(rig: &Rig) {
    let console = rig.console("web");
    let last = console.ticks().last().copied().unwrap_or(0);
    console
        .past(last + 2, 20 * SECOND)
        .await
        .expect("it goes on");
    let ticks = console.ticks();
    assert!(
        ticks.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{ticks:?}"
    );
}

/// The next thing that is told of which `what` makes something.
pub(crate) async fn told<T>(news: &mut Subscription, what: impl Fn(&What) -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Notice::News { news, .. } = news.next().await
                && let Some(found) = what(&news.what)
            {
                return found;
            }
        }
    };
    timeout(60 * SECOND, looking).await.expect("it is told")
}

/// Waits until that phase is told.
pub(crate) async fn phase(news: &mut Subscription, wanted: &str) {
    let is_it = |what: &What| match what {
        What::Phase { phase, .. } if **phase == *wanted => Some(()),
        _ => None,
    };
    told(news, is_it).await;
}

/// What became of the next job that a driver settled.
pub(crate) async fn became(news: &mut Subscription) -> Became {
    let is_it = |what: &What| match what {
        What::Recovered(found) => Some(found.became.clone()),
        _ => None,
    };
    told(news, is_it).await
}

/// An image without a fault.
pub(crate) fn check(rig: &Rig, path: &Path) {
    rig.env
        .qemu_img(&["check", "-q", text(path)])
        .expect("it is sound");
}

/// The copy, with what is behind it, is the disk. The guest is off.
pub(crate) fn same(rig: &Rig, copy: &Path, disk: &Path) {
    check(rig, copy);
    let words = ["compare", "-q", text(copy), text(disk)];
    rig.env.qemu_img(&words).expect("the chain is the disk");
}

/// The files of the rig's directory.
pub(crate) fn files(rig: &Rig) -> Vec<PathBuf> {
    let entries = fs::read_dir(rig.dir.path()).expect("it is there");
    let mut all: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    all.sort();
    all
}
