//! The driver's examples do what their first lines say, on a real QEMU.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use driver::Guest;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

use crate::harness::tests;
use crate::rig::{Foreign, Rig, Signal, kill};

tests! {
    read_and_update_need_no_guest,
    monitor_and_async_job_attach_to_a_guest_that_runs,
    agent_asks_a_guest_that_it_starts,
    disks_plugs_a_disk_moves_it_and_unplugs_it,
    migration_moves_a_guest,
    migrate_pair_moves_a_guest_between_two_processes_and_back,
    minimal_daemon_starts_a_guest_and_leaves_it_running,
}

const LONG: Duration = Duration::from_secs(120);

/// An example's program. `cargo test --workspace` and `cargo xtask integration` build it beside this one.
fn example(name: &str) -> Command {
    let here = std::env::current_exe().expect("a test has a path");
    let folder = here
        .parent()
        .and_then(|deps| deps.parent())
        .expect("it is in a target folder");
    let path: PathBuf = folder.join("examples").join(name);
    assert!(
        path.exists(),
        "{} is not built: cargo build --package driver --examples",
        path.display()
    );
    let mut command = Command::new(path);
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn output(mut command: Command) -> String {
    let output = timeout(LONG, command.output())
        .await
        .expect("it ends")
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}: {text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn description(rig: &Rig, guest: &Guest) -> PathBuf {
    let path = rig.dir.path().join(format!("{}.json", guest.name));
    fs::write(
        &path,
        serde_json::to_string(guest).expect("it is plain data"),
    )
    .expect("it can be written");
    path
}

async fn read_and_update_need_no_guest(_rig: Rig) {
    assert!(output(example("read")).await.contains("web is off"));
    assert!(
        output(example("update"))
            .await
            .contains("it has Some(1024) MiB")
    );
}

async fn monitor_and_async_job_attach_to_a_guest_that_runs(rig: Rig) {
    let foreign = Foreign::start(&rig).await;
    let asked = |name: &str| {
        let mut command = example(name);
        command.arg(&rig.env.transports).arg(foreign.target());
        output(command)
    };
    assert!(asked("monitor").await.contains("QEMU "));
    assert!(asked("async_job").await.contains("bytes written"));
}

async fn agent_asks_a_guest_that_it_starts(rig: Rig) {
    let mut command = example("agent");
    let run_dir = rig.dir.path().join("run-agent");
    command
        .arg(&rig.env.transports)
        .arg(run_dir)
        .arg(description(&rig, &rig.guest("web")));
    assert!(
        output(command)
            .await
            .contains("the guest says: kernel Some(")
    );
}

async fn disks_plugs_a_disk_moves_it_and_unplugs_it(rig: Rig) {
    let old = crate::plug::image(&rig, "old", 1 << 20);
    let mut command = example("disks");
    command
        .arg(&rig.env.transports)
        .arg(rig.dir.path().join("run-disks"))
        .arg(description(&rig, &rig.guest("web")))
        .arg(old)
        .arg(rig.dir.path().join("new.qcow2"));
    let text = output(command).await;
    for part in [
        "data is in slot Some(0)",
        "ended: Done",
        "new.qcow2",
        "it let go",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

async fn migration_moves_a_guest(rig: Rig) {
    let mut command = example("migration");
    command
        .arg(&rig.env.transports)
        .arg(description(&rig, &rig.guest("web")))
        .env("TMPDIR", rig.dir.path());
    let text = output(command).await;
    assert!(
        text.contains("here it is off, there it is running"),
        "{text}"
    );
}

async fn migrate_pair_moves_a_guest_between_two_processes_and_back(rig: Rig) {
    let mut command = example("migrate_pair");
    command
        .arg(&rig.env.transports)
        .arg(description(&rig, &rig.guest("web")))
        .env("TMPDIR", rig.dir.path());
    let text = output(command).await;
    // Each side shows how far it is, whichever way it goes, and how long the guest stood still.
    let said = |text: &str, side: &str, what: &str| {
        let lines = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix(side));
        lines.filter(|line| line.contains(what)).count()
    };
    let mut rest = &*text;
    for (from, to) in [("here: ", "there: "), ("there: ", "here: ")] {
        let (way, end) = rest.split_once("\nit runs ").expect("it moves");
        assert!(said(way, from, "] 100.0 %, pass ") > 0, "{from} in {text}");
        assert!(said(way, to, "MiB sent") > 0, "{to} in {text}");
        assert!(end.starts_with(to.trim_end_matches(": ")), "{text}");
        let (end, left) = end.split_once('\n').expect("it goes on");
        assert!(end.contains(" ms, give or take "), "{end}");
        assert_eq!(
            said(&text, from, "it stood still for "),
            2,
            "{from} in {text}"
        );
        rest = left;
    }
    let ticks = rig.console("web").ticks();
    assert!(
        ticks.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "no gap, no repeat: {ticks:?}"
    );
}

async fn minimal_daemon_starts_a_guest_and_leaves_it_running(rig: Rig) {
    let mut command = example("minimal_daemon");
    let (run_dir, guest) = (rig.dir.path().join("run-daemon"), rig.empty("web"));
    command
        .arg(&rig.env.transports)
        .arg(&run_dir)
        .arg(description(&rig, &guest))
        .stdout(Stdio::piped());
    let mut daemon = command.spawn().expect("it runs");
    let mut lines = BufReader::new(daemon.stdout.take().expect("it is piped")).lines();
    let first = timeout(LONG, lines.next_line())
        .await
        .expect("it starts")
        .expect("it talks")
        .expect("a line");
    assert!(first.contains("is running"), "{first}");
    kill(daemon.id().expect("it runs"), Signal::TERM);
    let status = timeout(LONG, daemon.wait())
        .await
        .expect("it ends")
        .expect("it is our child");
    assert!(status.success(), "{status}");

    // The guest outlived it, and another daemon takes it in.
    let target = format!(
        "unix:{}",
        run_dir
            .join(guest.uuid.to_string())
            .join("monitor.sock")
            .display()
    );
    let domain = rig.driver.attach(target).await.expect("it is there");
    assert_eq!(domain.uuid(), guest.uuid);
    assert!(domain.query_status().await.expect("it answers").running);
    domain.destroy().await.expect("it ends");
}
