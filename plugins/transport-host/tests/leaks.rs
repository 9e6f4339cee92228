//! Nothing is left behind: one test alone in its process, since it counts the process's descriptors
//! and threads.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "support/stage.rs"]
mod support;

use std::time::Duration;

use futures::poll;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use support::{Stage, later, open_descriptors, threads};
use transport_host::{Deadline, ErrorKind, Transports};

const ROUNDS: usize = 300;

#[tokio::test(start_paused = true)]
async fn dials_and_accepts_leave_no_descriptor_and_blocked_ones_no_thread() {
    let stage = Stage::new();
    let transports = stage.loaded();
    // The first use of everything may open what stays open.
    meet(&transports, &stage.unix("warm"), 1).await;
    let (descriptors, running) = (open_descriptors(), threads());

    meet(&transports, &stage.unix("s"), ROUNDS).await;
    meet(&transports, "tcp:127.0.0.1:0", ROUNDS).await;
    assert_eq!(open_descriptors(), descriptors);

    full_backlog(&transports, &stage).await;
    assert_eq!((open_descriptors(), threads()), (descriptors, running));

    for _ in 0..ROUNDS {
        transports
            .dial(&stage.unix("nobody"), later())
            .await
            .unwrap_err();
    }
    assert_eq!((open_descriptors(), threads()), (descriptors, running));
}

async fn meet(transports: &Transports, target: &str, rounds: usize) {
    let listener = transports.listen(target, later()).await.unwrap();
    for _ in 0..rounds {
        tokio::try_join!(
            transports.dial(listener.target(), later()),
            listener.accept(later())
        )
        .unwrap();
    }
}

/// A server that does not accept and whose backlog is full: no readiness will ever come.
async fn full_backlog(transports: &Transports, stage: &Stage) {
    let path = stage.path("full");
    let server = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&server, 0).unwrap();
    let target = format!("unix:{}", path.display());
    let _waiting = transports.dial(&target, later()).await.unwrap();

    let running = threads();
    let deadline = Deadline::now() + Duration::from_millis(50);
    let error = transports.dial(&target, deadline).await.unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::TimedOut { steps, last, .. } if *steps > 5 && last == "the next try"),
        "{error}"
    );
    assert_eq!((Deadline::now(), threads()), (deadline, running));

    let before = open_descriptors();
    let mut dial = Box::pin(transports.dial(&target, later()));
    assert!(poll!(&mut dial).is_pending());
    assert_eq!(open_descriptors(), before + 1, "its socket");
    drop(dial);
    assert_eq!(open_descriptors(), before);

    let (accepted, dialed) = tokio::join!(
        async { rustix::net::accept(&server) },
        transports.dial(&target, later())
    );
    accepted.unwrap();
    dialed.expect("there is room again");
}
