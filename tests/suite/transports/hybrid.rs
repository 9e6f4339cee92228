//! A guest whose vsock ends in a unix socket of this machine, as Firecracker and Cloud Hypervisor have it, and QEMU with
//! the device of `vhost-device-vsock`.

use std::path::{Path, PathBuf};
use std::process::Command;

use agent_qga::QgaExt as _;
use libtest_mimic::Completion;
use tokio::time::{sleep, timeout};
use transport_host::Peer;

use super::inside::Inside;
use super::parts::{Process, SECOND, ask, dial_once_up, program, script, soon, transports};
use crate::rig::Rig;

pub(super) async fn an_agent_behind_a_vhost_user_vsock_is_asked_through_its_unix_socket(
    rig: Rig,
) -> Completion {
    let Some(device) = device() else {
        return Completion::ignored_with(
            "no vhost-device-vsock here: cargo install vhost-device-vsock --root target/tools",
        );
    };
    let [control, far] = ["vhost", "vsock"].map(|name| rig.dir.path().join(name));
    let (control, far) = (control.display(), far.display());
    let mut command = Command::new(device);
    command.arg("--vm");
    let process =
        Process::start(command.arg(format!("guest-cid=3,socket={control},uds-path={far}")));
    made(&control.to_string()).await;

    // The device reads and writes the guest's memory, so that has to be shared with it.
    let memory = "memory-backend-memfd,id=memory,size=256M,share=on";
    let chardev = format!("socket,id=vhost,path={control}");
    let arguments = [
        "-object",
        memory,
        "-numa",
        "node,memdev=memory",
        "-chardev",
        &chardev,
        "-device",
        "vhost-user-vsock-pci,chardev=vhost",
    ]
    .map(str::to_owned);
    let inside = Inside::boot(&rig, None, &arguments).await;
    let transports = transports(&rig);
    let target = format!("vsock-unix:{far}:9999");

    // The guest is up, and nobody in it listens yet.
    inside.run("true").await;
    let refused = transports.dial(&target, soon()).await;
    println!("before: {}", refused.expect_err("nobody listens"));

    inside.listen_on_vsock(9999).await;
    let stream = dial_once_up(&transports, &target).await;
    // The kernel knows who carries the bytes, not who is behind.
    let Peer::Unix { pid, .. } = *stream.peer() else {
        panic!("{:?}", stream.peer())
    };
    assert_eq!(pid, Some(process.0.id()));
    let (agent, version) = ask(stream).await;
    println!("qemu-ga {version} in a guest, over {target}");
    let output = script(&agent, "hostname; exit 7", soon()).await;
    assert_eq!(output.exit_code, Some(7));
    assert_eq!(output.stdout, b"guest\n");

    // Its end is ours too.
    drop(process);
    let ended = agent.execute(agent_qga::Ping, soon()).await;
    println!("after: {}", ended.expect_err("the device is gone"));
    Completion::Completed
}

fn device() -> Option<PathBuf> {
    let name = "vhost-device-vsock";
    program("VMWRIGHT_VHOST_VSOCK", name).or_else(|| {
        // target/debug/deps/THIS and target/tools/bin/THAT
        let this = std::env::current_exe().ok()?;
        let built = this.ancestors().nth(3)?.join("tools/bin").join(name);
        built.is_file().then_some(built)
    })
}

async fn made(path: &str) {
    let making = async {
        while !Path::new(path).exists() {
            sleep(SECOND / 100).await;
        }
    };
    timeout(10 * SECOND, making).await.expect("it listens");
}
