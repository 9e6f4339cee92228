//! A guest's memory under TLS: nobody on the way reads it, nobody else's certificate is believed, and a refusal costs nothing.

use std::future::IntoFuture;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use driver::{Domain, ErrorKind, Landing, MigrateOptions, Op};
use job_core::JobKind;
use monitor_qmp::command::{ObjectAdd, QomList, QueryMigrateParameters};
use remote_migrate::{Answer, Cookie, InProcess, Owner, Peer, PeerError, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use super::{SECOND, is_performing, peer, slow};
use crate::authority::{Authority, under};
use crate::rig::{Rig, boot};

/// In the memory of every guest that runs Linux.
const KNOWN: &[u8] = b"Linux version ";

/// The way to a daemon, with somebody in the middle of it.
struct Tapped {
    there: Arc<InProcess>,
    change: fn(&str) -> String,
    has_read: Arc<AtomicBool>,
    passed: Arc<Mutex<u64>>,
}

impl Tapped {
    fn new(there: &Rig, change: fn(&str) -> String) -> Arc<Self> {
        Arc::new(Self {
            there: peer(there),
            change,
            has_read: Arc::default(),
            passed: Arc::default(),
        })
    }

    async fn tap(&self, to: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a port");
        let at = listener.local_addr().expect("it has one");
        let (has_read, passed) = (self.has_read.clone(), self.passed.clone());
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                let Ok(to) = TcpStream::connect(to).await else {
                    return;
                };
                let ((mut from_read, mut from_write), (mut to_read, mut to_write)) =
                    (from.into_split(), to.into_split());
                let (has_read, passed) = (has_read.clone(), passed.clone());
                tokio::spawn(async move {
                    // The end of what passed before, and what passes now: what is looked for may lie across.
                    let mut seen = Vec::new();
                    let mut piece = vec![0; 1 << 16];
                    while let Ok(length @ 1..) = from_read.read(&mut piece).await {
                        seen.extend_from_slice(&piece[..length]);
                        if !has_read.load(Ordering::SeqCst)
                            && seen.windows(KNOWN.len()).any(|window| window == KNOWN)
                        {
                            has_read.store(true, Ordering::SeqCst);
                        }
                        let old = seen.len().saturating_sub(KNOWN.len());
                        seen.drain(..old);
                        *passed.lock().expect("no panic") += length as u64;
                        if to_write.write_all(&piece[..length]).await.is_err() {
                            return;
                        }
                    }
                });
                tokio::spawn(async move { tokio::io::copy(&mut to_read, &mut from_write).await });
            }
        });
        at
    }
}

#[async_trait]
impl Peer for Tapped {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let mut answer = self.there.ask(request, deadline).await?;
        if let Reply::Prepared(prepared) = &mut answer.reply {
            let at = prepared.connect.strip_prefix("tcp:").expect("over tcp");
            let tap = self.tap(at.parse().expect("an address")).await;
            prepared.connect = format!("tcp:{tap}").into();
            let bring: serde_json::Value = prepared.cookie.decode().expect("JSON");
            prepared.cookie = Cookie::new((self.change)(&bring.to_string())).expect("as long");
        }
        Ok(answer)
    }
}

async fn moves(domain: &Domain, peer: Arc<dyn Peer>) {
    let moved = domain.migrate(peer, MigrateOptions::default());
    let report = moved.await.expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
}

/// Whether QEMU has a key, or would use one.
pub(super) async fn has_tls(domain: &Domain) -> bool {
    let look = |mut op: Op| async move {
        let monitor = op.monitor()?;
        let parameters = monitor.execute(QueryMigrateParameters).await?;
        let objects = monitor.execute(QomList::new("/objects")).await?;
        let is_used = parameters.tls_creds.is_some_and(|creds| !creds.is_empty());
        Ok(is_used || objects.iter().any(|object| object.name.contains("tls")))
    };
    let deadline = Instant::now() + 10 * SECOND;
    let looked = domain.run("look", JobKind::Query, deadline, look);
    looked.await.expect("it answers")
}

pub(super) async fn a_key_that_was_only_half_put_on_is_forgotten(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    // As a migration leaves it that was cancelled before QEMU was told to use it.
    let put_on = |mut op: Op| async move {
        let object = ObjectAdd::new("tls-creds-anon").with("id", "vmwright-tls");
        op.monitor()?
            .execute(object.with("endpoint", "client"))
            .await
    };
    let deadline = Instant::now() + 10 * SECOND;
    let put_on = domain.run("put-on", JobKind::Modify, deadline, put_on);
    put_on.await.expect("QEMU takes it");
    assert!(has_tls(&domain).await);
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    domain.cancel_job("test").expect("memory moves still");
    moving.await.expect("no panic").expect_err("it stays");
    assert!(!has_tls(&domain).await);
}

pub(super) fn has_key_on_disk(dir: &Path, domain: &Domain) -> bool {
    let guest = dir.join("run").join(domain.uuid().to_string());
    guest.join("tls").exists()
}

async fn goes_on(rig: &Rig) {
    let console = rig.console("web");
    let last = *console.ticks().last().expect("it counted");
    let on = console.past(last + 1, 20 * SECOND).await;
    on.expect("it goes on");
}

pub(super) async fn memory_is_read_on_its_way_in_plaintext_and_not_under_tls(rig: Rig) {
    let authority = Authority::new();
    let plaintext = || Landing::plaintext(Ipv4Addr::LOCALHOST.into());
    for (from, to, is_read) in [
        (plaintext(), plaintext(), true),
        (
            authority.landing("a.example"),
            authority.landing("b.example"),
            false,
        ),
    ] {
        let (here, there) = (Rig::at(&rig.env, from), Rig::at(&rig.env, to));
        let (domain, _) = boot(&here, "web").await.expect("it boots");
        let tapped = Tapped::new(&there, str::to_owned);
        moves(&domain, tapped.clone()).await;
        assert!(*tapped.passed.lock().expect("no panic") > 1 << 20);
        assert_eq!(tapped.has_read.load(Ordering::SeqCst), is_read);
        goes_on(&here).await;
    }
}

pub(super) async fn a_guest_moves_there_and_back_under_tls_and_keeps_no_key(rig: Rig) {
    let authority = Authority::new();
    let here = Rig::at(&rig.env, authority.landing("a.example"));
    let there = Rig::at(&rig.env, authority.landing("b.example"));
    let (domain, _) = boot(&here, "web").await.expect("it boots");
    moves(&domain, peer(&there)).await;
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    // The guest runs before the last is taken off.
    let off = Instant::now() + 10 * SECOND;
    while has_tls(&moved).await && Instant::now() < off {
        tokio::task::yield_now().await;
    }
    assert!(!has_tls(&moved).await);
    assert!(!has_key_on_disk(there.dir.path(), &moved));
    moves(&moved, peer(&here)).await;
    goes_on(&here).await;
    let file = here.dir.path().join("saved");
    domain
        .save(&file, driver::SaveOptions::default())
        .await
        .expect("what is saved is no stream to another daemon");
    let ticks = here.console("web").ticks();
    assert!(
        ticks.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "no gap, no repeat: {ticks:?}"
    );
}

pub(super) async fn who_is_not_believed_gets_no_memory_and_the_guest_runs_on(rig: Rig) {
    let (ours, others) = (Authority::new(), Authority::new());
    let as_is = str::to_owned as fn(&str) -> String;
    for (from, to, change) in [
        // The destination is of another authority.
        (
            ours.landing("a.example"),
            others.landing("b.example"),
            as_is,
        ),
        // The source is of another authority, though it believes the destination.
        (
            under(others.tls_believing("a.example", &[&ours, &others])),
            ours.landing("b.example"),
            as_is,
        ),
        // The destination is not the one the guest was to go to.
        (
            ours.landing("a.example"),
            ours.landing("b.example"),
            |bring| bring.replace("b.example", "c.example"),
        ),
    ] {
        let (here, there) = (Rig::at(&rig.env, from), Rig::at(&rig.env, to));
        let (domain, _) = boot(&here, "web").await.expect("it boots");
        let tapped = Tapped::new(&there, change);
        let moved = domain.migrate(tapped.clone(), MigrateOptions::default());
        let error = moved.await.expect_err("it is not believed");
        assert_eq!(error.kind(), ErrorKind::Tls, "{error:#}");
        assert!(format!("{error:#}").contains(".example"), "{error:#}");
        assert!(!tapped.has_read.load(Ordering::SeqCst));
        assert!(domain.query_status().await.expect("it answers").running);
        assert!(!has_tls(&domain).await);
        assert!(!has_key_on_disk(here.dir.path(), &domain));
        assert!(there.driver.by_uuid(domain.uuid()).is_none());
        goes_on(&here).await;
    }
}

pub(super) async fn memory_leaves_under_tls_or_not_at_all_unless_plaintext_was_allowed(rig: Rig) {
    let authority = Authority::new();
    let plaintext = || Landing::plaintext(Ipv4Addr::LOCALHOST.into());
    for (from, to, why) in [
        (Landing::unix(), plaintext(), "would pass in plaintext"),
        (
            authority.landing("a.example"),
            plaintext(),
            "under TLS alone",
        ),
        // Who listens on a socket of this host may pass on what it reads.
        (
            authority.landing("a.example"),
            Landing::unix(),
            "under TLS alone",
        ),
        (
            plaintext(),
            authority.landing("b.example"),
            "no certificate to show",
        ),
    ] {
        let (here, there) = (Rig::at(&rig.env, from), Rig::at(&rig.env, to));
        let (domain, _) = boot(&here, "web").await.expect("it boots");
        let moved = domain.migrate(peer(&there), MigrateOptions::default());
        let error = moved.await.expect_err("the two do not agree");
        assert!(format!("{error:#}").contains(why), "{error:#}");
        assert!(domain.query_status().await.expect("it answers").running);
        assert!(there.driver.by_uuid(domain.uuid()).is_none());
    }
}

pub(super) async fn a_guest_comes_over_several_connections_under_tls(rig: Rig) {
    let authority = Authority::new();
    let here = Rig::at(&rig.env, authority.landing("a.example"));
    let there = Rig::at(&rig.env, authority.landing("b.example"));
    let (domain, _) = boot(&here, "web").await.expect("it boots");
    let options = MigrateOptions {
        channels: NonZero::new(2),
        ..MigrateOptions::default()
    };
    let moved = domain.migrate(peer(&there), options);
    moved.await.expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    goes_on(&here).await;
}
