//! A driver that comes back: guests are found again, what was interrupted is finished or undone, what cannot be read
//! costs nobody else. The kills at any instant are `cargo xtask faults daemon`'s.

#![expect(
    unsafe_code,
    reason = "cuts a connection that belongs to another part of this process"
)]

use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use driver::{Became, Domain, ErrorKind, Notice, Recovered, Run, SaveOptions, StartOptions, What};
use job_core::GoneWhy;
use rustix::net::{Shutdown, SocketAddrUnix};
use tokio::time::Instant;
use uuid::Uuid;

use crate::harness::tests;
use crate::rig::{Rig, Signal, boot, is_clean, kill};

tests! {
    a_guest_that_runs_on_is_found_again_with_its_name_its_process_and_its_definition,
    a_guest_that_ended_while_no_driver_was_there_is_cleaned_up_and_named,
    definitions_are_kept_until_they_are_undefined_or_removed,
    a_guest_with_autostart_runs_with_the_first_driver_only,
    a_silent_qemu_is_not_run_beside_nor_ended_and_is_reached_once_it_answers,
    records_that_make_no_sense_are_set_aside_and_cost_nobody_else,
    a_migration_whose_record_makes_no_sense_refuses_its_own_guest_and_no_other,
    a_store_that_is_full_refuses_a_start_and_harms_no_other_guest,
    a_connection_that_is_lost_alone_comes_back,
    a_save_whose_connection_is_lost_is_undone_once_it_is_back,
    a_hundred_machines_are_back_in_two_seconds,
}

const SECOND: Duration = Duration::from_secs(1);

async fn recovered(rig: &Rig) -> Vec<Recovered> {
    let all = rig.driver.recovered(Instant::now() + 40 * SECOND);
    all.await.expect("all were looked at")
}

async fn started(rig: &Rig, name: &str) -> Domain {
    rig.started(rig.empty(name)).await
}

fn record(rig: &Rig, domain: &Domain) -> PathBuf {
    let name = format!("run/records/{}.json", domain.uuid());
    rig.dir.path().join(name)
}

async fn a_guest_that_runs_on_is_found_again_with_its_name_its_process_and_its_definition(
    rig: Rig,
) {
    let pid = started(&rig, "web").await.observed().pid;
    let rig = Rig::again(rig.leave().await);
    let web = rig.driver.by_name("web").expect("known at once");
    let all = recovered(&rig).await;
    assert_eq!(all.len(), 1);
    assert_eq!(
        (all[0].became.clone(), &*all[0].name),
        (Became::Kept, "web")
    );
    assert!(web.query_status().await.expect("it answers").running);
    assert_eq!(web.observed().pid, pid);
    assert_eq!(
        web.records().definition.as_ref().expect("known").machine,
        "none"
    );
    web.destroy().await.expect("it ends");
    assert!(is_clean(&rig, &web));
    assert!(!record(&rig, &web).exists());
}

async fn a_guest_that_ended_while_no_driver_was_there_is_cleaned_up_and_named(rig: Rig) {
    let web = started(&rig, "web").await;
    let pid = web.observed().pid.expect("it runs");
    drop(web);
    let left = rig.leave().await;
    kill(pid, Signal::KILL);
    let rig = Rig::again(left);
    let all = recovered(&rig).await;
    assert_eq!(all[0].became, Became::Ended);
    let web = rig.driver.by_name("web").expect("it is told of once more");
    assert_eq!(web.observed().run, Run::Off);
    let why = web.observed().ended.expect("it is known to have ended");
    assert!(matches!(why, GoneWhy::Died(_)), "{why}");
    assert!(is_clean(&rig, &web));
    web.start().await.expect("it can be started again");
    drop(web);
    let rig = Rig::again(rig.leave().await);
    assert_eq!(recovered(&rig).await[0].became, Became::Kept);
}

async fn definitions_are_kept_until_they_are_undefined_or_removed(rig: Rig) {
    for name in ["kept", "undefined", "removed"] {
        rig.driver
            .define(rig.empty(name))
            .await
            .expect("it is free");
    }
    let undefined = rig.driver.by_name("undefined").expect("known");
    undefined.undefine().await.expect("it was kept");
    let again = undefined.undefine().await.expect_err("it is not kept");
    assert_eq!(again.kind(), ErrorKind::State);
    drop(undefined);
    let removed = rig.driver.by_name("removed").expect("known");
    removed.remove().await.expect("it is off");
    drop(removed);
    let rig = Rig::again(rig.leave().await);
    let names: Vec<_> = rig
        .driver
        .list()
        .iter()
        .map(|row| row.name.to_string())
        .collect();
    assert_eq!(names, ["kept"]);
    assert_eq!(recovered(&rig).await.len(), 0, "nothing ran");
}

async fn a_guest_with_autostart_runs_with_the_first_driver_only(rig: Rig) {
    let web = rig
        .driver
        .define(rig.empty("web"))
        .await
        .expect("it is free");
    web.set_autostart(true).await.expect("it is kept");
    drop(web);
    // As if the host had been started anew.
    let left = rig.leave().await;
    fs::remove_dir_all(left.1.path().join("run")).expect("it is there");
    let rig = Rig::again(left);
    let web = rig.driver.by_name("web").expect("known");
    let running = web.wait_for(
        |observed| observed.run.is_running(),
        Instant::now() + 10 * SECOND,
    );
    running.await.expect("it was started");
    web.destroy().await.expect("it ends");
    drop(web);
    let rig = Rig::again(rig.leave().await);
    let web = rig.driver.by_name("web").expect("known");
    assert!(web.records().autostart);
    web.query_status().await.expect_err("who ended it meant it");
    assert_eq!(web.observed().run, Run::Off);
}

async fn a_silent_qemu_is_not_run_beside_nor_ended_and_is_reached_once_it_answers(rig: Rig) {
    let pid = started(&rig, "silent")
        .await
        .observed()
        .pid
        .expect("it runs");
    started(&rig, "well").await;
    let left = rig.leave().await;
    kill(pid, Signal::STOP);
    let began = Instant::now();
    let rig = Rig::again(left);
    let well = rig.driver.by_name("well").expect("known");
    let reached = well.wait_for(|observed| observed.run.is_running(), began + 5 * SECOND);
    reached.await.expect("the silent one delays nobody");
    let silent = rig.driver.by_name("silent").expect("known");
    assert_eq!(silent.observed().run, Run::Lost);
    let refused = silent
        .start()
        .deadline(SECOND)
        .await
        .expect_err("it would run twice");
    assert!(
        matches!(refused.kind(), ErrorKind::TimedOut | ErrorKind::State),
        "{refused:#}"
    );
    kill(pid, Signal::CONT);
    let reached = silent.wait_for(|observed| observed.run.is_running(), began + 60 * SECOND);
    reached.await.expect("it is found after all");
    silent.query_status().await.expect("it answers");
    assert_eq!(silent.observed().pid, Some(pid));
}

async fn records_that_make_no_sense_are_set_aside_and_cost_nobody_else(rig: Rig) {
    let mut pids = Vec::new();
    let mut paths = Vec::new();
    for name in ["cut", "zeroed", "newer", "twice", "good"] {
        let domain = started(&rig, name).await;
        pids.push(domain.observed().pid.expect("it runs"));
        paths.push(record(&rig, &domain));
    }
    let left = rig.leave().await;
    let text = fs::read_to_string(&paths[0]).expect("there");
    fs::write(&paths[0], &text[..text.len() / 2]).expect("cut");
    fs::write(&paths[1], vec![0; text.len()]).expect("zeroed");
    let newer = text.replace("\"format\": 2", "\"format\": 3");
    assert_ne!(newer, text);
    fs::write(&paths[2], newer).expect("newer");
    let copy = paths[3].with_file_name("zzzzzzzz-copy.json");
    fs::copy(&paths[3], &copy).expect("twice");

    let rig = Rig::again(left);
    let all = recovered(&rig).await;
    let reasons: Vec<_> = all
        .iter()
        .filter_map(|found| match &found.became {
            Became::SetAside { place, reason } => {
                assert!(fs::exists(place).expect("it can be looked at"), "{place}");
                Some(reason.clone())
            }
            _ => None,
        })
        .collect();
    assert_eq!(reasons.len(), 4, "{all:?}");
    for part in ["is damaged: ", "is of format 3", "is a copy: "] {
        assert!(
            reasons.iter().any(|reason| reason.starts_with(part)),
            "{part}: {reasons:?}"
        );
    }
    for name in ["twice", "good"] {
        let domain = rig.driver.by_name(name).expect("known");
        domain.query_status().await.expect("it is served");
    }
    // Theirs is nobody's now: that is for an operator, who is told where the records are.
    for pid in &pids[..3] {
        kill(*pid, Signal::KILL);
    }
}

async fn a_migration_whose_record_makes_no_sense_refuses_its_own_guest_and_no_other(rig: Rig) {
    let mine = rig.driver.define(rig.empty("mine")).await;
    let uuid = mine.expect("new").uuid();
    let key = format!("{}-source-{uuid}", Uuid::new_v4());
    let path = rig.dir.path().join(format!("state/migrations/{key}.json"));
    rig.driver.define(rig.empty("other")).await.expect("new");
    let left = rig.leave().await;
    fs::write(&path, br#"{"format": 99, "record": 1}"#).expect("written");

    let rig = Rig::again(left);
    let all = recovered(&rig).await;
    let told = all.iter().find(|found| found.uuid == Some(uuid));
    let told = &told.expect("it is told of").became;
    assert!(
        matches!(told, Became::SetAside { place, reason } if place.contains(&key) && reason.contains("format 99")),
        "{told:?}"
    );
    let other = rig.driver.by_name("other").expect("known");
    other.start().await.expect("it is another's");
    other.pause().await.expect("it is served");
    other.resume().await.expect("it is another's");
    let mine = rig.driver.by_name("mine").expect("known");
    let refused = mine.start().await.expect_err("another host may have it");
    assert_eq!(refused.kind(), ErrorKind::State, "{refused:#}");
    assert!(format!("{refused:#}").contains(&key), "{refused:#}");
    fs::remove_file(&path).expect("an operator takes it away");
    mine.start().await.expect("nothing is in doubt any more");
}

async fn a_store_that_is_full_refuses_a_start_and_harms_no_other_guest(rig: Rig) {
    let web = started(&rig, "web").await;
    // Root writes to any folder, but to none that is not there.
    let records = rig.dir.path().join("run/records");
    let away = rig.dir.path().join("away");
    fs::rename(&records, &away).expect("it is there");
    let error = rig
        .driver
        .start(rig.empty("next"), StartOptions::default())
        .await
        .expect_err("what cannot be written down is not begun");
    assert_eq!(error.kind(), ErrorKind::Io, "{error:#}");
    assert!(rig.driver.by_name("next").is_none());
    web.query_status().await.expect("it is served");
    web.pause().await.expect("it is served");
    fs::rename(&away, &records).expect("it comes back");
    started(&rig, "next").await;
}

/// Ends this process' connection to the monitor of that guest, and nothing else.
pub(crate) fn cut(rig: &Rig, domain: &Domain) {
    let path = format!("run/{}/monitor.sock", domain.uuid());
    cut_at(&rig.dir.path().join(path));
}

/// The same, by where that monitor listens.
pub(crate) fn cut_at(path: &Path) {
    let mut cuts = 0;
    for entry in fs::read_dir("/proc/self/fd")
        .expect("there is a list")
        .flatten()
    {
        let number = entry
            .file_name()
            .to_string_lossy()
            .parse()
            .expect("a number");
        // SAFETY: one that was closed since it was listed is refused by the calls below; nothing is closed here.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let is_it = rustix::net::getpeername(fd)
            .ok()
            .flatten()
            .and_then(|address| SocketAddrUnix::try_from(address).ok())
            .is_some_and(|address| address.path_bytes() == Some(path.as_os_str().as_bytes()));
        if is_it {
            rustix::net::shutdown(fd, Shutdown::Both).expect("it is connected");
            cuts += 1;
        }
    }
    assert_eq!(cuts, 1, "one connection");
}

pub(crate) async fn back(domain: &Domain, than: u64) {
    let deadline = Instant::now() + 30 * SECOND;
    let is_back =
        |observed: &driver::Observed| observed.generation > than && observed.run.is_running();
    domain
        .wait_for(is_back, deadline)
        .await
        .expect("it comes back");
}

async fn a_connection_that_is_lost_alone_comes_back(rig: Rig) {
    let web = started(&rig, "web").await;
    let before = web.observed();
    cut(&rig, &web);
    back(&web, before.generation).await;
    assert_eq!(web.observed().pid, before.pid);
    assert!(web.query_status().await.expect("it answers").running);
    web.destroy().await.expect("it ends");
}

async fn a_save_whose_connection_is_lost_is_undone_once_it_is_back(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let before = web.observed();
    let path = rig.dir.path().join("web.save");
    let options = SaveOptions {
        // Slow enough to be cut.
        bandwidth: Some(4 << 20),
        ..SaveOptions::default()
    };
    let mut news = web.subscribe();
    let saving = tokio::spawn(web.save(&path, options).into_future());
    loop {
        if let Notice::News { news, .. } = news.next().await
            && matches!(&news.what, What::Progress { .. })
        {
            break;
        }
    }
    cut(&rig, &web);
    let error = saving
        .await
        .expect("no panic")
        .expect_err("its connection is lost");
    assert_eq!(error.kind(), ErrorKind::Gone, "{error:#}");
    back(&web, before.generation).await;
    loop {
        if let Notice::News { news, .. } = news.next().await
            && let What::Recovered(found) = &news.what
        {
            assert_eq!(found.became, Became::Undone);
            break;
        }
    }
    assert!(!path.exists(), "what was not whole is gone");
    let last = rig.console("web").ticks().last().copied().unwrap_or(0);
    let counts = rig.console("web").past(last, 20 * SECOND).await;
    counts.expect("it goes on");
    let again = web.save(&path, SaveOptions::default()).await;
    again.expect("nothing is in the way");
}

async fn a_hundred_machines_are_back_in_two_seconds(rig: Rig) {
    const MACHINES: usize = 100;
    for number in 0..MACHINES {
        started(&rig, &format!("m{number}")).await;
    }
    let left = rig.leave().await;
    let began = Instant::now();
    let rig = Rig::again(left);
    let all = recovered(&rig).await;
    let took = began.elapsed();
    println!("figure driver-restart-100 {:.3} s", took.as_secs_f64());
    assert!(
        all.iter().all(|found| found.became == Became::Kept),
        "{all:?}"
    );
    assert_eq!(all.len(), MACHINES);
    assert!(took < 2 * SECOND, "{took:?}");
}
