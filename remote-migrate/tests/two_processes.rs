//! Two daemons that are two processes: a guest that pretends moves between them, and the receiving one is
//! killed when it has started the guest and not said so.
//!
//! The other process is this very test, run again for one ignored test of its own. What would be hosts and
//! disks is a folder both see: a file for the copy, and one a record.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use remote_migrate::{
    Begun, Control, Cookie, CopyState, Destination, DestinationHost, ErrorKind, Guest, HostError,
    Journal, JournalError, Limits, Load, MemoryJournal, Meter, MigrationId, Owner, Plan, Prepared,
    Ran, Record, RunState, Side, SourceHost, StartError, Step, Stopped,
    source::Outcome,
    verdict::GuestState,
    wire::{AllowList, Link, Options, PeerIdentity, UnixDial, WirePeer, serve_connection},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::UnixListener,
    process::{Child, Command},
};

const FOLDER: &str = "VMWRIGHT_TEST_FOLDER";
const HANGS: &str = "VMWRIGHT_TEST_HANGS";

/// What both processes see.
#[derive(Clone)]
struct Folder(PathBuf);

impl Folder {
    fn copy(&self) -> CopyState {
        fs::read(self.0.join("copy")).map_or(CopyState::Gone(Ran::Never), |text| {
            serde_json::from_slice(&text).unwrap()
        })
    }

    fn set_copy(&self, copy: CopyState) {
        self.replace("copy", &serde_json::to_vec(&copy).unwrap())
            .unwrap();
    }

    /// Whole or not at all, as a killed process leaves it.
    fn replace(&self, name: &str, text: &[u8]) -> io::Result<()> {
        let next = self.0.join("next");
        fs::write(&next, text)?;
        fs::rename(next, self.0.join(name))
    }

    fn note(&self, line: &str) {
        let notes = self.notes() + line + "\n";
        self.replace("notes", notes.as_bytes()).unwrap();
    }

    fn notes(&self) -> String {
        fs::read_to_string(self.0.join("notes")).unwrap_or_default()
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }

    fn options(&self) -> Options {
        let user = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&self.0).unwrap());
        Options::new(AllowList::nobody().uid(user))
    }
}

fn record_name(migration: MigrationId, side: Side) -> String {
    format!("{migration}.{side}.record")
}

#[async_trait]
impl Journal for Folder {
    async fn store(&self, record: &Record) -> Result<(), JournalError> {
        let text = serde_json::to_vec(record).map_err(JournalError::new)?;
        self.replace(&record_name(record.migration(), record.side()), &text)
            .map_err(JournalError::new)
    }

    async fn load(&self, id: MigrationId, side: Side) -> Result<Option<Record>, JournalError> {
        let all = self.list().await?;
        let mine = |record: &Record| (record.migration(), record.side()) == (id, side);
        Ok(all.into_iter().find(mine))
    }

    async fn list(&self) -> Result<Vec<Record>, JournalError> {
        let files = fs::read_dir(&self.0).map_err(JournalError::new)?;
        let records = files
            .map(|file| file.map(|file| file.path()))
            .filter(|path| match path {
                Ok(path) => path.extension().is_some_and(|end| end == "record"),
                Err(_) => true,
            })
            .map(|path| Ok(serde_json::from_slice(&fs::read(path?)?)?))
            .collect::<io::Result<_>>();
        records.map_err(JournalError::new)
    }

    async fn remove(&self, id: MigrationId, side: Side) -> Result<(), JournalError> {
        match fs::remove_file(self.0.join(record_name(id, side))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(JournalError::new(error)),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl DestinationHost for Folder {
    async fn prepare(&self, _: Step, guest: &Guest) -> Result<Prepared, HostError> {
        assert_eq!(guest.cookie.as_str(), "a guest");
        self.set_copy(CopyState::Incoming);
        Ok(Prepared {
            connect: "there".into(),
            cookie: Cookie::empty(),
        })
    }

    async fn load(&self, _: Step) -> Result<Load, HostError> {
        assert_eq!(self.copy(), CopyState::Complete);
        Ok(Load::Complete)
    }

    async fn start(&self, _: Step, _: RunState) -> Result<(), StartError> {
        self.note("started");
        self.set_copy(CopyState::Started);
        if std::env::var_os(HANGS).is_some() {
            println!("it runs");
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn discard(&self, _: Step) -> Result<(), HostError> {
        assert_ne!(self.copy(), CopyState::Started);
        self.set_copy(CopyState::Gone(Ran::Never));
        Ok(())
    }

    async fn inspect(&self, _: Step) -> Result<CopyState, HostError> {
        Ok(self.copy())
    }
}

/// The source's host: its guest is gone once it is released.
struct Here(Folder);

#[async_trait]
impl SourceHost for Here {
    async fn begin(&self, _: Step) -> Result<Begun, HostError> {
        let cookie = Cookie::new("a guest").map_err(HostError::new)?;
        let run = RunState::Running;
        Ok(Begun { cookie, run })
    }

    async fn perform(&self, _: Step, _: &Prepared, _: &Meter) -> Result<Stopped, HostError> {
        Ok(Stopped::ByHost)
    }

    async fn complete(&self, _: Step, _: &Meter) -> Result<(), HostError> {
        assert_eq!(self.0.copy(), CopyState::Incoming);
        self.0.set_copy(CopyState::Complete);
        Ok(())
    }

    async fn confirm(&self, _: Step, outcome: Outcome) -> Result<(), HostError> {
        self.0.note(&format!("{outcome:?}"));
        Ok(())
    }

    async fn inspect(&self, _: Step) -> Result<GuestState, HostError> {
        Ok(GuestState::Stopped)
    }
}

#[tokio::test]
#[ignore = "the other process of the tests below"]
async fn other_process() {
    let Some(path) = std::env::var_os(FOLDER) else {
        return;
    };
    let folder = Folder(path.into());
    let _old = fs::remove_file(folder.socket());
    let listener = UnixListener::bind(folder.socket()).unwrap();
    let host = Arc::new(folder.clone());
    let destination = Destination::new(host.clone(), host);
    println!("listens");
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let identity = PeerIdentity::of_unix(&stream).unwrap();
        let (destination, options) = (destination.clone(), folder.options());
        tokio::spawn(async move {
            serve_connection(stream, &identity, &destination, &options, &Link::new()).await
        });
    }
}

/// The other process, when it listens.
struct There {
    child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl There {
    async fn new(folder: &Path, hangs: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "other_process", "--ignored", "--nocapture"])
            .env(FOLDER, folder)
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        if hangs {
            command.env(HANGS, "yes");
        }
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut there = Self { child, lines };
        there.says("listens").await;
        there
    }

    async fn says(&mut self, what: &str) {
        while let Some(line) = self.lines.next_line().await.unwrap() {
            if line.ends_with(what) {
                return;
            }
        }
        panic!("it never said {what:?}");
    }
}

fn limits() -> Limits {
    Limits {
        pause: Duration::from_millis(20),
        patience: Duration::from_millis(200),
        ..Limits::default()
    }
}

#[tokio::test]
async fn a_guest_moves_from_one_process_to_another() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = Folder(temporary.path().to_owned());
    let _there = There::new(&folder.0, false).await;
    let peer = WirePeer::new(UnixDial::new(folder.socket()), folder.options());
    let plan = Plan::new(uuid::Uuid::new_v4());
    let (here, journal, control) = (Here(folder.clone()), MemoryJournal::new(), Control::new());
    let moving = remote_migrate::migrate(&plan, &here, &peer, &journal, &control);
    let report = moving.await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(folder.notes(), "started\nReleased\n");
    assert!(folder.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_process_killed_before_its_answer_is_asked_again_when_it_is_back() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = Folder(temporary.path().to_owned());
    let mut there = There::new(&folder.0, true).await;
    let peer = WirePeer::new(UnixDial::new(folder.socket()), folder.options());
    let plan = Plan::new(uuid::Uuid::new_v4()).limits(limits());
    let (here, journal, control) = (Here(folder.clone()), MemoryJournal::new(), Control::new());
    let moving = remote_migrate::migrate(&plan, &here, &peer, &journal, &control);
    let killing = async {
        there.says("it runs").await;
        there.child.kill().await.unwrap();
    };
    let (outcome, ()) = tokio::join!(moving, killing);
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InDoubt, "{error}");
    assert_eq!(
        folder.notes(),
        "started\n",
        "the source neither resumes nor ends"
    );

    let _there = There::new(&folder.0, false).await;
    let recovering = remote_migrate::recover(plan.id(), limits(), &here, &peer, &journal, &control);
    let report = recovering.await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(
        folder.notes(),
        "started\nReleased\n",
        "it is not started again"
    );
    assert!(folder.list().await.unwrap().is_empty());
    assert!(journal.list().await.unwrap().is_empty());
}
