//! The agent over the plugins: out of a guest over tcp, and one on this machine over unix, which is asked for nothing
//! that changes anything.

use std::process::Command;

use agent_qga::{ErrorKind, QgaExt as _};
use driver::{AgentChannel, Guest, StartOptions};
use libtest_mimic::Completion;
use serde_json::json;
use transport_host::Peer;

use super::inside::agent_port;
use super::parts::{Process, Report, ask, dial_once_up, program, script, soon, transports};
use crate::rig::Rig;

/// What the agent on this machine is forbidden to do, should anybody ask.
const FORBIDDEN: &str = "guest-exec,guest-shutdown,guest-suspend-disk,guest-suspend-ram,guest-suspend-hybrid,\
                         guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-fstrim,guest-file-open,\
                         guest-set-time,guest-set-vcpus,guest-set-memory-blocks,guest-set-user-password,\
                         guest-ssh-add-authorized-keys,guest-ssh-remove-authorized-keys";

pub(super) async fn an_agent_behind_a_tcp_chardev_is_asked_and_runs_a_program(rig: Rig) {
    let transports = transports(&rig);
    let report = Report::new(&rig, &transports).await;
    let port = agent_port("socket,id=qga,host=127.0.0.1,port=0,server=on,wait=off");
    let guest = Guest {
        agent: AgentChannel::None,
        extra_arguments: [&port[..], &report.arguments()].concat(),
        ..rig.guest("web")
    };
    let (started, target) = tokio::join!(
        rig.driver.start(guest, StartOptions::default()),
        report.tcp_target("qga")
    );
    let _domain = started.expect("it starts");
    let stream = transports.dial(&target, soon()).await;
    let (agent, version) = ask(stream.expect("QEMU listens")).await;
    println!("qemu-ga {version} in a guest, over {target}");
    let output = script(&agent, "hostname; exit 7", soon()).await;
    assert_eq!(output.exit_code, Some(7));
    assert_eq!(output.stdout, b"guest\n");
}

pub(super) async fn a_qemu_ga_that_listens_on_a_unix_path_is_asked_and_known_by_its_pid(
    rig: Rig,
) -> Completion {
    let Some(program) = program("VMWRIGHT_QGA", "qemu-ga") else {
        return Completion::ignored_with("no qemu-ga is installed on this machine itself");
    };
    let path = rig.dir.path().join("qga");
    let mut command = Command::new(program);
    command.args(["-m", "unix-listen", "-b", FORBIDDEN]);
    command.arg("-p").arg(&path).arg("-t").arg(rig.dir.path());
    command.arg("-f").arg(rig.dir.path().join("qga.pid"));
    let process = Process::start(&mut command);
    let target = format!("unix:{}", path.display());
    let transports = transports(&rig);
    let stream = dial_once_up(&transports, &target).await;
    let Peer::Unix { pid, .. } = *stream.peer() else {
        panic!("{:?}", stream.peer())
    };
    assert_eq!(pid, Some(process.0.id()));
    let (agent, version) = ask(stream).await;
    println!("qemu-ga {version} on this machine, over {target}");
    let exec = agent.execute_raw("guest-exec", json!({ "path": "/bin/true" }), soon());
    let refused = exec.await.expect_err("it is forbidden");
    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    Completion::Completed
}
