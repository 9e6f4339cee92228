//! QMP over the plugins: a QEMU that listens, spoken to directly and taken in by the driver, and a QEMU that dials us.

use monitor_qmp::command::{QueryName, QueryStatus};
use rustix::process::getuid;
use transport_host::{Peer, Stream, Transports};

use super::parts::{Process, Report, connect, monitor, qemu, soon, transports};
use crate::rig::Rig;

pub(super) async fn a_monitor_on_tcp_is_spoken_to_and_then_taken_in_by_the_driver(rig: Rig) {
    let transports = transports(&rig);
    let report = Report::new(&rig, &transports).await;
    let mut arguments = monitor("socket,id=tcp,host=127.0.0.1,port=0,server=on,wait=off").to_vec();
    arguments.extend(report.arguments());
    let process = qemu(&rig, &arguments);
    let target = report.tcp_target("tcp").await;
    let stream = dial(&transports, &target).await;
    let peer = target.strip_prefix("tcp:").expect("a tcp one").parse();
    assert_eq!(*stream.peer(), Peer::Inet(peer.expect("numbers")));
    speak(stream).await;
    // By name too, which the host resolves and the plugin never sees.
    let named = target.replace("127.0.0.1", "localhost");
    speak(dial(&transports, &named).await).await;
    taken_in(&rig, &target, process, None).await;
}

pub(super) async fn a_monitor_on_unix_is_spoken_to_and_then_taken_in_by_the_driver(rig: Rig) {
    let transports = transports(&rig);
    let report = Report::new(&rig, &transports).await;
    let path = rig.dir.path().join("qmp").display().to_string();
    let mut arguments = monitor(&format!("socket,id=unix,path={path},server=on,wait=off")).to_vec();
    arguments.extend(report.arguments());
    arguments.extend(monitor(
        "socket,id=tcp,host=127.0.0.1,port=0,server=on,wait=off",
    ));
    let process = qemu(&rig, &arguments);
    // Its word on one chardev says that all of them are there.
    report.tcp_target("tcp").await;
    let target = format!("unix:{path}");
    let stream = dial(&transports, &target).await;
    assert_is(stream.peer(), process.0.id());
    assert!(stream.passes_fds());
    speak(stream).await;
    let pid = Some(process.0.id());
    taken_in(&rig, &target, process, pid).await;
}

pub(super) async fn a_qemu_that_dials_us_over_unix_is_known_by_uid_and_pid_and_comes_back(
    rig: Rig,
) {
    let transports = transports(&rig);
    let path = rig.dir.path().join("ours").display().to_string();
    let listener = transports.listen(&format!("unix:{path}"), soon()).await;
    let listener = listener.expect("the path is free");
    let chardev = format!("socket,id=dials,path={path},server=off,reconnect=1");
    let mut process = qemu(&rig, &monitor(&chardev));
    // The second time because we left.
    for _ in 0..2 {
        let stream = listener.accept(soon()).await.expect("QEMU dials us");
        assert_is(stream.peer(), process.0.id());
        speak(stream).await;
    }
    drop(listener);
    assert!(!rig.dir.path().join("ours").exists(), "the path was ours");
    let status = process.0.try_wait().expect("it is our child");
    assert_eq!(status, None, "a monitor nobody listens for ends no QEMU");
}

pub(super) async fn a_qemu_that_dials_us_over_tcp_is_served_and_comes_back(rig: Rig) {
    let transports = transports(&rig);
    let listener = transports.listen("tcp:127.0.0.1:0", soon()).await;
    let listener = listener.expect("some port is free");
    let (_, port) = listener.target().rsplit_once(':').expect("a port");
    let chardev = format!("socket,id=dials,host=127.0.0.1,port={port},server=off,reconnect=1");
    let _process = qemu(&rig, &monitor(&chardev));
    for _ in 0..2 {
        let stream = listener.accept(soon()).await.expect("QEMU dials us");
        let Peer::Inet(from) = *stream.peer() else {
            panic!("{:?}", stream.peer())
        };
        assert!(from.ip().is_loopback(), "{from}");
        speak(stream).await;
    }
}

async fn dial(transports: &Transports, target: &str) -> Stream {
    let dialed = transports.dial(target, soon()).await;
    dialed.expect("QEMU listens")
}

fn assert_is(peer: &Peer, process: u32) {
    let Peer::Unix {
        uid,
        pid: Some(pid),
        ..
    } = *peer
    else {
        panic!("{peer:?}")
    };
    assert_eq!((uid, pid), (getuid().as_raw(), process));
}

/// A short conversation, whose end is ours.
async fn speak(stream: Stream) {
    let monitor = connect(stream).await;
    let name = monitor
        .execute(QueryName, soon())
        .await
        .expect("it answers");
    assert_eq!(name.name.as_deref(), Some("foreign"));
    let status = monitor.execute(QueryStatus, soon()).await;
    assert!(status.expect("it answers").running);
    monitor.close();
}

/// By its address alone: asked, paused and ended.
async fn taken_in(rig: &Rig, target: &str, mut process: Process, pid: Option<u32>) {
    let attached = rig.driver.attach(target).await;
    let domain = attached.expect("it is taken in");
    assert_eq!(domain.name(), "foreign");
    assert_eq!(domain.observed().pid, pid);
    assert!(domain.query_status().await.expect("it answers").running);
    domain.pause().await.expect("it pauses");
    assert_eq!(domain.observed().run.name(), "paused");
    domain.destroy().await.expect("it ends");
    let status = process.0.wait().expect("it is our child");
    assert!(status.success(), "asked to end, it did: {status}");
}
