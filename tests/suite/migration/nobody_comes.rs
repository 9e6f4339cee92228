//! Memory that does not come: its guest is dead, its host is down, or nobody answers who is to take it. Each side ends by
//! itself, with nothing left.

use std::future::IntoFuture;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use driver::{Became, Defaults, Domain, ErrorKind, MigrateOptions, Run};
use remote_migrate::{
    Answer, Destination, InProcess, Owner, Peer, PeerError, Reply, Request, Service, Side,
};
use tokio::net::{UnixListener, UnixSocket};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::restart::{Daemon, Town};
use super::traps::{Crooked, goes_on_here};
use super::{SECOND, peer};
use crate::rig::{Rig, Signal, boot, is_clean, jobs_until, kill};

/// A socket whose queue is full: whoever connects to it waits, as for a host that drops what it is sent.
struct Full {
    path: PathBuf,
    _listener: UnixListener,
    _standing: Vec<std::os::unix::net::UnixStream>,
}

impl Full {
    fn at(path: &Path) -> Self {
        let socket = UnixSocket::new_stream().expect("it can be made");
        socket.bind(path).expect("it is free");
        let listener = socket.listen(1).expect("it listens");
        let connect = || std::os::unix::net::UnixStream::connect(path).ok();
        let standing = std::iter::from_fn(connect).take(2).collect();
        Self {
            path: path.to_owned(),
            _listener: listener,
            _standing: standing,
        }
    }

    /// The way to a daemon whose memory is brought here.
    fn on_the_way(&self, there: Arc<dyn Peer>) -> Arc<Crooked> {
        let here = format!("unix:{}", self.path.display());
        Arc::new(Crooked::astray(there, here))
    }
}

async fn is_at_perform(domain: &Domain) -> bool {
    let is_at_it = |jobs: &job_core::Snapshot| {
        let held = jobs.asynchronous.as_ref();
        held.is_some_and(|held| held.holder.phase.as_deref() == Some("perform"))
    };
    jobs_until(domain, 20 * SECOND, is_at_it).await
}

/// A driver that does not wait long for the memory of a guest.
fn impatient(rig: &Rig) -> Rig {
    let defaults = Defaults {
        arrival: 4 * SECOND,
        ..Defaults::default()
    };
    Rig::with(&rig.env, defaults)
}

/// Nothing of the guest is left in that driver but, if at all, what is to be told to the other side.
async fn nothing_is_left_of(domain: &Domain, there: &Rig) {
    let deadline = Instant::now() + 40 * SECOND;
    while there.driver.by_uuid(domain.uuid()).is_some() {
        assert!(Instant::now() < deadline, "it is given up there");
        sleep(SECOND / 20).await;
    }
    assert!(is_clean(there, domain));
}

pub(super) async fn a_cancel_is_obeyed_at_once_while_nobody_answers_a_connect(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let full = Full::at(&rig.dir.path().join("full"));
    let moving = domain.migrate(full.on_the_way(peer(&there)), MigrateOptions::default());
    let moving = tokio::spawn(moving.into_future());
    assert!(is_at_perform(&domain).await);
    domain.cancel_job("test").expect("it can be cancelled");
    let error = moving.await.expect("no panic").expect_err("it was");
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error:#}");
    goes_on_here(&rig, &domain).await;
}

/// A QEMU that connects by itself would wait for as long as its kernel: two minutes.
pub(super) async fn a_connect_that_nobody_answers_is_given_up_and_leaves_the_guest_where_it_was(
    rig: Rig,
) {
    let defaults = Defaults {
        connect: 6 * SECOND,
        ..Defaults::default()
    };
    for channels in [None, NonZero::new(2)] {
        let (here, there) = (Rig::with(&rig.env, defaults), Rig::new(&rig.env));
        let (domain, _) = boot(&here, "web").await.expect("it boots");
        let full = Full::at(&here.dir.path().join("full"));
        let options = MigrateOptions {
            channels,
            ..MigrateOptions::default()
        };
        let moved = domain.migrate(full.on_the_way(peer(&there)), options);
        let error = moved.deadline(60 * SECOND).await.expect_err("nobody does");
        assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
        let text = format!("{error:#}");
        assert!(text.contains("owner is now: source"), "{text}");
        goes_on_here(&here, &domain).await;
        nothing_is_left_of(&domain, &there).await;
        for rig in [&here, &there] {
            let open = rig.driver.migrations().await.expect("it can be read");
            assert!(open.is_empty(), "{text}: {open:?}");
        }
        // QEMU hears that it connects in vain, and is free for the next.
        drop(full);
        let deadline = Instant::now() + 40 * SECOND;
        loop {
            assert!(Instant::now() < deadline, "the next one moves it");
            let moved = domain.migrate(peer(&there), MigrateOptions::default());
            match moved.await {
                Ok(_) => break,
                Err(error) => {
                    let text = format!("{error:#}");
                    assert!(text.contains("an earlier migration"), "{text}");
                }
            }
        }
    }
}

/// The way to a daemon that is told of as soon as the guest is dead here, and is ready to take it.
struct TooLate {
    there: Arc<InProcess>,
    guest: Domain,
}

#[async_trait]
impl Peer for TooLate {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let answer = self.there.ask(request, deadline).await?;
        if let Reply::Prepared(_) = &answer.reply {
            let pid = self.guest.observed().pid.expect("it has a process");
            kill(pid, Signal::KILL);
            let is_off = |observed: &driver::Observed| observed.run == Run::Off;
            let seen = self.guest.wait_for(is_off, deadline).await;
            seen.expect("its death is seen");
        }
        Ok(answer)
    }
}

pub(super) async fn a_guest_that_died_before_its_memory_moved_is_lost_and_nobody_waits_for_it(
    rig: Rig,
) {
    is_lost(&rig, &Rig::new(&rig.env), None).await;
}

/// QEMU listens by itself there, and hears nothing of a QEMU that never connected.
pub(super) async fn a_guest_that_died_before_its_connections_were_made_is_lost_and_is_not_waited_for_long(
    rig: Rig,
) {
    is_lost(&rig, &impatient(&rig), NonZero::new(2)).await;
}

async fn is_lost(rig: &Rig, there: &Rig, channels: Option<NonZero<u8>>) {
    let (domain, _) = boot(rig, "web").await.expect("it boots");
    let too_late = Arc::new(TooLate {
        there: peer(there),
        guest: domain.clone(),
    });
    let options = MigrateOptions {
        channels,
        ..MigrateOptions::default()
    };
    let moved = domain.migrate(too_late, options).await;
    let text = format!("{:#}", moved.expect_err("there is nothing to move"));
    assert!(text.contains("owner is now: nobody"), "{text}");
    for rig in [rig, there] {
        let open = rig.driver.migrations().await.expect("it can be read");
        assert!(open.is_empty(), "{open:?}");
    }
    nothing_is_left_of(&domain, there).await;
}

/// Its daemon and its QEMU are gone between the record that memory moves and the first byte of it.
pub(super) async fn a_guest_whose_host_goes_down_before_it_connects_is_not_waited_for_long(
    rig: Rig,
) {
    let there = impatient(&rig);
    let dir = tempfile::tempdir().expect("it can be made");
    let town = Town::default();
    let here = Daemon::in_town(&rig.env, dir.path(), town.clone()).await;
    let domain = here.starts(&rig).await;
    town.enter("there", there.driver.destination(), &Handle::current());
    let way = town.find("there").expect("it is there");
    let full = Full::at(&dir.path().join("full"));
    let options = MigrateOptions {
        there: Some("there".into()),
        ..MigrateOptions::default()
    };
    let moving = domain.migrate(full.on_the_way(way), options);
    here.runtime().spawn(moving.into_future());
    assert!(is_at_perform(&domain).await);
    kill(
        domain.observed().pid.expect("it has a process"),
        Signal::KILL,
    );
    here.die().await;

    // Nobody is there to be asked, and what is not complete is no loss.
    nothing_is_left_of(&domain, &there).await;
    let open = there.driver.migrations().await.expect("it can be read");
    let named: Vec<_> = open.iter().map(|open| (open.side, open.owner)).collect();
    assert_eq!(named, [(Side::Destination, Owner::Source)]);

    let uuid = domain.uuid();
    drop(domain);
    let here = Daemon::in_town(&rig.env, dir.path(), town).await;
    let deadline = Instant::now() + 40 * SECOND;
    for driver in [&here.driver, &there.driver] {
        while !driver
            .migrations()
            .await
            .expect("it can be read")
            .is_empty()
        {
            assert!(Instant::now() < deadline, "both know that nobody has it");
            sleep(SECOND / 20).await;
        }
    }
    let web = here.driver.by_uuid(uuid).expect("it is known");
    assert_eq!(web.observed().run, Run::Off);
}

/// The way to a daemon that makes room for a guest, and is not heard again.
struct Unheard {
    /// Until it was asked: its directories are the next one's then.
    there: Mutex<Option<Destination>>,
    runtime: Handle,
    made: Notify,
}

#[async_trait]
impl Peer for Unheard {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let there = self.there.lock().expect("no panic").take();
        let there = there.ok_or_else(|| PeerError::not_sent("it is not heard again"))?;
        let serving = async move { there.serve(request, deadline).await };
        let made = self.runtime.spawn(serving).await;
        made.map_err(PeerError::no_answer)?;
        self.made.notify_one();
        std::future::pending().await
    }
}

pub(super) async fn room_that_was_made_by_a_daemon_that_died_is_given_up_though_its_source_is_silent(
    rig: Rig,
) {
    let dir = tempfile::tempdir().expect("it can be made");
    let there = Daemon::in_town(&rig.env, dir.path(), Town::default()).await;
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let unheard = Arc::new(Unheard {
        there: Mutex::new(Some(there.driver.destination())),
        runtime: there.runtime().handle().clone(),
        made: Notify::new(),
    });
    let moving = domain.migrate(unheard.clone(), MigrateOptions::default());
    tokio::spawn(moving.into_future());
    unheard.made.notified().await;
    let there = there.again(&rig.env, dir.path()).await;
    let (copy, became) = there.takes_up("web").await;
    assert_eq!(became, Became::InDoubt, "its source may know of it");
    let is_off = |seen: &driver::Observed| seen.run == Run::Off;
    let off = copy.wait_for(is_off, Instant::now() + 30 * SECOND).await;
    off.expect("nobody can come to it any more");
}
