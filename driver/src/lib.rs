//! QEMU guests under job rules: start, attach, query, pause, save, dump, freeze, talk to the agent, destroy.
//!
//! This crate is what a daemon that runs virtual machines is built on. It composes the siblings it depends on: the job
//! scheduler decides who goes, the monitor and the agent talk, transports connect. It adds the guest itself: its
//! description, its process, its observed state, and the end of all of them.
//!
//! ```text
//!   caller ── domain.pause() ─────► Call ── await ──► job (job-core) ──► own task
//!                                                                          │ Monitor: borrowed from the guard,
//!                                                                          ▼          checked before and after
//!   QEMU ◄──────────────── fd ◄──── monitor-qmp ◄───────────────────── execute(Stop)
//!     │
//!     └─ events ─► pump ─► Observed::apply (no job) ─► log with numbers ─► subscribers, who may lag
//!     └─ end ────► pidfd ─► reaper ─► generation ends: all who wait are told, clean-up is the first job of the next
//! ```
//!
//! A daemon in a few lines:
//!
//! ```no_run
//! use driver::{Driver, Guest, Notice, StartOptions};
//! use transport_host::Transports;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut transports = Transports::builder();
//! transports.load_dir("/usr/lib/my-daemon/transports")?;
//! let driver = Driver::builder(transports.build()?, "/run/my-daemon").build()?;
//!
//! let web = driver.start(Guest::new("web"), StartOptions::default()).await?;
//! let mut events = web.subscribe();
//! web.pause().deadline(std::time::Duration::from_secs(5)).await?;
//! while let Notice::News { news, .. } = events.next().await {
//!     println!("{:?}", news.what);
//! }
//! # Ok(()) }
//! ```
//!
//! # What is promised
//!
//! - No lock is held across a wait: state is reached through closures that cannot await.
//! - Whatever waits ends by a deadline: each call has a default, and `.deadline(..)` changes it.
//! - A call that is dropped before its job is granted leaves no trace; after that its work goes on to its end on a task
//!   of its own, since a job must not end while its command is inside QEMU.
//! - [`Observed`] is written by what was seen only, [`Records`] only under a job.
//! - A guest that is asked to let go of a disk or a card is waited for without a job; whenever it does, nothing of the part
//!   is left ([`Domain::unplug_disk`]).
//! - Which file is a disk is never in doubt: a guest stands still from before it goes over to another file until that is
//!   written down ([`Domain::mirror_disk`], [`Domain::commit_disk`]).
//! - When QEMU dies, all who wait or hold are told [`Gone`](ErrorKind::Gone), with the reason, and no guard of the old
//!   guest can touch the next.
//! - [`Domain::destroy`] takes no job: nothing that is stuck is in its way.
//!
//! - What runs, and the async job that is at it, is written down before it is begun. A driver that comes back after a
//!   `kill -9` at any instant knows its guests at once, finds each again under a job of its own, and finishes or undoes what
//!   was interrupted ([`Driver::recovered`]); one that cannot be reached is tried again, and never ended for that.
//! - A freeze is a lease ([`Domain::freeze`]): written down before the guest is asked, thawed on drop, in time, or by the
//!   next driver.
//! - A guest that dies in the middle of a snapshot is started from what it wrote last ([`Domain::snapshot`]); a backup that
//!   is cut short leaves each bitmap with all that was written since the last good one ([`Domain::backup`]).
//! - A migration that a death or a broken link left open is settled by itself once the other daemon can be asked
//!   ([`Builder::peers`]); until then it is named ([`Driver::migrations`]), and nothing follows from silence.
//!
//! How far a migration is can be watched on both sides ([`Domain::migration_progress`]): bytes, pass, rate and dirty rate, and
//! when it will be over, which is not said of a guest that writes as fast as its memory is sent. The job's own progress tells
//! the same. At the end [`What::Moved`] tells both sides how long the guest stood still, and how far that may be from the truth.
//!
//! ```text
//!  RUN_DIR/lock                       one driver a directory
//!  RUN_DIR/UUID/                      sockets and log of a guest that runs; `lock` is QEMU's own
//!  RUN_DIR/records/UUID.json          what runs, in which process, and the job at it
//!  RUN_DIR/attached/UUID.json         what was attached, and where it listens
//!  STATE_DIR/domains/UUID.json        definitions, whether they run or not
//!  STATE_DIR/migrations/ID-SIDE.json  migrations that are not settled on both sides
//! ```
//!
//! # Operations of one's own
//!
//! [`Domain::run`], [`Domain::run_agent`] and [`Domain::run_async`] are what the operations here are written with. Six
//! patterns, each in a file of its own, are in `examples/`.
//!
//! # Limits
//!
//! - QEMU on Linux, x86-64 machines by default; any `qemu-system-*` by [`Builder::qemu`].
//! - An attached guest whose process is not known is ended through its monitor, under a job.
//! - The memory of a guest that moves passes over a network under TLS alone, unless it was said to be one of one's own
//!   ([`Landing`]). Who sees the network can keep a guest where it is, and no more.
//! - A guest that waits for its memory in post-copy may hold its QEMU's main loop: a driver that comes back then cannot
//!   reach it, and post-copy goes on only if its stream is whole. Where it can, a stream that broke is taken up again, also
//!   one that passes through the driver which ended. QEMU 7.2 ends itself if the new stream breaks before both sides have
//!   agreed on what is missing.
//! - A guest whose monitor's connection is lost while it moves goes on moving, or stays, once there is another connection. Until
//!   then it is neither started nor ended.
//! - Under emulation QEMU 7.2 loses writes of a guest that moves, or is saved while it runs, if its memory is a multiple of
//!   256 KiB (measured). KVM is not concerned.
//! - Over several connections QEMU connects by itself, and from 8.2 on listens by itself, with the system's own idea of how
//!   long a dead link may last.
//! - Generations and the history of jobs begin anew with each driver; the id of an interrupted job stays.
//! - [`Serial::File`] is written by QEMU itself and has no limit; [`Serial::Log`] has one, and keeps nothing while no
//!   driver runs.
//!
//! # What this crate does not know
//!
//! Its users' API: it has no wire and no command line. Whether a guest should run: it has no policy. How a connection
//! is made: that is a transport's matter.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod access;
mod arrivals;
mod block;
mod block_job;
mod builder;
mod command_line;
mod context;
mod devices;
mod dial;
mod domain;
mod driver;
mod error;
mod events;
mod explain;
mod foreign;
mod grouped;
mod guest;
mod journal;
mod landing;
mod logs;
mod made;
mod marks;
mod metrics;
mod migrations;
mod ops;
mod parts;
mod policy;
mod process;
mod qemu_job;
mod records;
mod recovery;
mod registry;
mod save_file;
mod select;
mod serve;
mod settling;
mod stats;
mod store;
mod stream_tls;
mod tap;
mod wire;

pub use access::{Agent, Monitor};
pub use arrivals::Arrivals;
pub use block_job::{BlockJobEnd, BlockJobKind, Pivot};
pub use builder::Builder;
pub use context::Defaults;
pub use dial::TransportDial;
pub use domain::state::{Observed, Run};
pub use domain::{Domain, Records, Row, Watch};
pub use driver::Driver;
pub use error::{Blame, Effect, Error, ErrorKind};
pub use events::{News, Notice, Subscription, What};
pub use explain::{AgentLink, Explanation, MonitorLink};
pub use guest::{
    Accelerator, AgentChannel, Disk, DiskFormat, Guest, InvalidGuest, Kernel, Mac, Network,
    NetworkBackend, NetworkModel, Serial,
};
pub use landing::Landing;
pub use metrics::{CommandMetrics, Counts, Histogram, JobMetrics, Metrics};
pub use migrations::{Next, OpenMigration, PostCopy};
pub use ops::{
    AgentOp, AsyncOp, Attach, BackedUp, BackupOf, BackupOptions, BackupTarget, Became, BlockJob,
    BlockJobState, Call, CommitOptions, Deadline, DumpFormat, Dumped, FreezeOptions,
    InsideSnapshot, MigrateOptions, MirrorOptions, Op, Recovered, SaveOptions, Saved,
    SnapshotOptions, Snapshotted, StartOptions, StreamOptions, Tuning,
};
pub use parts::{PartKind, Scope};
pub use policy::{Policy, Remedy};
pub use process::{Exit, Launch, Launcher, Plain, Process};
pub use select::Select;
pub use serve::Door;
pub use stats::{Stats, StatsRow};
pub use store::{FileStore, Found, MemoryStore, Shelf, StateStore};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
