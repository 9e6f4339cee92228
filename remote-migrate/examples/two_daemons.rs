//! Moves a guest that pretends from this process to another one, over a unix socket.
//!
//! `cargo run -p remote-migrate --example two_daemons`; with a path as argument it is the other process.

use std::{
    env, error::Error, os::unix::fs::MetadataExt as _, path::Path, process::Stdio, sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use remote_migrate::{
    Begun, Control, Cookie, CopyState, Destination, DestinationHost, Guest, HostError, Load,
    MemoryJournal, Meter, Plan, Prepared, RunState, SourceHost, StartError, Step, Stopped,
    Transfer,
    source::Outcome,
    verdict::GuestState,
    wire::{AllowList, Link, Options, PeerIdentity, UnixDial, WirePeer, serve_connection},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::UnixListener,
    process::Command,
    time::sleep,
};

struct Here;

#[async_trait]
impl SourceHost for Here {
    async fn begin(&self, _: Step) -> Result<Begun, HostError> {
        let cookie = Cookie::new("2 vcpus").map_err(HostError::new)?;
        let run = RunState::Running;
        Ok(Begun { cookie, run })
    }

    async fn perform(&self, _: Step, to: &Prepared, meter: &Meter) -> Result<Stopped, HostError> {
        println!("here:  memory goes to {}", to.connect);
        for sent in (0..100).step_by(20) {
            meter.report(sent_of_100(sent));
            sleep(Duration::from_millis(20)).await;
        }
        Ok(Stopped::ByHost)
    }

    async fn complete(&self, _: Step, meter: &Meter) -> Result<(), HostError> {
        println!("here:  the last of it goes");
        meter.report(sent_of_100(100));
        Ok(())
    }

    async fn confirm(&self, _: Step, outcome: Outcome) -> Result<(), HostError> {
        println!("here:  {outcome:?}");
        Ok(())
    }

    async fn inspect(&self, _: Step) -> Result<GuestState, HostError> {
        Ok(GuestState::Stopped)
    }
}

fn sent_of_100(sent: u64) -> Transfer {
    Transfer {
        sent,
        remaining: 100 - sent,
        total: 100,
        ..Transfer::default()
    }
}

struct There;

#[async_trait]
impl DestinationHost for There {
    async fn prepare(&self, _: Step, guest: &Guest) -> Result<Prepared, HostError> {
        println!("there: makes room for {}", guest.cookie.as_str());
        Ok(Prepared {
            connect: "tcp:there:49152".into(),
            cookie: Cookie::empty(),
        })
    }

    async fn load(&self, _: Step) -> Result<Load, HostError> {
        Ok(Load::Complete)
    }

    async fn start(&self, _: Step, _: RunState) -> Result<(), StartError> {
        println!("there: it runs");
        Ok(())
    }

    async fn discard(&self, _: Step) -> Result<(), HostError> {
        Ok(())
    }

    async fn inspect(&self, _: Step) -> Result<CopyState, HostError> {
        Ok(CopyState::Started)
    }
}

/// The daemon that receives: whoever runs as the same user may connect, one at a time.
async fn serve(path: &Path) -> Result<(), Box<dyn Error>> {
    let listener = UnixListener::bind(path)?;
    println!("there: listens");
    let destination = Destination::new(Arc::new(There), Arc::new(MemoryJournal::new()));
    let options = options(path)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let identity = PeerIdentity::of_unix(&stream)?;
        println!("there: {identity} connects");
        let link = Link::new();
        let served = serve_connection(stream, &identity, &destination, &options, &link);
        if let Err(error) = served.await {
            println!("there: {error}");
        }
    }
}

/// The daemon that sends.
async fn send(path: &Path) -> Result<(), Box<dyn Error>> {
    let peer = WirePeer::new(UnixDial::new(path), options(path)?);
    let plan = Plan::new(uuid::Uuid::new_v4());
    let (journal, control) = (MemoryJournal::new(), Control::new());
    let mut progress = control.progress();
    tokio::spawn(async move {
        while progress.changed().await.is_ok() {
            let now = *progress.borrow_and_update();
            let Transfer { sent, total, .. } = now.transfer;
            println!("here:  {} ({sent} of {total})", now.phase);
        }
    });
    let report = remote_migrate::migrate(&plan, &Here, &peer, &journal, &control).await?;
    println!(
        "here:  owner is the {}, after {:?}",
        report.owner, report.took
    );
    if let Some(clock) = peer.link().watch().borrow().clock {
        println!(
            "here:  the other clock is {} ns ahead, give or take {:?}",
            clock.nanos, clock.error
        );
    }
    Ok(())
}

/// Nobody but the user who owns the socket, or the folder it will be in.
fn options(path: &Path) -> Result<Options, Box<dyn Error>> {
    let folder = path.parent().ok_or("the socket is in no folder")?;
    let user = folder.metadata()?.uid();
    Ok(Options::new(AllowList::nobody().uid(user)))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    if let Some(path) = env::args().nth(1) {
        return serve(Path::new(&path)).await;
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("migrate.sock");
    let mut there = Command::new(env::current_exe()?)
        .arg(&path)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let said = there.stdout.take().ok_or("its words are lost")?;
    let mut said = BufReader::new(said).lines();
    // Its first words are that it listens.
    if let Some(line) = said.next_line().await? {
        println!("{line}");
    }
    let moved = send(&path).await;
    there.kill().await?;
    while let Some(line) = said.next_line().await? {
        println!("{line}");
    }
    moved
}
