//! The vsock plugin inside a guest, whose kernel has the loopback that this machine's may lack.
//!
//! The programs and the plugin go in on a disk, and what they print comes out through the agent. This very program is
//! one of them: as the [`visitor`] it is the daemon in there.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use driver::{Door, Driver, TransportDial};
use remote_migrate::wire::{AllowList, Options, WirePeer};
use remote_migrate::{Call, Epoch, MigrationId, Peer as _, Reason, Request, Side};
use serde_json::Value;
use tokio::runtime::Builder;
use transport_host::{Peer, Transports};
use uuid::Uuid;

use super::inside::{Inside, Kit};
use super::parts::{ask, dial_once_up, run, script, soon};
use crate::rig::Rig;

/// Tells this program to visit an agent from inside a guest: a target on vsock, and the folder of the plugins.
const VISIT: &str = "VMWRIGHT_VISIT";
/// Tells it to be two daemons in there, one of which knocks at the other over the loopback: the folder of the plugins.
const KNOCK: &str = "VMWRIGHT_KNOCK";
const SERVED: &str = "served by the list, refused by it, and refused by the list of who dialled";
/// In the guest, the plugins lie where root alone can write, and were copied by root.
const PREPARE: &str = "mkdir -p /run/plugins && cp /mnt/plugins/* /run/plugins && chmod 755 /run/plugins /run/plugins/*";
const LIBRARIES: &str = "LD_LIBRARY_PATH=/mnt/lib";

pub(super) async fn the_vsock_plugin_conforms_in_a_guest_whose_kernel_has_the_loopback(rig: Rig) {
    let mut kit = Kit::new(&rig);
    let [conformance, kernel] = built();
    kit.add(&conformance, "conformance");
    kit.add(&kernel, "kernel");
    let inside = boot(&rig, kit, &[]).await;

    let output = inside.run(&format!("{LIBRARIES} /mnt/kernel")).await;
    assert!(output.contains("2 passed; 0 failed; 0 ignored"), "{output}");

    // The kit fills a backlog, and a processor that is emulated takes half a minute for the 4096 of the default.
    inside.run("echo 64 >/proc/sys/net/core/somaxconn").await;
    let judge = "/mnt/conformance /run/plugins/libtransport_vsock.so vsock:1:any --short";
    let output = inside.run(&format!("{LIBRARIES} {judge}")).await;
    assert!(output.contains(" 0 broken"), "{output}");
    // What needs both ends was tried, which this machine itself may not be able to.
    for clause in ["1 MiB both ways", "cancel: a dial", "round after round"] {
        let kept = |line: &str| line.starts_with("kept ") && line.contains(clause);
        assert!(output.lines().any(kept), "{clause}: {output}");
    }
}

pub(super) async fn an_agent_that_listens_on_vsock_is_asked_from_inside_its_guest(rig: Rig) {
    let inside = boot(&rig, visitors(&rig), &[]).await;
    inside.listen_on_vsock(9999).await;
    visit_from(&inside, "vsock:1:9999").await;
}

/// A guest with this kit and the plugin, and these arguments for its QEMU.
pub(super) async fn boot(rig: &Rig, mut kit: Kit, arguments: &[String]) -> Inside {
    let plugin = rig.env.transports.join("libtransport_vsock.so");
    kit.add(&plugin, "plugins/libtransport_vsock.so");
    let inside = Inside::boot(rig, Some(kit), arguments).await;
    inside.run(PREPARE).await;
    inside
}

/// What a visit takes.
pub(super) fn visitors(rig: &Rig) -> Kit {
    let mut kit = Kit::new(rig);
    let this = std::env::current_exe().expect("this program has a path");
    kit.add(&this, "suite");
    kit
}

/// Has the agent at `target` asked from inside the guest, over the plugin in there.
pub(super) async fn visit_from(inside: &Inside, target: &str) {
    let visit = format!("{LIBRARIES} {VISIT}='{target} /run/plugins' /mnt/suite");
    let output = inside.run(&visit).await;
    assert!(output.contains(&format!("over {target}")), "{output}");
}

pub(super) async fn over_vsock_a_daemon_serves_the_contexts_on_its_list_alone(rig: Rig) {
    let inside = boot(&rig, visitors(&rig), &[]).await;
    let knock = format!("{LIBRARIES} {KNOCK}=/run/plugins /mnt/suite");
    let output = inside.run(&knock).await;
    assert!(output.contains(SERVED), "{output}");
}

/// Whether this process was started inside a guest; then it asks the agent it is told of, or knocks at a daemon, and does
/// nothing else.
pub(crate) fn visitor() -> Option<ExitCode> {
    if let Some(plugins) = std::env::var_os(KNOCK) {
        let runtime = Builder::new_current_thread().enable_all().build();
        let knocked = knock(Path::new(&plugins));
        runtime.expect("a runtime can be made").block_on(knocked);
        return Some(ExitCode::SUCCESS);
    }
    let told = std::env::var(VISIT).ok()?;
    let (target, plugins) = told.split_once(' ').expect("a target and a folder");
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime
        .expect("a runtime can be made")
        .block_on(visit(target, Path::new(plugins)));
    Some(ExitCode::SUCCESS)
}

async fn visit(target: &str, plugins: &Path) {
    let transports = loaded(plugins);
    let stream = dial_once_up(&transports, target).await;
    let Peer::Vsock { cid, port } = *stream.peer() else {
        panic!("{:?}", stream.peer())
    };
    assert_eq!(format!("vsock:{cid}:{port}"), target);
    let (agent, version) = ask(stream).await;
    println!("qemu-ga {version} over {target}");
    let output = script(&agent, "hostname", soon()).await;
    assert_eq!(output.stdout, b"guest\n");
}

fn loaded(plugins: &Path) -> Transports {
    let mut builder = Transports::builder();
    let report = builder.load_dir(plugins).expect("the folder can be read");
    assert!(report.refused.is_empty(), "{:?}", report.refused);
    builder.build().expect("names differ")
}

/// What a daemon's door says to one that comes over the loopback, each with a list of contexts.
async fn knock(plugins: &Path) {
    let transports = loaded(plugins);
    let driver = Driver::builder(transports.clone(), "/run/knocked").build();
    let driver = driver.expect("the folder is its own");
    let mut said = Vec::new();
    // The loopback is context 1.
    for (served, believed) in [(1, 1), (7, 1), (1, 7)] {
        let only = |cid| Options::new(AllowList::nobody().cid(cid));
        let listener = transports.listen("vsock:1:any", soon()).await;
        let listener = listener.expect("the kernel has the loopback");
        let there = TransportDial::new(transports.clone(), listener.target());
        driver.serve_migrations(Door::transport(listener), only(served));
        let peer = WirePeer::new(there, only(believed));
        let request = Request {
            migration: MigrationId::random(),
            epoch: Epoch::FIRST,
            domain: Uuid::new_v4(),
            call: Call::Status(Side::Destination),
            run: None,
            downtime: None,
        };
        said.push(match peer.ask(request, soon()).await {
            Ok(answer) => format!("{:?}", answer.reply),
            Err(error) => Reason::of(&error).as_str().to_owned(),
        });
    }
    assert_eq!(said[0], "Unknown");
    let refused = "admit cid 1: the cid is not on the allow-list";
    assert!(said[1].contains("peer reports a fault"), "{said:?}");
    assert!(said[1].ends_with(refused), "{said:?}");
    assert!(
        !said[2].contains("fault") && said[2].ends_with(refused),
        "{said:?}"
    );
    println!("{SERVED}");
}

/// The conformance kit and the vsock plugin's own test of the kernel, as cargo builds them.
fn built() -> [PathBuf; 2] {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let messages = run(Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--message-format=json-render-diagnostics"])
        .args(["--package=transport-host", "--bin=transport-conformance"])
        .args(["--package=transport-vsock", "--test=kernel"]));
    ["transport-conformance", "kernel"].map(|name| {
        let mut programs = messages.lines().filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            let ours = message["target"]["name"] == name;
            ours.then(|| message["executable"].as_str().map(PathBuf::from))?
        });
        let program = programs.next();
        program.unwrap_or_else(|| panic!("cargo built {name}"))
    })
}
