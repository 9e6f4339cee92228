//! The `vsock:` transport: a target's address is `CID:PORT`, both numbers; to listen, either may be
//! `any`.
//!
//! ```text
//!  dial    connect ── in progress ──► writable ──► done, or the reason
//!  listen  bind CID:PORT, any:PORT, any:any ──► accept
//! ```
//!
//! Context ids: 1 is this machine itself (if the kernel has the loopback), 2 the host as seen from
//! a guest, from 3 on guests.
//!
//! ```
//! let table = transport_abi::Verified::of(&transport_vsock::TABLE).unwrap();
//! assert_eq!((table.name(), table.resolves_names()), ("vsock", false));
//! ```
//!
//! # Limits
//!
//! What the kernel offers: without a vsock transport of its own, a dial ends with `ENODEV` or after
//! the kernel's own 2 s. A listener whose backlog is full resets a dial just as a port does on which nobody listens, so
//! that neither is tried again.
//!
//! # What this crate does not know
//!
//! The host, deadlines, and who the peer is.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

mod address;

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use transport_abi::{Dial, Failure, Listen, Request, Step, Transport, export_transport};

use crate::address::Address;

/// As many as the kernel allows; it caps by `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

struct Vsock;

impl Transport for Vsock {
    const NAME: &'static str = "vsock";
    type Dial = Connecting;
    type Listen = Bound;

    fn begin_dial(request: &Request<'_>) -> Result<Connecting, Failure> {
        let address = Address::parse(request.address())?;
        if address.is_partial() {
            return Err(Failure::bad_address(
                "cannot dial any: expected CID:PORT as numbers",
            ));
        }
        let socket = socket()?;
        match retry_on_intr(|| rustix::net::connect(&socket, &address)) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Connecting {
                socket: Some(socket),
            }),
            Err(error) => Err(Failure::io("connect")(error)),
        }
    }

    fn begin_listen(request: &Request<'_>) -> Result<Bound, Failure> {
        let address = Address::parse(request.address())?;
        let socket = socket()?;
        rustix::net::bind(&socket, &address).map_err(Failure::io("bind"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(Failure::io("listen"))?;
        Ok(Bound { socket })
    }
}

export_transport!(Vsock, "vsock");

fn socket() -> Result<OwnedFd, Failure> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)
        .map_err(Failure::io("make a vsock socket"))
}

struct Connecting {
    socket: Option<OwnedFd>,
}

impl Dial for Connecting {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        let socket = self
            .socket
            .take()
            .ok_or_else(|| Failure::new("step a finished dial"))?;
        // Asking again with connect, as tcp does, would answer "already" for ever once this
        // family's connect has failed.
        if !is_decided(&socket).map_err(Failure::io("poll"))? {
            let socket: &OwnedFd = self.socket.insert(socket);
            return Ok(Step::writable(socket.as_fd()));
        }
        match sockopt::socket_error(&socket).map_err(Failure::io("read SO_ERROR"))? {
            Ok(()) => Ok(Step::Ready(socket)),
            Err(error) => Err(Failure::io("connect")(error)),
        }
    }
}

fn is_decided(socket: &OwnedFd) -> Result<bool, Errno> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    retry_on_intr(|| poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&now)))
        .map(|ready| ready > 0)
}

struct Bound {
    socket: OwnedFd,
}

impl Listen for Bound {
    fn accept(&mut self) -> Result<Step<'_>, Failure> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match retry_on_intr(|| rustix::net::accept_with(&self.socket, flags)) {
            Ok(accepted) => Ok(Step::Ready(accepted)),
            Err(Errno::AGAIN) => Ok(Step::readable(self.socket.as_fd())),
            Err(error) => Err(Failure::io("accept")(error)),
        }
    }

    fn address(&self) -> Result<String, Failure> {
        let bound = rustix::net::getsockname(&self.socket)
            .map_err(Failure::io("read the bound address"))?;
        let address = Address::of(&bound)
            .ok_or_else(|| Failure::new("read the bound address: not a vsock one"))?;
        Ok(address.to_string())
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_is_for_listening_only() {
        for partial in ["any:1", "3:any", "4294967295:1"] {
            let failure = Vsock::begin_dial(&Request::new(partial)).err().unwrap();
            assert_eq!(
                failure.kind(),
                transport_abi::FailureKind::BadAddress,
                "{partial}"
            );
        }
    }
}
