//! The way that a guest's memory takes: over a network, from whoever may bring it and nobody else.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::num::NonZero;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use driver::{Landing, MigrateOptions};
use remote_migrate::{Answer, InProcess, Owner, Peer, PeerError, Reply, Request};
use tokio::time::Instant;

use super::{SECOND, peer};
use crate::rig::{Rig, boot};

/// The way to a daemon whose port is found by strangers before the memory comes.
struct Overheard {
    there: Arc<InProcess>,
    strangers: Mutex<Vec<TcpStream>>,
}

#[async_trait]
impl Peer for Overheard {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let answer = self.there.ask(request, deadline).await?;
        if let Reply::Prepared(prepared) = &answer.reply {
            let at = prepared.connect.strip_prefix("tcp:").expect("over tcp");
            let mut strangers = self.strangers.lock().expect("no panic");
            for first in [&b""[..], b"QEVM and what a QEMU would like to read"] {
                let mut stranger = TcpStream::connect(at).expect("somebody listens");
                stranger.write_all(first).expect("it can be told anything");
                strangers.push(stranger);
            }
        }
        Ok(answer)
    }
}

pub(super) async fn a_guest_moves_over_tcp_past_strangers_at_its_port(rig: Rig) {
    let plaintext = || Landing::plaintext(Ipv4Addr::LOCALHOST.into());
    let rig = Rig::at(&rig.env, plaintext());
    let there = Rig::at(&rig.env, plaintext());
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let overheard = Arc::new(Overheard {
        there: peer(&there),
        strangers: Mutex::default(),
    });
    let moved = domain.migrate(overheard.clone(), MigrateOptions::default());
    let report = moved.await.expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    let console = rig.console("web");
    let last = *console.ticks().last().expect("it counted");
    let on = console.past(last + 1, 20 * SECOND).await;
    on.expect("it goes on");
    let strangers = std::mem::take(&mut *overheard.strangers.lock().expect("no panic"));
    assert_eq!(strangers.len(), 2);
    for mut stranger in strangers {
        let told = stranger.read(&mut [0; 16]);
        assert!(
            matches!(told, Ok(0)) || told.is_err(),
            "sent away: {told:?}"
        );
    }
}

pub(super) async fn a_guest_comes_over_several_connections_where_that_is_trusted_and_not_elsewhere(
    rig: Rig,
) {
    let tcp = || Landing::plaintext(Ipv4Addr::LOCALHOST.into());
    let rig = Rig::at(&rig.env, tcp().trusting());
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let options = MigrateOptions {
        channels: NonZero::new(2),
        ..MigrateOptions::default()
    };
    let wary = Rig::at(&rig.env, tcp());
    let moved = domain.migrate(peer(&wary), options.clone());
    let error = moved.await.expect_err("anybody could bring it");
    assert!(
        format!("{error:#}").contains("over several connections"),
        "{error:#}"
    );
    let there = Rig::at(&rig.env, tcp().trusting());
    let moved = domain.migrate(peer(&there), options.clone());
    moved.await.expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    let back = moved.migrate(peer(&rig), options.clone());
    back.await.expect("it moves back");
    let there = Rig::at(&rig.env, Landing::unix());
    let moved = domain.migrate(peer(&there), options);
    moved.await.expect("it moves within its host");
    let console = rig.console("web");
    let last = *console.ticks().last().expect("it counted");
    let on = console.past(last + 1, 20 * SECOND).await;
    on.expect("it goes on");
}
