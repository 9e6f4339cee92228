//! Snapshots inside a real guest's images: made, listed, gone back to, deleted.

use driver::{DiskFormat, ErrorKind};

use crate::guests::shell;
use crate::harness::tests;
use crate::rig::Rig;
use crate::storage::{SECOND, booted, check, counts_on};

tests! {
    a_guest_goes_back_to_a_snapshot_inside_its_images,
    what_cannot_be_done_inside_images_is_refused_before_the_guest_stops,
}

async fn a_guest_goes_back_to_a_snapshot_inside_its_images(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    shell(&web, "echo then >/tmp/mark; echo then >/mnt/mark; sync").await;
    web.snapshot_inside("monday").await.expect("it is made");
    counts_on(&rig).await;
    shell(&web, "echo now >/tmp/mark; echo now >/mnt/mark; sync").await;
    web.snapshot_inside("tuesday").await.expect("it is made");
    let all = web.list_inside().await.expect("it answers");
    let seen: Vec<_> = all.iter().map(|one| (&*one.tag, one.is_whole)).collect();
    assert_eq!(seen, [("monday", true), ("tuesday", true)]);
    assert!(
        all[0].memory > 1 << 20,
        "its memory is in it: {}",
        all[0].memory
    );

    web.revert_inside("monday").await.expect("it goes back");
    assert!(web.query_status().await.expect("it answers").running);
    web.wait_agent()
        .deadline(60 * SECOND)
        .await
        .expect("it answers");
    assert_eq!(shell(&web, "cat /tmp/mark /mnt/mark").await, "then\nthen");
    web.delete_inside("monday").await.expect("it is deleted");
    let left = web.list_inside().await.expect("it answers");
    assert_eq!(left.len(), 1, "{left:?}");
    web.destroy().await.expect("it ends");
    for disk in ["root.qcow2", "data"] {
        check(&rig, &rig.dir.path().join(disk));
    }
}

async fn what_cannot_be_done_inside_images_is_refused_before_the_guest_stops(rig: Rig) {
    let web = booted(&rig, DiskFormat::Qcow2).await;
    web.snapshot_inside("monday").await.expect("it is made");
    let twice = web
        .snapshot_inside("monday")
        .await
        .expect_err("it is there");
    assert_eq!(twice.kind(), ErrorKind::Exists, "{twice:#}");
    for (refused, kind) in [
        (web.revert_inside("friday").await, ErrorKind::State),
        (web.delete_inside("friday").await, ErrorKind::State),
        (web.snapshot_inside("").await, ErrorKind::Invalid),
    ] {
        let error = refused.expect_err("refused");
        assert_eq!(error.kind(), kind, "{error:#}");
    }
    counts_on(&rig).await;
    web.destroy().await.expect("it ends");
    web.remove().await.expect("it is off");
    std::fs::remove_file(rig.dir.path().join("root.qcow2")).expect("it is there");
    let web = booted(&rig, DiskFormat::Raw).await;
    let error = web.snapshot_inside("monday").await.expect_err("one is raw");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    assert!(
        error
            .to_string()
            .contains("disk \"data\" is no qcow2 image"),
        "{error}"
    );
}
