//! A QEMU that somebody else started, taken in by the address of its monitor.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use driver::{ErrorKind, Run};
use tokio::time::{Instant, sleep};

use crate::harness::tests;
use crate::rig::Rig;

tests! {
    a_foreign_qemu_is_queried_paused_and_destroyed,
    the_death_of_a_foreign_qemu_is_noticed,
    an_attached_guest_that_is_gone_cannot_be_started,
    letting_an_attached_guest_go_frees_its_monitor,
}

const SECOND: Duration = Duration::from_secs(1);

/// A QEMU of our own making, as another tool would start it.
struct Foreign {
    child: Child,
    socket: PathBuf,
}

impl Foreign {
    async fn start(rig: &Rig, folder: &Path) -> Self {
        let socket = folder.join("qmp.sock");
        let mut command = Command::new(&rig.env.qemu);
        command.args([
            "-M",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-name",
            "foreign",
        ]);
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let foreign = Self {
            child: child.expect("QEMU starts"),
            socket,
        };
        let deadline = Instant::now() + 10 * SECOND;
        while !foreign.socket.exists() {
            assert!(Instant::now() < deadline, "QEMU makes its socket");
            sleep(Duration::from_millis(5)).await;
        }
        foreign
    }

    fn target(&self) -> String {
        format!("unix:{}", self.socket.display())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // It may have ended already; it is reaped either way.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

async fn a_foreign_qemu_is_queried_paused_and_destroyed(rig: Rig) {
    let mut foreign = Foreign::start(&rig, rig.dir.path()).await;
    let domain = rig
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
    assert_eq!(domain.name(), "foreign");
    assert_eq!(
        domain.observed().pid,
        Some(foreign.child.id()),
        "its process is known, from the socket"
    );
    assert!(domain.query_status().await.expect("it answers").running);
    domain.pause().await.expect("it pauses");
    assert_eq!(domain.observed().run.name(), "paused");
    domain.destroy().await.expect("it ends");
    let status = foreign.child.wait().expect("it is our child");
    assert!(status.success(), "asked to end, it did: {status}");
}

async fn the_death_of_a_foreign_qemu_is_noticed(rig: Rig) {
    let mut foreign = Foreign::start(&rig, rig.dir.path()).await;
    let domain = rig
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
    foreign.child.kill().expect("it can be killed");
    let off = domain
        .wait_for(
            |observed| observed.run == Run::Off,
            Instant::now() + 5 * SECOND,
        )
        .await;
    off.expect("it is noticed");
}

async fn an_attached_guest_that_is_gone_cannot_be_started(rig: Rig) {
    let foreign = Foreign::start(&rig, rig.dir.path()).await;
    let domain = rig
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
    domain.destroy().await.expect("it ends");
    let error = domain.start().await.expect_err("nobody knows how");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    domain.remove().await.expect("it can be forgotten");
    assert!(rig.driver.by_name("foreign").is_none());
    assert_eq!(
        domain.query_status().await.expect_err("removed").kind(),
        ErrorKind::Closed
    );
}

async fn letting_an_attached_guest_go_frees_its_monitor(rig: Rig) {
    let foreign = Foreign::start(&rig, rig.dir.path()).await;
    let first = Rig::new(&rig.env);
    let domain = first
        .driver
        .attach(foreign.target())
        .await
        .expect("it is taken in");
    let taken = rig
        .driver
        .attach(foreign.target())
        .deadline(SECOND)
        .await
        .expect_err("QEMU serves one at a time");
    assert_eq!(taken.kind(), ErrorKind::Monitor, "{taken:#}");
    drop(domain);
    first
        .driver
        .shutdown(Instant::now() + 5 * SECOND)
        .await
        .expect("nothing runs");
    drop(first);
    rig.driver
        .attach(foreign.target())
        .await
        .expect("the next one is served");
}
