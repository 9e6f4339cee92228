//! A guest that floods its serial port and a QEMU that floods its standard error fill no disk, with a driver and without.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use driver::{Domain, Guest, Serial};
use tokio::time::{Instant, sleep};

use crate::harness::tests;
use crate::rig::Rig;

tests! {
    a_guest_that_floods_its_serial_port_fills_two_files_and_no_more,
    a_qemu_that_floods_its_standard_error_fills_two_files_and_no_more,
}

const SECOND: Duration = Duration::from_secs(1);
/// The limit of one log, as `driver` says it.
const LIMIT: u64 = 1 << 20;

fn older(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.1", path.display()))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn kept(path: &Path) -> u64 {
    length(path) + length(&older(path))
}

/// Waits until the log has been turned over, then looks on for a while: neither file passes the limit.
async fn flooded(path: &Path) {
    let deadline = Instant::now() + 90 * SECOND;
    while !older(path).exists() {
        let here = length(path);
        assert!(Instant::now() < deadline, "the flood came to {here} bytes");
        sleep(SECOND / 20).await;
    }
    for _ in 0..20 {
        assert!(length(path) <= LIMIT && length(&older(path)) <= LIMIT);
        sleep(SECOND / 20).await;
    }
}

/// The flood goes on with a driver, without one, and with the next, which ends it.
async fn floods_with_a_driver_and_without(rig: Rig, domain: Domain, path: &Path) {
    flooded(path).await;
    answers(&domain).await;
    drop(domain);
    let left = rig.leave().await;
    let before = kept(path);
    sleep(2 * SECOND).await;
    assert_eq!(kept(path), before, "nobody writes");
    let rig = Rig::again(left);
    let domain = rig.driver.by_name("web").expect("known");
    let found = rig.driver.recovered(Instant::now() + 20 * SECOND).await;
    found.expect("found");
    answers(&domain).await;
    flooded(path).await;
    domain.destroy().await.expect("it ends");
}

async fn answers(domain: &Domain) {
    let asked = domain.query_status().deadline(10 * SECOND).await;
    assert!(asked.expect("QEMU is not held up by what it says").running);
}

async fn a_guest_that_floods_its_serial_port_fills_two_files_and_no_more(rig: Rig) {
    let path = rig.dir.path().join("serial.log");
    let guest = Guest {
        serial: Serial::Log(path.clone()),
        ..rig.guest("web")
    };
    let domain = rig.booted(guest).await;
    let text = fs::read_to_string(&path).expect("the console is kept");
    assert!(text.contains("tick "), "{text}");
    let script = "(while :; do cat /proc/kallsyms; done) >/dev/ttyS0 2>/dev/null </dev/null &";
    let arguments = vec!["-c".into(), script.into()];
    let flood = domain.exec("/bin/sh", arguments, agent_qga::Limits::default());
    flood.await.expect("it begins");
    floods_with_a_driver_and_without(rig, domain, &path).await;
}

async fn a_qemu_that_floods_its_standard_error_fills_two_files_and_no_more(rig: Rig) {
    let guest = Guest {
        // Each block that is run is told of.
        extra_arguments: vec!["-d".into(), "exec,nochain".into()],
        ..rig.guest("web")
    };
    let domain = rig.started(guest).await;
    let path = rig
        .dir
        .path()
        .join("run")
        .join(domain.uuid().to_string())
        .join("qemu.log");
    floods_with_a_driver_and_without(rig, domain, &path).await;
    assert!(!path.exists());
}
