//! Against a real `qemu-ga`, run as a child of the test on a socket in a folder of its own.
//!
//! No guest is needed, which also means that the agent would act on this very machine: whatever
//! shuts down, suspends or freezes is forbidden to it on its command line and never asked here.
//! `VMWRIGHT_QGA` names the agent; else it is looked for in `PATH` and where Debian has it.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::env;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use agent_qga::{
    Agent, CHUNK, Digest, Effect, ErrorKind, FreezeState, FsfreezeStatus, GetFsinfo, GetHostName,
    GetOsinfo, GetTime, GetVcpus, Info, IpKind, Limits, NetworkGetInterfaces, NetworkInterface,
    Options, Piece, Ping, ProgramStream, Qga, QgaExt as _, SyncDelimited, digest_in_guest,
    download, upload,
};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::time::{Instant, sleep, timeout};

/// What could reach beyond the test.
const FORBIDDEN: &str = "guest-shutdown,guest-suspend-ram,guest-suspend-disk,guest-suspend-hybrid,\
    guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-set-time,guest-set-vcpus,\
    guest-set-user-password,guest-fstrim,guest-set-memory-blocks";

fn main() {
    let trials = vec![
        trial(
            "typed_queries_read_what_a_real_agent_answers",
            "",
            typed_queries,
        ),
        trial("a_program_is_run_to_its_end", "", run_to_the_end),
        trial("files_go_in_and_out_with_their_digest", "", files),
        trial("a_program_is_heard_while_it_runs", "", streamed),
        trial("a_refusal_keeps_its_class_and_words", "", refusal),
        trial("what_an_earlier_client_left_is_skipped", "", earlier_client),
        trial(
            "answers_that_nobody_waits_for_are_skipped",
            "",
            stale_answers,
        ),
        trial(
            "calls_dropped_at_any_time_shift_no_answer",
            "",
            dropped_calls,
        ),
        trial(
            "a_stopped_agent_costs_a_deadline_and_no_more",
            "",
            stopped_agent,
        ),
        trial(
            "an_agent_without_delimited_sync_is_synced",
            ",guest-sync-delimited",
            ping,
        ),
        trial("an_agent_that_dies_ends_its_calls", "", dead_agent),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// A test with an agent of its own; ignored, with the reason, where there is none.
fn trial(
    name: &str,
    forbidden: &'static str,
    test: impl AsyncFn(&RealAgent) + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        let Some(program) = find_agent() else {
            return Ok(Completion::ignored_with(
                "qemu-ga not found: install it or set VMWRIGHT_QGA",
            ));
        };
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Failed::from)?;
        runtime.block_on(async {
            let agent = RealAgent::start(&program, forbidden);
            test(&agent).await;
        });
        Ok(Completion::Completed)
    })
}

fn find_agent() -> Option<PathBuf> {
    if let Some(named) = env::var_os("VMWRIGHT_QGA") {
        return Some(named.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join("qemu-ga"))
        .find(|program| program.is_file())
}

/// A running agent; killed with the value, so also when a test panics.
struct RealAgent {
    child: Child,
    folder: TempDir,
}

impl RealAgent {
    fn start(program: &PathBuf, forbidden: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let child = Command::new(program)
            .args(["-m", "unix-listen"])
            .arg("-p")
            .arg(folder.path().join("agent"))
            .arg("-t")
            .arg(folder.path())
            .arg("-f")
            .arg(folder.path().join("pid"))
            .arg("-b")
            .arg(format!("{FORBIDDEN}{forbidden}"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    /// Connects, as soon as it listens. Nothing tells when that is, so it is tried.
    async fn stream(&self) -> UnixStream {
        let path = self.folder.path().join("agent");
        let connect = async {
            loop {
                match UnixStream::connect(&path).await {
                    Ok(stream) => return stream,
                    Err(_) => sleep(Duration::from_millis(5)).await,
                }
            }
        };
        timeout(Duration::from_secs(30), connect)
            .await
            .expect("the agent listens within 30 s")
    }

    async fn connect(&self) -> Agent {
        Agent::new(self.stream().await, Options::default())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for RealAgent {
    fn drop(&mut self) {
        // SIGKILL ends a stopped one too. That it has ended already is no news.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Answers that tell their questions apart: the agent echoes what it is asked.
async fn assert_answers_reach_their_callers(agent: &Agent) {
    for id in 0..100 {
        assert_eq!(
            agent.execute(SyncDelimited { id }, soon()).await.unwrap(),
            id
        );
    }
}

async fn ping(real: &RealAgent) {
    let agent = real.connect().await;
    agent.wait_ready(soon()).await.unwrap();
    for _ in 0..10 {
        agent.execute(Ping, soon()).await.unwrap();
    }
}

async fn typed_queries(real: &RealAgent) {
    let agent = real.connect().await;
    let info = agent.execute(Info, soon()).await.unwrap();
    assert!(
        info.version
            .starts_with(|first: char| first.is_ascii_digit()),
        "{info:?}"
    );
    let find = |name: &str| {
        info.supported_commands
            .iter()
            .find(|command| command.name == name)
            .unwrap()
    };
    assert!(find("guest-ping").enabled && find("guest-ping").success_response);
    assert!(!find("guest-shutdown").enabled && !find("guest-shutdown").success_response);

    let osinfo = agent.execute(GetOsinfo, soon()).await.unwrap();
    assert_eq!(osinfo.machine.as_deref(), Some(env::consts::ARCH));
    let host = agent.execute(GetHostName, soon()).await.unwrap();
    let uname = rustix::system::uname();
    assert_eq!(host.host_name, uname.nodename().to_str().unwrap());
    assert!(agent.execute(GetTime, soon()).await.unwrap() > 1_600_000_000_000_000_000);
    assert_eq!(
        agent.execute(FsfreezeStatus, soon()).await.unwrap(),
        FreezeState::Thawed
    );
    let interfaces = agent.execute(NetworkGetInterfaces, soon()).await.unwrap();
    let is_lo = |interface: &&NetworkInterface| interface.name == "lo";
    let lo = interfaces.iter().find(is_lo).unwrap();
    assert!(lo.statistics.is_some(), "{lo:?}");
    let v4 = lo
        .ip_addresses
        .iter()
        .find(|address| address.ip_address == "127.0.0.1");
    assert_eq!(
        v4.map(|address| (&address.ip_address_type, address.prefix)),
        Some((&IpKind::Ipv4, 8))
    );
    agent.execute(GetFsinfo, soon()).await.unwrap();
    let vcpus = agent.execute(GetVcpus, soon()).await.unwrap();
    assert!(
        vcpus
            .iter()
            .any(|vcpu| vcpu.online && vcpu.can_offline.is_some()),
        "{vcpus:?}"
    );
    let zone = agent
        .execute_raw("guest-get-timezone", Value::Null, soon())
        .await
        .unwrap();
    assert!(zone["offset"].is_i64(), "{zone}");
}

async fn run_to_the_end(real: &RealAgent) {
    let agent = real.connect().await;
    let sh = async |script, input, limits| {
        let args = ["-c", script];
        agent
            .run("/bin/sh", &args, input, limits, soon())
            .await
            .unwrap()
    };

    let output = sh("cat; echo oops >&2; exit 3", b"hello", Limits::default()).await;
    assert_eq!((output.exit_code, output.signal), (Some(3), None));
    assert_eq!(output.stdout, b"hello");
    assert_eq!(output.stderr, b"oops\n");
    assert!(!output.stdout_truncated && !output.stderr_truncated);

    let output = sh("kill -9 $$", b"", Limits::default()).await;
    assert_eq!((output.exit_code, output.signal), (None, Some(9)));

    let limits = Limits {
        stdout: 1000,
        stderr: 0,
    };
    let output = sh("head -c 3000000 /dev/zero", b"", limits).await;
    assert_eq!((output.stdout.len(), output.stdout_truncated), (1000, true));

    let deadline = Instant::now() + Duration::from_millis(300);
    let limits = Limits::default();
    let error = agent
        .run("/bin/sleep", &["5"], b"", limits, deadline)
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::StillRunning, Effect::Unknown)
    );
    assert_answers_reach_their_callers(&agent).await;
}

async fn files(real: &RealAgent) {
    let agent: Arc<dyn Qga> = Arc::new(real.connect().await);
    let path = real.folder.path().join("file");
    let path = path.to_str().unwrap();
    for length in [0, 1, CHUNK, 3 * CHUNK + 1] {
        let sent: Vec<u8> = (0..length).map(|at| ((at * 31) >> 3) as u8).collect();
        let up = upload(agent.clone(), path, &mut &sent[..], soon())
            .await
            .unwrap();
        assert_eq!(up.sha256, Digest::of(&sent));
        assert_eq!(std::fs::read(path).unwrap(), sent);
        assert_eq!(
            digest_in_guest(&*agent, path, soon()).await.unwrap(),
            up.sha256
        );
        let mut got = Vec::new();
        let limit = length as u64;
        let down = download(
            agent.clone(),
            path,
            &mut got,
            limit,
            Some(up.sha256),
            soon(),
        )
        .await;
        assert_eq!(down.unwrap(), up);
        assert!(got == sent);
    }
}

async fn streamed(real: &RealAgent) {
    let agent: Arc<dyn Qga> = Arc::new(real.connect().await);
    let go = real.folder.path().join("go");
    let script =
        "read word; echo $word; while [ ! -e $0 ]; do sleep 0.05; done; echo oops >&2; exit 3";
    let arguments = ["-c", script, go.to_str().unwrap()];
    let limits = Limits::default();
    let start = ProgramStream::start(agent, "/bin/sh", &arguments, b"hello\n", limits, soon());
    let mut program = start.await.unwrap();
    let first = program.next(soon()).await.unwrap();
    assert_eq!(first, Some(Piece::Stdout(b"hello\n".to_vec())));
    let quiet = program
        .next(Instant::now() + Duration::from_millis(200))
        .await;
    assert_eq!(quiet.unwrap_err().kind(), ErrorKind::StillRunning);
    std::fs::write(go, b"").unwrap();
    let last = program.next(soon()).await.unwrap();
    assert_eq!(last, Some(Piece::Stderr(b"oops\n".to_vec())));
    assert_eq!(program.next(soon()).await.unwrap(), None);
    assert_eq!(program.end().unwrap().exit_code, Some(3));
}

async fn refusal(real: &RealAgent) {
    let agent = real.connect().await;
    for missing in ["guest-nonsense", "guest-set-time"] {
        let error = agent
            .execute_raw(missing, Value::Null, soon())
            .await
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::Refused, Effect::Refused)
        );
        assert_eq!(error.class(), Some("CommandNotFound"));
        assert!(error.desc().unwrap().contains(missing), "{error}");
    }
    let run = agent.run("/no/such/program", &[], b"", Limits::default(), soon());
    assert_eq!(run.await.unwrap_err().class(), Some("GenericError"));
}

/// Half requests only: on a listening socket, an agent that cannot deliver an answer exits.
async fn earlier_client(real: &RealAgent) {
    for left in [
        "{\"execute\":\"guest-pi",
        "{\"execute\": \"guest-info\"",
        "[[[\"",
        "{\"a\":\"\\",
    ] {
        let mut client = real.stream().await;
        client.write_all(left.as_bytes()).await.unwrap();
        drop(client);
        let agent = real.connect().await;
        assert_answers_reach_their_callers(&agent).await;
    }
}

async fn stale_answers(real: &RealAgent) {
    let mut stream = real.stream().await;
    let asked =
        "{\"execute\":\"guest-sync\",\"arguments\":{\"id\":77}}{\"execute\":\"guest-nonsense\"}";
    stream.write_all(asked.repeat(50).as_bytes()).await.unwrap();
    let agent = Agent::new(stream, Options::default());
    assert_answers_reach_their_callers(&agent).await;
}

async fn dropped_calls(real: &RealAgent) {
    let agent = real.connect().await;
    for micros in (0..2000).step_by(25) {
        let call = agent.execute_raw("guest-sync", json!({ "id": 77 }), soon());
        let _ = timeout(Duration::from_micros(micros), call).await;
        assert_eq!(
            agent
                .execute(SyncDelimited { id: 5 }, soon())
                .await
                .unwrap(),
            5
        );
    }
    assert_answers_reach_their_callers(&agent).await;
}

async fn stopped_agent(real: &RealAgent) {
    let agent = real.connect().await;
    agent.execute(Ping, soon()).await.unwrap();
    real.signal(Signal::STOP);
    let short = || Instant::now() + Duration::from_millis(200);
    let error = agent
        .execute(SyncDelimited { id: 1 }, short())
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown)
    );
    for id in 2..5 {
        let error = agent
            .execute(SyncDelimited { id }, short())
            .await
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::Unresponsive, Effect::None)
        );
    }
    real.signal(Signal::CONT);
    assert_answers_reach_their_callers(&agent).await;
}

async fn dead_agent(real: &RealAgent) {
    let agent = real.connect().await;
    agent.execute(Ping, soon()).await.unwrap();
    real.signal(Signal::STOP);
    let (result, ()) = tokio::join!(agent.execute(Ping, soon()), async {
        // Whether the command is on its way by then, the machine's load decides.
        sleep(Duration::from_millis(50)).await;
        real.signal(Signal::KILL);
    });
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Closed);
    agent.closed().await;
}
