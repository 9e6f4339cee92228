//! Disks and network cards, from the start and plugged in and out while a real guest runs and looks.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use agent_qga::Limits;
use driver::{Disk, DiskFormat, Domain, Guest, Mac, Network, NetworkBackend, StartOptions};

use crate::harness::tests;
use crate::rig::Rig;

tests! {
    a_guest_finds_its_disks_and_cards_where_they_were_put,
}

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

/// A new image of raw bytes.
fn image(rig: &Rig, name: &str, bytes: u64) -> PathBuf {
    let path = rig.dir.path().join(name);
    let file = File::create_new(&path).expect("it is new");
    file.set_len(bytes).expect("a file has room");
    path
}

/// What a command of the guest's shell says.
async fn shell(domain: &Domain, script: &str) -> String {
    let arguments = vec!["-c".to_owned(), script.to_owned()];
    let ran = domain.exec("/bin/sh", arguments, Limits::default());
    let output = ran.deadline(30 * SECOND).await.expect("the agent answers");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

async fn booted(rig: &Rig, guest: Guest) -> Domain {
    let started = rig.driver.start(guest, StartOptions::default()).await;
    let domain = started.expect("it starts");
    let ready = domain.wait_agent().deadline(90 * SECOND).await;
    ready.expect("it boots");
    domain
}

async fn a_guest_finds_its_disks_and_cards_where_they_were_put(rig: Rig) {
    let mac = Mac::new([0x52, 0x54, 0, 1, 2, 3]);
    for machine in ["q35", "pc"] {
        let disk = |name: &str, mib| {
            let path = image(&rig, &format!("{machine}-{name}"), mib * MIB);
            Disk::new(name, path, DiskFormat::Raw)
        };
        let guest = Guest {
            machine: machine.into(),
            disks: vec![
                disk("root", 3),
                Disk {
                    slot: Some(1),
                    read_only: true,
                    ..disk("data", 5)
                },
            ],
            networks: vec![Network {
                mac,
                slot: Some(2),
                ..Network::new("lan", NetworkBackend::User)
            }],
            ..rig.guest(machine)
        };
        let domain = booted(&rig, guest).await;
        let sizes = shell(&domain, "cat /sys/block/vd?/size /sys/block/vd?/ro").await;
        assert_eq!(sizes, "6144\n10240\n0\n1", "{machine}");
        let address = shell(&domain, "cat /sys/class/net/eth0/address").await;
        assert_eq!(address, mac.to_string(), "{machine}");
        domain.destroy().await.expect("it ends");
    }
}
