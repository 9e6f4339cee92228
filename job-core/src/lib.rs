//! The per-domain job scheduler: who may change a guest, who waits, and why.
//!
//! A daemon that runs virtual machines has many callers of one guest: a status page, a resize, a backup, a migration, an
//! agent that may never answer. This crate decides who goes. A caller asks for a job of a kind, waits in turn until a
//! deadline it brought, and holds a guard; what the guard is gives the right to do is checked by the compiler.
//!
//! ```text
//!            normal slot           async slot              agent slot
//!            one at a time         one at a time           one at a time
//!          ┌────────────────┐    ┌──────────────────┐    ┌───────────────┐
//!          │ Job            │    │ AsyncJob         │    │ AgentJob      │
//!          │ or NestedJob ◄─┼────┤  .nested()       │    │               │
//!          └───────▲────────┘    │  .agent() ───────┼───►│ (or AgentStep)│
//!                  │             │  mask, phase,    │    └───────▲───────┘
//!                  │             │  progress, token │            │
//!        only kinds in the mask  └────────▲─────────┘            │
//!        pass beside an async job         │ only when neither    │ beside anything
//!                  │                      │ normal nor async runs│
//!          Caller::begin           Caller::begin_async    Caller::begin_agent
//! ```
//!
//! The rules are those of libvirt's threading document for its QEMU driver; where that asks reviewers to watch, this
//! crate has types, and what types cannot carry is walked exhaustively (`tests/walk.rs`).
//!
//! # In five minutes
//!
//! One [`Scheduler`] a guest. Whoever wants something of it opens a [`Caller`] with a name for people to read, and begins
//! one job, which consumes the caller:
//!
//! | to | begin | and hold |
//! |---|---|---|
//! | read or change the guest | [`Caller::begin`] with a [`JobKind`] | a [`Job`] |
//! | ask the guest's agent | [`Caller::begin_agent`] | an [`AgentJob`] |
//! | save, migrate, back up | [`Caller::begin_async`] | an [`AsyncJob`], and a [`NestedJob`] for each visit to the monitor |
//!
//! Functions that need the right take a borrow of the guard (`&impl `[`MonitorRight`]), or keep what it guards in a
//! [`Guarded`]. Dropping the guard ends the job, and the next one in turn goes.
//!
//! ```
//! # futures::executor::block_on(async {
//! use job_core::{AsyncKind, BeginError, JobKind, Scheduler};
//!
//! let domain = Scheduler::new("web");
//! let mut save = domain.caller("nightly").begin_async(AsyncKind::Save, std::future::pending()).await?;
//! save.set_phase("writing");
//!
//! // A query passes beside a save. A modify waits for it, here until a deadline that has already come.
//! let query = domain.caller("status page").try_begin(JobKind::Query)?;
//! query.finish();
//! let refused = domain.caller("resize").begin(JobKind::Modify, std::future::ready(())).await;
//! let error = refused.expect_err("the save lets no modify pass");
//! assert!(matches!(error, BeginError::TimedOut { .. }));
//! assert!(error.to_string().contains("held by save (writing, "));
//!
//! let step = save.nested(std::future::pending()).await?;
//! drop(step); // here it would have talked to the monitor
//! save.finish();
//! domain.caller("resize").try_begin(JobKind::Modify)?.finish();
//! # Ok::<_, BeginError>(()) }).unwrap();
//! ```
//!
//! # Order and cost
//!
//! First come, first served among those that may run; `Destroy`, then `Abort`, go first. A waiter that the mask holds back
//! is not in the way of one behind it. A release wakes exactly those it grants. The cost of a grant does not grow with
//! the queue. Why somebody waits is one call away: [`Scheduler::snapshot`] has the holder, its phase and command, the
//! mask, and each waiter's place. An idle domain weighs half a kilobyte, its history apart (`benches/`).
//!
//! A deadline is polled only by who has to wait: `async { sleep(..).await }` costs nothing where the domain is free.
//! Times are told to the kernel's tick (4 ms at 250 Hz): exact ones were a third of what a job costs.
//!
//! # When the guest dies
//!
//! [`Scheduler::end_generation`] fails all who wait, fires all [`Token`]s and takes the right out of old guards; the
//! clean-up is the first job of the next generation. [`Scheduler::close`] is for a domain that is removed.
//!
//! # Limits
//!
//! - A guard that is kept in a future nobody polls keeps its slot; [`Scheduler::snapshot`] shows its age.
//! - A grant in such a future is taken back after a second, by the next begin or release on the domain, or by
//!   [`Overdue::sweep`].
//! - One flow, one job: joined operations need a [`Flow`] each, or the second is told that it would deadlock.
//!
//! # What this crate does not know
//!
//! QEMU, sockets, any async runtime and the calendar. Deadlines are futures that callers bring; what a job's holder does
//! with its right is its own matter.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod caller;
mod error;
mod guard;
mod held;
mod jobs;
mod kind;
mod label;
mod ledger;
mod overdue;
mod progress;
mod scheduler;
mod shared;
mod slots;
mod snapshot;
mod state;
mod sync;
mod token;

pub use caller::{Caller, Flow};
pub use error::{BeginError, CancelError, Gone, GoneWhy, Holder};
pub use guard::{
    AgentJob, AgentRight, AgentStep, AsyncJob, Guard, Job, MonitorRight, NestedJob, Step, Steps,
};
pub use jobs::{Ask, Jobs};
pub use kind::{AgentKind, AsyncKind, JobKind, Kind, KindSet};
pub use label::Label;
pub use overdue::Overdue;
pub use progress::{Estimate, Progress};
pub use scheduler::{Cleanup, Scheduler};
pub use slots::Limits;
pub use snapshot::{AsyncRecord, Finished, Held, Outcome, Snapshot, Waiting};
pub use state::{ChangeError, Guarded};
pub use token::{Stop, Token};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
