//! Copies of a real guest's disks while it writes: whole, and chains of what changed, also after one was interrupted.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use driver::{
    BackupOf, BackupOptions, BackupTarget, Became, Disk, DiskFormat, Domain, ErrorKind,
    FreezeOptions, Guest, MirrorOptions, Pivot, StartOptions,
};
use job_core::JobKind;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::freeze::write_on;
use crate::guests::shell;
use crate::harness::tests;
use crate::recovery::{back, cut};
use crate::rig::{Rig, jobs_until};
use crate::storage::{SECOND, became, booted, check, counts_on, files, phase, same, text};

tests! {
    a_chain_of_backups_is_the_disk_although_one_of_them_was_cancelled,
    disks_are_copied_as_of_one_instant_of_a_frozen_guest_which_writes_on,
    a_backup_whose_connection_is_lost_goes_on_under_the_next,
    a_mirror_that_comes_while_a_backup_is_planned_is_refused_by_its_name,
}

const CHAIN: &str = "nightly";

pub(crate) fn target(rig: &Rig, disk: &str, name: &str, behind: Option<&Path>) -> BackupTarget {
    BackupTarget {
        disk: disk.to_owned(),
        path: rig.dir.path().join(name),
        behind: behind.map(PathBuf::from),
    }
}

pub(crate) fn of(of: BackupOf) -> BackupOptions {
    BackupOptions {
        of,
        ..BackupOptions::default()
    }
}

pub(crate) fn whole() -> BackupOf {
    BackupOf::EverythingAnd(CHAIN.into())
}

pub(crate) fn since() -> BackupOf {
    BackupOf::Since(CHAIN.into())
}

/// Has the guest fill a file with other bytes than before.
async fn fill(web: &Domain, name: &str) {
    shell(
        web,
        &format!("dd if=/dev/urandom of=/mnt/{name} bs=64k count=16; sync"),
    )
    .await;
}

async fn a_chain_of_backups_is_the_disk_although_one_of_them_was_cancelled(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    fill(&web, "one").await;
    let full = target(&rig, "root", "whole", None);
    web.backup(vec![full.clone()], of(whole()))
        .await
        .expect("it is copied");
    fill(&web, "two").await;

    // Slow enough to be cancelled; once with its copy kept, once without.
    for keep_partial in [false, true] {
        let slow = BackupOptions {
            of: since(),
            speed: Some(64 << 10),
            keep_partial,
            ..BackupOptions::default()
        };
        let before = files(&rig).len();
        let mut news = web.subscribe();
        let partial = target(&rig, "root", "partial", Some(&full.path));
        let copying = tokio::spawn(web.backup(vec![partial], slow).into_future());
        phase(&mut news, "copying").await;
        web.cancel_job("a test").expect("it can be cancelled");
        let error = copying.await.expect("no panic").expect_err("cancelled");
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error:#}");
        assert_eq!(files(&rig).len() - before, usize::from(keep_partial));
    }
    fill(&web, "one").await;
    web.pause()
        .await
        .expect("what it wrote last is what is copied");
    let next = target(&rig, "root", "next", Some(&full.path));
    web.backup(vec![next.clone()], of(since()))
        .await
        .expect("it is copied");
    web.destroy().await.expect("it ends");
    let disk = rig.dir.path().join("root.qcow2");
    same(&rig, &next.path, &disk);
    let info = rig
        .env
        .qemu_img(&["info", "--output=json", text(&next.path)]);
    assert!(
        info.expect("it is an image")
            .contains("\"backing-filename\"")
    );
}

async fn disks_are_copied_as_of_one_instant_of_a_frozen_guest_which_writes_on(rig: Rig) {
    let web = booted(&rig, DiskFormat::Raw).await;
    write_on(&web).await;
    let console = rig.console("web");
    console.writes(30 * SECOND).await.expect("it writes");
    let targets = vec![
        target(&rig, "root", "root.copy", None),
        target(&rig, "data", "data.copy", None),
    ];
    let options = BackupOptions {
        freeze: Some(FreezeOptions::default()),
        ..BackupOptions::default()
    };
    let done = web.backup(targets, options).await.expect("they are copied");
    let frozen = done.frozen.expect("it was frozen and is thawed");
    println!("figure backup-frozen {:.3} s", frozen.held.as_secs_f64());
    console.writes(30 * SECOND).await.expect("it writes on");
    counts_on(&rig).await;
    check(&rig, &rig.dir.path().join("root.copy"));
    // An ext4 that was frozen has nothing to replay.
    let raw = rig.dir.path().join("copy.raw");
    let copy = rig.dir.path().join("root.copy");
    let words = ["convert", "-O", "raw", text(&copy), text(&raw)];
    rig.env.qemu_img(&words).expect("it is an image");
    let fsck = ["e2fsck", "/sbin/e2fsck", "/usr/sbin/e2fsck"]
        .iter()
        .find_map(|program| Command::new(program).arg("-fn").arg(&raw).output().ok());
    let fsck = fsck.expect("e2fsck comes with mke2fs");
    assert!(
        fsck.status.success(),
        "{}",
        String::from_utf8_lossy(&fsck.stdout)
    );
    let data = rig.dir.path().join("data");
    let copy = rig.dir.path().join("data.copy");
    let words = ["compare", "-q", "-F", "raw", text(&copy), text(&data)];
    web.destroy().await.expect("it ends");
    rig.env.qemu_img(&words).expect("it is the disk");
}

async fn a_backup_whose_connection_is_lost_goes_on_under_the_next(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    fill(&web, "one").await;
    let before = web.observed().generation;
    let slow = BackupOptions {
        of: whole(),
        speed: Some(4 << 20),
        ..BackupOptions::default()
    };
    let mut news = web.subscribe();
    let full = target(&rig, "root", "whole", None);
    let copying = tokio::spawn(web.backup(vec![full.clone()], slow).into_future());
    phase(&mut news, "copying").await;
    cut(&rig, &web);
    let error = copying.await.expect("no panic").expect_err("it is lost");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
    back(&web, before).await;
    assert_eq!(became(&mut news).await, Became::GoesOn);
    assert_eq!(became(&mut news).await, Became::Finished);
    check(&rig, &full.path);
    fill(&web, "two").await;
    web.pause()
        .await
        .expect("what it wrote last is what is copied");
    let next = target(&rig, "root", "next", Some(&full.path));
    web.backup(vec![next.clone()], of(since()))
        .await
        .expect("the chain goes on");
    web.destroy().await.expect("it ends");
    let disk = rig.dir.path().join("root.qcow2");
    same(&rig, &next.path, &disk);
}

async fn a_mirror_that_comes_while_a_backup_is_planned_is_refused_by_its_name(rig: Rig) {
    let path = rig.dir.path().join("root");
    let file = File::create_new(&path).expect("it is new");
    file.set_len(1 << 20).expect("a file has room");
    let guest = Guest {
        machine: "q35".into(),
        memory_mib: 32,
        disks: vec![Disk::new("root", path, DiskFormat::Raw)],
        ..rig.empty("web")
    };
    let options = StartOptions { paused: true };
    let web = rig.driver.start(guest, options).await.expect("it starts");

    // Both wait for one who is at the guest, the backup first.
    let (leave, left) = oneshot::channel::<()>();
    let deadline = Instant::now() + 60 * SECOND;
    let held = web.clone();
    let looking = tokio::spawn(async move {
        let look = held.run("look", JobKind::Query, deadline, |op| async move {
            left.await.expect("it is told");
            drop(op);
            Ok(())
        });
        look.await
    });
    let is_held = jobs_until(&web, 10 * SECOND, |jobs| jobs.normal.is_some());
    assert!(is_held.await, "somebody is at the guest");
    let copy = target(&rig, "root", "copy", None);
    let backup = web.backup(vec![copy.clone()], BackupOptions::default());
    let backup = tokio::spawn(backup.into_future());
    let waits = jobs_until(&web, 10 * SECOND, |jobs| jobs.waiting.len() == 1);
    assert!(waits.await, "the backup waits its turn");
    let mirrored = MirrorOptions {
        path: rig.dir.path().join("mirrored"),
        format: DiskFormat::Raw,
        pivot: Pivot::WhenReady,
        bandwidth: None,
    };
    let mirror = tokio::spawn(web.mirror_disk("root", mirrored.clone()).into_future());
    let wait = jobs_until(&web, 10 * SECOND, |jobs| jobs.waiting.len() == 2);
    assert!(wait.await, "and the mirror");
    leave.send(()).expect("it is heard");
    looking.await.expect("no panic").expect("it looked");

    // The mirror gets its turn once it is written down what the backup does, and not as soon as the backup has begun.
    let error = mirror.await.expect("no panic");
    let error = error.expect_err("a backup is at the disk");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    assert!(error.to_string().contains("backup-root.1"), "{error}");
    assert!(!mirrored.path.exists());
    backup.await.expect("no panic").expect("it is copied");
    check(&rig, &copy.path);
}
