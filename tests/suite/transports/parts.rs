//! What the tests of transports share: children that end with the test, a monitor that QEMU dials, and an agent's paces.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent_qga::{Agent, Info, Limits, Options, Output, Ping, Qga, QgaExt as _, SyncDelimited};
use monitor_qmp::command::QueryChardev;
use monitor_qmp::{Monitor, NoFds};
use tokio::time::{sleep, timeout};
use transport_host::{Deadline, Listener, Stream, Transports};

use crate::rig::Rig;

pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) fn soon() -> Deadline {
    Deadline::now() + 60 * SECOND
}

pub(super) fn transports(rig: &Rig) -> Transports {
    rig.env.transports().expect("the staged plugins load")
}

/// A program of ours, ended and reaped with the test.
pub(super) struct Process(pub(super) Child);

impl Process {
    pub(super) fn start(command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap_or_else(|error| panic!("{command:?} starts: {error}")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; it is reaped either way.
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// A machine without a system, called `foreign`, with these arguments beside.
pub(super) fn qemu(rig: &Rig, arguments: &[String]) -> Process {
    let mut command = Command::new(&rig.env.qemu);
    command.args(["-M", "none", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-name", "foreign"]);
    Process::start(command.args(arguments))
}

/// A monitor beside the one under test. QEMU dials it, so nobody has to guess when it is there.
pub(super) struct Report {
    listener: Listener,
}

impl Report {
    pub(super) async fn new(rig: &Rig, transports: &Transports) -> Self {
        let target = format!("unix:{}", rig.dir.path().join("report").display());
        let listener = transports.listen(&target, soon()).await;
        Self {
            listener: listener.expect("the path is free"),
        }
    }

    /// What QEMU is started with for this, after the chardevs that it is to report.
    pub(super) fn arguments(&self) -> [String; 4] {
        let (_, path) = self.listener.target().split_once(':').expect("a target");
        monitor(&format!("socket,id=report,path={path},server=off"))
    }

    /// Where the chardev `label`, which was told to take any port, listens.
    pub(super) async fn tcp_target(&self, label: &str) -> String {
        let stream = self.listener.accept(soon()).await.expect("QEMU dials us");
        let monitor = connect(stream).await;
        let chardevs = monitor.execute(QueryChardev, soon()).await;
        let chardevs = chardevs.expect("it answers");
        let found = chardevs.iter().find(|chardev| chardev.label == label);
        let filename = &found.expect("it has this chardev").filename;
        // `disconnected:tcp:127.0.0.1:40000,server=on`
        let at = filename.find("tcp:").expect("it is a tcp one");
        let target = filename[at..].split(',').next().expect("a first part");
        target.to_owned()
    }
}

/// Arguments for a QMP monitor on this chardev, whose id has to come second.
pub(super) fn monitor(chardev: &str) -> [String; 4] {
    let id = chardev.split(',').find_map(|part| part.strip_prefix("id="));
    let mon = format!("chardev={},mode=control", id.expect("an id"));
    ["-chardev", chardev, "-mon", &mon].map(str::to_owned)
}

/// QMP on a stream of a transport.
pub(super) async fn connect(stream: Stream) -> Monitor {
    let connected = Monitor::connect(NoFds(stream), Default::default(), (), soon()).await;
    connected.expect("QEMU greets")
}

/// Dials a server that tells nobody when it is up.
pub(super) async fn dial_once_up(transports: &Transports, target: &str) -> Stream {
    let dialing = async {
        loop {
            match transports.dial(target, soon()).await {
                Ok(stream) => break stream,
                Err(_) => sleep(SECOND / 20).await,
            }
        }
    };
    timeout(30 * SECOND, dialing).await.expect("it listens")
}

/// Goes through what every agent can do and harms nobody: sync, ping, info. Yields its version.
pub(super) async fn ask(stream: Stream) -> (Agent, String) {
    let agent = Agent::new(stream, Options::default());
    agent.wait_ready(soon()).await.expect("it answers");
    for id in [1, 1 << 40] {
        let answer = agent.execute(SyncDelimited { id }, soon()).await;
        assert_eq!(answer.expect("it answers"), id);
    }
    agent.execute(Ping, soon()).await.expect("it answers");
    let info = agent.execute(Info, soon()).await.expect("it answers");
    assert!(info.supported_commands.len() > 30, "{info:?}");
    (agent, info.version)
}

/// Runs a script in a guest and shows what came of it.
pub(super) async fn script(agent: &dyn Qga, script: &str, deadline: Deadline) -> Output {
    let limits = Limits::default();
    let arguments = ["-c", script];
    let output = agent.run("/bin/sh", &arguments, b"", limits, deadline);
    let output = output.await.expect("the guest runs it");
    println!("in the guest: {script}");
    for bytes in [&output.stdout, &output.stderr] {
        for line in String::from_utf8_lossy(bytes).lines() {
            println!("  {line}");
        }
    }
    println!("  exit code {:?}", output.exit_code);
    output
}

/// What a helper prints, once it has succeeded.
pub(super) fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?} runs: {error}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {complaint}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Where a program lies: in `variable`, on the path, or in a folder that is often not on it.
pub(super) fn program(variable: &str, name: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let mut found = folders.map(|folder| folder.join(OsStr::new(name)));
    named.or_else(|| found.find(|file| file.is_file()))
}
