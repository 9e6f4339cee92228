//! Which copy of what changed is to be trusted, by what came between it and the copy before. Guests that stand still, whose
//! disks are written to through their devices.

use std::fs;
use std::path::{Path, PathBuf};

use driver::{
    BackupOf, BackupOptions, BlockJobEnd, CommitOptions, Disk, DiskFormat, Domain, ErrorKind,
    Guest, MirrorOptions, Pivot, Run, SnapshotOptions, StartOptions,
};
use serde_json::json;
use tokio::time::Instant;

use crate::backup::{of, since, target, whole};
use crate::block_jobs::ends;
use crate::guests::signal;
use crate::harness::tests;
use crate::plug::ask;
use crate::rig::{Rig, Signal};
use crate::storage::{SECOND, files, phase, same, text};

tests! {
    a_bitmap_is_trusted_for_the_copy_it_began_with_if_it_was_put_away_in_good_order,
    a_chain_does_not_go_on_below_an_overlay_from_a_copy_of_the_overlay,
    what_an_overlay_had_is_told_by_the_bitmap_of_the_image_it_went_back_into,
    a_copy_that_ended_with_its_guest_is_none_to_go_on_from,
    a_disk_that_went_over_to_a_mirror_begins_its_chain_anew,
    a_disk_that_tells_what_changed_does_not_go_back_inside_its_image,
    what_was_written_while_the_guest_was_off_is_told_or_the_chain_is_refused,
}

fn root(rig: &Rig) -> PathBuf {
    rig.dir.path().join("root.qcow2")
}

/// A guest that does not run, with one disk.
async fn idle(rig: &Rig) -> Domain {
    let path = root(rig);
    let words = ["create", "-q", "-f", "qcow2", text(&path), "8M"];
    rig.env.qemu_img(&words).expect("an image can be made");
    let guest = Guest {
        machine: "q35".into(),
        memory_mib: 32,
        disks: vec![Disk::new("root", path, DiskFormat::Qcow2)],
        ..rig.empty("web")
    };
    let web = rig.driver.define(guest).await.expect("it is free");
    on(&web).await;
    web
}

async fn on(web: &Domain) {
    let options = StartOptions { paused: true };
    web.start_with(options).await.expect("it starts");
}

async fn off(web: &Domain) {
    web.destroy().await.expect("it ends");
}

/// Has 64 KiB of the disk be this byte.
async fn write(web: &Domain, place: u32, byte: u8) {
    let device = "/machine/peripheral/root-device/virtio-backend";
    let line = format!(
        "qemu-io -d {device} \"write -P {byte} {}k 64k\"",
        place * 64
    );
    let said = ask(web, "human-monitor-command", json!({"command-line": line})).await;
    assert_eq!(said, "", "it is written");
}

/// Copies all of the disk, and a chain begins.
async fn anew(rig: &Rig, web: &Domain, name: &str) -> PathBuf {
    let target = target(rig, "root", name, None);
    let path = target.path.clone();
    let copied = web.backup(vec![target], of(whole())).await;
    copied.expect("it is copied");
    path
}

/// Copies what changed.
async fn next(rig: &Rig, web: &Domain, name: &str, behind: &Path) -> PathBuf {
    let target = target(rig, "root", name, Some(behind));
    let path = target.path.clone();
    let copied = web.backup(vec![target], of(since())).await;
    copied.expect("the chain goes on");
    path
}

/// Copying what changed is refused for that reason, and nothing is left of it.
async fn refused(rig: &Rig, web: &Domain, behind: Option<&Path>, why: &str) {
    let before = files(rig);
    let copied = web.backup(vec![target(rig, "root", "no", behind)], of(since()));
    let error = copied.await.expect_err("it cannot be trusted");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    for part in [why, "a chain begins with a backup of everything"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(files(rig), before);
}

const NO_BITMAP: &str = "does not tell what changed since the copy behind";

async fn a_bitmap_is_trusted_for_the_copy_it_began_with_if_it_was_put_away_in_good_order(rig: Rig) {
    let web = idle(&rig).await;
    write(&web, 0, 1).await;
    refused(&rig, &web, None, "is told of no copy behind it").await;
    let first = anew(&rig, &web, "first").await;
    refused(&rig, &web, None, "is told of no copy behind it").await;
    let plain = target(&rig, "root", "plain", None);
    let copied = web.backup(vec![plain.clone()], BackupOptions::default());
    copied.await.expect("it is copied");
    refused(&rig, &web, Some(&plain.path), "is no whole copy").await;
    let other = target(&rig, "root", "other", None);
    let of_another = of(BackupOf::EverythingAnd("weekly".into()));
    let copied = web.backup(vec![other.clone()], of_another);
    copied.await.expect("it is copied");
    refused(&rig, &web, Some(&other.path), "is no whole copy").await;
    write(&web, 1, 2).await;
    off(&web).await;
    on(&web).await;
    write(&web, 2, 3).await;
    let second = next(&rig, &web, "second", &first).await;
    refused(&rig, &web, Some(&first), NO_BITMAP).await;
    off(&web).await;
    same(&rig, &second, &root(&rig));
    // Who is killed puts nothing away.
    on(&web).await;
    signal(&web, Signal::KILL);
    let deadline = Instant::now() + 30 * SECOND;
    let is_off = |observed: &driver::Observed| observed.run == Run::Off;
    web.wait_for(is_off, deadline).await.expect("it ends");
    on(&web).await;
    refused(&rig, &web, Some(&second), "was not put away in good order").await;
    let again = anew(&rig, &web, "again").await;
    write(&web, 3, 4).await;
    let third = next(&rig, &web, "third", &again).await;
    off(&web).await;
    same(&rig, &third, &root(&rig));
}

/// With an overlay that the definition does not have.
async fn overlay(rig: &Rig, web: &Domain) -> PathBuf {
    let path = rig.dir.path().join("overlay");
    let options = SnapshotOptions {
        in_definition: false,
        ..SnapshotOptions::default()
    };
    let taken = web.snapshot(vec![("root".to_owned(), path.clone())], options);
    taken.await.expect("it is taken");
    path
}

async fn a_chain_does_not_go_on_below_an_overlay_from_a_copy_of_the_overlay(rig: Rig) {
    let web = idle(&rig).await;
    write(&web, 0, 1).await;
    let first = anew(&rig, &web, "first").await;
    write(&web, 1, 2).await;
    let overlay = overlay(&rig, &web).await;
    refused(&rig, &web, Some(&first), NO_BITMAP).await;
    write(&web, 2, 3).await;
    let of_overlay = anew(&rig, &web, "of-overlay").await;
    write(&web, 3, 4).await;
    let next_of_overlay = next(&rig, &web, "next-of-overlay", &of_overlay).await;
    off(&web).await;
    same(&rig, &next_of_overlay, &overlay);

    // What the overlay had is void, and the copies of it have it.
    on(&web).await;
    write(&web, 4, 5).await;
    refused(&rig, &web, Some(&of_overlay), NO_BITMAP).await;
    refused(&rig, &web, Some(&next_of_overlay), NO_BITMAP).await;
    let second = next(&rig, &web, "second", &first).await;
    off(&web).await;
    same(&rig, &second, &root(&rig));
}

async fn what_an_overlay_had_is_told_by_the_bitmap_of_the_image_it_went_back_into(rig: Rig) {
    let web = idle(&rig).await;
    write(&web, 0, 1).await;
    let first = anew(&rig, &web, "first").await;
    overlay(&rig, &web).await;
    write(&web, 1, 2).await;
    let of_overlay = anew(&rig, &web, "of-overlay").await;
    let job = web.commit_disk("root", CommitOptions::default()).await;
    let job = job.expect("it begins");
    assert_eq!(ends(&job).await, BlockJobEnd::Done);
    refused(&rig, &web, Some(&of_overlay), NO_BITMAP).await;
    write(&web, 2, 3).await;
    let second = next(&rig, &web, "second", &first).await;
    off(&web).await;
    same(&rig, &second, &root(&rig));
}

async fn a_copy_that_ended_with_its_guest_is_none_to_go_on_from(rig: Rig) {
    let web = idle(&rig).await;
    let first = anew(&rig, &web, "first").await;
    for place in 0..32 {
        write(&web, place, 1).await;
    }
    let slow = BackupOptions {
        speed: Some(64 << 10),
        keep_partial: true,
        ..of(since())
    };
    let partial = target(&rig, "root", "partial", Some(&first));
    let mut news = web.subscribe();
    let copying = tokio::spawn(web.backup(vec![partial.clone()], slow).into_future());
    phase(&mut news, "copying").await;
    off(&web).await;
    copying
        .await
        .expect("no panic")
        .expect_err("it is not whole");
    assert!(partial.path.exists(), "it was to be kept");
    on(&web).await;
    refused(&rig, &web, Some(&partial.path), "is no whole copy").await;
    let second = next(&rig, &web, "second", &first).await;
    off(&web).await;
    same(&rig, &second, &root(&rig));
}

async fn a_disk_that_went_over_to_a_mirror_begins_its_chain_anew(rig: Rig) {
    let web = idle(&rig).await;
    write(&web, 0, 1).await;
    let first = anew(&rig, &web, "first").await;
    let mirror = MirrorOptions {
        path: rig.dir.path().join("mirror"),
        format: DiskFormat::Qcow2,
        pivot: Pivot::WhenReady,
        bandwidth: None,
    };
    let job = web.mirror_disk("root", mirror).await.expect("it begins");
    assert_eq!(ends(&job).await, BlockJobEnd::Done);
    write(&web, 1, 2).await;
    refused(&rig, &web, Some(&first), NO_BITMAP).await;
}

async fn a_disk_that_tells_what_changed_does_not_go_back_inside_its_image(rig: Rig) {
    let web = idle(&rig).await;
    web.snapshot_inside("monday").await.expect("it is made");
    write(&web, 0, 1).await;
    let first = anew(&rig, &web, "first").await;
    write(&web, 1, 2).await;
    let error = web.revert_inside("monday").await.expect_err("QEMU refuses");
    let text = format!("{error:#}");
    assert!(text.contains("active dirty bitmaps"), "{text}");
    let second = next(&rig, &web, "second", &first).await;
    off(&web).await;
    same(&rig, &second, &root(&rig));
}

async fn what_was_written_while_the_guest_was_off_is_told_or_the_chain_is_refused(rig: Rig) {
    let web = idle(&rig).await;
    let first = anew(&rig, &web, "first").await;
    off(&web).await;
    let raw = rig.dir.path().join("raw");
    fs::write(&raw, vec![7; 8 << 20]).expect("it is written");
    let disk = root(&rig);
    let words = ["convert", "-n", "-f", "raw", "-O", "qcow2"];
    let words = [&words[..], &[text(&raw), text(&disk)]].concat();
    rig.env.qemu_img(&words).expect("it writes into the image");
    on(&web).await;
    let second = next(&rig, &web, "second", &first).await;
    off(&web).await;
    same(&rig, &second, &root(&rig));
    // Who does not know bitmaps takes away the bit that says that they are as the image is.
    let mut image = fs::read(root(&rig)).expect("it is there");
    assert_eq!(image[95], 1, "the bitmaps are good");
    image[95] = 0;
    fs::write(root(&rig), image).expect("it is written");
    on(&web).await;
    refused(&rig, &web, Some(&second), NO_BITMAP).await;
}
