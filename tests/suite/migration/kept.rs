//! A guest comes to where a definition of it is kept, or does not come after all: the definition is its owner's.

use std::fs::File;
use std::future::IntoFuture;

use driver::{Disk, DiskFormat, Guest, MigrateOptions, Run, SnapshotOptions, StartOptions};
use tokio::time::Instant;

use super::{SECOND, counts_on, is_performing, peer, slow};
use crate::rig::{Rig, boot};

const PAUSED: StartOptions = StartOptions { paused: true };

pub(super) async fn a_definition_that_is_kept_there_stays_as_it_was_but_for_the_files_of_the_disks(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (base, overlay) = (
        rig.dir.path().join("data.raw"),
        rig.dir.path().join("data.overlay"),
    );
    let made = File::create(&base).and_then(|file| file.set_len(8 << 20));
    made.expect("a file has room");
    let guest = Guest {
        disks: vec![Disk::new("data", &base, DiskFormat::Raw)],
        ..rig.guest("web")
    };
    let mut kept = Guest {
        memory_mib: 128,
        ..guest.clone()
    };
    let defined = there.driver.define(kept.clone()).await.expect("it is free");
    defined.set_autostart(true).await.expect("it is kept");
    let domain = rig.driver.start(guest, PAUSED).await.expect("it starts");
    domain
        .snapshot(
            vec![("data".to_owned(), overlay.clone())],
            SnapshotOptions::default(),
        )
        .await
        .expect("it is taken");
    domain
        .migrate(peer(&there), MigrateOptions::default())
        .await
        .expect("it moves");
    let words = ["resize", &overlay.display().to_string(), "8M"];
    let refused = there.env.qemu_img(&words);
    assert!(
        refused.as_ref().is_err_and(|said| said.contains("lock")),
        "its disk is taken there, though it does not run: {refused:?}"
    );
    let runs = defined.description().expect("it is there");
    assert_eq!(runs.memory_mib, 256, "the guest is what it was");
    kept.disks[0].path = overlay;
    kept.disks[0].format = DiskFormat::Qcow2;
    assert_eq!(defined.records().definition, Some(kept.clone()));

    let uuid = defined.uuid();
    drop(defined);
    let there = Rig::again(there.leave().await);
    let recovered = there.driver.recovered(Instant::now() + 30 * SECOND).await;
    recovered.expect("it is found");
    let records = there.driver.by_uuid(uuid).expect("it is known").records();
    assert!(records.persistent && records.autostart && !records.moved_away);
    assert_eq!(records.definition, Some(kept), "and so it is written");
}

pub(super) async fn a_definition_that_is_kept_there_is_not_touched_by_a_guest_that_does_not_arrive(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let kept = Guest {
        memory_mib: 128,
        ..domain.description().expect("it runs").as_ref().clone()
    };
    let defined = there.driver.define(kept.clone()).await.expect("it is free");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    assert_eq!(defined.records().definition, Some(kept.clone()), "not yet");
    domain.cancel_job("test").expect("it can be cancelled");
    moving.await.expect("no panic").expect_err("it was");
    let is_off = |seen: &driver::Observed| seen.run == Run::Off;
    let off = defined.wait_for(is_off, Instant::now() + 20 * SECOND);
    off.await.expect("its copy there ends");
    assert_eq!(defined.records().definition, Some(kept));
    counts_on(&rig, 2, 20 * SECOND).await;
}

pub(super) async fn a_guest_does_not_arrive_where_it_is_known_by_another_name(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let other = Guest {
        uuid: domain.uuid(),
        ..there.empty("other")
    };
    let defined = there.driver.define(other).await.expect("it is free");
    let moved = domain
        .migrate(peer(&there), MigrateOptions::default())
        .await;
    let text = format!("{:#}", moved.expect_err("whose guest is it?"));
    assert!(
        text.contains("calls it \"web\"") && text.contains("known as \"other\""),
        "{text}"
    );
    assert!(defined.observed().pid.is_none(), "nothing was started");
    counts_on(&rig, 2, 20 * SECOND).await;
}
