//! Commit, stream and mirror while a real guest writes: which file is the disk, whoever fails, leaves or dies meanwhile.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use driver::{
    BackupOptions, BackupTarget, BlockJob, BlockJobEnd, BlockJobKind, CommitOptions, Disk,
    DiskFormat, Domain, Driver, ErrorKind, Guest, MirrorOptions, Pivot, SaveOptions, Scope,
    SnapshotOptions, StreamOptions, Subscription, What,
};
use job_core::JobKind;
use monitor_qmp::{Error, Qmp, Reply, Request};
use serde_json::{Value, json, value::to_raw_value};
use tokio::time::{Instant, sleep, timeout};

use crate::between::{GoBetween, between};
use crate::guests::{shell, signal, up};
use crate::harness::tests;
use crate::plug::{ask, image, left, until_told};
use crate::rig::{Rig, Signal};
use crate::storage::told;

tests! {
    a_mirror_becomes_the_disk_while_the_guest_writes,
    a_mirror_follows_the_disk_until_it_is_told_to_take_over_and_excludes_what_it_must,
    a_mirror_that_is_cancelled_leaves_the_disk_and_nothing_else,
    a_mirror_whose_target_is_full_fails_with_the_reason_and_leaves_the_disk,
    layers_are_committed_and_streamed_and_the_descriptions_follow,
    a_block_job_is_followed_to_its_end_by_the_driver_that_comes_back,
    a_block_job_that_ended_while_no_driver_was_there_is_known_to_have,
    a_block_job_is_looked_at_however_much_else_happens,
    a_qemu_that_dies_in_a_mirror_leaves_the_disk_and_no_copy,
}

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;
const SUM: &str = "md5sum </dev/vda";

fn soon() -> Instant {
    Instant::now() + 60 * SECOND
}

fn to(path: &Path, format: DiskFormat) -> MirrorOptions {
    MirrorOptions {
        path: path.to_owned(),
        format,
        pivot: Pivot::WhenReady,
        bandwidth: None,
    }
}

/// A guest with one disk of those bytes, and what it writes there from a place of its own.
async fn with_disk(rig: &Rig, disk: Disk) -> Domain {
    let guest = Guest {
        disks: vec![disk],
        ..rig.guest("web")
    };
    let domain = rig.driver.define(guest).await.expect("it is free");
    up(&domain).await;
    domain
}

async fn write(domain: &Domain, megabyte: u32) {
    let script = format!(
        "dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek={megabyte} conv=fsync 2>/dev/null; echo $?"
    );
    assert_eq!(shell(domain, &script).await, "0");
}

/// The file of the disk, by both descriptions.
fn files(domain: &Domain) -> (Option<PathBuf>, Option<PathBuf>) {
    let file = |guest: &Guest| guest.disks[0].path.clone();
    let live = domain.description().map(|guest| file(&guest));
    (live, domain.records().definition.as_ref().map(file))
}

pub(crate) async fn ends(job: &BlockJob) -> BlockJobEnd {
    job.wait(soon()).await.expect("it ends")
}

/// Which block job is told to have ended next, and how.
async fn told_end(news: &mut Subscription) -> (String, BlockJobEnd) {
    let is_it = |what: &What| match what {
        What::BlockJobEnded { id, end, .. } => Some((id.to_string(), end.clone())),
        _ => None,
    };
    told(news, is_it).await
}

/// A qcow2 image, made by a QEMU of its own.
async fn qcow2(rig: &Rig, name: &str, behind: Option<&Path>, bytes: u64) -> PathBuf {
    let path = rig.dir.path().join(name);
    File::create_new(&path).expect("it is new");
    let maker = match rig.driver.by_name("maker") {
        Some(maker) => maker,
        None => rig.started(rig.empty("maker")).await,
    };
    let file = json!({"driver": "file", "node-name": "file", "filename": path});
    ask(&maker, "blockdev-add", file).await;
    let mut options = json!({"driver": "qcow2", "file": "file", "size": bytes});
    if let Some(behind) = behind {
        options["backing-file"] = json!(behind);
        options["backing-fmt"] = "qcow2".into();
    }
    ask(
        &maker,
        "blockdev-create",
        json!({"job-id": "make", "options": options}),
    )
    .await;
    let made = async {
        loop {
            let jobs = ask(&maker, "query-jobs", Value::Null).await;
            if jobs[0]["status"] == "concluded" {
                return jobs[0]["error"].clone();
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    let error = timeout(10 * SECOND, made).await.expect("it is made");
    assert_eq!(error, Value::Null);
    ask(&maker, "job-dismiss", json!({"id": "make"})).await;
    ask(&maker, "blockdev-del", json!({"node-name": "file"})).await;
    path
}

async fn a_mirror_becomes_the_disk_while_the_guest_writes(rig: Rig) {
    let old = image(&rig, "old", 16 * MIB);
    let domain = with_disk(&rig, Disk::new("root", &old, DiskFormat::Raw)).await;
    write(&domain, 1).await;
    // It goes on writing all the time, and notes each write once it is on the disk.
    let writer = "(n=0; while :; do n=$((n+1)); \
        dd if=/dev/urandom of=/dev/vda bs=4k count=16 seek=1024 conv=fsync,notrunc 2>/dev/null; \
        echo $n >/tmp/wrote; done) >/dev/null 2>&1 & echo $! >/tmp/writer";
    shell(&domain, writer).await;
    let new = rig.dir.path().join("new.qcow2");
    let mut events = domain.subscribe();
    let job = domain
        .mirror_disk("root", to(&new, DiskFormat::Qcow2))
        .await
        .expect("it begins");
    assert_eq!((job.disk(), job.kind()), ("root", BlockJobKind::Mirror));
    assert_eq!(ends(&job).await, BlockJobEnd::Done);
    assert_eq!(
        told_end(&mut events).await,
        (job.id().to_owned(), BlockJobEnd::Done)
    );
    assert!(
        domain.observed().run.is_running(),
        "it stood still for the pivot only"
    );
    assert_eq!(files(&domain), (Some(new.clone()), Some(new.clone())));
    assert!(domain.block_jobs().is_empty());
    assert_eq!(ask(&domain, "query-jobs", Value::Null).await, json!([]));
    assert_eq!(left(&domain, "root").await, ["root.1", "root-device"]);

    let wrote = shell(&domain, "cat /tmp/wrote").await;
    let goes_on = format!("while [ $(cat /tmp/wrote) -le {wrote} ]; do sleep 0.1; done; echo yes");
    assert_eq!(shell(&domain, &goes_on).await, "yes", "the guest writes on");
    shell(&domain, "kill $(cat /tmp/writer); sleep 0.3; sync").await;
    write(&domain, 9).await;
    let sum = shell(&domain, SUM).await;
    domain.destroy().await.expect("it ends");
    up(&domain).await;
    assert_eq!(shell(&domain, SUM).await, sum, "the new file has all of it");
}

async fn a_mirror_follows_the_disk_until_it_is_told_to_take_over_and_excludes_what_it_must(
    rig: Rig,
) {
    let old = image(&rig, "old", 8 * MIB);
    let disk = Disk {
        slot: Some(0),
        ..Disk::new("root", &old, DiskFormat::Raw)
    };
    let domain = with_disk(&rig, disk).await;
    let other = Disk::new("other", image(&rig, "other", 4 * MIB), DiskFormat::Raw);
    domain
        .plug_disk(other, Scope::Live)
        .await
        .expect("there is room");
    let new = rig.dir.path().join("new.raw");
    let options = MirrorOptions {
        pivot: Pivot::OnRequest,
        ..to(&new, DiskFormat::Raw)
    };
    let job = domain
        .mirror_disk("root", options)
        .await
        .expect("it begins");
    let ready = job
        .wait_for(|state| state.is_ready, soon())
        .await
        .expect("it is whole");
    assert_eq!((ready.end, ready.done), (None, 8 * MIB));
    write(&domain, 3).await;

    let is_named = |error: driver::Error| {
        assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
        assert!(error.to_string().contains(job.id()), "{error}");
    };
    let file = rig.dir.path().join("web.save");
    is_named(
        domain
            .save(&file, SaveOptions::default())
            .await
            .expect_err("it is at it"),
    );
    assert!(!file.exists());
    is_named(
        domain
            .unplug_disk("root", Scope::Live)
            .await
            .expect_err("it is at it"),
    );
    let overlay = vec![("root".to_owned(), rig.dir.path().join("overlay"))];
    let snapshot = domain.snapshot(overlay, SnapshotOptions::default());
    is_named(snapshot.await.expect_err("it is at it"));
    let target = BackupTarget {
        disk: "root".to_owned(),
        path: rig.dir.path().join("backup"),
        behind: None,
    };
    let backup = domain.backup(vec![target], BackupOptions::default());
    is_named(backup.await.expect_err("it is at it"));
    let second = rig.dir.path().join("second");
    let second = to(&second, DiskFormat::Raw);
    is_named(
        domain
            .mirror_disk("root", second)
            .await
            .expect_err("it is at it"),
    );
    let beside = rig.dir.path().join("beside");
    let beside = domain
        .mirror_disk("other", to(&beside, DiskFormat::Raw))
        .await;
    assert_eq!(
        ends(&beside.expect("another disk")).await,
        BlockJobEnd::Done
    );

    assert_eq!(job.state().end, None, "it waits");
    let sum = shell(&domain, SUM).await;
    job.pivot().await.expect("it takes over");
    assert_eq!(files(&domain).0, Some(new));
    let error = job.cancel().await.expect_err("it is over");
    assert_eq!(error.kind(), ErrorKind::TooLate, "{error:#}");
    assert_eq!(shell(&domain, SUM).await, sum);
    domain
        .save(&file, SaveOptions::default())
        .await
        .expect("nothing is in the way");
}

async fn a_mirror_that_is_cancelled_leaves_the_disk_and_nothing_else(rig: Rig) {
    let old = image(&rig, "old", 8 * MIB);
    let domain = with_disk(&rig, Disk::new("root", &old, DiskFormat::Raw)).await;
    let new = rig.dir.path().join("new");
    let slow = MirrorOptions {
        bandwidth: Some(MIB),
        ..to(&new, DiskFormat::Qcow2)
    };
    let job = domain
        .mirror_disk("root", slow.clone())
        .await
        .expect("it begins");
    assert!(new.exists());
    job.wait_for(|state| state.done > 0, soon())
        .await
        .expect("it copies");
    job.cancel().await.expect("it stops");
    assert_eq!(job.state().end, Some(BlockJobEnd::Cancelled));
    assert!(!new.exists());
    assert_eq!(left(&domain, "root").await, ["root", "root-device"]);
    assert_eq!(files(&domain), (Some(old.clone()), Some(old)));
    write(&domain, 2).await;

    File::create_new(&new).expect("it is free");
    let error = domain
        .mirror_disk("root", slow)
        .await
        .expect_err("somebody's file");
    assert_eq!(error.kind(), ErrorKind::Exists, "{error:#}");
    assert!(new.exists() && domain.block_jobs().is_empty());
    let unknown = domain.mirror_disk("none", to(&new, DiskFormat::Raw)).await;
    assert_eq!(unknown.expect_err("no such disk").kind(), ErrorKind::State);
}

/// Makes the copy of a mirror lie on a device without room.
struct NoRoom;

#[async_trait]
impl GoBetween for NoRoom {
    async fn call(&self, monitor: &dyn Qmp, mut request: Request) -> Result<Reply, Error> {
        let text = request.arguments.as_ref().map_or("null", |text| text.get());
        let mut arguments: Value = serde_json::from_str(text).expect("it is JSON");
        if request.name == "blockdev-add" && arguments["node-name"] == "root.1" {
            let image = arguments["file"].take();
            arguments["file"] = json!({"driver": "blkdebug", "image": image,
                "inject-error": [{"event": "write_aio", "errno": 28}]});
            request.arguments = Some(to_raw_value(&arguments).expect("it is JSON"));
        }
        monitor.call(request).await
    }
}

async fn a_mirror_whose_target_is_full_fails_with_the_reason_and_leaves_the_disk(rig: Rig) {
    let transports = rig.env.transports().expect("they load");
    let driver = Driver::builder(transports, rig.dir.path().join("run2"))
        .qemu(&rig.env.qemu)
        .wrap_monitor(between(Arc::new(NoRoom)))
        .build();
    let rig = rig.with_driver(driver.expect("it can be made"));
    let old = image(&rig, "old", 8 * MIB);
    let domain = with_disk(&rig, Disk::new("root", &old, DiskFormat::Raw)).await;
    write(&domain, 1).await;
    let new = rig.dir.path().join("new");
    let job = domain
        .mirror_disk("root", to(&new, DiskFormat::Raw))
        .await
        .expect("it begins");
    let BlockJobEnd::Failed(reason) = ends(&job).await else {
        panic!("{:?}", job.state());
    };
    assert!(reason.contains("No space left on device"), "{reason}");
    assert!(!new.exists());
    assert_eq!(files(&domain), (Some(old.clone()), Some(old)));
    assert_eq!(left(&domain, "root").await, ["root", "root-device"]);
    write(&domain, 2).await;
}

async fn layers_are_committed_and_streamed_and_the_descriptions_follow(rig: Rig) {
    let low = qcow2(&rig, "low", None, 8 * MIB).await;
    let mut layers = vec![low.clone()];
    for name in ["a", "b", "c"] {
        let behind = layers.last().expect("there is one").clone();
        layers.push(qcow2(&rig, name, Some(&behind), 8 * MIB).await);
    }
    let top = layers[3].clone();
    let domain = with_disk(&rig, Disk::new("root", &top, DiskFormat::Qcow2)).await;
    write(&domain, 1).await;
    let sum = shell(&domain, SUM).await;
    let behind = async || {
        let devices = ask(&domain, "query-block", Value::Null).await;
        let mut image = devices[0]["inserted"]["image"].clone();
        let mut files = Vec::new();
        while let Some(file) = image["filename"].as_str().map(PathBuf::from) {
            files.push(file);
            image = image["backing-image"].clone();
        }
        files
    };
    assert_eq!(
        behind().await,
        [
            top.as_path(),
            layers[2].as_path(),
            layers[1].as_path(),
            low.as_path()
        ]
    );

    // A lower layer goes into the one behind it.
    let options = CommitOptions {
        top: Some(layers[1].clone()),
        ..CommitOptions::default()
    };
    let job = domain
        .commit_disk("root", options)
        .await
        .expect("it begins");
    assert_eq!(ends(&job).await, BlockJobEnd::Done);
    assert_eq!(
        behind().await,
        [top.as_path(), layers[2].as_path(), low.as_path()]
    );
    assert_eq!(
        files(&domain).0.as_ref(),
        Some(&top),
        "the disk is the same file"
    );
    let nonsense = CommitOptions {
        base: Some(top.clone()),
        ..CommitOptions::default()
    };
    let error = domain
        .commit_disk("root", nonsense)
        .await
        .expect_err("into itself");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");

    // The layer in the middle is copied up.
    let options = StreamOptions {
        base: Some(low.clone()),
        ..StreamOptions::default()
    };
    let job = domain
        .stream_disk("root", options)
        .await
        .expect("it begins");
    assert_eq!(ends(&job).await, BlockJobEnd::Done);
    assert_eq!(behind().await, [top.as_path(), low.as_path()]);

    // The layer that the guest writes to goes into the lowest, which is the disk then.
    let job = domain
        .commit_disk("root", CommitOptions::default())
        .await
        .expect("it begins");
    assert_eq!(ends(&job).await, BlockJobEnd::Done);
    assert_eq!(behind().await, [low.as_path()]);
    assert_eq!(files(&domain), (Some(low.clone()), Some(low)));
    assert_eq!(shell(&domain, SUM).await, sum);
    assert_eq!(
        left(&domain, "root").await,
        ["root-device"],
        "its node has QEMU's own name"
    );
    let error = domain.stream_disk("root", StreamOptions::default()).await;
    assert_eq!(
        error.expect_err("nothing is behind it").kind(),
        ErrorKind::State
    );
    write(&domain, 5).await;
    let sum = shell(&domain, SUM).await;
    domain.destroy().await.expect("it ends");
    up(&domain).await;
    assert_eq!(shell(&domain, SUM).await, sum);
}

async fn a_block_job_is_followed_to_its_end_by_the_driver_that_comes_back(rig: Rig) {
    let old = image(&rig, "old", 8 * MIB);
    let domain = with_disk(&rig, Disk::new("root", &old, DiskFormat::Raw)).await;
    write(&domain, 1).await;
    let new = rig.dir.path().join("new");
    let slow = MirrorOptions {
        bandwidth: Some(4 * MIB),
        ..to(&new, DiskFormat::Qcow2)
    };
    let job = domain.mirror_disk("root", slow).await.expect("it begins");
    let id = job.id().to_owned();
    drop((job, domain));
    let rig = Rig::again(rig.leave().await);
    rig.driver.recovered(soon()).await.expect("it is found");
    let domain = rig.driver.by_name("web").expect("known");
    let job = domain.block_job(&id).expect("it goes on");
    assert_eq!(ends(&job).await, BlockJobEnd::Done);
    assert_eq!(files(&domain), (Some(new.clone()), Some(new)));
    assert!(domain.observed().run.is_running());
    write(&domain, 4).await;
}

async fn a_block_job_that_ended_while_no_driver_was_there_is_known_to_have(rig: Rig) {
    let low = image(&rig, "low", 8 * MIB);
    let domain = with_disk(&rig, Disk::new("root", low, DiskFormat::Raw)).await;
    let overlay = vec![("root".to_owned(), rig.dir.path().join("top"))];
    let taken = domain.snapshot(overlay, SnapshotOptions::default());
    taken.await.expect("it has a layer more");
    // After the first piece it stands still until it may go faster: it does not end before the driver has left.
    let still = StreamOptions {
        bandwidth: Some(1),
        ..StreamOptions::default()
    };
    let job = domain.stream_disk("root", still).await.expect("it begins");
    let id = job.id().to_owned();
    let socket = rig
        .dir
        .path()
        .join(format!("run/{}/monitor.sock", domain.uuid()));
    drop((job, domain));
    let left_behind = rig.leave().await;
    let let_go = [
        json!({"execute": "block-job-set-speed", "arguments": {"device": id, "speed": 0}}),
        json!({"execute": "query-jobs"}),
    ];
    until_told(socket, &let_go, |message| {
        message["return"][0]["status"] == "concluded"
    })
    .await;
    let rig = Rig::again(left_behind);
    let domain = rig.driver.by_name("web").expect("known");
    let mut events = domain.subscribe_from(0);
    assert_eq!(told_end(&mut events).await, (id, BlockJobEnd::Done));
    assert_eq!(ask(&domain, "query-jobs", Value::Null).await, json!([]));
    write(&domain, 2).await;
}

async fn a_block_job_is_looked_at_however_much_else_happens(rig: Rig) {
    let old = image(&rig, "old", 64 * MIB);
    let domain = with_disk(&rig, Disk::new("root", &old, DiskFormat::Raw)).await;
    let slow = MirrorOptions {
        bandwidth: Some(MIB),
        ..to(&rig.dir.path().join("new"), DiskFormat::Raw)
    };
    let job = domain.mirror_disk("root", slow).await.expect("it begins");
    // Each is a job of the domain, and news of it, long before it is time to look.
    let noise = async {
        loop {
            domain.query_status().await.expect("it answers");
            sleep(Duration::from_millis(100)).await;
        }
    };
    let looks = async {
        let mut done = 0;
        for _ in 0..3 {
            let state = job.wait_for(|state| state.done > done, soon()).await;
            let state = state.expect("it is seen to go on");
            assert_eq!(state.end, None, "it has not ended");
            done = state.done;
        }
    };
    tokio::select! {
        () = noise => unreachable!("it does not end"),
        () = looks => {}
    }
    job.cancel().await.expect("it stops");
}

async fn a_qemu_that_dies_in_a_mirror_leaves_the_disk_and_no_copy(rig: Rig) {
    let old = image(&rig, "old", 8 * MIB);
    let domain = with_disk(&rig, Disk::new("root", &old, DiskFormat::Raw)).await;
    write(&domain, 1).await;
    let sum = shell(&domain, SUM).await;
    let new = rig.dir.path().join("new");
    let slow = MirrorOptions {
        bandwidth: Some(MIB),
        ..to(&new, DiskFormat::Qcow2)
    };
    let job = domain.mirror_disk("root", slow).await.expect("it begins");
    signal(&domain, Signal::KILL);
    assert_eq!(ends(&job).await, BlockJobEnd::Gone);
    let cleaned = domain.run("see", JobKind::Query, soon(), |_| async { Ok(()) });
    cleaned.await.expect("the clean-up goes first");
    assert!(!new.exists());
    assert_eq!(files(&domain), (None, Some(old)));
    up(&domain).await;
    assert_eq!(shell(&domain, SUM).await, sum);
}
