//! What an agent is asked for: files, programs, and every command it has.

use agent_qga::{
    Agent, CHUNK, Digest, ErrorKind, Fstrim, GetCpustats, GetDisks, GetDiskstats,
    GetMemoryBlockInfo, GetMemoryBlocks, GetTime, GetTimezone, GetUsers, GetVcpus, Info, Limits,
    Options, Piece, ProgramStream, Proof, QgaExt as _, SetTime, ShutdownMode, digest_in_guest,
    download, upload,
};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::bench::{Bench, SECOND, assert_answers_reach_their_callers, exec, soon, within};
use crate::rig::{Rig, boot};

pub(super) async fn files_go_in_and_out_with_their_digest(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    for length in [0, 1, CHUNK + 1, 5 << 20] {
        let sent: Vec<u8> = (0..length)
            .map(|at| (at * 7 + (at >> 9)).to_le_bytes()[0])
            .collect();
        let up = upload(agent.clone(), "/mnt/file", &mut &sent[..], soon())
            .await
            .expect("it goes in");
        assert_eq!((up.bytes, up.sha256), (length as u64, Digest::of(&sent)));
        let theirs = digest_in_guest(&*agent, "/mnt/file", soon())
            .await
            .expect("the guest reads it");
        assert_eq!(theirs, up.sha256, "the guest's own word");
        let mut got = Vec::new();
        let down = download(
            agent.clone(),
            "/mnt/file",
            &mut got,
            1 << 30,
            Some(theirs),
            soon(),
        )
        .await;
        assert_eq!(down.expect("it comes out"), up);
        assert!(got == sent, "{length} bytes");
    }
    let mut nothing = Vec::new();
    let missing = download(agent.clone(), "/mnt/none", &mut nothing, 1, None, soon()).await;
    assert_eq!(
        missing.expect_err("there is none").kind(),
        ErrorKind::Refused
    );
    // A disk that is full refuses; nothing is called done.
    let mut endless = tokio::io::repeat(7);
    let full = upload(
        agent.clone(),
        "/mnt/endless",
        &mut endless,
        Instant::now() + 300 * SECOND,
    )
    .await;
    let full = full.expect_err("16 MiB are not endless");
    assert_eq!(full.kind(), ErrorKind::Refused, "{full}");
}

pub(super) async fn a_program_is_heard_while_it_runs(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    let script = "read word; echo $word; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo oops >&2; seq 1 300000; exit 4";
    let limits = Limits {
        stdout: 64 << 20,
        stderr: 100,
    };
    let arguments = ["-c", script];
    let start = ProgramStream::start(
        agent.clone(),
        "/bin/sh",
        &arguments,
        b"first\n",
        limits,
        soon(),
    );
    let mut program = start.await.expect("it starts");
    let first = program.next(soon()).await.expect("it speaks");
    assert_eq!(
        first,
        Some(Piece::Stdout(b"first\n".to_vec())),
        "while it runs"
    );
    let quiet = program
        .next(within(300))
        .await
        .expect_err("it waits for us");
    assert_eq!(quiet.kind(), ErrorKind::StillRunning);
    exec(&agent, ": >/tmp/go").await;
    let (mut out, mut err) = (String::new(), Vec::new());
    while let Some(piece) = program.next(soon()).await.expect("it speaks") {
        match piece {
            Piece::Stdout(bytes) => out.push_str(&String::from_utf8(bytes).expect("digits")),
            Piece::Stderr(bytes) => err.extend(bytes),
        }
    }
    let lines = out
        .lines()
        .zip(1..)
        .filter(|(line, number)| **line == number.to_string())
        .count();
    assert_eq!((lines, &err[..]), (300_000, &b"oops\n"[..]));
    let end = program.end().expect("it ended");
    assert_eq!((end.exit_code, end.stdout_truncated), (Some(4), false));
    let left = agent
        .run(
            "/bin/sh",
            &["-c", "ls -d /tmp/tmp.* | wc -l"],
            b"",
            Limits::default(),
            soon(),
        )
        .await;
    assert_eq!(
        left.expect("it runs").stdout.trim_ascii(),
        b"0",
        "no folder is left in the guest"
    );

    let missing = ProgramStream::start(
        agent.clone(),
        "/no/such",
        &[],
        b"",
        Limits::default(),
        soon(),
    );
    let mut missing = missing.await.expect("the shell starts");
    while missing.next(soon()).await.expect("it ends").is_some() {}
    assert_eq!(missing.end().and_then(|end| end.exit_code), Some(127));
}

pub(super) async fn an_agent_cuts_output_at_sixteen_mebibytes_and_says_so(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let stream = UnixStream::connect(&bench.socket)
        .await
        .expect("QEMU listens");
    let agent = Agent::new(stream, Options::default().with_max_message(64 << 20));
    let limits = Limits {
        stdout: 64 << 20,
        stderr: 0,
    };
    let deadline = Instant::now() + 180 * SECOND;
    let output = agent
        .run(
            "/bin/head",
            &["-c", "20000000", "/dev/zero"],
            b"",
            limits,
            deadline,
        )
        .await;
    let output = output.expect("it runs");
    assert_eq!(
        (output.stdout.len(), output.stdout_truncated),
        (16 << 20, true)
    );

    // By the default limits the answer is refused instead, and the next one is right.
    drop(agent);
    let agent = bench.connect().await;
    let arguments = ["-c", "20000000", "/dev/zero"];
    let refused = agent
        .run("/bin/head", &arguments, b"", Limits::default(), deadline)
        .await;
    assert_eq!(
        refused.expect_err("it is too large").kind(),
        ErrorKind::TooLarge
    );
    assert_answers_reach_their_callers(&agent).await;
}

pub(super) async fn every_command_of_the_agent_is_typed(rig: Rig) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    let info = agent.execute(Info, soon()).await.expect("it answers");
    let unknown: Vec<_> = info
        .supported_commands
        .iter()
        .filter(|known| !TYPED.contains(&&*known.name))
        .collect();
    assert!(unknown.is_empty(), "not typed: {unknown:?}");
    for command in &info.supported_commands {
        assert_eq!(
            command.success_response,
            !SILENT.contains(&&*command.name),
            "{}",
            command.name
        );
    }

    agent
        .execute(GetTimezone, soon())
        .await
        .expect("it answers");
    agent.execute(GetUsers, soon()).await.expect("it answers");
    agent.execute(GetVcpus, soon()).await.expect("it answers");
    let disks = agent.execute(GetDisks, soon()).await.expect("it answers");
    assert!(
        disks
            .iter()
            .any(|disk| disk.name == "/dev/vda" && !disk.partition),
        "{disks:?}"
    );
    let stats = agent
        .execute(GetDiskstats, soon())
        .await
        .expect("it answers");
    assert!(
        stats
            .iter()
            .any(|disk| disk.name == "vda" && disk.stats.read_ios > Some(0)),
        "{stats:?}"
    );
    let cpus = agent
        .execute(GetCpustats, soon())
        .await
        .expect("it answers");
    assert!(
        cpus.iter()
            .any(|cpu| cpu.kind == "linux" && cpu.user + cpu.system > 0),
        "{cpus:?}"
    );
    let now = agent.execute(GetTime, soon()).await.expect("it answers");
    let later = SetTime {
        time: Some(now + 3_600_000_000_000),
    };
    agent
        .execute(later, soon())
        .await
        .expect("it sets its clock");
    assert!(agent.execute(GetTime, soon()).await.expect("it answers") >= now + 3_600_000_000_000);
    let trimmed = agent
        .execute(Fstrim { minimum: None }, soon())
        .await
        .expect("it trims");
    assert!(
        trimmed.paths.iter().any(|path| path.path == "/mnt"),
        "{trimmed:?}"
    );
    // A guest without hot-plug has no such blocks and says so; either answer is read.
    for refused in [
        agent.execute(GetMemoryBlocks, soon()).await.err(),
        agent.execute(GetMemoryBlockInfo, soon()).await.err(),
    ]
    .into_iter()
    .flatten()
    {
        assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    }
}

pub(super) async fn a_shutdown_answered_by_silence_ends_by_its_event(rig: Rig) {
    // Through the driver: it is the owner of the monitor that sees the proof.
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let proof = domain
        .shutdown(ShutdownMode::Reboot)
        .deadline(60 * SECOND)
        .await
        .expect("it reboots");
    assert_eq!(proof, Proof::Reset);
    domain
        .wait_agent()
        .deadline(60 * SECOND)
        .await
        .expect("it boots again");
    let proof = domain
        .shutdown(ShutdownMode::Powerdown)
        .deadline(60 * SECOND)
        .await
        .expect("it shuts down");
    assert!(
        matches!(proof, Proof::Shutdown | Proof::Closed),
        "{proof:?}"
    );
}

/// The names of typed commands.
macro_rules! names {
    ($($command:ident)*) => { [$(<agent_qga::$command as agent_qga::Command>::NAME),*] };
}

/// The 44 commands of the protocol, each with a struct of its own in `agent_qga`.
const TYPED: [&str; 44] = names! {
    Exec ExecStatus FileClose FileFlush FileOpen FileRead FileSeek FileWrite FsfreezeFreeze
    FsfreezeFreezeList FsfreezeStatus FsfreezeThaw Fstrim GetCpustats GetDevices GetDisks
    GetDiskstats GetFsinfo GetHostName GetLoad GetMemoryBlockInfo GetMemoryBlocks GetOsinfo
    GetTime GetTimezone GetUsers GetVcpus Info NetworkGetInterfaces NetworkGetRoute Ping
    SetMemoryBlocks SetTime SetUserPassword SetVcpus Shutdown SshAddAuthorizedKeys
    SshGetAuthorizedKeys SshRemoveAuthorizedKeys SuspendDisk SuspendHybrid SuspendRam
    SyncDelimited SyncPlain
};

/// Those whose success is silence.
const SILENT: [&str; 4] = [
    "guest-shutdown",
    "guest-suspend-disk",
    "guest-suspend-hybrid",
    "guest-suspend-ram",
];
