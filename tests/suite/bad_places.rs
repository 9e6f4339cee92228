//! A disk that is full and one that cannot be written to: a clear error each, every other domain served, and nothing that a
//! later driver would take for more than it is. Records that make no sense are in `recovery.rs`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use driver::{Became, Domain, Effect, Error, ErrorKind, Run, SaveOptions, StartOptions};
use libtest_mimic::Completion;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::harness::tests;
use crate::rig::{Rig, boot};

tests! {
    a_full_state_directory_refuses_what_must_be_kept_and_nothing_else,
    a_full_run_directory_refuses_a_start_and_a_save_and_harms_no_guest_that_runs,
    a_state_directory_that_became_read_only_costs_definitions_only,
    a_run_directory_that_became_read_only_still_lets_guests_be_used_and_ended,
}

const SECOND: Duration = Duration::from_secs(1);

/// A small disk on a folder, until it is dropped.
struct Disk(PathBuf);

impl Disk {
    /// None where this process may not mount.
    fn on(folder: PathBuf) -> Option<Self> {
        fs::create_dir(&folder).expect("it can be made");
        let options = "size=256k,mode=700";
        let mounted = mount(&["-t", "tmpfs", "-o", options, "small"], &folder);
        mounted.then_some(Self(folder))
    }

    /// Takes all the room there is. The file that does is to be removed.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).expect("it can be made");
        while file.write_all(&[0; 512]).is_ok() {}
        path
    }
}

/// A folder in which nothing can be written from now on, until this is dropped: a second mount of it on itself. What is
/// open already stays so, which a disk that is mounted anew would not allow.
struct ReadOnly(PathBuf);

impl ReadOnly {
    /// None where this process may not mount.
    fn make(folder: PathBuf) -> Option<Self> {
        let text = folder.to_str().expect("our own path is text").to_owned();
        if !mount(&["--bind", &text], &folder) {
            return None;
        }
        let made = Self(folder);
        assert!(mount(&["-o", "remount,bind,ro"], &made.0));
        Some(made)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

/// At once, though a QEMU that was just killed may have its log open for a moment more.
fn unmount(folder: &Path) {
    let unmounted = Command::new("umount").arg("-l").arg(folder).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
}

fn mount(arguments: &[&str], folder: &Path) -> bool {
    let mounted = Command::new("mount").args(arguments).arg(folder).output();
    mounted.is_ok_and(|output| output.status.success())
}

/// A driver one of whose folders is a small disk. The parts are dropped in the order in which a caller names them last.
fn small(rig: &Rig, folder: &str) -> Option<(Arc<TempDir>, Disk, Rig)> {
    let dir = Arc::new(tempfile::tempdir().expect("it can be made"));
    let disk = Disk::on(dir.path().join(folder))?;
    let rig = Rig::again((rig.env.clone(), dir.clone()));
    Some((dir, disk, rig))
}

fn cannot_mount() -> Completion {
    Completion::ignored_with("mounting a disk of its own needs root")
}

async fn started(rig: &Rig, name: &str) -> Result<Domain, Error> {
    let started = rig.driver.start(rig.empty(name), StartOptions::default());
    started.await
}

/// It is one of the system, says which, and nothing took effect.
fn is_of_the_disk(error: &Error, says: &str) {
    assert_eq!(error.kind(), ErrorKind::Io, "{error:#}");
    assert_eq!(error.effect(), Effect::None, "{error:#}");
    let text = format!("{error:#}");
    assert!(text.contains(says), "{text}");
}

async fn is_served(domain: &Domain) {
    domain.pause().await.expect("it is served");
    domain.resume().await.expect("it is served");
    assert!(domain.query_status().await.expect("it is served").running);
}

async fn a_full_state_directory_refuses_what_must_be_kept_and_nothing_else(rig: Rig) -> Completion {
    let Some((_dir, disk, rig)) = small(&rig, "state") else {
        return cannot_mount();
    };
    let web = started(&rig, "web").await.expect("it starts");
    let kept = rig
        .driver
        .define(rig.empty("kept"))
        .await
        .expect("there is room");
    let filler = disk.fill();
    let says = "No space left";
    let error = rig
        .driver
        .define(rig.empty("next"))
        .await
        .expect_err("there is no room");
    is_of_the_disk(&error, says);
    assert!(rig.driver.by_name("next").is_none());
    let error = kept
        .set_autostart(true)
        .await
        .expect_err("there is no room");
    is_of_the_disk(&error, says);
    assert!(
        !kept.records().autostart,
        "what is not written down is not so"
    );
    is_served(&web).await;
    kept.start()
        .await
        .expect("what runs is written down elsewhere");
    let another = started(&rig, "another").await.expect("as is this");
    is_served(&another).await;
    fs::remove_file(filler).expect("it is there");
    rig.driver
        .define(rig.empty("next"))
        .await
        .expect("there is room");
    drop((web, kept, another));
    let rig = Rig::again(rig.leave().await);
    let kept = rig.driver.by_name("kept").expect("it is kept");
    assert!(kept.records().persistent && !kept.records().autostart);
    assert!(rig.driver.by_name("next").is_some());
    Completion::Completed
}

async fn a_full_run_directory_refuses_a_start_and_a_save_and_harms_no_guest_that_runs(
    rig: Rig,
) -> Completion {
    let Some((dir, disk, rig)) = small(&rig, "run") else {
        return cannot_mount();
    };
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let other = started(&rig, "other").await.expect("it starts");
    let filler = disk.fill();
    let says = "No space left";
    let error = started(&rig, "next").await.expect_err("there is no room");
    is_of_the_disk(&error, says);
    assert!(rig.driver.by_name("next").is_none());
    let file = dir.path().join("web.save");
    let error = web.save(&file, SaveOptions::default()).await;
    is_of_the_disk(&error.expect_err("it cannot be written down"), says);
    assert!(!file.exists(), "nothing of it is left");
    is_served(&web).await;
    is_served(&other).await;
    other.destroy().await.expect("it ends on a full disk, too");
    assert_eq!(other.observed().run, Run::Off);
    fs::remove_file(filler).expect("it is there");
    started(&rig, "next").await.expect("there is room");
    let saved = web.save(&file, SaveOptions::default()).await;
    saved.expect("there is room");
    Completion::Completed
}

async fn a_state_directory_that_became_read_only_costs_definitions_only(rig: Rig) -> Completion {
    let state = rig.dir.path().join("state");
    let kept = rig.driver.define(rig.empty("kept")).await;
    let kept = kept.expect("it is free");
    let Some(read_only) = ReadOnly::make(state.clone()) else {
        return cannot_mount();
    };
    let says = "Read-only file system";
    let error = rig.driver.define(rig.empty("next")).await;
    is_of_the_disk(&error.expect_err("refused"), says);
    let error = kept.undefine().await.expect_err("refused");
    is_of_the_disk(&error, says);
    assert!(kept.records().persistent);
    kept.start()
        .await
        .expect("what runs is written down elsewhere");
    is_served(&kept).await;
    drop(kept);
    let left = rig.leave().await;
    let transports = left.0.transports().expect("they load");
    let again = driver::Driver::builder(transports, left.1.path().join("run"))
        .state_dir(&state)
        .build();
    let error = again.expect_err("it could keep nothing");
    is_of_the_disk(&error, says);
    let text = format!("{error:#}");
    assert!(text.contains(&*state.to_string_lossy()), "{text}");
    drop(read_only);
    let rig = Rig::again(left);
    let all = rig.driver.recovered(Instant::now() + 20 * SECOND).await;
    assert_eq!(all.expect("it was looked at")[0].became, Became::Kept);
    is_served(&rig.driver.by_name("kept").expect("it is kept")).await;
    Completion::Completed
}

async fn a_run_directory_that_became_read_only_still_lets_guests_be_used_and_ended(
    rig: Rig,
) -> Completion {
    let web = started(&rig, "web").await.expect("it starts");
    let ended = started(&rig, "ended").await.expect("it starts");
    let Some(read_only) = ReadOnly::make(rig.dir.path().join("run")) else {
        return cannot_mount();
    };
    let error = started(&rig, "next").await;
    let error = error.expect_err("it cannot be written down");
    is_of_the_disk(&error, "Read-only file system");
    is_served(&web).await;
    ended.destroy().await.expect("it ends all the same");
    assert_eq!(ended.observed().run, Run::Off);
    drop(read_only);
    drop((web, ended));
    let rig = Rig::again(rig.leave().await);
    let all = rig.driver.recovered(Instant::now() + 20 * SECOND).await;
    let all = all.expect("both were looked at").into_iter();
    let mut all: Vec<_> = all
        .map(|found| (found.name.to_string(), found.became))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let wanted = [
        ("ended".to_owned(), Became::Ended),
        ("web".to_owned(), Became::Kept),
    ];
    assert_eq!(all, wanted);
    Completion::Completed
}
