//! What vsock does on this machine's kernel. What the kernel lacks is reported as ignored, with the
//! reason.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transport_host::{Blame, Deadline, Listener, Peer, Transports};

fn main() {
    let trials = vec![
        Trial::ignorable_test("a_vsock_listener_on_any_port_tells_the_real_one", || {
            in_runtime(any_port())
        }),
        Trial::ignorable_test(
            "a_vsock_connection_through_the_loopback_knows_its_peer",
            || in_runtime(loopback()),
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn in_runtime(test: impl Future<Output = Completion>) -> Result<Completion, Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(test))
}

fn later() -> Deadline {
    Deadline::now() + Duration::from_secs(30)
}

fn vsock() -> Transports {
    let builder = Transports::builder().register_table(&transport_vsock::TABLE);
    builder.build().unwrap()
}

/// A listener, unless the kernel says no in this way.
async fn listen(transports: &Transports, target: &str, lacking: Errno) -> Option<Listener> {
    match transports.listen(target, later()).await {
        Err(error) if error.os_error() == Some(lacking.raw_os_error()) => None,
        listener => Some(listener.unwrap()),
    }
}

async fn any_port() -> Completion {
    let transports = vsock();
    let Some(listener) = listen(&transports, "vsock:any:any", Errno::AFNOSUPPORT).await else {
        return Completion::ignored_with("this kernel has no vsock");
    };
    let port = listener.target().strip_prefix("vsock:any:").unwrap();
    assert!(port.parse::<u32>().is_ok(), "{port} is a real port");
    let taken = transports.listen(listener.target(), later()).await;
    assert_eq!(taken.unwrap_err().blame(), Blame::Caller);
    Completion::Completed
}

async fn loopback() -> Completion {
    let transports = vsock();
    let missing = Errno::ADDRNOTAVAIL;
    let listener = match listen(&transports, "vsock:1:any", missing).await {
        Some(listener) => listener,
        None => return Completion::ignored_with("this kernel has no vsock loopback"),
    };
    let (mut dialed, mut accepted) = tokio::try_join!(
        transports.dial(listener.target(), later()),
        listener.accept(later())
    )
    .unwrap();
    let Peer::Vsock { cid: 1, port } = *dialed.peer() else {
        panic!("{:?}", dialed.peer())
    };
    assert_eq!(listener.target(), format!("vsock:1:{port}"));
    assert!(matches!(accepted.peer(), Peer::Vsock { cid: 1, .. }));
    dialed.write_all(b"hello").await.unwrap();
    dialed.shutdown().await.unwrap();
    let mut heard = String::new();
    accepted.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "hello");
    Completion::Completed
}
