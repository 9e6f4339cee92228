//! Two hosts of one machine: network namespaces with a cable between them, and disks of their own for what must outlive
//! them. Made by iproute2 and mount, as root; all of it goes when the lab is dropped.
//!
//! A dead connection is given up after some three seconds in there (`tcp_retries2=3`), not after a quarter of an hour.
//!
//! All that runs in there takes precedence over the rest of the machine, as on hosts of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The addresses of the two hosts.
pub(crate) const ADDRESSES: [&str; 2] = ["10.111.0.1", "10.111.0.2"];
/// Where their daemons are asked.
pub(crate) const PORT: u16 = 7000;
/// Enough for the records of one guest, and soon full.
const DISK: &str = "size=256k,mode=700";
/// Of the lab's processes, by `nice`.
const PRECEDENCE: i32 = -15;
/// What the names of all our namespaces begin with; the pid of their campaign follows.
const PREFIX: &str = "vmwright-";

pub(crate) struct Lab {
    names: [String; 2],
    disks: Vec<PathBuf>,
}

impl Lab {
    /// Why this machine cannot have one, if it cannot.
    pub(crate) fn lacks() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("network namespaces are made as root".to_owned());
        }
        run("ip", &["netns", "list"]).err()
    }

    pub(crate) fn new() -> Result<Self, String> {
        sweep();
        // What is started from here on inherits it.
        rustix::process::setpriority_process(None, PRECEDENCE)
            .map_err(|error| format!("take precedence: {error}"))?;
        let pid = std::process::id();
        let lab = Self {
            names: ["a", "b"].map(|host| format!("{PREFIX}{pid}-{host}")),
            disks: Vec::new(),
        };
        for name in &lab.names {
            run("ip", &["netns", "add", name])?;
        }
        let [a, b] = [&lab.names[0], &lab.names[1]];
        let cable = [
            "link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b,
        ];
        run("ip", &cable)?;
        for (name, address) in lab.names.iter().zip(ADDRESSES) {
            let address = format!("{address}/24");
            run("ip", &["-n", name, "addr", "add", &address, "dev", "cable"])?;
            run("ip", &["-n", name, "link", "set", "lo", "up"])?;
            run("ip", &["-n", name, "link", "set", "cable", "up"])?;
            let retries = "echo 3 > /proc/sys/net/ipv4/tcp_retries2";
            run("ip", &["netns", "exec", name, "sh", "-c", retries])?;
        }
        Ok(lab)
    }

    /// Cuts the cable at that host, or mends it.
    pub(crate) fn set_cable(&self, host: usize, is_up: bool) -> Result<(), String> {
        let state = if is_up { "up" } else { "down" };
        run(
            "ip",
            &["-n", &self.names[host], "link", "set", "cable", state],
        )
    }

    /// A command to be run on that host, which sees `boot` as the id of its start.
    pub(crate) fn command(&self, host: usize, boot: &Path) -> Command {
        let script = "mount --bind \"$1\" /proc/sys/kernel/random/boot_id && shift && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "slave",
            "sh",
            "-c",
            script,
            "sh",
        ]);
        command
            .arg(boot)
            .args(["ip", "netns", "exec", &self.names[host]]);
        command
    }

    /// Puts a small disk there.
    pub(crate) fn mount(&mut self, place: &Path) -> Result<(), String> {
        fs::create_dir_all(place).map_err(|error| error.to_string())?;
        let path = place.to_str().ok_or("a path of ours is text")?;
        run("mount", &["-t", "tmpfs", "-o", DISK, "vmwright", path])?;
        self.disks.push(place.to_owned());
        Ok(())
    }

    /// Takes the disks away again.
    pub(crate) fn unmount(&mut self) -> Result<(), String> {
        let mut result = Ok(());
        for disk in self.disks.drain(..) {
            let path = disk.to_string_lossy().into_owned();
            let unmounted = run("umount", &[&path]).or_else(|_| run("umount", &["--lazy", &path]));
            result = result.and(unmounted);
        }
        result
    }

    /// The number of that host's namespace, by which a process is known to be on it.
    pub(crate) fn inode(&self, host: usize) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        let place = Path::new("/run/netns").join(&self.names[host]);
        fs::metadata(place).ok().map(|facts| facts.ino())
    }

    /// What is left of the namespaces, for the last look.
    pub(crate) fn leftovers() -> Vec<String> {
        let mine = format!("{PREFIX}{}-", std::process::id());
        let names = namespaces().into_iter();
        names.filter(|name| name.starts_with(&mine)).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A lab that was half made has less to take down.
        let _unmounted = self.unmount();
        for name in &self.names {
            let _removed = run("ip", &["netns", "del", name]);
        }
    }
}

fn namespaces() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.collect()
}

/// Removes the namespaces of campaigns that were killed.
fn sweep() {
    for name in namespaces() {
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _removed = run("ip", &["netns", "del", &name]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let failed = |why: String| format!("{program} {}: {why}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}
