//! Files and streamed programs, on a fake agent that keeps count of what is open, and lies.
//! On a real agent in `real_agent.rs`.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_qga::{
    Agent, CHUNK, Digest, Error, ErrorKind, GuestFile, Limits, Options, Piece, ProgramStream, Qga,
    QgaExt as _, SyncDelimited, digest_in_guest, download, upload,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::poll;
use serde_json::{Value, json};
use tests::fake_guest::{Act, FakeGuest, Request, Table};
use tokio::runtime::Builder;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(600)
}

/// The files of a guest, and the handles that its agent holds.
#[derive(Default)]
struct Disk {
    files: HashMap<String, Vec<u8>>,
    open: HashMap<i64, (String, usize)>,
    opened: i64,
    /// The most that one write takes.
    short: Option<usize>,
    /// The program ends at the first question about it.
    hasty: bool,
}

impl Disk {
    fn act(&mut self, request: &Request) -> Vec<Act> {
        let asked = &request.arguments;
        let number = |member: &str| asked[member].as_i64().unwrap();
        let answer = match &*request.name {
            "guest-file-open" => {
                let path = asked["path"].as_str().unwrap().to_owned();
                match asked["mode"].as_str() {
                    Some("r") if !self.files.contains_key(&path) => {
                        return vec![Act::refuse("GenericError", "no such file")];
                    }
                    Some("r") => {}
                    _ => drop(self.files.insert(path.clone(), Vec::new())),
                }
                self.opened += 1;
                self.open.insert(self.opened, (path, 0));
                json!(self.opened)
            }
            "guest-file-close" => {
                // Handles count up, so one that was closed already is nobody else's.
                if self.open.remove(&number("handle")).is_none() {
                    return vec![Act::refuse("GenericError", "no such handle")];
                }
                json!({})
            }
            "guest-file-flush" => json!({}),
            "guest-file-seek" => {
                let at = number("offset");
                self.open.get_mut(&number("handle")).unwrap().1 = usize::try_from(at).unwrap();
                json!({ "position": at, "eof": false })
            }
            "guest-file-read" => {
                let (path, at) = self.open.get_mut(&number("handle")).unwrap();
                let rest = &self.files[path][*at..];
                let count = rest.len().min(usize::try_from(number("count")).unwrap());
                *at += count;
                json!({ "count": count, "buf-b64": BASE64.encode(&rest[..count]), "eof": count == 0 })
            }
            "guest-file-write" => {
                let (path, at) = self.open.get_mut(&number("handle")).unwrap();
                let bytes = BASE64.decode(asked["buf-b64"].as_str().unwrap()).unwrap();
                let count = bytes.len().min(self.short.unwrap_or(usize::MAX));
                let file = self.files.get_mut(path).unwrap();
                file.truncate(*at);
                file.extend(&bytes[..count]);
                *at += count;
                json!({ "count": count, "eof": false })
            }
            other => panic!("{other} is no command about files"),
        };
        vec![Act::Return(answer)]
    }
}

type Shared = Arc<Mutex<Disk>>;

/// An agent with a disk, and a shell that makes `/tmp/d` and has a program say what is in it.
fn guest() -> (Arc<dyn Qga>, Shared) {
    let disk = Shared::default();
    (served(table(&disk)), disk)
}

fn served(mut table: Table) -> Arc<dyn Qga> {
    let (stream, mut guest) = FakeGuest::open();
    tokio::spawn(async move { guest.serve(&mut table).await });
    Arc::new(Agent::new(stream, Options::default()))
}

fn table(disk: &Shared) -> Table {
    let mut table = Table::typical();
    for command in ["open", "close", "read", "write", "seek", "flush"] {
        let disk = disk.clone();
        table = table.on_call(&format!("guest-file-{command}"), move |request| {
            disk.lock().unwrap().act(request)
        });
    }
    let files = disk.clone();
    let mut asked = 0;
    table
        .on_call("guest-exec", move |request| {
            let script = request.arguments["arg"][1].as_str().unwrap();
            let mut disk = files.lock().unwrap();
            let pid = if script.contains("mktemp") { 1 } else { 2 };
            if pid == 1 {
                disk.files.insert("/tmp/d/out".into(), Vec::new());
                disk.files.insert("/tmp/d/err".into(), Vec::new());
            }
            vec![Act::Return(json!({ "pid": pid }))]
        })
        .on_call("guest-exec-status", {
            let files = disk.clone();
            move |request| {
                if request.arguments["pid"] == 1 {
                    let folder = BASE64.encode("/tmp/d");
                    let state = json!({ "exited": true, "exitcode": 0, "out-data": folder });
                    return vec![Act::Return(state)];
                }
                asked += 1;
                let mut disk = files.lock().unwrap();
                let said = format!("line {asked}\n");
                disk.files
                    .get_mut("/tmp/d/out")
                    .unwrap()
                    .extend(said.into_bytes());
                let exited = asked == 4 || disk.hasty;
                if exited {
                    disk.files.get_mut("/tmp/d/err").unwrap().extend(b"done\n");
                }
                // As a real agent: an end is told once.
                if asked > 4 {
                    return vec![Act::refuse("GenericError", "PID 2 does not exist")];
                }
                let code = exited.then_some(3);
                vec![Act::Return(json!({ "exited": exited, "exitcode": code }))]
            }
        })
}

/// Waits until no task acts for a file or a program any more.
async fn settled(agent: &Arc<dyn Qga>) {
    while Arc::strong_count(agent) > 1 {
        sleep(Duration::from_millis(1)).await;
    }
}

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| ((at * at) >> 7) as u8).collect()
}

#[tokio::test(start_paused = true)]
async fn what_goes_in_comes_out_whatever_its_size_and_the_agents_appetite() {
    for short in [None, Some(1000)] {
        let (agent, disk) = guest();
        disk.lock().unwrap().short = short;
        for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5] {
            let sent = content(length);
            let up = upload(agent.clone(), "/f", &mut &sent[..], soon())
                .await
                .unwrap();
            assert_eq!((up.bytes, up.sha256), (length as u64, Digest::of(&sent)));
            assert_eq!(disk.lock().unwrap().files["/f"], sent);
            let mut got = Vec::new();
            let expected = Some(up.sha256);
            let down = download(
                agent.clone(),
                "/f",
                &mut got,
                length as u64,
                expected,
                soon(),
            );
            assert_eq!(down.await.unwrap(), up);
            assert!(got == sent, "{length} bytes");
        }
        settled(&agent).await;
        assert!(disk.lock().unwrap().open.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn another_content_another_size_and_a_missing_file_are_told_apart() {
    let (agent, disk) = guest();
    let get = async |path: &'static str, limit, expected| {
        let mut got = Vec::new();
        let copied = download(agent.clone(), path, &mut got, limit, expected, soon()).await;
        copied.map(drop).map_err(|error| error.kind())
    };
    disk.lock().unwrap().files.insert("/f".into(), content(100));
    assert_eq!(get("/f", 100, None).await, Ok(()));
    assert_eq!(get("/f", 99, None).await, Err(ErrorKind::TooLarge));
    let other = Some(Digest::of(b"other"));
    assert_eq!(get("/f", 100, other).await, Err(ErrorKind::DigestMismatch));
    assert_eq!(get("/g", 100, None).await, Err(ErrorKind::Refused));
    settled(&agent).await;
    assert!(
        disk.lock().unwrap().open.is_empty(),
        "closed after an error too"
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_keeps_something_else_is_found_out() {
    let disk = Shared::default();
    let files = disk.clone();
    let table = table(&disk).on_call("guest-file-flush", move |_| {
        files
            .lock()
            .unwrap()
            .files
            .insert("/f".into(), b"something else".to_vec());
        vec![Act::Return(json!({}))]
    });
    let agent = served(table);
    let error = upload(agent, "/f", &mut &b"what was meant"[..], soon()).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::DigestMismatch);
}

#[tokio::test(start_paused = true)]
async fn lies_about_a_file_end_in_a_typed_error() {
    let lies = [
        json!({ "count": 5, "buf-b64": "", "eof": false }),
        json!({ "count": 0, "buf-b64": "", "eof": false }),
        json!({ "count": 3, "buf-b64": BASE64.encode("four"), "eof": false }),
        json!({ "count": 100, "buf-b64": BASE64.encode([0; 100]), "eof": false }),
        json!({ "count": 1, "buf-b64": "!", "eof": false }),
        json!({ "count": -1, "buf-b64": "", "eof": true }),
    ];
    for lie in lies {
        let disk = Shared::default();
        disk.lock()
            .unwrap()
            .files
            .insert("/f".into(), content(1000));
        let table = table(&disk).on("guest-file-read", [Act::Return(lie.clone())]);
        let agent = served(table);
        let mut file = GuestFile::open(agent.clone(), "/f", "r", soon())
            .await
            .unwrap();
        let error = file.read(10, soon()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedReply, "{lie}: {error}");
    }
    for count in [json!(0), json!(1_i64 << 40), Value::Null] {
        let disk = Shared::default();
        let written = json!({ "count": count, "eof": false });
        let table = table(&disk).on("guest-file-write", [Act::Return(written)]);
        let mut file = GuestFile::open(served(table), "/f", "w", soon())
            .await
            .unwrap();
        let error = file.write(b"bytes", soon()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedReply, "{count}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_digest_the_guest_cannot_tell_is_no_digest() {
    for (code, said, kind) in [
        (1, "", ErrorKind::Refused),
        (0, "no digest", ErrorKind::UnexpectedReply),
    ] {
        let state = json!({ "exited": true, "exitcode": code, "out-data": BASE64.encode(said) });
        let table = Table::typical()
            .on("guest-exec", [Act::Return(json!({ "pid": 1 }))])
            .on("guest-exec-status", [Act::Return(state)]);
        let error = digest_in_guest(&*served(table), "/f", soon()).await;
        assert_eq!(error.unwrap_err().kind(), kind);
    }
}

async fn listen(agent: Arc<dyn Qga>, limits: Limits) -> Result<(String, String, i64), Error> {
    let mut program = ProgramStream::start(agent, "make", &["all"], b"", limits, soon()).await?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while let Some(piece) = program.next(soon()).await? {
        match piece {
            Piece::Stdout(bytes) => out.extend(bytes),
            Piece::Stderr(bytes) => err.extend(bytes),
        }
    }
    let end = program.end().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ok((text(out), text(err), end.exit_code.unwrap()))
}

const SAID: &str = "line 1\nline 2\nline 3\nline 4\n";

#[tokio::test(start_paused = true)]
async fn a_program_is_heard_while_it_runs_and_to_its_end() {
    let (agent, disk) = guest();
    let heard = listen(agent.clone(), Limits::default()).await.unwrap();
    assert_eq!(heard, (SAID.into(), "done\n".into(), 3));
    settled(&agent).await;
    assert!(disk.lock().unwrap().open.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_program_that_says_more_than_is_wanted_is_cut_and_flagged() {
    let (agent, _) = guest();
    let limits = Limits {
        stdout: 10,
        stderr: 5,
    };
    let mut program = ProgramStream::start(agent, "make", &[], b"", limits, soon())
        .await
        .unwrap();
    let mut out = Vec::new();
    while let Some(piece) = program.next(soon()).await.unwrap() {
        if let Piece::Stdout(bytes) = piece {
            out.extend(bytes);
        }
    }
    assert_eq!(out, b"line 1\nlin");
    let end = program.end().unwrap();
    assert!(end.stdout_truncated && !end.stderr_truncated, "{end:?}");
}

async fn dropped_after<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    for _ in 0..polls {
        if let std::task::Poll::Ready(done) = poll!(&mut future) {
            return Some(done);
        }
        yield_now().await;
    }
    None
}

fn step_by_step(test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .event_interval(1)
        .build();
    runtime.unwrap().block_on(test);
}

/// Drops `act` after one poll, after two, ... until it ends; after each no file stays open and the
/// next caller is answered.
fn drop_at_every_poll(name: &str, act: impl AsyncFn(Arc<dyn Qga>)) {
    step_by_step(async {
        let mut polls = 0;
        loop {
            let (agent, disk) = guest();
            disk.lock()
                .unwrap()
                .files
                .insert("/f".into(), content(CHUNK + 1));
            // Nobody rests between two polls, so no time passes.
            disk.lock().unwrap().hasty = true;
            let ended = dropped_after(polls, act(agent.clone())).await;
            settled(&agent).await;
            let open = disk.lock().unwrap().open.len();
            assert_eq!(
                open, 0,
                "{name} dropped after {polls} polls left files open"
            );
            for id in 0..100 {
                let answer = agent.execute(SyncDelimited { id }, soon()).await;
                assert_eq!(answer.unwrap(), id, "{name} dropped after {polls} polls");
            }
            if ended.is_some() {
                break;
            }
            polls += 1;
        }
        assert!(polls > 10, "{name} ended after {polls} polls");
    });
}

#[test]
fn a_download_dropped_at_any_poll_leaves_no_file_open() {
    drop_at_every_poll("download", async |agent| {
        let mut got = Vec::new();
        download(agent, "/f", &mut got, u64::MAX, None, soon())
            .await
            .unwrap();
    });
}

#[test]
fn an_upload_dropped_at_any_poll_leaves_no_file_open() {
    let sent = content(CHUNK + 1);
    drop_at_every_poll("upload", async |agent| {
        upload(agent, "/f", &mut &sent[..], soon()).await.unwrap();
    });
}

#[test]
fn a_streamed_program_dropped_at_any_poll_leaves_no_file_open() {
    drop_at_every_poll("stream", async |agent| {
        listen(agent, Limits::default()).await.unwrap();
    });
}

#[test]
fn a_file_dropped_at_any_poll_of_its_life_leaves_none_open() {
    drop_at_every_poll("a file's life", async |agent| {
        let mut file = GuestFile::open(agent, "/f", "r+", soon()).await.unwrap();
        file.write(b"words", soon()).await.unwrap();
        file.seek(0, soon()).await.unwrap();
        file.read(5, soon()).await.unwrap();
        file.flush(soon()).await.unwrap();
        file.close(soon()).await.unwrap();
    });
}

#[test]
fn a_read_dropped_at_any_poll_loses_no_byte() {
    step_by_step(async {
        let sent = content(3000);
        for polls in 0..40 {
            let (agent, disk) = guest();
            disk.lock().unwrap().files.insert("/f".into(), sent.clone());
            let mut file = GuestFile::open(agent, "/f", "r", soon()).await.unwrap();
            let mut got = file.read(1000, soon()).await.unwrap();
            if let Some(read) = dropped_after(polls, file.read(1000, soon())).await {
                got.extend(read.unwrap());
            }
            loop {
                let bytes = file.read(1000, soon()).await.unwrap();
                if bytes.is_empty() {
                    break;
                }
                got.extend(bytes);
            }
            assert!(got == sent, "dropped after {polls} polls");
        }
    });
}

#[test]
fn asking_what_a_program_says_next_dropped_at_any_poll_loses_nothing() {
    step_by_step(async {
        for polls in 1..60 {
            let (agent, _) = guest();
            let start = ProgramStream::start(agent, "make", &[], b"", Limits::default(), soon());
            let mut program = start.await.unwrap();
            let mut out = Vec::new();
            loop {
                // Every other question is dropped.
                let piece = match dropped_after(polls, program.next(soon())).await {
                    Some(piece) => piece.unwrap(),
                    None => program.next(soon()).await.unwrap(),
                };
                match piece {
                    Some(Piece::Stdout(bytes)) => out.extend(bytes),
                    Some(Piece::Stderr(_)) => {}
                    None => break,
                }
            }
            assert_eq!(
                String::from_utf8(out).unwrap(),
                SAID,
                "dropped after {polls} polls"
            );
            assert_eq!(program.end().unwrap().exit_code, Some(3));
        }
    });
}
