//! A guest that writes to a disk moves between two drivers that find the disk's file under the same path.

use std::future::IntoFuture;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use driver::{Domain, FreezeOptions, MigrateOptions};
use remote_migrate::Owner;
use tokio::time::Instant;

use super::traps::Crooked;
use super::{SECOND, at_full_speed, is_performing, peer, slow};
use crate::freeze::writing;
use crate::rig::Rig;

/// A program of e2fsprogs, which lies beside `mke2fs`.
fn e2fs(program: &str, words: &[&str], image: &Path) -> Output {
    let found = ["", "/sbin/", "/usr/sbin/"].iter().find_map(|place| {
        let mut command = Command::new(format!("{place}{program}"));
        command.args(words).arg(image).stdin(Stdio::null());
        command.output().ok()
    });
    found.unwrap_or_else(|| panic!("{program} (package e2fsprogs) reads the guest's disk"))
}

/// Nobody else can open it for writing. It would be as large as it is.
fn is_locked(rig: &Rig, image: &Path) {
    let image = image.to_str().expect("our own path is text");
    let error = rig.env.qemu_img(&["resize", "-f", "raw", image, "16M"]);
    let error = error.expect_err("a guest has it");
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
}

/// The guest writes three times more, wherever it is.
async fn writes_on(rig: &Rig) {
    let written = rig.console("web").writes(30 * SECOND).await;
    written.unwrap_or_else(|error| panic!("{error}"));
}

/// All that the guest says it has written, in its order.
fn told(rig: &Rig) -> Vec<u64> {
    let text = rig.console("web").text();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let numbers = whole.lines().filter_map(|line| {
        let number = line.trim().strip_prefix("wrote ")?;
        number.parse().ok()
    });
    numbers.collect()
}

/// Moves it while it writes. The console stays that of `rig`, since the guest brings the path of it along.
async fn moves(rig: &Rig, domain: &Domain, to: &Rig) {
    let moving = tokio::spawn(domain.migrate(peer(to), slow()).into_future());
    assert!(is_performing(domain).await);
    writes_on(rig).await;
    assert!(!moving.is_finished(), "it wrote while it moved");
    at_full_speed(domain).await;
    let report = moving.await.expect("no panic").expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    writes_on(rig).await;
}

pub(super) async fn a_guest_that_writes_to_its_disk_moves_there_and_back_and_the_disk_is_whole(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let image = rig.dir.path().join("disk.raw");
    let domain = writing(&rig).await;
    is_locked(&rig, &image);
    moves(&rig, &domain, &there).await;
    is_locked(&rig, &image);
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    moves(&rig, &moved, &rig).await;
    is_locked(&rig, &image);

    // Frozen, all that the guest has written is in the file, and no journal is left to be run.
    let agent = domain.wait_agent().deadline(30 * SECOND).await;
    agent.expect("it answers here again");
    let lease = domain.freeze(FreezeOptions::default()).await;
    let lease = lease.expect("it freezes");
    let checked = e2fs("e2fsck", &["-f", "-n"], &image);
    assert!(checked.status.success(), "{checked:?}");
    let read = e2fs("debugfs", &["-R", "cat /n"], &image);
    let read = String::from_utf8_lossy(&read.stdout).trim().parse::<u64>();
    let read = read.expect("the guest wrote a number");
    let told = told(&rig);
    let last = *told.last().expect("it told");
    assert!(
        read == last || read == last + 1,
        "the file has {read}, and the guest wrote {last}"
    );
    assert_eq!(told, (0..=last).collect::<Vec<_>>(), "no gap, no repeat");
    lease
        .thaw(Instant::now() + 20 * SECOND)
        .await
        .expect("it thaws");
    writes_on(&rig).await;
}

pub(super) async fn a_disk_that_is_not_there_is_refused_by_its_path(rig: Rig) {
    let there = Rig::new(&rig.env);
    let domain = writing(&rig).await;
    let elsewhere = |guest: String| guest.replace("disk.raw", "elsewhere.raw");
    let moved = domain.migrate(
        Crooked::telling(&there, elsewhere),
        MigrateOptions::default(),
    );
    let error = moved.await.expect_err("there is no such file");
    let text = format!("{error:#}");
    assert!(
        text.contains("elsewhere.raw") && text.contains("No such file or directory"),
        "{text}"
    );
    assert!(there.driver.by_uuid(domain.uuid()).is_none());
    writes_on(&rig).await;
}
