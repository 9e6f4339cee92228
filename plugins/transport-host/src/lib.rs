//! Finds, checks, loads and uses transports: from `unix:/run/qmp.sock` to a connected stream.
//!
//! A daemon collects its transports once, from files, from tables that are linked in, or from its
//! own code, and then dials and listens by target. Whatever made a connection, the daemon gets one
//! type of [`Stream`], checked and identified by the kernel; the transport is out of the data path.
//!
//! ```text
//!  libtransport_unix.so ── policy ── dlopen ── verify ──┐
//!  transport_unix::TABLE ───────────────────── verify ──┼──► Transports ── dial("unix:/p") ────► Stream
//!  Arc<dyn Transport> ──────────────────────────────────┘        │  host: names, waiting,         AsyncRead + AsyncWrite
//!                                                                │  deadline, cancel, checks      fds, peer
//!                                                                └── listen("tcp:[::]:0") ──► Listener ── accept ──► Stream
//! ```
//!
//! ```
//! use std::time::Duration;
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! use transport_host::{Deadline, Peer, Transports};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let transports = Transports::builder().register_table(&transport_unix::TABLE).build()?;
//!
//! let dir = tempfile::tempdir()?;
//! let target = format!("unix:{}/hello", dir.path().display());
//! let deadline = Deadline::now() + Duration::from_secs(5);
//! let listener = transports.listen(&target, deadline).await?;
//! let (mut client, mut server) = tokio::try_join!(transports.dial(&target, deadline), listener.accept(deadline))?;
//!
//! assert!(matches!(server.peer(), Peer::Unix { pid: Some(pid), .. } if *pid == std::process::id()));
//! client.write_all(b"hello").await?;
//! client.shutdown().await?;
//! let mut heard = String::new();
//! server.read_to_string(&mut heard).await?;
//! assert_eq!(heard, "hello");
//! # Ok(())
//! # }
//! ```
//!
//! # Loading
//!
//! Nothing is loaded that anybody but root and the daemon's user could have changed, and there is
//! no search path: see [`Builder::load`]. That keeps others out; it does not keep a plugin in. A
//! loaded plugin runs with all the daemon's rights, and stays until the process ends.
//!
//! # Deadlines and cancelling
//!
//! A plugin never waits: it says what it waits for, and this crate does, with the daemon's own
//! reactor. So a deadline is a timer and cancelling is dropping a future; both free the operation
//! and leave no thread behind.
//!
//! # Is a plugin any good?
//!
//! The program `transport-conformance` of this package loads one as a daemon would and goes through
//! the contract: every C function early, twice and in every state, bytes and half-close both ways,
//! limits, cancelling, and 10 000 rounds with nothing left behind. Its target is where the plugin
//! can listen; one that only dials is judged on a live server.
//!
//! # Limits
//!
//! `SIGPIPE` must be ignored, as Rust programs do from the start (clause 2.5). Linux, tokio, stream
//! sockets. Messages of plugins and addresses of listeners up to 512 bytes;
//! 253 descriptors a message.
//!
//! # What this crate does not know
//!
//! QEMU, QMP, guests, jobs, and any one transport. It does not retry, and it does not encrypt.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod adopt;
mod builder;
mod call;
mod catalog;
mod error;
mod library;
mod listener;
mod peer;
mod plugin;
mod policy;
mod readiness;
mod resolve;
mod stream;
mod transport;
mod wait;

pub use builder::Builder;
pub use catalog::Transports;
pub use error::{Blame, Error, ErrorKind};
pub use library::{LoadReport, Loaded, Refused};
pub use listener::Listener;
pub use peer::Peer;
pub use stream::Stream;
pub use transport::{Deadline, Listening, Transport};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
