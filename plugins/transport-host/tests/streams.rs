//! Real transports, loaded from files: bytes, half-close, descriptors, peers, deadlines and
//! cancelling.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "support/stage.rs"]
mod support;

use std::future::poll_fn;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::time::Duration;

use futures::{FutureExt, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use support::{Stage, later, linked};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transport_host::{Blame, Deadline, ErrorKind, Listener, Peer, Stream, Transports};

const MIB: usize = 1 << 20;

async fn connected(transports: &Transports, target: &str) -> (Listener, Stream, Stream) {
    let listener = transports.listen(target, later()).await.unwrap();
    let pair = tokio::try_join!(
        transports.dial(listener.target(), later()),
        listener.accept(later())
    );
    let (dialed, accepted) = pair.unwrap();
    (listener, dialed, accepted)
}

/// Bytes whose place can be told from their value.
fn pattern() -> Vec<u8> {
    (0..MIB).map(|at| (at % 251) as u8).collect()
}

async fn send_all_and_read_all(mut stream: Stream) -> Vec<u8> {
    let (mut read, mut write) = tokio::io::split(&mut stream);
    let sending = async {
        write.write_all(&pattern()).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    tokio::join!(sending, async {
        read.read_to_end(&mut received).await.unwrap()
    });
    received
}

#[tokio::test]
async fn a_mebibyte_goes_both_ways_and_ends_with_half_close() {
    let stage = Stage::new();
    let transports = stage.loaded();
    for target in [
        stage.unix("s"),
        "tcp:127.0.0.1:0".to_owned(),
        "tcp:[::1]:0".to_owned(),
    ] {
        let (_listener, dialed, accepted) = connected(&transports, &target).await;
        let (one, other) = tokio::join!(
            send_all_and_read_all(dialed),
            send_all_and_read_all(accepted)
        );
        assert!(one == pattern() && other == pattern(), "{target}");
    }
}

#[tokio::test]
async fn one_end_may_close_before_the_other_has_sent() {
    let stage = Stage::new();
    let (_listener, mut dialed, mut accepted) = connected(&stage.loaded(), &stage.unix("s")).await;
    dialed.shutdown().await.unwrap();
    assert_eq!(accepted.read(&mut [0]).await.unwrap(), 0);
    accepted.write_all(b"still here").await.unwrap();
    drop(accepted);
    let mut rest = String::new();
    dialed.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "still here");
}

#[tokio::test]
async fn gathered_writes_arrive_in_order_however_many() {
    let stage = Stage::new();
    let (_listener, mut dialed, mut accepted) = connected(&stage.loaded(), &stage.unix("s")).await;
    let bytes: Vec<u8> = (0..3000_u32).map(|at| (at % 251) as u8).collect();
    let slices: Vec<_> = bytes.chunks(1).map(std::io::IoSlice::new).collect();
    let sent = dialed.write_vectored(&slices).await.unwrap();
    let mut received = vec![0; sent];
    accepted.read_exact(&mut received).await.unwrap();
    assert!(sent > 0 && received == bytes[..sent]);
}

#[tokio::test]
async fn peers_are_who_the_kernel_says() {
    let stage = Stage::new();
    let transports = stage.loaded();
    let ourselves = Peer::Unix {
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        pid: Some(std::process::id()),
    };
    let (_listener, dialed, accepted) = connected(&transports, &stage.unix("s")).await;
    assert_eq!((dialed.peer(), accepted.peer()), (&ourselves, &ourselves));
    assert!(dialed.passes_fds() && accepted.passes_fds());

    let (listener, dialed, accepted) = connected(&transports, "tcp:127.0.0.1:0").await;
    let Peer::Inet(far) = dialed.peer() else {
        panic!("{:?}", dialed.peer())
    };
    assert_eq!(format!("tcp:{far}"), listener.target());
    assert!(matches!(accepted.peer(), Peer::Inet(near) if near.ip().is_loopback() && near != far));
    assert!(!dialed.passes_fds());
}

#[tokio::test]
async fn descriptors_ride_on_the_first_byte() {
    let stage = Stage::new();
    let (_listener, mut dialed, accepted) = connected(&stage.loaded(), &stage.unix("s")).await;
    let (mut kept, sent) = std::os::unix::net::UnixStream::pair().unwrap();
    let both = [sent.as_fd(), sent.as_fd()];
    let count = poll_fn(|cx| Pin::new(&mut dialed).poll_send(cx, b"{getfd}", &both))
        .await
        .unwrap();
    assert_eq!(count, 7);
    drop(sent);

    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut first = [0];
    let socket = accepted.into_fd();
    rustix::net::recvmsg(
        &socket,
        &mut [std::io::IoSliceMut::new(&mut first)],
        &mut control,
        RecvFlags::empty(),
    )
    .unwrap();
    assert_eq!(&first, b"{");
    let fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        })
        .collect();
    assert_eq!(fds.len(), 2);
    for fd in fds {
        std::os::unix::net::UnixStream::from(fd)
            .write_all(b"!")
            .unwrap();
    }
    let mut heard = String::new();
    kept.read_to_string(&mut heard).unwrap();
    assert_eq!(
        heard, "!!",
        "and nobody holds a copy, or this would not have ended"
    );
}

#[tokio::test]
async fn descriptors_without_a_byte_or_off_unix_are_refused() {
    let stage = Stage::new();
    let transports = stage.loaded();
    let (_unix, mut unix, _far) = connected(&transports, &stage.unix("s")).await;
    let (_tcp, mut tcp, _far) = connected(&transports, "tcp:127.0.0.1:0").await;
    let file = std::fs::File::open("/dev/null").unwrap();
    let many = vec![file.as_fd(); 254];
    let kind = async |stream: &mut Stream, bytes: &[u8], count: usize| {
        poll_fn(|cx| Pin::new(&mut *stream).poll_send(cx, bytes, &many[..count]))
            .await
            .unwrap_err()
            .kind()
    };
    assert_eq!(
        kind(&mut unix, b"", 1).await,
        std::io::ErrorKind::InvalidInput
    );
    assert_eq!(
        kind(&mut unix, b"x", 254).await,
        std::io::ErrorKind::InvalidInput
    );
    assert_eq!(
        kind(&mut tcp, b"x", 1).await,
        std::io::ErrorKind::Unsupported
    );
    assert_eq!(
        poll_fn(|cx| Pin::new(&mut unix).poll_send(cx, b"x", &many[..253]))
            .await
            .unwrap(),
        1
    );
}

#[tokio::test]
async fn nobody_there_is_told_with_the_systems_reason() {
    let stage = Stage::new();
    let transports = stage.loaded();
    let error = transports
        .dial(&stage.unix("nobody"), later())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot dial {}: failed to connect", stage.unix("nobody"))
    );
    assert_eq!(
        (error.os_error(), error.blame()),
        (Some(libc::ENOENT), Blame::Peer)
    );
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let error = transports
        .dial(&format!("tcp:{closed}"), later())
        .await
        .unwrap_err();
    assert_eq!(error.os_error(), Some(libc::ECONNREFUSED));
    assert_eq!(
        std::io::Error::from(error).kind(),
        std::io::ErrorKind::ConnectionRefused
    );
}

#[tokio::test]
async fn a_host_name_is_resolved_for_dialing_and_listening() {
    let transports = Stage::new().loaded();
    let listener = transports.listen("tcp:localhost:0", later()).await.unwrap();
    let port = listener.target().rsplit_once(':').unwrap().1;
    let named = format!("tcp:localhost:{port}");
    tokio::try_join!(transports.dial(&named, later()), listener.accept(later())).unwrap();
}

#[tokio::test]
async fn targets_that_make_no_sense_say_what_would() {
    let transports = linked().build().unwrap();
    for nonsense in ["", "unix", "unix:", ":/run/s", "unix:/a\0b"] {
        assert_eq!(
            transports.dial(nonsense, later()).await.unwrap_err().kind(),
            &ErrorKind::BadTarget,
            "{nonsense:?}"
        );
    }
    let error = transports.dial("ssh:host", later()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot dial ssh:host: no transport \"ssh\" among tcp, unix, vsock; load or register it"
    );
    for scrap in ["tcp:localhost", "tcp:host:port", "tcp::1"] {
        let error = transports.dial(scrap, later()).await.unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::BadAddress { .. }),
            "{error}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn accept_ends_by_its_deadline_and_the_listener_goes_on() {
    let stage = Stage::new();
    let transports = linked().build().unwrap();
    let listener = transports.listen(&stage.unix("s"), later()).await.unwrap();
    let deadline = Deadline::now() + Duration::from_secs(3);
    let error = listener.accept(deadline).await.unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::TimedOut { .. }),
        "{error}"
    );
    assert_eq!(Deadline::now(), deadline);
    tokio::try_join!(
        transports.dial(listener.target(), later()),
        listener.accept(later())
    )
    .unwrap();
}

#[tokio::test]
async fn an_accept_that_is_dropped_loses_no_peer_and_blocks_no_other() {
    let stage = Stage::new();
    let transports = linked().build().unwrap();
    let listener = transports.listen(&stage.unix("s"), later()).await.unwrap();
    let mut dropped = Box::pin(listener.accept(later()));
    let mut stuck = pin!(listener.accept(later()));
    assert!(poll!(&mut dropped).is_pending() && poll!(&mut stuck).is_pending());
    let _dialed = transports.dial(listener.target(), later()).await.unwrap();
    drop(dropped);
    // `stuck` is not polled any more, and holds nothing that this one needs.
    listener.accept(later()).await.unwrap();
    assert!(
        stuck.now_or_never().is_none(),
        "there was one peer, and it is taken"
    );
}

#[tokio::test(start_paused = true)]
async fn a_vsock_dial_ends_whatever_the_kernel_has() {
    let transports = Stage::new().loaded();
    let deadline = Deadline::now() + Duration::from_secs(3);
    let error = transports
        .dial("vsock:1:4000000000", deadline)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::TimedOut { .. } | ErrorKind::Failed { .. }
        ),
        "{error}"
    );
    assert!(Deadline::now() <= deadline);
}

#[tokio::test]
async fn a_path_is_kept_from_others_and_given_back() {
    let stage = Stage::new();
    let transports = stage.loaded();
    let (target, path) = (stage.unix("s"), stage.path("s"));
    let (listener, mut dialed, mut accepted) = connected(&transports, &target).await;
    let error = transports.listen(&target, later()).await.unwrap_err();
    assert_eq!(
        (error.os_error(), error.blame()),
        (Some(libc::EADDRINUSE), Blame::Caller)
    );
    drop(listener);
    assert!(!path.exists());
    dialed.write_all(b"x").await.unwrap();
    assert_eq!(
        accepted.read(&mut [0]).await.unwrap(),
        1,
        "what was accepted lives on"
    );
}
