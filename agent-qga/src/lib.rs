//! A guest agent client that trusts the guest with nothing.
//!
//! `qemu-ga` runs inside the guest, where whoever owns the guest decides what it says and when. So
//! everything it does is bounded here: how long it may be silent, how much and how deep it may
//! answer, and whom an answer can reach. A guest that lies gets its own callers a wrong answer or
//! an error; it cannot get them another caller's answer, and it cannot keep them past their deadline.
//!
//! ```text
//!  freeze   files   programs        built on the trait alone, for whoever stands behind it
//!      └──────┬───────┘
//!  Agent ── Agent ── dyn Qga        handles: callers queue, each within its own deadline
//!      └──────┴───────┘
//!             │ one call at a time, and what the monitor saw
//!           task                    the only one that reads and writes
//!             │ asks what the bytes mean
//!          protocol                 pure: sync, stale answers, lost sync
//!             │
//!      frame ─┴─ stream             lines, a 0xFF ends whatever came before it
//! ```
//!
//! An agent's answers carry nothing that ties them to a question, so order is all there is, and
//! one answer too many would shift all that follow. Therefore a connection is in sync or it is not:
//! before the first command, after every command that was given up, and whenever the guest may have
//! started anew, a 0xFF and a `guest-sync-delimited` with a fresh number go first, and nothing counts
//! as an answer until that number has come back. Callers see nothing of it but the time it takes.
//!
//! ```
//! use std::time::Duration;
//!
//! use agent_qga::{Agent, GetHostName, Options, QgaExt as _};
//! # use tests::fake_guest::{FakeGuest, Table};
//! use tokio::time::Instant;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), agent_qga::Error> {
//! # let (stream, mut guest) = FakeGuest::open();
//! # tokio::spawn(async move { guest.serve(&mut Table::typical()).await });
//! let agent = Agent::new(stream, Options::default()); // any connected stream
//! agent.wait_ready(Instant::now() + Duration::from_secs(60)).await?; // it may be booting
//!
//! let deadline = Instant::now() + Duration::from_secs(10);
//! let name = agent.execute(GetHostName, deadline).await?.host_name;
//! assert_eq!(name, "fake");
//! # Ok(())
//! # }
//! ```
//!
//! # Errors
//!
//! Each [`Error`] says what sort it is ([`ErrorKind`]), whose fault ([`Blame`]) and, since that
//! decides whether asking again is safe, what the guest may have done ([`Effect`]). The guest's
//! words are in them shortened and escaped. Its words in *answers* are data, and as they came: a
//! host name may hold an escape sequence.
//!
//! # Silence
//!
//! `guest-shutdown` and `guest-suspend-*` answer only if they fail. They end when the owner of the
//! monitor hands in the [`Signal`] that proves them ([`Qga::note`]), or when the channel ends; the
//! [`Proof`] says by which. Which proof is right for which mode, the caller judges.
//!
//! # Freezing
//!
//! [`freeze`] is a lease: recorded in a [`LeaseStore`] before it is asked for, thawed when the
//! [`FreezeLease`] is dropped and when its time is over; [`recover`] thaws after a crash. A freeze that
//! nobody recorded is somebody else's: it is reported and left alone.
//!
//! # Files and programs
//!
//! [`upload`] and [`download`] copy in chunks and check digests; [`GuestFile`] closes itself.
//! [`QgaExt::run`] waits for a program's end and its output; [`ProgramStream`] hears it while it runs,
//! by way of two files in the guest, for the protocol itself shows no output before the end.
//!
//! # Limits
//!
//! - An agent serves one client at a time. A second one connects and meets silence.
//! - A dropped or timed-out command takes its course in the guest, and the agent does nothing else
//!   meanwhile: the next call waits for it within its own deadline.
//! - A guest that talks while nobody asks is read up to one message's worth. Then its channel fills,
//!   and the end of the connection is seen by the next call only.
//! - [`FsfreezeFreeze`] by itself is plain: nothing thaws it but [`FsfreezeThaw`]. [`freeze`] is the
//!   one that cannot be forgotten.
//!
//! # What this crate does not know
//!
//! Jobs, domains, QMP, and how the stream was connected. Who may ask the agent what, and that only
//! one does at a time per domain, is decided above; what happens to the guest is told from beside,
//! through [`Qga::note`].

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]
#![expect(
    unexpected_cfgs,
    reason = "cargo-fuzz sets `fuzzing`, and only it opens the inside to its targets"
)]

mod agent;
mod command;
mod copy;
mod error;
mod ext;
mod file;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
#[cfg(test)]
mod hostile;
mod lease;
pub mod protocol;
mod stream;
mod task;

pub use agent::{Agent, Deadline, Options, Qga, Reply, Request};
pub use command::*;
pub use copy::{Digest, NoDigest, Transferred, digest_in_guest, download, upload};
pub use error::{Blame, Closed, Effect, Error, ErrorKind};
pub use ext::{Limits, Output, QgaExt};
pub use file::{CHUNK, GuestFile};
pub use lease::{
    FileLeases, FreezeEnd, FreezeLease, FreezePlan, FreezeWatch, LeaseRecord, LeaseStore,
    MemoryLeases, Recovered, Thawed, ThawedBy, freeze, recover,
};
pub use protocol::{Proof, Signal};
pub use stream::{Piece, ProgramEnd, ProgramStream};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
