//! A guest in which programs of this machine run: they go in on a disk, and what they print comes out through the agent.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use agent_qga::{Agent, Options, QgaExt as _};
use driver::{AgentChannel, Disk, DiskFormat, Domain, Guest};

use super::parts::{SECOND, run, script, soon, transports};
use crate::rig::Rig;

/// A guest, and its own agent to run things by, over the unix plugin.
pub(super) struct Inside {
    _domain: Domain,
    agent: Agent,
}

impl Inside {
    /// Boots a guest with a kit at `/mnt`, if there is one, and these arguments for its QEMU.
    pub(super) async fn boot(rig: &Rig, kit: Option<Kit>, arguments: &[String]) -> Self {
        let socket = rig.dir.path().join("qga.sock").display().to_string();
        let chardev = format!("socket,id=qga,path={socket},server=on,wait=off");
        let disk = |kit: Kit| Disk::new("kit", kit.image(rig), DiskFormat::Raw);
        let guest = Guest {
            agent: AgentChannel::None,
            extra_arguments: [&agent_port(&chardev), arguments].concat(),
            disks: kit.map(disk).into_iter().collect(),
            ..rig.guest("inside")
        };
        let domain = rig.started(guest).await;
        let (transports, target) = (transports(rig), format!("unix:{socket}"));
        let dialed = transports.dial(&target, soon()).await;
        let agent = Agent::new(dialed.expect("QEMU listens"), Options::default());
        agent.wait_ready(soon()).await.expect("it boots");
        Self {
            _domain: domain,
            agent,
        }
    }

    /// What a script in the guest prints; it succeeds.
    pub(super) async fn run(&self, what: &str) -> String {
        let output = script(&self.agent, what, soon() + 60 * SECOND).await;
        assert!(output.success(), "it exits with {:?}", output.exit_code);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts another agent in the guest, which listens on a port of vsock, on any context id.
    pub(super) async fn listen_on_vsock(&self, port: u32) {
        // The agent refuses -1 and takes the same number without a sign.
        let any = u32::MAX;
        let agent = format!("qemu-ga -m vsock-listen -p {any}:{port} -t /run/ga -f /run/ga/pid");
        let started = format!("mkdir -p /run/ga && ({agent} </dev/null >/dev/null 2>&1 &)");
        self.run(&started).await;
    }
}

/// Arguments for an agent's port on this chardev, which is called `qga`.
pub(super) fn agent_port(chardev: &str) -> [String; 6] {
    let port = "virtserialport,chardev=qga,name=org.qemu.guest_agent.0";
    let bus = "virtio-serial-pci";
    ["-device", bus, "-chardev", chardev, "-device", port].map(str::to_owned)
}

/// A folder that becomes a guest's disk: programs without their debug information, and the libraries they need.
pub(super) struct Kit {
    folder: PathBuf,
    libraries: BTreeMap<String, PathBuf>,
}

impl Kit {
    pub(super) fn new(rig: &Rig) -> Self {
        let folder = rig.dir.path().join("kit");
        fs::create_dir_all(folder.join("lib")).expect("a folder can be made");
        fs::create_dir(folder.join("plugins")).expect("a folder can be made");
        Self {
            folder,
            libraries: BTreeMap::new(),
        }
    }

    /// Adds a program or a library under the name `name`.
    pub(super) fn add(&mut self, file: &Path, name: &str) {
        let needed = run(Command::new("ldd").arg(file));
        for line in needed.lines() {
            // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`; the loader is in the guest's image.
            if let Some((name, place)) = line.trim().split_once(" => ") {
                let path = place.split(" (").next().expect("a first part");
                self.libraries.insert(name.to_owned(), path.into());
            }
        }
        let to = self.folder.join(name);
        run(Command::new("strip").arg("-o").arg(to).arg(file));
    }

    /// An ext4 with all that was added; a guest finds it at `/mnt`.
    pub(super) fn image(self, rig: &Rig) -> PathBuf {
        for (name, path) in &self.libraries {
            fs::copy(path, self.folder.join("lib").join(name)).expect("a library can be copied");
        }
        let image = rig.dir.path().join("kit.raw");
        let mke2fs = ["/usr/sbin/mke2fs", "/sbin/mke2fs"];
        let mke2fs = mke2fs.into_iter().find(|path| Path::new(path).exists());
        let mut make = Command::new(mke2fs.unwrap_or("mke2fs"));
        make.args(["-q", "-F", "-t", "ext4", "-d"]);
        run(make.arg(&self.folder).arg(&image).arg("128M"));
        image
    }
}
