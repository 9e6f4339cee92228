//! The C ABI between a daemon and its transport plugins.
//!
//! A transport turns an address into a connected stream socket, and then is out of the way: bytes
//! flow between daemon and peer without it. It is a table of eight C functions under one symbol, so
//! it can be written in any language, and this crate never breaks: the table grows at its tail, and
//! old and new plugins and hosts keep loading each other.
//!
//! ```text
//!  host                              plugin
//!   │  dial_begin("/run/qmp.sock")     │  makes a socket, starts to connect
//!   │ ───────────────────────────────► │
//!   │  dial_step                       │
//!   │ ───────────────────────────────► │  WAIT: this descriptor, writable; or 2 ms
//!   │  (waits with its own reactor,    │
//!   │   up to its own deadline)        │
//!   │  dial_step                       │
//!   │ ───────────────────────────────► │  READY: this descriptor is yours
//!   │  dial_free                       │
//!   │ ───────────────────────────────► │
//! ```
//!
//! No call blocks and no thread waits: giving up is calling `dial_free` early. Listening works
//! alike, see [`Listen`].
//!
//! # Writing a plugin
//!
//! In Rust a plugin is safe code: implement [`Transport`], [`Dial`] and [`Listen`], and export
//! them.
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use transport_abi::{CannotListen, Dial, Failure, Request, Step, Transport, export_transport};
//!
//! /// `echo:` connects to itself: whatever is written comes back.
//! struct Echo;
//!
//! struct Loop(Option<UnixStream>);
//!
//! impl Transport for Echo {
//!     const NAME: &'static str = "echo";
//!     type Dial = Loop;
//!     type Listen = CannotListen;
//!
//!     fn begin_dial(_request: &Request<'_>) -> Result<Loop, Failure> {
//!         let (ours, theirs) = UnixStream::pair().map_err(Failure::io("make a socket pair"))?;
//!         std::thread::spawn(move || std::io::copy(&mut &ours, &mut &ours)); // a plugin may have threads: clause 2.2
//!         theirs.set_nonblocking(true).map_err(Failure::io("make non-blocking"))?;
//!         Ok(Loop(Some(theirs)))
//!     }
//! }
//!
//! impl Dial for Loop {
//!     fn step(&mut self) -> Result<Step<'_>, Failure> {
//!         let stream = self.0.take().ok_or_else(|| Failure::new("step a finished dial"))?;
//!         Ok(Step::Ready(stream.into()))
//!     }
//! }
//!
//! export_transport!(Echo, "echo");
//!
//! assert_eq!(transport_abi::Verified::of(&TABLE).unwrap().name(), "echo");
//! ```
//!
//! Never block: what cannot be done yet is a wait, and the host does the waiting. Listening is the
//! same with [`Listen`]; so is a dial that is not done at once.
//!
//! ```
//! use std::io::ErrorKind;
//! use std::os::fd::AsFd;
//! use std::os::unix::net::UnixListener;
//! use transport_abi::{Failure, Listen, Step};
//!
//! struct Door {
//!     listener: UnixListener, // non-blocking
//!     path: String,
//! }
//!
//! impl Listen for Door {
//!     fn accept(&mut self) -> Result<Step<'_>, Failure> {
//!         match self.listener.accept() {
//!             Ok((peer, _)) => {
//!                 peer.set_nonblocking(true).map_err(Failure::io("make non-blocking"))?;
//!                 Ok(Step::Ready(peer.into()))
//!             }
//!             Err(error) if error.kind() == ErrorKind::WouldBlock => {
//!                 Ok(Step::readable(self.listener.as_fd())) // lent: it stays ours
//!             }
//!             Err(error) => Err(Failure::io("accept")(error)), // costs that peer only
//!         }
//!     }
//!
//!     fn address(&self) -> Result<String, Failure> {
//!         Ok(self.path.clone())
//!     }
//! }
//! ```
//!
//! | what you have | what a step answers |
//! |---|---|
//! | a socket that is connected | [`Step::Ready`], non-blocking and close-on-exec |
//! | one that is connecting | [`Step::writable`] |
//! | nothing that signals (a full unix backlog) | [`Step::retry_after`] |
//! | something that may signal, or may die silently | [`Step::readable`]` … `[`at_most`](Step::at_most) |
//! | a channel that is no socket | one end of a socket pair; a thread of yours pumps the other |
//! | no hope | [`Failure`]: the step that failed, as a verb phrase, and the errno |
//!
//! `begin_*`, `step` and `accept` may be called on any thread, one after the other; dropping is how
//! the host cancels. A panic is caught at the boundary, so leave `panic = "unwind"` alone.
//!
//! # From a crate to a daemon
//!
//! 1. `cargo xtask new-transport NAME` copies `plugins/transport-template`: a channel that is no
//!    socket, pumped. For one that is, `plugins/transport-unix` is the shorter model.
//! 2. `crate-type = ["cdylib", "rlib"]` makes it a file to load and a crate to link: a static daemon
//!    registers the very same `TABLE`.
//! 3. `cargo xtask conformance target/debug/libtransport_NAME.so NAME:ADDRESS` goes through the
//!    [`contract`] clause by clause. ADDRESS is where it can listen, or a live server's if it only
//!    dials.
//! 4. Install it as `libtransport_NAME.so` (with `_` for `-`) in a folder that nobody but root and
//!    the daemon's user can write, nor any folder above; the host refuses it anywhere else.
//!
//! In C the same is a `const vmw_transport` filled in by hand: `include/vmwright_transport.h` has
//! the types, `plugins/transport-abstract/abstract.c` is a whole plugin in one file, and the kit
//! takes the source itself. The numbered clauses of the [`contract`] bind both languages.
//!
//! # Versions
//!
//! The table and the structs that cross only grow at their tails, and each says its own size. A
//! plugin built today loads in every host that speaks ABI 1, and one built later loads in today's
//! host unless it says that it cannot do without something new (`needs_minor`). What does not fit
//! is refused by [`Verified`] with both versions in the message.
//!
//! # Limits
//!
//! Stream sockets only. Names up to 32 bytes, failure texts up to what the host offers. A plugin is
//! not a security border: it runs with all the rights of the daemon.
//!
//! # What this crate does not know
//!
//! Files, libraries, runtimes, any transport, and who the host is. It depends on the standard
//! library alone.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod export;
mod layout;
mod negotiate;
mod plugin;

pub use layout::{
    ABI_MAJOR, ABI_MINOR, DialBegin, DialFree, DialStep, Events, Flags, ListenAddress, ListenBegin,
    ListenFree, ListenStep, MAGIC, RawDial, RawFailure, RawListener, RawProgress, RawRequest,
    RawText, Status, Table,
};
pub use negotiate::{DialFunctions, ListenFunctions, Mismatch, Verified};
pub use plugin::{
    Addressing, CannotListen, Dial, Failure, FailureKind, Listen, Request, Step, Transport, Wait,
};

/// The numbered clauses.
#[doc = include_str!("contract.md")]
pub mod contract {}

#[doc(hidden)]
pub use export::stem_matches;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
