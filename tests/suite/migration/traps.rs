//! What QEMU does when a migration goes wrong, and says otherwise or nothing at all. Each of these is a real QEMU's doing.

use std::fs::File;
use std::future::IntoFuture;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use driver::{
    Defaults, Disk, DiskFormat, Domain, Error, ErrorKind, Guest, Landing, MigrateOptions, Op, Run,
};
use job_core::JobKind;
use monitor_qmp::command::{MigrateSetParameters, MigrationStatus, RunState};
use remote_migrate::{
    Answer, Call, Cookie, InProcess, Owner, Peer, PeerError, Prepared, Reply, Report, Request,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::policy::busy;
use super::tuned::asked;
use super::{SECOND, is_performing, peer, slow};
use crate::rig::{Rig, boot};

/// The way to another daemon, with what is said on it changed.
pub(super) struct Crooked {
    there: Arc<dyn Peer>,
    /// What the other side is told of the guest.
    described: fn(String) -> String,
    /// Where this side is told to bring the memory, if it is not where it should.
    astray: Option<String>,
    /// Whether its QEMU is to connect there by itself.
    is_bare: bool,
}

impl Crooked {
    fn to(there: &Rig) -> Self {
        Self {
            there: peer(there),
            described: |guest| guest,
            astray: None,
            is_bare: false,
        }
    }

    /// With the other side told this of the guest.
    pub(super) fn telling(there: &Rig, described: fn(String) -> String) -> Arc<Self> {
        Arc::new(Self {
            described,
            ..Self::to(there)
        })
    }

    /// With this side told to bring the memory elsewhere.
    pub(super) fn astray(there: Arc<dyn Peer>, to: String) -> Self {
        Self {
            there,
            described: |guest| guest,
            astray: Some(to),
            is_bare: false,
        }
    }
}

#[async_trait]
impl Peer for Crooked {
    async fn ask(&self, mut request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        if let Call::Prepare(guest) = &mut request.call {
            let told = (self.described)(guest.cookie.as_str().to_owned());
            guest.cookie = Cookie::new(told).expect("it is no longer than it was");
        }
        let mut answer = self.there.ask(request, deadline).await?;
        if let (Reply::Prepared(prepared), Some(astray)) = (&mut answer.reply, &self.astray) {
            *prepared = Prepared {
                connect: astray.as_str().into(),
                cookie: match self.is_bare {
                    true => Cookie::encode(&json!({"way": "bare"})).expect("it is short"),
                    false => prepared.cookie.clone(),
                },
            };
        }
        Ok(answer)
    }
}

pub(super) async fn goes_on_here(rig: &Rig, domain: &Domain) {
    assert!(domain.query_status().await.expect("it answers").running);
    let console = rig.console("web");
    let last = console.ticks().last().copied().unwrap_or_default();
    let on = console.past(last + 1, 20 * SECOND).await;
    on.expect("it counts on");
}

/// A QEMU that is told so runs a command, or writes the memory of its guest to a file.
pub(super) async fn a_destination_that_calls_a_command_a_place_has_none_run(rig: Rig) {
    let plaintext = || Landing::plaintext(Ipv4Addr::LOCALHOST.into());
    let (rig, there) = (
        Rig::at(&rig.env, plaintext()),
        Rig::at(&rig.env, plaintext()),
    );
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let dir = tempfile::tempdir().expect("it can be made");
    let mark = dir.path().join("mark");
    for said in [
        format!("exec:touch {}", mark.display()),
        format!("file:{}", mark.display()),
    ] {
        let crooked = Arc::new(Crooked {
            is_bare: true,
            ..Crooked::astray(peer(&there), said.clone())
        });
        let moved = domain.migrate(crooked, MigrateOptions::default());
        let error = moved.await.expect_err("that is no place");
        let text = format!("{error:#}");
        assert!(text.contains("no place where memory is taken in"), "{text}");
        assert!(!mark.exists(), "{said}");
    }
    goes_on_here(&rig, &domain).await;
    assert!(!mark.exists());
}

/// Its QEMU would exit, and the source's say `completed`, if nobody asked for an answer.
pub(super) async fn a_destination_that_cannot_read_the_state_gives_the_guest_back_and_says_why(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let crooked = Crooked::telling(&there, |guest| {
        guest.replace("\"balloon\":true", "\"balloon\":false")
    });
    let moved = domain.migrate(crooked, MigrateOptions::default());
    let error = moved.await.expect_err("it lacks a device");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    let text = format!("{error:#}");
    assert!(
        text.contains("the destination says") && text.contains("savevm"),
        "in the words of the QEMU that knows: {text}"
    );
    goes_on_here(&rig, &domain).await;
}

pub(super) async fn what_the_destination_cannot_open_is_refused_by_name(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let crooked = Crooked::telling(&there, |guest| guest.replace("initramfs", "elsewhere"));
    let moved = domain.migrate(crooked, MigrateOptions::default());
    let error = moved.await.expect_err("it is not there");
    let text = format!("{error:#}");
    assert!(text.contains("elsewhere"), "{text}");
    let left = there.driver.by_uuid(domain.uuid());
    assert!(left.is_none(), "nothing of it is left there");
    goes_on_here(&rig, &domain).await;
}

pub(super) async fn what_cannot_be_moved_is_refused_in_qemus_words(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let folder = rig.dir.path().join("folder");
    std::fs::create_dir(&folder).expect("it can be made");
    let node = json!({"node-name": "blocks", "driver": "vvfat", "dir": folder, "rw": true});
    raw(&domain, "blockdev-add", node).await;
    let moved = domain.migrate(peer(&there), MigrateOptions::default());
    let error = moved.await.expect_err("QEMU would not");
    let text = format!("{error:#}");
    assert!(text.contains("does not support live migration"), "{text}");
    goes_on_here(&rig, &domain).await;
    raw(&domain, "blockdev-del", json!({"node-name": "blocks"})).await;
    let moved = domain.migrate(peer(&there), MigrateOptions::default());
    moved.await.expect("nothing is in its way now");
}

async fn raw(domain: &Domain, command: &'static str, arguments: serde_json::Value) {
    let work = move |mut op: Op| async move { op.monitor()?.execute_raw(command, arguments).await };
    let done = domain.run("test", JobKind::Modify, Instant::now() + 10 * SECOND, work);
    done.await.expect("QEMU does it");
}

pub(super) async fn what_is_left_of_an_earlier_migration_is_named_and_not_met_half_way(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    // Somebody else's: it is accepted by the kernel, and nobody reads it.
    let nobody = TcpListener::bind("127.0.0.1:0").expect("there is a port");
    let at = nobody.local_addr().expect("it has an address");
    raw(&domain, "migrate", json!({"uri": format!("tcp:{at}")})).await;
    let moved = domain.migrate(peer(&there), MigrateOptions::default());
    let error = moved.await.expect_err("QEMU would refuse");
    let text = format!("{error:#}");
    assert!(text.contains("an earlier migration"), "{text}");
    assert!(there.driver.by_uuid(domain.uuid()).is_none(), "{text}");
}

/// A connection that is slow, and then dead: nothing is closed, and nobody reads.
async fn narrow(path: std::path::PathBuf, to: String, is_dead: Arc<AtomicBool>) {
    let listener = UnixListener::bind(&path).expect("it is free");
    let (mut from, _) = listener.accept().await.expect("the source connects");
    let to = to.strip_prefix("unix:").expect("over a unix socket");
    let mut to = UnixStream::connect(to).await.expect("somebody listens");
    let (mut back, mut there) = to.split();
    let (mut here, mut answers) = from.split();
    let forth = async {
        let mut piece = vec![0; 64 * 1024];
        loop {
            let length = here.read(&mut piece).await.expect("it can be read");
            if is_dead.load(Ordering::SeqCst) {
                return std::future::pending::<()>().await;
            }
            there.write_all(&piece[..length]).await.expect("it is read");
            // 32 MiB a second.
            sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    let backwards = tokio::io::copy(&mut back, &mut answers);
    tokio::join!(forth, backwards).1.expect("it can be carried");
}

/// The way to a daemon to which the memory goes through a narrow place.
struct Narrow {
    there: Arc<InProcess>,
    path: std::path::PathBuf,
    is_dead: Arc<AtomicBool>,
}

#[async_trait]
impl Peer for Narrow {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let mut answer = self.there.ask(request, deadline).await?;
        if let Reply::Prepared(prepared) = &mut answer.reply {
            let to = prepared.connect.to_string();
            tokio::spawn(narrow(self.path.clone(), to, self.is_dead.clone()));
            while !Path::new(&self.path).exists() {
                tokio::task::yield_now().await;
            }
            prepared.connect = format!("unix:{}", self.path.display()).into();
        }
        Ok(answer)
    }
}

type Moving = JoinHandle<Result<Report, Error>>;

/// A guest that stands still for its switchover, with much of its memory to go, and what makes its stream go nowhere.
async fn standing_still(rig: &Rig, there: &Rig) -> (Domain, Moving, Arc<AtomicBool>) {
    let (domain, _) = boot(rig, "web").await.expect("it boots");
    let is_dead = Arc::new(AtomicBool::new(false));
    let narrow = Arc::new(Narrow {
        there: peer(there),
        path: rig.dir.path().join("narrow"),
        is_dead: is_dead.clone(),
    });
    let moving = tokio::spawn(domain.migrate(narrow, slow()).into_future());
    assert!(is_performing(&domain).await);
    // Behind the driver's back: QEMU stops the guest at once, with all of its memory to go.
    let mut parameters = MigrateSetParameters::default();
    parameters.downtime_limit = Some(100_000);
    asked(&domain, parameters).await;
    let is_stopped =
        |seen: &driver::Observed| matches!(&seen.run, Run::Qemu(_)) && !seen.run.is_running();
    let stopped = domain.wait_for(is_stopped, Instant::now() + 30 * SECOND);
    stopped.await.expect("it is stopped for its switchover");
    (domain, moving, is_dead)
}

/// A guest whose QEMU is stuck at the last of its memory: it stands still here and there, and its main loop is taken.
async fn stuck(rig: &Rig, there: &Rig) -> (Domain, JoinHandle<ErrorKind>) {
    let (domain, moving, is_dead) = standing_still(rig, there).await;
    is_dead.store(true, Ordering::SeqCst);
    let moving = async move {
        moving
            .await
            .expect("no panic")
            .map_err(|error| error.kind())
    };
    let moving = tokio::spawn(async move { moving.await.expect_err("it cannot arrive") });
    // In band nobody answers, but for what QEMU reads while it still brings its disks to rest, having told of the stop.
    let limit = Instant::now() + 10 * SECOND;
    while let Ok(status) = domain.query_status().deadline(SECOND / 2).await {
        assert!(Instant::now() < limit, "its main loop is free: {status:?}");
    }
    (domain, moving)
}

pub(super) async fn a_main_loop_that_is_stuck_behind_a_dead_link_is_freed_by_a_cancel(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, moving) = stuck(&rig, &there).await;
    domain.cancel_job("test").expect("it was not offered yet");
    assert_eq!(moving.await.expect("no panic"), ErrorKind::Cancelled);
    goes_on_here(&rig, &domain).await;
}

pub(super) async fn a_main_loop_that_is_stuck_behind_a_dead_link_is_freed_when_it_is_silent_too_long(
    rig: Rig,
) {
    let defaults = Defaults {
        silence: 2 * SECOND,
        ..Defaults::default()
    };
    let (rig, there) = (Rig::with(&rig.env, defaults), Rig::new(&rig.env));
    let (domain, moving) = stuck(&rig, &there).await;
    assert_eq!(moving.await.expect("no panic"), ErrorKind::Migration);
    goes_on_here(&rig, &domain).await;
}

/// A guest that its driver has stopped for the last of its memory, of which nothing moves any more.
async fn held_up(rig: &Rig, there: &Rig) -> (Domain, Moving) {
    let domain = busy(rig).await;
    let is_dead = Arc::new(AtomicBool::new(false));
    let narrow = Arc::new(Narrow {
        there: peer(there),
        path: rig.dir.path().join("narrow"),
        is_dead: is_dead.clone(),
    });
    // All that it writes anew may go while it stands still, and takes seconds.
    let options = MigrateOptions {
        bandwidth: Some(0),
        downtime: Some(60 * SECOND),
        ..MigrateOptions::default()
    };
    let moving = tokio::spawn(domain.migrate(narrow, options).into_future());
    let is_stopped = |seen: &driver::Observed| seen.run == Run::Qemu(RunState::Paused);
    let stopped = domain.wait_for(is_stopped, Instant::now() + 60 * SECOND);
    let stopped = stopped.await.expect("it is stopped");
    assert_eq!(stopped.migration, Some(MigrationStatus::Active));
    is_dead.store(true, Ordering::SeqCst);
    (domain, moving)
}

pub(super) async fn a_guest_that_waits_for_the_last_of_its_memory_to_go_runs_on_after_a_cancel(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, moving) = held_up(&rig, &there).await;
    domain.cancel_job("test").expect("it was not offered yet");
    let error = moving.await.expect("no panic").expect_err("it stays");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    goes_on_here(&rig, &domain).await;
}

pub(super) async fn a_guest_does_not_stand_still_for_memory_that_goes_nowhere(rig: Rig) {
    let defaults = Defaults {
        silence: 2 * SECOND,
        ..Defaults::default()
    };
    let (rig, there) = (Rig::with(&rig.env, defaults), Rig::new(&rig.env));
    let (domain, moving) = held_up(&rig, &there).await;
    let error = moving.await.expect("no panic").expect_err("it stays");
    let text = format!("{error:#}");
    assert!(text.contains("the last of the memory to move"), "{text}");
    goes_on_here(&rig, &domain).await;
}

/// What an agent is asked while its guest stands still is read on neither side.
pub(super) async fn what_the_agent_was_asked_at_the_switchover_ends_as_lost_and_it_answers_there(
    rig: Rig,
) {
    let there = Rig::new(&rig.env);
    let (domain, moving, _) = standing_still(&rig, &there).await;
    let asked = tokio::spawn(domain.ping().deadline(60 * SECOND).into_future());
    let report = moving.await.expect("no panic").expect("it arrives");
    assert_eq!(report.owner, Owner::Destination);
    let lost = asked.await.expect("no panic").expect_err("nobody read it");
    let is_told = matches!(lost.kind(), ErrorKind::Agent | ErrorKind::Gone);
    assert!(is_told, "{lost:#}");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    let awake = moved.wait_agent().deadline(30 * SECOND).await;
    awake.expect("it is greeted anew there");
    moved.ping().await.expect("and answers what it is asked");
}

pub(super) async fn a_destination_that_is_cancelled_leaves_the_guest_where_it_was(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let copy = there.driver.by_uuid(domain.uuid()).expect("it is there");
    copy.cancel_job("test").expect("it can be cancelled");
    let error = moving.await.expect("no panic").expect_err("it was");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    goes_on_here(&rig, &domain).await;
    let open = there.driver.migrations().await.expect("it can be read");
    assert!(open.is_empty(), "{open:?}");
}

/// Takes such a lock on a whole file as QEMU asks for before it writes, says so, and keeps it. One of our own process would go
/// as soon as the driver has looked at the file and closes it.
const HOLDER: &str = r#"use Fcntl; $| = 1; open(F, "<", $ARGV[0]) or die;
    my $all = pack("s s x4 q q l x4", F_RDLCK, 0, 0, 0, 0);
    fcntl(F, F_SETLK, $all) or die; print "locked\n"; sleep;"#;

/// The way to another daemon, on whose host somebody will not share the disk until the guest was refused.
struct Contended {
    there: Arc<dyn Peer>,
    other: Mutex<Option<Child>>,
}

#[async_trait]
impl Peer for Contended {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let answer = self.there.ask(request, deadline).await?;
        if matches!(answer.reply, Reply::Refused(_)) {
            let other = self.other.lock().expect("no panic").take();
            if let Some(mut other) = other {
                other.kill().await.expect("it is a child of ours");
            }
        }
        Ok(answer)
    }
}

/// QEMU takes the guest's disks from the other one, or does not let it run.
pub(super) async fn a_guest_that_qemu_does_not_let_run_there_is_given_back_and_runs_here(rig: Rig) {
    let there = Rig::new(&rig.env);
    let path = rig.dir.path().join("data.raw");
    let disk = File::create(&path).expect("it can be made");
    disk.set_len(1 << 20).expect("it can be as long");
    drop(disk);
    let guest = Guest {
        disks: vec![Disk::new("data", &path, DiskFormat::Raw)],
        ..rig.guest("web")
    };
    let domain = rig.driver.define(guest).await.expect("it is known now");
    domain.start().await.expect("it starts");
    let booted = rig.console("web").past(3, 60 * SECOND).await;
    booted.expect("it counts");
    // The QEMU that has the disk has asked already.
    let mut other = Command::new("perl")
        .args(["-e", HOLDER])
        .arg(&path)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("there is a perl");
    let mut said = [0; 7];
    let out = other.stdout.as_mut().expect("it is piped");
    out.read_exact(&mut said).await.expect("it has the lock");
    let contended = Arc::new(Contended {
        there: peer(&there),
        other: Mutex::new(Some(other)),
    });
    let moved = domain.migrate(contended.clone(), MigrateOptions::default());
    let error = moved.await.expect_err("it cannot have its disk there");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    let text = format!("{error:#}");
    assert!(text.contains("lock"), "{text}");
    assert!(contended.other.lock().expect("no panic").is_none());
    goes_on_here(&rig, &domain).await;
    let open = rig.driver.migrations().await.expect("it can be read");
    assert!(open.is_empty(), "{open:?}");
    assert!(there.driver.by_uuid(domain.uuid()).is_none());
}
