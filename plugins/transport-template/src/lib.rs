//! The `template:` transport: a target's address is the path of a door, a named pipe to knock on.
//!
//! It stands for every channel that is no socket: something is opened, and a thread carries its
//! bytes to and from one end of a socket pair, whose other end the host gets (clause 6.3).
//!
//! ```text
//!  dial    two pipes of its own, PATH.PID-N.up and .down ── their name goes into the door
//!          └── a byte in .down ──► opens .up, removes both names ──► pump
//!  listen  makes the door and locks it ── a name is in it ──► opens both, answers ──► pump
//!
//!  host ◄── socket pair ──► pump ── up ───► pump ◄── socket pair ──► host
//!                                ◄── down ──
//! ```
//!
//! ```
//! let table = transport_abi::Verified::of(&transport_template::TABLE).unwrap();
//! assert_eq!((table.name(), table.resolves_names()), ("template", false));
//! ```
//!
//! # Limits
//!
//! One machine, one user: door and pipes have mode 0600. Nobody can say who the peer is (clause
//! 13.1). A process that is killed while it dials leaves its two names behind.
//!
//! # What this crate does not know
//!
//! The host, deadlines, and what the bytes mean.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod dial;
mod listen;
mod pipes;
mod pump;

use transport_abi::{Failure, Request, Transport, export_transport};

struct Doors;

impl Transport for Doors {
    const NAME: &'static str = "template";
    type Dial = dial::Knocking;
    type Listen = listen::Door;

    fn begin_dial(request: &Request<'_>) -> Result<dial::Knocking, Failure> {
        dial::Knocking::new(request.address().as_ref())
    }

    fn begin_listen(request: &Request<'_>) -> Result<listen::Door, Failure> {
        listen::Door::new(request.address())
    }
}

export_transport!(Doors, "template");

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
