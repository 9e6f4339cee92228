//! QEMU guests under job rules: start, attach, query, pause, save, talk to the agent, destroy.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod access;
mod builder;
mod command_line;
mod context;
mod domain;
mod driver;
mod error;
mod events;
mod guest;
mod ops;
mod process;
mod registry;
mod save_file;
mod wire;

pub use access::{Agent, Monitor};
pub use builder::Builder;
pub use context::Defaults;
pub use domain::state::{Observed, Run};
pub use domain::{Domain, Records, Row};
pub use driver::Driver;
pub use error::{Blame, Effect, Error, ErrorKind};
pub use events::{News, Notice, Subscription, What};
pub use guest::{Accelerator, AgentChannel, Disk, DiskFormat, Guest, InvalidGuest, Kernel, Serial};
pub use ops::{AgentOp, AsyncOp, Call, Deadline, Op, SaveOptions, Saved, StartOptions};
pub use process::{Exit, Launch, Launcher, Plain, Process};
