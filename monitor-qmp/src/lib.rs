//! A QMP client that survives peers that hang, flood and lie.
//!
//! A [`Monitor`] is a connection to one QEMU. Its clones share it; each call is one command,
//! with its own deadline, and any number may be under way at once.
//!
//! ```
//! use monitor_qmp::{Deadline, Effect, Error, Monitor, command::*};
//!
//! async fn pause(monitor: &Monitor, deadline: Deadline) -> Result<RunState, Error> {
//!     match monitor.execute(Stop, deadline).await {
//!         // Sent, and no answer: it may have happened. Asking is safe, sending again need not be.
//!         Err(error) if error.effect() == Effect::Unknown => {}
//!         outcome => drop(outcome?),
//!     }
//!     Ok(monitor.execute(QueryStatus, deadline).await?.status)
//! }
//!
//! # use monitor_qmp::{NoFds, Options};
//! # use tests::fake_qemu::{Answers, FakeQemu};
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! # let (wire, qemu) = FakeQemu::over_unix().unwrap();
//! # tokio::spawn(qemu.serve(Answers::new()));
//! let deadline = Deadline::now() + std::time::Duration::from_secs(5);
//! let monitor = Monitor::connect(wire, Options::default(), (), deadline).await?;
//! assert_eq!(pause(&monitor, deadline).await?, RunState::Running); // the fake is stubborn
//! # Ok::<(), Error>(()) }).unwrap();
//! ```
//!
//! # How it works
//!
//! ```text
//!  caller ── execute ──> Protocol (a lock, no wait) <── Task ──> stream ──> QEMU
//!    ^                      who waits, what is in         │ whole messages only
//!    │                      flight, what may be sent      │
//!    └──────── reply ─────────────────────────────────────┤ in the order of the wire
//!                                      EventSink <────────┘ events before later replies
//! ```
//!
//! - **One task owns the stream.** It writes whole messages, so no dropped future tears one, and
//!   it reads whatever callers do. Replies are decoded in the caller's task.
//! - **Several commands may be in flight**, each known by its id. One that is sent while none is goes without: QEMU reads
//!   its monitor a byte a turn, and an id is a sixth of what a query takes.
//! - **A command ends in one of three ways**: done, refused, or unknown. [`Error::effect`] says
//!   which; it decides whether a retry is safe.
//! - **Dropping a call** withdraws a request that was not taken yet. What was sent is not undone:
//!   its reply reaches nobody, and [`Monitor::settled`] waits for it. Whoever is about to change
//!   the guest waits there first.
//! - **A deadline does not close the connection.** It asks QEMU for a sign of life out of band:
//!   [`Health::Busy`] or [`Health::Unresponsive`], until the answer comes after all.
//! - **An unknown outcome is settled by asking**: [`Settle`] knows the question for each command
//!   that changes something, and [`Monitor::execute_settled`] never sends one twice.
//! - **Events** go to an [`EventSink`] in the order of the wire, before any later reply is
//!   handed over. [`events`] makes a bounded stream of them, and [`Monitor::expect_event`] waits
//!   for one, armed before the command that causes it is written.
//! - **A stuck QEMU can be rescued**: a place past its main loop is always free for `yank` and
//!   its like, and [`Monitor::diagnose`] tells busy, link down and silent apart.
//! - **The end of the stream** fails every caller at once, with the reason.
//! - **Dropping the last handle** closes the stream: QEMU serves one client at a time.
//!
//! # Limits
//!
//! A message may have 64 MiB and 1024 nested brackets ([`Limits`]); beyond that the connection
//! ends with [`Closed::Violation`]. Typed decoding stops at serde_json's own 128 levels, an
//! error of that call alone. At most eight commands are in flight, seven beside the
//! out-of-band lane; the rest wait their turn here, where they can be withdrawn. Of commands
//! with descriptors one is in flight at a time, since QEMU keeps only the newest set.
//!
//! # What this crate does not know
//!
//! Which guest it talks to, who holds a job of it, how the stream was made, and how to make a
//! new one: a closed monitor stays closed, unless the caller chose [`Reconnect`] and gave it a
//! closure that dials. It never sends a command twice; what it asks on its own changes nothing.
//! Which QEMU has which command it learns from the [`Schema`] of the one that runs, not from
//! version numbers.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]
#![expect(
    unexpected_cfgs,
    reason = "cargo-fuzz sets `fuzzing`, and only it opens the inside to its targets"
)]

pub mod command;
mod error;
mod event;
mod events;
mod expect;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod message;
mod monitor;
mod protocol;
mod qmp;
mod reconnect;
mod rescue;
mod schema;
mod settle;
mod shared;
mod task;
mod wire;

pub use crate::{
    command::Command,
    error::{Blame, Closed, Effect, Error, ErrorClass, ErrorKind},
    event::{
        AcpiOst, BlockIoError, BlockJob, DevicePath, DisplayClients, DisplayEnd, DumpCompleted,
        Event, EventSink, FailoverDevice, GuestFault, ImageCorrupted, JobChange, MemoryFailure,
        MemoryFailureFlags, MemorySize, NicChanged, PortChange, PrManager, QmpEvent, RdmaGid,
        Shutdown, ShutdownCause, StreamConnected, StreamDisconnected, Subject, Timestamp,
        TrayMoved, WriteThreshold,
    },
    events::{EventQueue, Events, Notice, events},
    expect::Expected,
    frame::Limits,
    monitor::{Monitor, Options},
    protocol::Counters,
    qmp::{Deadline, Greeting, Health, Lane, Qmp, Release, Reply, Request, Version},
    reconnect::{Dial, Followed, Patience, Reconnect},
    rescue::Diagnosis,
    schema::{Difference, DifferenceKind, Schema},
    settle::{Outcome, Settle, Settled},
    wire::{MAX_FDS, NoFds, Wire},
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
