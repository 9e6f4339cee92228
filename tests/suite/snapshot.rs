//! Overlays on a real guest's disks, all at one instant, with frozen file systems or with its memory.

use std::fs;
use std::path::PathBuf;

use agent_qga::ThawedBy;
use driver::{DiskFormat, Domain, ErrorKind, FreezeOptions, SnapshotOptions};

use crate::freeze::write_on;
use crate::guests::{shell, up};
use crate::harness::tests;
use crate::rig::Rig;
use crate::storage::{SECOND, booted, check, counts_on, files, phase, text};

tests! {
    overlays_go_on_all_disks_of_a_frozen_guest_and_what_is_behind_them_stays,
    a_guest_goes_back_to_the_memory_of_a_snapshot,
    a_cancelled_snapshot_leaves_no_file_and_the_guest_as_it_was,
    a_snapshot_that_cannot_be_made_changes_nothing,
}

fn overlays(rig: &Rig, disks: &[&str]) -> Vec<(String, PathBuf)> {
    let overlay = |disk: &&str| {
        let path = rig.dir.path().join(format!("{disk}.overlay"));
        ((*disk).to_owned(), path)
    };
    disks.iter().map(overlay).collect()
}

fn paths(domain: &Domain) -> Vec<PathBuf> {
    let guest = domain.records().definition.clone().expect("it is defined");
    guest.disks.into_iter().map(|disk| disk.path).collect()
}

async fn overlays_go_on_all_disks_of_a_frozen_guest_and_what_is_behind_them_stays(rig: Rig) {
    let web = booted(&rig, DiskFormat::Raw).await;
    shell(&web, "echo before >/mnt/mark; sync").await;
    write_on(&web).await;
    let console = rig.console("web");
    console.writes(30 * SECOND).await.expect("it writes");
    let wanted = overlays(&rig, &["root", "data"]);
    let options = SnapshotOptions {
        freeze: Some(FreezeOptions::default()),
        ..SnapshotOptions::default()
    };
    let taken = web
        .snapshot(wanted.clone(), options)
        .await
        .expect("it is taken");
    let frozen = taken.frozen.expect("it was frozen and is thawed");
    assert_eq!((frozen.by, frozen.file_systems), (ThawedBy::Holder, 1));
    println!("figure snapshot-frozen {:.3} s", frozen.held.as_secs_f64());
    let base = rig.dir.path().join("root.qcow2");
    let before = fs::read(&base).expect("it is there");
    console.writes(30 * SECOND).await.expect("it writes again");
    shell(&web, "echo after >/mnt/mark; sync").await;
    counts_on(&rig).await;
    assert!(
        fs::read(&base).expect("it is there") == before,
        "what is behind stays"
    );
    let overlaid: Vec<_> = wanted.iter().map(|(_, path)| path.clone()).collect();
    assert_eq!(paths(&web), overlaid);
    web.destroy().await.expect("it ends");
    overlaid.iter().for_each(|path| check(&rig, path));
    let info = rig
        .env
        .qemu_img(&["info", text(&overlaid[1])])
        .expect("it is an image");
    assert!(info.contains("backing file format: raw"), "{info}");
    up(&web).await;
    assert_eq!(shell(&web, "cat /mnt/mark").await, "after");
}

async fn a_guest_goes_back_to_the_memory_of_a_snapshot(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    shell(&web, "echo then >/tmp/mark").await;
    let memory = rig.dir.path().join("memory");
    let options = SnapshotOptions {
        memory: Some(memory.clone()),
        ..SnapshotOptions::default()
    };
    let taken = web
        .snapshot(overlays(&rig, &["root", "data"]), options)
        .await;
    assert_eq!(taken.expect("it is taken").memory.as_ref(), Some(&memory));
    assert!(web.query_status().await.expect("it answers").running);
    counts_on(&rig).await;
    shell(&web, "echo now >/tmp/mark").await;
    let refused = rig.driver.restore(&memory).await.expect_err("it runs");
    assert_eq!(refused.kind(), ErrorKind::State, "{refused:#}");
    web.destroy().await.expect("it ends");
    let last = *rig.console("web").ticks().last().expect("it counted");
    rig.driver.restore(&memory).await.expect("it comes back");
    web.wait_agent()
        .deadline(60 * SECOND)
        .await
        .expect("it answers");
    assert_eq!(shell(&web, "cat /tmp/mark").await, "then");
    let ticks = rig.console("web").ticks();
    assert!(*ticks.last().expect("it counts") < last + 600, "{ticks:?}");
}

async fn a_cancelled_snapshot_leaves_no_file_and_the_guest_as_it_was(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    let before = (files(&rig), paths(&web));
    let options = SnapshotOptions {
        memory: Some(rig.dir.path().join("memory")),
        ..SnapshotOptions::default()
    };
    let mut news = web.subscribe();
    let taking = web.snapshot(overlays(&rig, &["root", "data"]), options);
    let taking = tokio::spawn(taking.into_future());
    phase(&mut news, "writing").await;
    web.cancel_job("a test").expect("it can be cancelled");
    let error = taking.await.expect("no panic").expect_err("cancelled");
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error:#}");
    assert_eq!((files(&rig), paths(&web)), before);
    counts_on(&rig).await;
    let again = web.snapshot(overlays(&rig, &["root"]), SnapshotOptions::default());
    again.await.expect("nothing is in the way");
    counts_on(&rig).await;
}

async fn a_snapshot_that_cannot_be_made_changes_nothing(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    let theirs = rig.dir.path().join("theirs");
    fs::write(&theirs, b"theirs").expect("it is written");
    let before = (files(&rig), paths(&web));
    let one = || overlays(&rig, &["root"]).remove(0);
    let cases = [
        (vec![], ErrorKind::Invalid),
        (vec![("none".to_owned(), one().1)], ErrorKind::Invalid),
        (vec![one(), one()], ErrorKind::Invalid),
        (
            vec![one(), ("data".to_owned(), theirs.clone())],
            ErrorKind::Exists,
        ),
        (
            vec![one(), ("data".to_owned(), "/no/such/folder".into())],
            ErrorKind::Io,
        ),
    ];
    for (wanted, kind) in cases {
        let refused = web
            .snapshot(wanted.clone(), SnapshotOptions::default())
            .await;
        let error = refused.expect_err("refused");
        assert_eq!(error.kind(), kind, "{wanted:?}: {error:#}");
        assert_eq!((files(&rig), paths(&web)), before);
    }
    // A guest whose agent is silent is not frozen, and then not changed.
    web.pause().await.expect("it stops");
    let options = SnapshotOptions {
        freeze: Some(FreezeOptions::default()),
        ..SnapshotOptions::default()
    };
    let silent = web
        .snapshot(vec![one()], options)
        .deadline(20 * SECOND)
        .await;
    let error = silent.expect_err("nobody freezes it");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error:#}");
    assert_eq!((files(&rig), paths(&web)), before);
    web.resume().await.expect("it runs on");
    counts_on(&rig).await;
}
