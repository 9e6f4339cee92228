//! A real guest's memory into a file: the guest goes on, whatever becomes of the dump.

use std::fs;
use std::path::Path;

use driver::{Became, Domain, DumpFormat, ErrorKind};
use tokio::time::timeout;

use crate::harness::tests;
use crate::recovery::{back, cut};
use crate::rig::{Rig, boot};
use crate::storage::{SECOND, became, counts_on, phase};

tests! {
    a_dump_is_whole_in_each_format_and_the_guest_goes_on_where_it_was,
    a_cancelled_dump_frees_the_guest_at_once_and_leaves_no_file,
    a_dump_that_cannot_be_made_changes_nothing,
    a_dump_whose_connection_is_lost_is_undone_before_any_other_job_begins,
}

const MIB: u64 = 1 << 20;

fn head(path: &Path) -> Vec<u8> {
    fs::read(path).expect("it is there")[..12].to_vec()
}

async fn a_dump_is_whole_in_each_format_and_the_guest_goes_on_where_it_was(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let path = |name: &str| rig.dir.path().join(name);
    let elf = web
        .dump(path("elf"), DumpFormat::Elf)
        .await
        .expect("it is dumped");
    assert!(elf.bytes > 256 * MIB, "all of its memory: {}", elf.bytes);
    assert_eq!(
        elf.bytes,
        fs::metadata(&elf.path).expect("it is there").len()
    );
    assert_eq!(&head(&elf.path)[..4], b"\x7fELF");
    assert!(web.observed().run.is_running(), "{:?}", web.observed().run);
    let kdump = web.dump(path("kdump"), DumpFormat::KdumpZlib).await;
    let kdump = kdump.expect("it is dumped");
    assert_eq!(head(&kdump.path), b"makedumpfile");
    assert!(kdump.bytes < elf.bytes, "it is compressed");
    counts_on(&rig).await;
    web.pause().await.expect("it stops");
    web.dump(path("paused"), DumpFormat::Elf)
        .await
        .expect("it is dumped");
    let status = web.query_status().await.expect("it answers");
    assert!(!status.running, "it was paused and stays so");
    web.resume().await.expect("nothing is in the way");
    counts_on(&rig).await;
}

async fn a_cancelled_dump_frees_the_guest_at_once_and_leaves_no_file(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let path = rig.dir.path().join("dump");
    let mut news = web.subscribe();
    let dumping = tokio::spawn(web.dump(&path, DumpFormat::KdumpZlib).into_future());
    phase(&mut news, "writing").await;
    web.cancel_job("a test").expect("it can be cancelled");
    let error = dumping.await.expect("no panic").expect_err("cancelled");
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error:#}");
    assert!(!path.exists());
    assert!(web.query_status().await.expect("it answers").running);
    counts_on(&rig).await;
    web.dump(&path, DumpFormat::Elf)
        .await
        .expect("nothing is in the way");
}

async fn a_dump_that_cannot_be_made_changes_nothing(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let path = rig.dir.path().join("dump");
    fs::write(&path, b"theirs").expect("it is written");
    let refused = async |path: &Path, format, kind| {
        let error = web.dump(path, format).await.expect_err("refused");
        assert_eq!(error.kind(), kind, "{error:#}");
    };
    refused(&path, DumpFormat::Elf, ErrorKind::Exists).await;
    assert_eq!(fs::read(&path).expect("it stays"), b"theirs");
    refused(Path::new("relative"), DumpFormat::Elf, ErrorKind::Invalid).await;
    refused(Path::new("/no/such/folder"), DumpFormat::Elf, ErrorKind::Io).await;
    // Debian's QEMU knows no lzo.
    refused(Path::new("/tmp/x"), DumpFormat::KdumpLzo, ErrorKind::State).await;
    counts_on(&rig).await;
}

async fn a_dump_whose_connection_is_lost_is_undone_before_any_other_job_begins(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let before = web.observed().generation;
    let path = rig.dir.path().join("dump");
    let mut news = web.subscribe();
    let dumping = tokio::spawn(web.dump(&path, DumpFormat::KdumpZlib).into_future());
    phase(&mut news, "writing").await;
    cut(&rig, &web);
    let error = dumping.await.expect("no panic").expect_err("it is lost");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
    // One that begins as soon as it can never writes over what was noted of the first.
    let eager = {
        let (web, path): (Domain, _) = (web.clone(), rig.dir.path().join("eager"));
        tokio::spawn(async move {
            while let Err(error) = web.dump(&path, DumpFormat::Elf).await {
                let is_told = matches!(error.kind(), ErrorKind::State | ErrorKind::Gone);
                assert!(is_told, "{error:#}");
                tokio::task::yield_now().await;
            }
        })
    };
    back(&web, before).await;
    assert_eq!(became(&mut news).await, Became::Undone);
    assert!(!path.exists());
    timeout(60 * SECOND, eager)
        .await
        .expect("its turn comes")
        .expect("no panic");
    counts_on(&rig).await;
}
