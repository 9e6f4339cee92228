//! The `unix:` transport: a target's address is the path of a stream socket, up to 107 bytes.
//!
//! ```text
//!  dial    connect ── full backlog ──► again in 2 ms, since no readiness will ever come
//!  listen  bind ── path taken ──► no socket, or somebody answers: refused
//!                             └─► a dead server's leftover: moved aside, looked at again, removed
//!  drop    the path is removed if it still is the socket that was bound
//! ```
//!
//! ```
//! let table = transport_abi::Verified::of(&transport_unix::TABLE).unwrap();
//! assert_eq!((table.name(), table.resolves_names()), ("unix", false));
//! ```
//!
//! # Limits
//!
//! Paths only, no abstract names: those have no owner and no mode. A listening socket has mode 0600
//! from its first instant on.
//!
//! # What this crate does not know
//!
//! The host, deadlines, and who the peer is.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod dial;
mod listen;

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use transport_abi::{Failure, Request, Transport, export_transport};

struct Unix;

impl Transport for Unix {
    const NAME: &'static str = "unix";
    type Dial = dial::Connecting;
    type Listen = listen::Bound;

    fn begin_dial(request: &Request<'_>) -> Result<dial::Connecting, Failure> {
        dial::Connecting::new(request.address())
    }

    fn begin_listen(request: &Request<'_>) -> Result<listen::Bound, Failure> {
        listen::Bound::new(request.address())
    }
}

export_transport!(Unix, "unix");

/// The room for a path in `sockaddr_un`, without the ending zero.
const PATH_LIMIT: usize = 107;

fn socket() -> Result<OwnedFd, Failure> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(Failure::io("make a unix socket"))
}

fn address(path: &str) -> Result<SocketAddrUnix, Failure> {
    if path.len() > PATH_LIMIT {
        let length = path.len();
        return Err(Failure::bad_address(format!(
            "path has {length} bytes, a unix socket takes {PATH_LIMIT}"
        )));
    }
    SocketAddrUnix::new(path).map_err(Failure::io("read the path"))
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
