//! A monitor and an agent on a QEMU with a real guest and nobody between: what QEMU tells, and what it does not tell, of
//! a guest that resets, loses its agent or moves away.
//!
//! What needs no guest is in `monitor-qmp/tests/real_qemu.rs`.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent_qga::{Agent, Effect, ErrorKind, Ping, QgaExt as _, SyncDelimited};
use futures::StreamExt as _;
use monitor_qmp::command::{
    Cont, DeviceDel, Migrate, MigrateContinue, MigrateIncoming, MigrateSetCapabilities,
    MigrationCapability, MigrationStatus, QueryChardev, QueryMigrate,
};
use monitor_qmp::{Event, Events, Monitor, Notice, QmpEvent, events};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use crate::harness::tests;
use crate::rig::Rig;

tests! {
    a_port_tells_of_the_guests_side_only_and_its_chardev_tells_those_who_come_late,
    an_agents_port_that_is_unplugged_ends_its_calls_and_its_listener_is_gone,
    an_agents_request_is_lost_when_the_guest_moves_and_the_next_is_answered_right,
    a_reset_is_told_by_the_event_of_the_shutdown,
}

const SECOND: Duration = Duration::from_secs(1);

fn soon() -> Instant {
    Instant::now() + 60 * SECOND
}

fn within(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

/// A QEMU with the guest, its two sockets in the rig's directory; ends with the value.
struct Machine {
    process: Child,
    folder: PathBuf,
}

impl Machine {
    fn start(rig: &Rig, name: &str, more: &[&str]) -> Self {
        let folder = rig.dir.path().join(name);
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        let mut command = Command::new(&rig.env.qemu);
        command.args([
            "-M", "q35", "-accel", "tcg", "-m", "256", "-display", "none",
        ]);
        command.args(["-nodefaults", "-no-user-config", "-serial", "file:console"]);
        command.arg("-kernel").arg(&rig.env.kernel);
        command.arg("-initrd").arg(&rig.env.initrd);
        command.args(["-append", "console=ttyS0 quiet"]);
        command.args(["-qmp", "unix:qmp,server=on,wait=off"]);
        command.args(["-device", "virtio-serial-pci"]);
        command.args(["-chardev", "socket,id=agent,path=agent,server=on,wait=off"]);
        command.args([
            "-device",
            "virtserialport,id=port,chardev=agent,name=org.qemu.guest_agent.0",
        ]);
        let process = command
            .args(more)
            .current_dir(&folder)
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        Self { process, folder }
    }

    async fn dial(&self, name: &str) -> UnixStream {
        let path = self.folder.join(name);
        let connecting = async {
            loop {
                match UnixStream::connect(&path).await {
                    Ok(stream) => return stream,
                    // QEMU makes its socket when it is ready, and nothing tells when that is.
                    Err(_) => sleep(Duration::from_millis(5)).await,
                }
            }
        };
        timeout(20 * SECOND, connecting)
            .await
            .expect("QEMU listens")
    }

    async fn monitor(&self) -> (Monitor, Events) {
        let (queue, stream) = events(1000);
        let connect = Monitor::connect(self.dial("qmp").await, Default::default(), queue, soon());
        (connect.await.expect("QEMU greets"), stream)
    }

    async fn agent(&self) -> Agent {
        Agent::new(self.dial("agent").await, Default::default())
    }

    /// An agent that answers.
    async fn booted(&self) -> Agent {
        let agent = self.agent().await;
        agent.wait_ready(soon()).await.expect("it boots");
        agent
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already; it is reaped either way.
        let _ended = self.process.kill();
        let _status = self.process.wait();
    }
}

/// The next event for which `wanted` says yes.
async fn until(stream: &mut Events, wanted: impl Fn(&QmpEvent) -> bool) -> Event {
    let waiting = async {
        loop {
            match stream.next().await {
                Some(Notice::Event(event)) if wanted(&event.typed()) => return event,
                Some(Notice::Event(_)) => {}
                other => panic!("{other:?} instead of the event"),
            }
        }
    };
    timeout(60 * SECOND, waiting)
        .await
        .expect("the event comes")
}

/// All that was told so far of a port's guest side.
async fn told_of_ports(stream: &mut Events) -> Vec<bool> {
    let mut told = Vec::new();
    while let Ok(Some(Notice::Event(event))) = timeout(SECOND / 2, stream.next()).await {
        if let QmpEvent::VserportChange(change) = event.typed() {
            assert_eq!(change.id, "port");
            told.push(change.open);
        }
    }
    told
}

async fn is_open(monitor: &Monitor) -> bool {
    let all = monitor.execute(QueryChardev, soon()).await;
    let all = all.expect("it answers");
    let agents = all.iter().find(|chardev| chardev.label == "agent");
    agents.expect("it is there").frontend_open
}

async fn sh(agent: &Agent, script: &str) {
    let exec = agent_qga::Exec {
        path: "/bin/sh".into(),
        arg: vec!["-c".into(), script.into()],
        ..Default::default()
    };
    agent.execute(exec, soon()).await.expect("it starts");
}

/// A hundred answers that tell their questions apart.
async fn assert_answers_reach_their_callers(agent: &Agent) {
    for id in 0..100 {
        let answer = agent.execute(SyncDelimited { id }, soon()).await;
        assert_eq!(answer.expect("it answers"), id);
    }
}

async fn a_port_tells_of_the_guests_side_only_and_its_chardev_tells_those_who_come_late(rig: Rig) {
    let machine = Machine::start(&rig, "one", &[]);
    let (monitor, mut stream) = machine.monitor().await;
    let agent = machine.booted().await;
    assert_eq!(
        told_of_ports(&mut stream).await,
        [true],
        "the guest's agent"
    );
    drop(agent);
    for _ in 0..3 {
        // Clients in the host come and go: no event.
        drop(machine.booted().await);
    }
    let agent = machine.booted().await;
    assert_eq!(told_of_ports(&mut stream).await, [false; 0]);
    drop(monitor);
    let (monitor, mut stream) = machine.monitor().await;
    assert_eq!(told_of_ports(&mut stream).await, [false; 0], "no replay");
    assert!(is_open(&monitor).await, "a late client reads it here");

    // Stopped: no event, and it still counts as open.
    sh(
        &agent,
        "(sleep 0.3; kill -STOP $PPID; sleep 3; kill -CONT $PPID) >/dev/null 2>&1 &",
    )
    .await;
    let asking = async { while agent.execute(Ping, within(300)).await.is_ok() {} };
    timeout(30 * SECOND, asking).await.expect("it stops");
    assert!(is_open(&monitor).await);
    assert_answers_reach_their_callers(&agent).await;
    assert_eq!(told_of_ports(&mut stream).await, [false; 0]);

    // Killed and started again by the guest: false, then true, and the connection survives.
    sh(&agent, "sleep 0.2; kill -9 $PPID").await;
    let is_port = |open| move |event: &QmpEvent| matches!(event, QmpEvent::VserportChange(change) if change.open == open);
    until(&mut stream, is_port(false)).await;
    until(&mut stream, is_port(true)).await;
    agent
        .wait_ready(soon())
        .await
        .expect("the next one answers");
    assert_answers_reach_their_callers(&agent).await;
}

async fn an_agents_port_that_is_unplugged_ends_its_calls_and_its_listener_is_gone(rig: Rig) {
    let machine = Machine::start(&rig, "one", &[]);
    let (monitor, mut stream) = machine.monitor().await;
    let agent = machine.booted().await;
    monitor
        .execute(DeviceDel::new("port"), soon())
        .await
        .expect("it begins");
    let gone = |event: &QmpEvent| matches!(event, QmpEvent::DeviceDeleted(path) if path.device.as_deref() == Some("port"));
    until(&mut stream, gone).await;
    let error = agent
        .execute(Ping, within(500))
        .await
        .expect_err("nobody is there");
    assert!(
        matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unresponsive),
        "{error}"
    );
    let removed = monitor.execute_raw("chardev-remove", json!({"id": "agent"}), soon());
    removed.await.expect("nothing uses it any more");
    // What is asked now finds the channel at its end, at once and with nothing done.
    timeout(30 * SECOND, agent_qga::Qga::closed(&agent))
        .await
        .expect("the channel ends");
    let error = agent.execute(Ping, soon()).await.expect_err("it is closed");
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Closed, Effect::None)
    );
    let again = UnixStream::connect(machine.folder.join("agent")).await;
    assert!(again.is_err(), "its listener is gone");
}

async fn an_agents_request_is_lost_when_the_guest_moves_and_the_next_is_answered_right(rig: Rig) {
    let here = Machine::start(&rig, "here", &[]);
    let there = Machine::start(&rig, "there", &["-incoming", "defer"]);
    let agent = here.booted().await;
    let (source, mut told) = here.monitor().await;
    let (destination, _unread) = there.monitor().await;
    let on = |names: &[&'static str]| MigrateSetCapabilities {
        capabilities: names
            .iter()
            .map(|name| MigrationCapability::on(*name))
            .collect(),
    };
    let both = ["events", "return-path"];
    let set = destination.execute(on(&both), soon()).await;
    set.expect("it can");
    let set = on(&[&both[..], &["pause-before-switchover"]].concat());
    source.execute(set, soon()).await.expect("it can");
    let path = rig.dir.path().join("ram");
    let uri = format!("unix:{}", path.display());
    let listen = MigrateIncoming::new(uri.clone());
    destination
        .execute(listen, soon())
        .await
        .expect("it listens");
    source
        .execute(Migrate::new(uri), soon())
        .await
        .expect("it begins");
    let is = |status: &'static str| move |event: &QmpEvent| matches!(event, QmpEvent::Migration(reached) if reached.as_str() == status);
    until(&mut told, is("pre-switchover")).await;

    // The guest stands still here and does not run there yet: what is sent now is heard nowhere.
    let lost = agent
        .execute(SyncDelimited { id: 4_711 }, within(500))
        .await;
    let lost = lost.expect_err("nobody answers");
    assert!(
        matches!(lost.kind(), ErrorKind::TimedOut | ErrorKind::Unresponsive),
        "{lost}"
    );
    let state = MigrationStatus::from("pre-switchover");
    let go = source.execute(MigrateContinue { state }, soon()).await;
    go.expect("it goes on");
    until(&mut told, is("completed")).await;
    let running = async {
        // Its own word: the source's alone would not do.
        while destination
            .execute(QueryMigrate, soon())
            .await
            .expect("it answers")
            .status
            .is_none_or(|status| status.as_str() != "completed")
        {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(30 * SECOND, running).await.expect("it arrives");
    // It runs by itself unless it was paused.
    let _runs = destination.execute(Cont, soon()).await;

    let arrived = there.agent().await;
    let first = arrived.execute(SyncDelimited { id: 5 }, soon()).await;
    assert_eq!(
        first.expect("it answers"),
        5,
        "the first answer is the right one"
    );
    assert_answers_reach_their_callers(&arrived).await;
    let error = agent.execute(Ping, within(500)).await;
    error.expect_err("no answer of the guest comes out here any more");
}

async fn a_reset_is_told_by_the_event_of_the_shutdown(rig: Rig) {
    let machine = Machine::start(&rig, "resets", &["-no-reboot"]);
    let (_monitor, mut stream) = machine.monitor().await;
    let agent = machine.booted().await;
    sh(&agent, "sleep 0.2; echo b > /proc/sysrq-trigger").await;
    let event = until(&mut stream, |event| matches!(event, QmpEvent::Shutdown(_))).await;
    assert_eq!(reason(&event), (true, "guest-reset".to_owned()));
}

/// Whether the guest shut down, and why.
fn reason(event: &Event) -> (bool, String) {
    match event.typed() {
        QmpEvent::Shutdown(shutdown) => (shutdown.guest, shutdown.reason.as_str().to_owned()),
        other => panic!("{other:?}"),
    }
}
