//! Disks and network cards, from the start and plugged in and out while a real guest runs and looks.

#![expect(unsafe_code, reason = "one thread leaves the network of this process")]

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use driver::{
    Disk, DiskFormat, Domain, ErrorKind, Guest, Mac, Network, NetworkBackend, Notice, SaveOptions,
    Scope, StartOptions, Subscription, What,
};
use job_core::JobKind;
use libtest_mimic::Completion;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixStream, unix::OwnedWriteHalf};
use tokio::runtime::Builder;
use tokio::time::{Instant, timeout};

use crate::guests::{shell, up};
use crate::harness::tests;
use crate::rig::{Env, Rig};

tests! {
    a_guest_finds_its_disks_and_cards_where_they_were_put,
    a_disk_and_a_card_come_and_go_while_the_guest_looks,
    a_plug_that_is_refused_leaves_nothing_behind,
    a_guest_that_does_not_let_go_is_waited_for_without_a_job_and_cleaned_up_when_it_does,
    a_part_that_went_while_no_driver_was_there_is_cleaned_up_by_the_next,
    what_was_plugged_in_is_saved_and_restored_and_defined_on_request,
    a_guest_talks_through_a_tap_device_from_the_start_and_plugged_in,
}

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

/// A new image of raw bytes.
pub(crate) fn image(rig: &Rig, name: &str, bytes: u64) -> PathBuf {
    let path = rig.dir.path().join(name);
    let file = File::create_new(&path).expect("it is new");
    file.set_len(bytes).expect("a file has room");
    path
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
        let domain = rig.booted(guest).await;
        let sizes = shell(&domain, "cat /sys/block/vd?/size /sys/block/vd?/ro").await;
        assert_eq!(sizes, "6144\n10240\n0\n1", "{machine}");
        let address = shell(&domain, "cat /sys/class/net/eth0/address").await;
        assert_eq!(address, mac.to_string(), "{machine}");
        domain.destroy().await.expect("it ends");
    }
}

/// Waits until the guest's shell says that.
async fn says(domain: &Domain, script: &str, expected: &str) {
    let looking = async {
        while shell(domain, script).await != expected {
            // The guest tells nobody when it has found something.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let found = timeout(30 * SECOND, looking).await;
    assert!(found.is_ok(), "{script}: {}", shell(domain, script).await);
}

/// What QEMU answers to a question.
pub(crate) async fn ask(domain: &Domain, command: &'static str, arguments: Value) -> Value {
    let deadline = Instant::now() + 10 * SECOND;
    let asked = domain.run("ask", JobKind::Query, deadline, move |mut op| async move {
        op.monitor()?.execute_raw(command, arguments).await
    });
    asked.await.expect("QEMU answers")
}

/// The nodes, devices and backends that QEMU has of a part of that name.
pub(crate) async fn left(domain: &Domain, name: &str) -> Vec<String> {
    let nodes = ask(domain, "query-named-block-nodes", json!({"flat": true})).await;
    let devices = ask(domain, "qom-list", json!({"path": "/machine/peripheral"})).await;
    let all = |list: Value, key: &str| -> Vec<String> {
        let list = list.as_array().expect("a list").clone();
        let names = list
            .iter()
            .filter_map(|one| one[key].as_str().map(str::to_owned));
        names.filter(|found| found.starts_with(name)).collect()
    };
    let info = json!({"command-line": "info network"});
    let info = ask(domain, "human-monitor-command", info).await;
    let backend = format!("{name}-net");
    let backends = info.as_str().expect("a text").contains(&backend);
    let backends = backends.then_some(backend);
    all(nodes, "node-name")
        .into_iter()
        .chain(all(devices, "name"))
        .chain(backends)
        .collect()
}

/// Waits for the news that a part is gone.
async fn gone(events: &mut Subscription, part: &str) {
    let looking = async {
        loop {
            if let Notice::News { news, .. } = events.next().await
                && let What::Unplugged { name, .. } = &news.what
            {
                assert_eq!(&**name, part);
                return;
            }
        }
    };
    timeout(30 * SECOND, looking).await.expect("it is told");
}

async fn a_disk_and_a_card_come_and_go_while_the_guest_looks(rig: Rig) {
    const DISK: &str = "cat /sys/block/vda/size 2>/dev/null || echo none";
    const CARD: &str = "cat /sys/class/net/eth0/address 2>/dev/null || echo none";
    for machine in ["q35", "pc"] {
        let guest = Guest {
            machine: machine.into(),
            ..rig.guest(machine)
        };
        let domain = rig.booted(guest).await;
        let mut events = domain.subscribe();
        let path = image(&rig, &format!("{machine}-data"), 4 * MIB);
        let disk = Disk::new("data", &path, DiskFormat::Raw);
        let disk = domain
            .plug_disk(disk, Scope::Live)
            .await
            .expect("there is room");
        assert_eq!(disk.slot, Some(0), "it is told where it is");
        let card = Network::new("lan", NetworkBackend::User);
        let card = domain
            .plug_network(card, Scope::Live)
            .await
            .expect("there is room");
        says(&domain, DISK, "8192").await;
        says(&domain, CARD, &card.mac.to_string()).await;
        let written = shell(
            &domain,
            "echo found | dd of=/dev/vda conv=fsync 2>/dev/null; echo $?",
        );
        assert_eq!(written.await, "0");
        let bytes = std::fs::read(&path).expect("it is there");
        assert!(bytes.starts_with(b"found"), "the guest wrote to it");
        let live = domain.description().expect("it runs");
        assert_eq!((live.disks.len(), live.networks.len()), (1, 1));
        let next = domain.records().definition.clone().expect("it has one");
        assert_eq!((next.disks.len(), next.networks.len()), (0, 0));

        let began = Instant::now();
        domain
            .unplug_disk("data", Scope::Live)
            .await
            .expect("the guest lets go");
        println!(
            "figure unplug-{machine} {:.3} s",
            began.elapsed().as_secs_f64()
        );
        domain
            .unplug_network("lan", Scope::Live)
            .await
            .expect("the guest lets go");
        gone(&mut events, "data").await;
        gone(&mut events, "lan").await;
        says(&domain, DISK, "none").await;
        says(&domain, CARD, "none").await;
        for name in ["data", "lan"] {
            assert_eq!(left(&domain, name).await, Vec::<String>::new(), "{machine}");
        }
        let live = domain.description().expect("it runs");
        assert_eq!((live.disks.len(), live.networks.len()), (0, 0));
        let disk = domain.plug_disk(disk, Scope::Live).await;
        disk.expect("name, file and slot are free again");
        domain.destroy().await.expect("it ends");
    }
}

async fn a_plug_that_is_refused_leaves_nothing_behind(rig: Rig) {
    let guest = Guest {
        slots: 1,
        ..rig.guest("web")
    };
    let options = StartOptions { paused: true };
    let domain = rig.driver.start(guest, options).await.expect("it starts");
    let plug = async |name: &str, path: PathBuf, format| {
        domain
            .plug_disk(Disk::new(name, path, format), Scope::Live)
            .await
    };
    let missing = rig.dir.path().join("missing");
    let error = plug("data", missing, DiskFormat::Raw)
        .await
        .expect_err("no such file");
    assert_eq!(error.kind(), ErrorKind::Refused, "{error:#}");
    let raw = image(&rig, "raw", MIB);
    // The node of what is no qcow2 is refused; of a card whose backend is there, the device.
    let error = plug("data", raw.clone(), DiskFormat::Qcow2)
        .await
        .expect_err("no qcow2");
    assert_eq!(error.kind(), ErrorKind::Refused, "{error:#}");
    assert_eq!(left(&domain, "data").await, Vec::<String>::new());
    let nowhere = NetworkBackend::Tap("vmw-nowhere".into());
    let error = domain
        .plug_network(Network::new("lan", nowhere), Scope::Live)
        .await;
    let error = error.expect_err("no such device");
    assert_eq!(error.kind(), ErrorKind::Io, "{error:#}");

    plug("data", raw.clone(), DiskFormat::Raw)
        .await
        .expect("nothing is in the way");
    for (name, path, kind) in [
        ("data", "other", ErrorKind::Exists),
        ("more", "other", ErrorKind::State),
        ("d,ta", "other", ErrorKind::State),
    ] {
        let path = rig.dir.path().join(path);
        let error = plug(name, path, DiskFormat::Raw)
            .await
            .expect_err("refused");
        assert_eq!(error.kind(), kind, "{error:#}");
    }
    let error = domain
        .unplug_disk("none", Scope::Live)
        .await
        .expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    assert_eq!(domain.description().expect("it runs").disks.len(), 1);
}

async fn a_guest_that_does_not_let_go_is_waited_for_without_a_job_and_cleaned_up_when_it_does(
    rig: Rig,
) {
    let domain = rig.booted(rig.guest("web")).await;
    let disk = Disk::new("data", image(&rig, "data", MIB), DiskFormat::Raw);
    domain
        .plug_disk(disk, Scope::Live)
        .await
        .expect("there is room");
    says(&domain, "cat /sys/block/vda/size", "2048").await;
    domain.pause().await.expect("it stops");
    let mut events = domain.subscribe();
    let unplug = domain.unplug_disk("data", Scope::Live).deadline(3 * SECOND);
    let unplug = tokio::spawn(unplug.into_future());
    let asking = async {
        while domain
            .history()
            .iter()
            .all(|job| &*job.owner != "unplug-disk")
        {
            tokio::task::yield_now().await;
        }
    };
    timeout(2 * SECOND, asking)
        .await
        .expect("the job ends when the guest was asked");
    assert!(!unplug.is_finished(), "the guest has it still");
    domain.query_status().await.expect("no job is held");
    let error = unplug
        .await
        .expect("no panic")
        .expect_err("it does not answer");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error:#}");
    assert!(
        error.to_string().contains("which it may still do"),
        "{error}"
    );
    let again = domain.unplug_disk("data", Scope::Live).deadline(SECOND);
    let error = again
        .await
        .expect_err("asked twice, it does not answer either");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error:#}");
    assert_eq!(domain.description().expect("it runs").disks.len(), 1);

    domain.resume().await.expect("it goes on");
    gone(&mut events, "data").await;
    assert_eq!(domain.description().expect("it runs").disks.len(), 0);
    assert_eq!(left(&domain, "data").await, Vec::<String>::new());
}

/// Tells a QEMU that no driver has these commands, and waits until it says that. The last is asked again and again where it
/// asks for something: that may be so already, and no event tells then.
pub(crate) async fn until_told(
    socket: PathBuf,
    commands: &[Value],
    is_it: impl Fn(&Value) -> bool,
) {
    let stream = UnixStream::connect(socket).await.expect("QEMU listens");
    let (read, mut write) = stream.into_split();
    let send = async |write: &mut OwnedWriteHalf, command: &Value| {
        let text = command.to_string();
        write.write_all(text.as_bytes()).await.expect("it reads");
    };
    send(&mut write, &json!({"execute": "qmp_capabilities"})).await;
    for command in commands {
        send(&mut write, command).await;
    }
    let last = commands.last().expect("there is one");
    let mut lines = BufReader::new(read).lines();
    let looking = async {
        while let Some(line) = lines.next_line().await.expect("it writes") {
            let message: Value = serde_json::from_str(&line).expect("a message");
            if is_it(&message) {
                return;
            }
            if message["return"].is_array() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                send(&mut write, last).await;
            }
        }
        panic!("QEMU left");
    };
    timeout(30 * SECOND, looking).await.expect("it is told");
}

async fn a_part_that_went_while_no_driver_was_there_is_cleaned_up_by_the_next(rig: Rig) {
    let domain = rig.booted(rig.guest("web")).await;
    let disk = Disk::new("data", image(&rig, "data", MIB), DiskFormat::Raw);
    domain
        .plug_disk(disk, Scope::Live)
        .await
        .expect("there is room");
    let card = Network::new("lan", NetworkBackend::User);
    domain
        .plug_network(card, Scope::Live)
        .await
        .expect("there is room");
    says(&domain, "cat /sys/block/vda/size", "2048").await;
    domain.pause().await.expect("it stops");
    let unplug = domain.unplug_disk("data", Scope::Live).deadline(SECOND);
    unplug.await.expect_err("it is paused");
    let socket = format!("run/{}/monitor.sock", domain.uuid());
    drop(domain);
    let left_behind = rig.leave().await;
    let socket = left_behind.1.path().join(socket);
    until_told(socket, &[json!({"execute": "cont"})], |message| {
        message["event"] == "DEVICE_DELETED" && message["data"]["device"] == "data-device"
    })
    .await;

    let rig = Rig::again(left_behind);
    let domain = rig.driver.by_name("web").expect("known");
    let mut events = domain.subscribe_from(0);
    gone(&mut events, "data").await;
    let live = domain.description().expect("it runs");
    assert_eq!((live.disks.len(), live.networks.len()), (0, 1));
    assert_eq!(left(&domain, "data").await, Vec::<String>::new());
    assert_eq!(left(&domain, "lan").await.len(), 2, "the card stays");
}

async fn what_was_plugged_in_is_saved_and_restored_and_defined_on_request(rig: Rig) {
    let domain = rig
        .driver
        .define(rig.guest("web"))
        .await
        .expect("it is free");
    up(&domain).await;
    let disk = |name: &str| Disk::new(name, image(&rig, name, MIB), DiskFormat::Raw);
    domain
        .plug_disk(disk("gone"), Scope::Live)
        .await
        .expect("there is room");
    domain
        .plug_disk(disk("kept"), Scope::LiveAndDefinition)
        .await
        .expect("there is room");
    domain
        .plug_disk(disk("live"), Scope::Live)
        .await
        .expect("there is room");
    says(&domain, "ls /dev/vd?", "/dev/vda\n/dev/vdb\n/dev/vdc").await;
    domain
        .unplug_disk("gone", Scope::Live)
        .await
        .expect("it lets go");
    let path = rig.dir.path().join("web.save");
    domain
        .save(&path, SaveOptions::default())
        .await
        .expect("it is saved");
    let names = |guest: &Guest| -> Vec<_> {
        guest
            .disks
            .iter()
            .map(|disk| (disk.name.clone(), disk.slot))
            .collect()
    };
    let defined = domain.records().definition.clone().expect("it has one");
    assert_eq!(names(&defined), [("kept".to_owned(), Some(1))]);

    // The state names each device by its place on the bus: it fits only where they are the same.
    let restored = rig.driver.restore(&path).await.expect("it comes back");
    let live = restored.description().expect("it runs");
    let expected = [("kept".to_owned(), Some(1)), ("live".to_owned(), Some(2))];
    assert_eq!(names(&live), expected);
    says(&restored, "ls /dev/vd?", "/dev/vdb\n/dev/vdc").await;
    restored
        .unplug_disk("live", Scope::Live)
        .await
        .expect("it lets go");
    restored.destroy().await.expect("it ends");
    restored.start().await.expect("it starts");
    let live = restored.description().expect("it runs");
    assert_eq!(names(&live), [("kept".to_owned(), Some(1))]);
}

/// A thread in a network of its own, with two tap devices in it; the driver and its QEMU are there, too.
fn in_a_network_of_its_own(env: &Env) -> Completion {
    // SAFETY: only the network is left; no other thread depends on which one this thread is in.
    if unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.is_err() {
        return Completion::ignored_with("a network namespace needs privileges");
    }
    for (name, address) in [("vmw-a", "10.0.1.1/24"), ("vmw-b", "10.0.2.1/24")] {
        for arguments in [
            vec!["tuntap", "add", "dev", name, "mode", "tap"],
            vec!["addr", "add", address, "dev", name],
            vec!["link", "set", name, "up"],
        ] {
            let ran = Command::new("ip").args(arguments).status();
            if !ran.is_ok_and(|status| status.success()) {
                return Completion::ignored_with("tap devices are made by `ip` of iproute2");
            }
        }
    }
    // Its threads are begun by this one, and are where it is.
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let talking = async { talk(Rig::new(env)).await };
    runtime.expect("a runtime can be made").block_on(talking);
    Completion::Completed
}

async fn a_guest_talks_through_a_tap_device_from_the_start_and_plugged_in(rig: Rig) -> Completion {
    let env = rig.env.clone();
    let apart = std::thread::spawn(move || in_a_network_of_its_own(&env));
    let joined = tokio::task::spawn_blocking(move || apart.join()).await;
    joined
        .expect("it is waited for")
        .expect("it does not panic")
}

async fn talk(rig: Rig) {
    let tap = |name: &str| NetworkBackend::Tap(name.into());
    let guest = Guest {
        networks: vec![Network::new("first", tap("vmw-a"))],
        ..rig.guest("web")
    };
    let domain = rig.booted(guest).await;
    let ping = |card: u8| {
        format!(
            "ifconfig eth{card} 10.0.{net}.2 up; ping -c 1 -w 10 10.0.{net}.1 >/dev/null && echo heard",
            net = card + 1
        )
    };
    assert_eq!(shell(&domain, &ping(0)).await, "heard");
    let second = Network::new("second", tap("vmw-b"));
    let second = domain
        .plug_network(second, Scope::Live)
        .await
        .expect("there is room");
    says(
        &domain,
        "cat /sys/class/net/eth1/address",
        &second.mac.to_string(),
    )
    .await;
    assert_eq!(shell(&domain, &ping(1)).await, "heard");
    let taken = domain
        .plug_network(Network::new("third", tap("vmw-b")), Scope::Live)
        .await;
    let error = taken.expect_err("QEMU has it");
    assert_eq!(error.kind(), ErrorKind::Io, "{error:#}");
    domain
        .unplug_network("second", Scope::Live)
        .await
        .expect("the guest lets go");
    let third = domain
        .plug_network(Network::new("third", tap("vmw-b")), Scope::Live)
        .await;
    third.expect("it is free again");
    domain.destroy().await.expect("it ends");
}
