//! The guest with a disk that the tests of the agent use, and what they do to it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_qga::{
    Agent, FileLeases, FreezeLease, FreezePlan, FreezeState, FsfreezeStatus, GetFsinfo,
    GetHostName, Options, Ping, Qga, QgaExt as _, SyncDelimited, freeze,
};
use driver::{AgentChannel, Disk, DiskFormat, Domain, Guest};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use crate::rig::{Console, Rig, WRITER, ext4};

pub(super) const SECOND: Duration = Duration::from_secs(1);
/// What the guest is called in the store.
pub(super) const NAME: &str = "web/1";

pub(super) fn soon() -> Instant {
    Instant::now() + 60 * SECOND
}

pub(super) fn within(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

/// A guest whose agent's channel is the test's own.
pub(super) struct Bench {
    pub(super) domain: Domain,
    pub(super) socket: PathBuf,
    console: Console,
    pub(super) store: PathBuf,
}

impl Bench {
    pub(super) async fn boot(rig: &Rig) -> Self {
        let socket = rig.dir.path().join("qga.sock");
        let channel = format!("socket,id=qga,path={},server=on,wait=off", socket.display());
        let guest = Guest {
            agent: AgentChannel::None,
            extra_arguments: [
                "-device",
                "virtio-serial-pci",
                "-chardev",
                &channel,
                "-device",
                "virtserialport,chardev=qga,name=org.qemu.guest_agent.0",
            ]
            .map(str::to_owned)
            .to_vec(),
            disks: vec![Disk::new("data", ext4(rig.dir.path()), DiskFormat::Raw)],
            ..rig.guest("web")
        };
        let domain = rig.started(guest).await;
        let bench = Self {
            domain,
            socket,
            console: rig.console("web"),
            store: rig.dir.path().join("leases.json"),
        };
        let agent = bench.connect().await;
        agent.wait_ready(soon()).await.expect("it boots");
        let mounted = agent.execute(GetFsinfo, soon()).await.expect("it answers");
        assert!(
            mounted
                .iter()
                .any(|fs| fs.mountpoint == "/mnt" && fs.kind == "ext4"),
            "{mounted:?}"
        );
        bench
    }

    /// A connection; whoever had the one before has dropped it.
    pub(super) async fn connect(&self) -> Arc<dyn Qga> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .expect("QEMU listens");
        Arc::new(Agent::new(stream, Options::default()))
    }

    pub(super) fn leases(&self) -> Arc<FileLeases> {
        Arc::new(FileLeases::new(&self.store))
    }

    pub(super) async fn freeze(&self, agent: &Arc<dyn Qga>, hold: Duration) -> FreezeLease {
        let plan = FreezePlan::new(NAME, hold);
        let lease = freeze(agent.clone(), self.leases(), plan, soon())
            .await
            .expect("it freezes");
        assert_eq!(lease.file_systems(), 1, "the one ext4");
        lease
    }

    /// Has the guest write to its disk for ever, and tell.
    pub(super) async fn write_on(&self, agent: &Arc<dyn Qga>) {
        exec(agent, WRITER).await;
        self.writes().await;
    }

    /// Waits until the guest writes.
    pub(super) async fn writes(&self) {
        let written = self.console.writes(30 * SECOND).await;
        written.unwrap_or_else(|error| panic!("{error}"));
    }

    /// That the guest runs and does not write.
    pub(super) async fn stands_still(&self) {
        let still = self.console.stands_still().await;
        still.unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Starts a script in the guest and does not wait for its end.
pub(super) async fn exec(agent: &Arc<dyn Qga>, script: &str) {
    let exec = agent_qga::Exec {
        path: "/bin/sh".into(),
        arg: vec!["-c".into(), script.into()],
        ..Default::default()
    };
    agent.execute(exec, soon()).await.expect("it starts");
}

/// Stops the agent a moment from now, for so many seconds.
pub(super) async fn stop_agent(agent: &Arc<dyn Qga>, seconds: u32) {
    let script = format!(
        "(sleep 0.5; kill -STOP $PPID; sleep {seconds}; kill -CONT $PPID) </dev/null >/dev/null 2>&1 &"
    );
    exec(agent, &script).await;
    // Nothing tells when it has stopped, so it is asked until it does not answer.
    let asking = async {
        while agent.execute(Ping, within(200)).await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(30 * SECOND, asking).await.expect("it stops");
}

/// Answers that tell their questions apart.
pub(super) async fn assert_answers_reach_their_callers(agent: &Arc<dyn Qga>) {
    for id in 0..100 {
        assert_eq!(
            agent
                .execute(SyncDelimited { id }, soon())
                .await
                .expect("it answers"),
            id
        );
        if id % 10 == 0 {
            assert_eq!(
                agent
                    .execute(GetHostName, soon())
                    .await
                    .expect("it answers")
                    .host_name,
                "guest"
            );
        }
    }
}

pub(super) async fn status(agent: &Arc<dyn Qga>) -> FreezeState {
    agent
        .execute(FsfreezeStatus, soon())
        .await
        .expect("it answers")
}
