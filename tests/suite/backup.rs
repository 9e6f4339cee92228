//! Copies of a real guest's disks while it writes: whole, and chains of what changed, also after one was interrupted.

use std::path::{Path, PathBuf};
use std::process::Command;

use driver::{
    BackupOf, BackupOptions, BackupTarget, Became, DiskFormat, Domain, ErrorKind, FreezeOptions,
    Run,
};
use tokio::time::Instant;

use crate::freeze::write_on;
use crate::harness::tests;
use crate::recovery::{back, cut};
use crate::rig::{Rig, Signal, kill};
use crate::storage::{SECOND, became, booted, check, counts_on, files, phase, shell, text, up};

tests! {
    a_chain_of_backups_is_the_disk_although_one_of_them_was_cancelled,
    disks_are_copied_as_of_one_instant_of_a_frozen_guest_which_writes_on,
    a_backup_whose_connection_is_lost_goes_on_under_the_next,
    a_copy_of_what_changed_wants_a_bitmap_that_can_be_trusted,
}

const CHAIN: &str = "nightly";

fn target(rig: &Rig, disk: &str, name: &str, behind: Option<&Path>) -> BackupTarget {
    BackupTarget {
        disk: disk.to_owned(),
        path: rig.dir.path().join(name),
        behind: behind.map(PathBuf::from),
    }
}

fn of(of: BackupOf) -> BackupOptions {
    BackupOptions {
        of,
        ..BackupOptions::default()
    }
}

fn since() -> BackupOf {
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
    let whole = target(&rig, "root", "whole", None);
    let first = of(BackupOf::EverythingAnd(CHAIN.into()));
    web.backup(vec![whole.clone()], first)
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
        let partial = target(&rig, "root", "partial", Some(&whole.path));
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
    let next = target(&rig, "root", "next", Some(&whole.path));
    web.backup(vec![next.clone()], of(since()))
        .await
        .expect("it is copied");
    web.destroy().await.expect("it ends");
    check(&rig, &next.path);
    let disk = rig.dir.path().join("root.qcow2");
    let same = rig
        .env
        .qemu_img(&["compare", "-q", text(&next.path), text(&disk)]);
    same.expect("the chain is the disk");
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
        of: BackupOf::EverythingAnd(CHAIN.into()),
        speed: Some(4 << 20),
        ..BackupOptions::default()
    };
    let mut news = web.subscribe();
    let whole = target(&rig, "root", "whole", None);
    let copying = tokio::spawn(web.backup(vec![whole.clone()], slow).into_future());
    phase(&mut news, "copying").await;
    cut(&rig, &web);
    let error = copying.await.expect("no panic").expect_err("it is lost");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
    back(&web, before).await;
    assert_eq!(became(&mut news).await, Became::GoesOn);
    assert_eq!(became(&mut news).await, Became::Finished);
    check(&rig, &whole.path);
    fill(&web, "two").await;
    web.pause()
        .await
        .expect("what it wrote last is what is copied");
    let next = target(&rig, "root", "next", Some(&whole.path));
    web.backup(vec![next.clone()], of(since()))
        .await
        .expect("the chain goes on");
    web.destroy().await.expect("it ends");
    let disk = rig.dir.path().join("root.qcow2");
    let same = rig
        .env
        .qemu_img(&["compare", "-q", text(&next.path), text(&disk)]);
    same.expect("the chain is the disk");
}

async fn a_copy_of_what_changed_wants_a_bitmap_that_can_be_trusted(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    let before = files(&rig);
    let refused = web
        .backup(vec![target(&rig, "root", "next", None)], of(since()))
        .await;
    let error = refused.expect_err("there is none");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    assert!(
        error
            .to_string()
            .contains("a chain begins with a backup of everything"),
        "{error}"
    );
    assert_eq!(files(&rig), before);
    let whole = || of(BackupOf::EverythingAnd(CHAIN.into()));
    let first = web
        .backup(vec![target(&rig, "root", "whole", None)], whole())
        .await;
    first.expect("it is copied");
    web.destroy().await.expect("it ends");
    up(&web).await;
    let next = web
        .backup(vec![target(&rig, "root", "next", None)], of(since()))
        .await;
    next.expect("who ends in good order puts its bitmaps away");
    // Who is killed does not.
    kill(web.observed().pid.expect("it runs"), Signal::KILL);
    let deadline = Instant::now() + 30 * SECOND;
    let is_off = |observed: &driver::Observed| observed.run == Run::Off;
    web.wait_for(is_off, deadline).await.expect("it ends");
    up(&web).await;
    let refused = web
        .backup(vec![target(&rig, "root", "late", None)], of(since()))
        .await;
    let error = refused.expect_err("it says nothing");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    assert!(
        error.to_string().contains("was not put away in good order"),
        "{error}"
    );
    let again = web
        .backup(vec![target(&rig, "root", "anew", None)], whole())
        .await;
    again.expect("a chain begins anew");
    web.backup(vec![target(&rig, "root", "late", None)], of(since()))
        .await
        .expect("and goes on");
}
