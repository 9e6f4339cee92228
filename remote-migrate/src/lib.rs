//! Moves a running guest from one daemon to another, so that it never runs twice and is never lost.
//!
//! # The law
//!
//! 1. The guest never runs twice at any instant.
//! 2. A complete copy is never discarded before the other side is known to own the guest.
//! 3. Every run in which links heal and daemons return ends with one owner; every case ends in a state
//!    that has a name.
//!
//! # The phases
//!
//! ```text
//!            source                                    destination
//!  Begin     describes the guest
//!  Prepare   ───────────── Prepare ─────────────────►  makes a QEMU that waits, says where
//!  Perform   moves memory, stops the guest  ═══════►   loads
//!            journal: handing over
//!  ─ ─ ─ ─ ─ the point of return ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
//!            lets the last of the memory go ══════►    loads
//!  Finish    ───────────── Finish ──────────────────►  all loaded? journal: mine; starts the guest
//!            ◄──────────── owned, or refused ────────
//!            journal: released, or kept
//!  Confirm   kills its copy, or resumes it
//!            ───────────── Confirm ─────────────────►  forgets, or discards and forgets
//!            forgets
//! ```
//!
//! The last of the memory goes once the journal says that the guest may be offered: a copy that is complete is known as the
//! guest as it was last, also if the source's host goes down with the guest. That takes a guest that its host has stopped
//! ([`Stopped`]): one that QEMU has stopped it also lets run again by itself, so of that one all must be known to be there
//! before the journal says so.
//!
//! `Finish` is the one message that gives ownership away. Before it is sent the source's journal says
//! so; before the guest is started the destination's journal says so. If its answer is lost, the guest
//! is *in doubt*: stopped at the source, perhaps running at the destination. The source then asks again,
//! for as long as it has patience, and after that whenever [`recover()`] is called. It never resumes by
//! guess. An operator who knows what became of the other side may rule ([`resolve`], [`verdict::Ruling`]). Before the point of
//! return [`Control::cancel`] undoes; from there on it answers [`TooLate`].
//!
//! What decides is pure: [`source`], [`destination`] and [`verdict`] are plain values and functions that
//! `tests/walk.rs` explores exhaustively, with crashes, lost and stray messages, failing disks and killed
//! guests. What waits is thin: [`migrate`] drives one side, [`Destination`] serves the other. Between two
//! daemons stand [`wire::WirePeer`] and [`wire::serve_connection`].
//!
//! # Post-copy
//!
//! [`Control::post_copy`] turns a migration to post-copy: the guest changes hands before its memory has.
//!
//! ```text
//!            source                                    destination
//!  Perform   moves memory
//!            journal: switching; stops the guest
//!  ─ ─ ─ ─ ─ the point of return ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
//!            journal: handing over
//!  Finish    ───────────── Finish ──────────────────►  can it run? journal: mine; starts the guest
//!            ◄──────────── owned ───────────────────
//!            journal: post-copy
//!            sends the rest of the memory  ═════════►  runs, and waits for what it touches
//!            ───────────── Status ──────────────────►  all there?
//!            ◄──────────── started, or partial ─────
//!            journal: released
//!  Confirm   as above
//! ```
//!
//! If the stream breaks, `Resume` asks where to send the rest, and both halves are kept until it is sent.
//! Only the destination's word that all is there ends the source's half: a source's QEMU says `completed`
//! of what its destination never had. An operator must say as much
//! ([`PeerHasAll`](verdict::Ruling::PeerHasAll)); that the other side owns the guest does not end it.
//!
//! # How far it is
//!
//! Both sides can watch a [`Progress`]: the source by [`Control::progress`], the destination by an [`Echo`] of what the source
//! tells in passing. Its [`Transfer`] holds the host's own counters: bytes, the pass, the dirty rate. Its [`Estimate`] holds what
//! follows from them: the rate, and as [`Eta`] when it will be over, which has a time only while passes are seen to shrink.
//! Lean on that; [`Transfer::percent`] falls back at each pass. How long the guest stood still is a [`Downtime`] at the end, by
//! each host's own clock, with the error of what those are apart: in the [`Report`], and told to
//! [`DestinationHost::moved`].
//!
//! # Example
//!
//! Two hosts that pretend, in one process:
//!
//! ```
//! use std::sync::Arc;
//!
//! use async_trait::async_trait;
//! use remote_migrate::{
//!     source::Outcome, verdict::GuestState, Begun, Control, Cookie, CopyState, Destination,
//!     DestinationHost, Guest, HostError, InProcess, Load, MemoryJournal, Meter, Owner, Plan, Prepared,
//!     Ran, RunState, SourceHost, StartError, Step, Stopped,
//! };
//!
//! struct Here;
//!
//! #[async_trait]
//! impl SourceHost for Here {
//!     async fn begin(&self, _: Step) -> Result<Begun, HostError> {
//!         Ok(Begun { cookie: Cookie::new("2 vcpus").map_err(HostError::new)?, run: RunState::Running })
//!     }
//!     async fn perform(&self, _: Step, to: &Prepared, _: &Meter) -> Result<Stopped, HostError> {
//!         println!("sending memory to {}, all but the last of it", to.connect);
//!         Ok(Stopped::ByHost)
//!     }
//!     async fn complete(&self, _: Step, _: &Meter) -> Result<(), HostError> {
//!         Ok(())
//!     }
//!     async fn confirm(&self, _: Step, outcome: Outcome) -> Result<(), HostError> {
//!         assert_eq!(outcome, Outcome::Released);
//!         Ok(())
//!     }
//!     async fn inspect(&self, _: Step) -> Result<GuestState, HostError> {
//!         Ok(GuestState::Stopped)
//!     }
//! }
//!
//! struct There;
//!
//! #[async_trait]
//! impl DestinationHost for There {
//!     async fn prepare(&self, _: Step, guest: &Guest) -> Result<Prepared, HostError> {
//!         assert_eq!(guest.cookie.as_str(), "2 vcpus");
//!         Ok(Prepared { connect: "tcp:there:49152".into(), cookie: Cookie::empty() })
//!     }
//!     async fn load(&self, _: Step) -> Result<Load, HostError> {
//!         Ok(Load::Complete)
//!     }
//!     async fn start(&self, _: Step, _: RunState) -> Result<(), StartError> {
//!         Ok(())
//!     }
//!     async fn discard(&self, _: Step) -> Result<(), HostError> {
//!         Ok(())
//!     }
//!     async fn inspect(&self, _: Step) -> Result<CopyState, HostError> {
//!         Ok(CopyState::Started)
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let destination = Destination::new(Arc::new(There), Arc::new(MemoryJournal::new()));
//! let peer = InProcess::new(Arc::new(destination));
//!
//! let plan = Plan::new(uuid::Uuid::new_v4());
//! let control = Control::new();
//! let report =
//!     remote_migrate::migrate(&plan, &Here, &peer, &MemoryJournal::new(), &control).await?;
//!
//! assert_eq!(report.owner, Owner::Destination);
//! assert!(control.cancel().is_err(), "too late");
//! # Ok(())
//! # }
//! ```
//!
//! # What a daemon does
//!
//! - It runs [`migrate`] on a task of its own: a dropped future is a crash of the daemon, as far as that
//!   migration goes, and [`recover()`] goes on from the journal.
//! - When it starts, before it serves, it goes through [`Journal::list`]: [`recover()`] for each record of
//!   the source, [`Destination::reconcile`] for each of the destination. Start, autostart and restore
//!   refuse a domain whose record says [`Record::refuses_start`].
//! - It keeps the job of the domain from Begin to Confirm, so that nobody else starts, stops or moves it.
//!
//! # Limits
//!
//! - One guest moves in one migration at a time; a second one is refused until the first is settled, or has ended here and is
//!   only to be told to its destination.
//! - In post-copy the only complete guest is in two halves: if the host of either dies then, it is lost, and
//!   the loss is named. A link that is lost costs time alone. A start that the destination refuses then gives
//!   the guest back only where the source's QEMU lets it run again.
//! - At most 1024 migrations arrive at one [`Destination`] at a time. Cookies hold up to 256 KiB. Those of
//!   the wire stand in [`wire`].
//! - If the source's QEMU dies between its last byte and the hand-over, and nobody can prove that the guest
//!   did not run on there, a person decides: the other copy may be older than the disk.
//!
//! # What this crate does not know
//!
//! QEMU, disks, networks, domains and jobs: what a step means locally is behind [`SourceHost`] and
//! [`DestinationHost`]. How a request travels, and who may send one, is behind [`Peer`] and [`Service`]:
//! [`wire`] is one such way, and the phases know nothing of it.
//! Where records lie is behind [`Journal`]. It knows none of its sibling crates.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]
#![expect(
    unexpected_cfgs,
    reason = "cargo-fuzz sets `fuzzing`, and only it opens the inside to its targets"
)]

mod control;
pub mod destination;
mod drive;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod host;
mod journal;
mod message;
mod pace;
mod peer;
mod phase;
mod plan;
mod serve;
pub mod source;
pub mod verdict;
pub mod wire;

pub use control::{Control, Echo, Meter, Progress, Transfer};
pub use drive::{migrate, recover, resolve};
pub use error::{Blame, Error, ErrorKind};
pub use host::{Begun, DestinationHost, HostError, Load, SourceHost, StartError, Step, Stopped};
pub use journal::{
    DestinationRecord, DestinationStage, Journal, JournalError, MemoryJournal, Record,
    SourceRecord, SourceStage,
};
pub use message::{
    Answer, Call, CopyState, Downtime, Fate, Guest, Prepared, Ran, Reply, Request, Status, Underway,
};
pub use pace::{Estimate, Eta, Pace};
pub use peer::{Effect, InProcess, Peer, PeerError, Service};
pub use phase::{
    Cookie, CookieError, Epoch, MigrationId, Owner, Phase, Reason, RunState, Side, TooLate,
};
pub use plan::{Limits, Plan, Report};
pub use serve::{Destination, Standing};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
