//! A guest whose vsock ends in a unix socket of this machine, as Firecracker and Cloud Hypervisor have it, and QEMU with
//! the device of `vhost-device-vsock`.

use std::path::{Path, PathBuf};
use std::process::Command;

use agent_qga::{ErrorKind, Ping, QgaExt as _};
use libtest_mimic::Completion;
use rustix::io::Errno;
use tokio::io::copy_bidirectional;
use tokio::time::{sleep, timeout};
use transport_host::Peer;

use super::inside::Inside;
use super::parts::{Process, SECOND, ask, dial_once_up, program, script, soon, transports};
use super::vsock::{boot, visit_from, visitors};
use crate::rig::Rig;

const MISSING: &str =
    "no vhost-device-vsock here: cargo install vhost-device-vsock --root target/tools";

pub(super) async fn an_agent_behind_a_vhost_user_vsock_is_asked_through_its_unix_socket(
    rig: Rig,
) -> Completion {
    let Some(device) = Device::start(&rig).await else {
        return Completion::ignored_with(MISSING);
    };
    let inside = Inside::boot(&rig, None, &device.arguments()).await;
    let transports = transports(&rig);
    let target = format!("vsock-unix:{}:9999", device.far);

    // The guest is up, and nobody in it listens yet.
    inside.run("true").await;
    let refused = transports.dial(&target, soon()).await;
    let refused = refused.expect_err("nobody listens");
    assert_eq!(
        refused.os_error(),
        Some(Errno::CONNREFUSED.raw_os_error()),
        "{refused}"
    );

    inside.listen_on_vsock(9999).await;
    let stream = dial_once_up(&transports, &target).await;
    // The kernel knows who carries the bytes, not who is behind.
    let Peer::Unix { pid, .. } = *stream.peer() else {
        panic!("{:?}", stream.peer())
    };
    assert_eq!(pid, Some(device.process.0.id()));
    let (agent, version) = ask(stream).await;
    println!("qemu-ga {version} in a guest, over {target}");
    let output = script(&agent, "hostname; exit 7", soon()).await;
    assert_eq!(output.exit_code, Some(7));
    assert_eq!(output.stdout, b"guest\n");

    drop(device);
    let ended = agent.execute(Ping, soon()).await;
    let ended = ended.expect_err("its device is gone");
    assert_eq!(ended.kind(), ErrorKind::Closed, "{ended}");
    Completion::Completed
}

pub(super) async fn a_guest_that_dials_its_host_is_brought_to_a_unix_listener_of_ours(
    rig: Rig,
) -> Completion {
    let Some(device) = Device::start(&rig).await else {
        return Completion::ignored_with(MISSING);
    };
    let inside = boot(&rig, visitors(&rig), &device.arguments()).await;
    inside.listen_on_vsock(9999).await;
    let transports = transports(&rig);
    let ours = format!("unix:{}_1234", device.far);
    let listener = transports.listen(&ours, soon()).await;
    let listener = listener.expect("the path is free");
    let target = format!("vsock-unix:{}:9999", device.far);
    // What the guest says to us goes back into it, to its agent: real bytes both ways, twice through vsock.
    let back = async {
        let mut guest = listener.accept(soon() + 60 * SECOND).await;
        let guest = guest.as_mut().expect("the guest dials us");
        let mut agent = dial_once_up(&transports, &target).await;
        copy_bidirectional(guest, &mut agent).await
    };
    let (carried, ()) = tokio::join!(back, visit_from(&inside, "vsock:2:1234"));
    let (asked, answered) = carried.expect("both leave in order");
    println!("{asked} bytes to the agent, {answered} from it");
    assert!(asked > 0 && answered > 0);
    Completion::Completed
}

/// The device, and where it ends on this machine.
struct Device {
    process: Process,
    control: String,
    far: String,
}

impl Device {
    /// None where there is no such program.
    async fn start(rig: &Rig) -> Option<Self> {
        let place = |name: &str| rig.dir.path().join(name).display().to_string();
        let (control, far) = (place("vhost"), place("vsock"));
        let vm = format!("guest-cid=3,socket={control},uds-path={far}");
        let process = Process::start(Command::new(device()?).args(["--vm", &vm]));
        let making = async {
            while !Path::new(&control).exists() {
                sleep(SECOND / 100).await;
            }
        };
        timeout(10 * SECOND, making).await.expect("it listens");
        Some(Self {
            process,
            control,
            far,
        })
    }

    /// The device reads and writes the guest's memory, so that has to be shared with it.
    fn arguments(&self) -> [String; 8] {
        [
            "-object",
            "memory-backend-memfd,id=memory,size=256M,share=on",
            "-numa",
            "node,memdev=memory",
            "-chardev",
            &format!("socket,id=vhost,path={}", self.control),
            "-device",
            "vhost-user-vsock-pci,chardev=vhost",
        ]
        .map(str::to_owned)
    }
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
