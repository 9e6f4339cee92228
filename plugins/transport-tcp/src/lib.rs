//! The `tcp:` transport: a target's address is `HOST:PORT`, v4 or v6, which the host resolves
//! before it comes here.
//!
//! ```text
//!  dial    connect ── in progress ──► writable ──► connect again: done, or the reason
//!  listen  bind (port 0: the system chooses) ──► accept, each peer tuned alike
//! ```
//!
//! Every connection sends small writes at once (`TCP_NODELAY`), since requests and answers take
//! turns, and one to another machine finds a peer that vanished without a word within a minute.
//!
//! ```
//! let table = transport_abi::Verified::of(&transport_tcp::TABLE).unwrap();
//! assert_eq!((table.name(), table.resolves_names()), ("tcp", true));
//! ```
//!
//! # Limits
//!
//! No encryption and no authentication. How long a connect may take is the host's business: packets
//! that are dropped look like waiting from here.
//!
//! # What this crate does not know
//!
//! The host, names, deadlines, and who the peer is.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use transport_abi::{
    Addressing, Dial, Failure, Listen, Request, Step, Transport, export_transport,
};

/// Silence after which the peer is probed, between probes, and how many probes it may miss: dead
/// after 60 s, where the system's defaults take over two hours.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// As many as the kernel allows; it caps by `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

struct Tcp;

impl Transport for Tcp {
    const NAME: &'static str = "tcp";
    const ADDRESSING: Addressing = Addressing::HostPort;
    type Dial = Connecting;
    type Listen = Bound;

    fn begin_dial(request: &Request<'_>) -> Result<Connecting, Failure> {
        let address = numeric(request.address())?;
        let socket = socket(&address)?;
        tune(&socket, &address)?;
        Ok(Connecting {
            socket: Some(socket),
            address,
        })
    }

    fn begin_listen(request: &Request<'_>) -> Result<Bound, Failure> {
        let address = numeric(request.address())?;
        let socket = socket(&address)?;
        // A port whose last connections still linger can be bound again; one that somebody listens
        // on cannot.
        sockopt::set_socket_reuseaddr(&socket, true).map_err(Failure::io("set SO_REUSEADDR"))?;
        rustix::net::bind(&socket, &address).map_err(Failure::io("bind"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(Failure::io("listen"))?;
        Ok(Bound { socket })
    }
}

export_transport!(Tcp, "tcp");

fn numeric(address: &str) -> Result<SocketAddr, Failure> {
    address.parse().map_err(|_| {
        Failure::bad_address(format!("{address:?} is not A.B.C.D:PORT or [IPV6]:PORT"))
    })
}

fn socket(address: &SocketAddr) -> Result<OwnedFd, Failure> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))
        .map_err(Failure::io("make a tcp socket"))
}

/// No delay; and keepalive, unless the peer is on this machine: whatever happens to it there, the
/// kernel closes its sockets, so that probes would only answer themselves.
fn tune(socket: &OwnedFd, peer: &SocketAddr) -> Result<(), Failure> {
    let tuned = || {
        sockopt::set_tcp_nodelay(socket, true)?;
        if peer.ip().is_loopback() {
            return Ok(());
        }
        sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
        sockopt::set_socket_keepalive(socket, true)
    };
    tuned().map_err(Failure::io("set no-delay and keepalive"))
}

struct Connecting {
    socket: Option<OwnedFd>,
    address: SocketAddr,
}

impl Dial for Connecting {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        let socket = self
            .socket
            .take()
            .ok_or_else(|| Failure::new("step a finished dial"))?;
        match self.connect(&socket) {
            Ok(()) if is_its_own_peer(&socket, &self.address) => {
                Err(Failure::io("connect")(Errno::CONNREFUSED))
            }
            Ok(()) => Ok(Step::Ready(socket)),
            Err(Errno::INPROGRESS | Errno::ALREADY) => {
                let socket: &OwnedFd = self.socket.insert(socket);
                Ok(Step::writable(socket.as_fd()))
            }
            Err(error) => Err(Failure::io("connect")(error)),
        }
    }
}

impl Connecting {
    /// Starts to connect, or asks how far it is: on a socket that is connecting, the same call
    /// does.
    fn connect(&self, socket: &OwnedFd) -> Result<(), Errno> {
        let connect = || retry_on_intr(|| rustix::net::connect(socket, &self.address));
        let outcome = match connect() {
            // On the way to this machine itself the handshake is over before the first call
            // returns; asking once more saves the host a wait.
            Err(Errno::INPROGRESS) => connect(),
            known => known,
        };
        match outcome {
            Err(Errno::ISCONN) => Ok(()),
            other => other,
        }
    }
}

/// A local port that nobody listens on may be the very one that the system gave us to connect from;
/// then TCP connects the socket to itself, and a daemon that waits for a peer would talk to its own
/// echo.
fn is_its_own_peer(socket: &OwnedFd, far: &SocketAddr) -> bool {
    rustix::net::getsockname(socket)
        .is_ok_and(|near| SocketAddr::try_from(near).is_ok_and(|near| near == *far))
}

struct Bound {
    socket: OwnedFd,
}

impl Listen for Bound {
    fn accept(&mut self) -> Result<Step<'_>, Failure> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match retry_on_intr(|| rustix::net::acceptfrom_with(&self.socket, flags)) {
            Ok((accepted, peer)) => {
                let peer = peer.ok_or(Errno::NOTCONN).and_then(SocketAddr::try_from);
                let peer = peer.map_err(Failure::io("read the peer's address"))?;
                tune(&accepted, &peer).map(|()| Step::Ready(accepted))
            }
            Err(Errno::AGAIN) => Ok(Step::readable(self.socket.as_fd())),
            Err(error) => Err(Failure::io("accept")(error)),
        }
    }

    fn address(&self) -> Result<String, Failure> {
        let bound = rustix::net::getsockname(&self.socket)
            .map_err(Failure::io("read the bound address"))?;
        SocketAddr::try_from(bound)
            .map(|address| address.to_string())
            .map_err(Failure::io("read the bound address"))
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn dial(address: &str) -> Result<Connecting, Failure> {
        Tcp::begin_dial(&Request::new(address))
    }

    fn listen(address: &str) -> Bound {
        Tcp::begin_listen(&Request::new(address)).unwrap()
    }

    /// Steps without waiting for anything but the kernel; loopback handshakes end within a few
    /// calls.
    fn finish(dial: &mut Connecting) -> Result<OwnedFd, Failure> {
        loop {
            if let Step::Ready(fd) = dial.step()? {
                return Ok(fd);
            }
            std::thread::yield_now();
        }
    }

    fn assert_keepalive(fd: &OwnedFd, wanted: bool) {
        assert!(sockopt::tcp_nodelay(fd).unwrap());
        assert_eq!(sockopt::socket_keepalive(fd).unwrap(), wanted);
        let times = (
            sockopt::tcp_keepidle(fd).unwrap(),
            sockopt::tcp_keepintvl(fd).unwrap(),
            sockopt::tcp_keepcnt(fd).unwrap(),
        );
        let ours = (KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES);
        assert_eq!(times == ours, wanted, "{times:?}");
    }

    #[test]
    fn a_peer_that_may_vanish_is_probed() {
        for far in ["192.0.2.1:9", "[2001:db8::1]:9"] {
            let far = numeric(far).unwrap();
            let socket = socket(&far).unwrap();
            tune(&socket, &far).unwrap();
            assert_keepalive(&socket, true);
        }
    }

    #[test]
    fn both_ends_of_both_families_send_at_once_and_local_ones_are_not_probed() {
        for any_port in ["127.0.0.1:0", "[::1]:0"] {
            let mut bound = listen(any_port);
            let address = bound.address().unwrap();
            assert!(!address.ends_with(":0"), "{address} has a real port");
            assert_keepalive(&finish(&mut dial(&address).unwrap()).unwrap(), false);
            let Step::Ready(accepted) = bound.accept().unwrap() else {
                panic!("a peer waits")
            };
            assert_keepalive(&accepted, false);
            assert!(matches!(bound.accept(), Ok(Step::Wait(_))));
        }
    }

    #[test]
    fn closed_port_is_refused_with_the_errno() {
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let failure = finish(&mut dial(&address).unwrap()).unwrap_err();
        assert_eq!(failure.os_error(), Some(Errno::CONNREFUSED.raw_os_error()));
    }

    #[test]
    fn socket_that_connected_to_itself_is_seen() {
        let alone = socket(&numeric("127.0.0.1:0").unwrap()).unwrap();
        rustix::net::bind(&alone, &numeric("127.0.0.1:0").unwrap()).unwrap();
        let own = SocketAddr::try_from(rustix::net::getsockname(&alone).unwrap()).unwrap();
        let mut dial = Connecting {
            socket: Some(alone),
            address: own,
        };
        assert_eq!(
            finish(&mut dial).unwrap_err().os_error(),
            Some(Errno::CONNREFUSED.raw_os_error())
        );
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let far = server.local_addr().unwrap();
        assert!(!is_its_own_peer(&client.into(), &far));
    }

    #[test]
    fn port_in_use_is_refused() {
        let bound = listen("127.0.0.1:0");
        let taken = Tcp::begin_listen(&Request::new(&bound.address().unwrap()));
        assert_eq!(
            taken.err().unwrap().os_error(),
            Some(Errno::ADDRINUSE.raw_os_error())
        );
    }

    #[test]
    fn names_and_scraps_are_no_addresses() {
        for wrong in [
            "localhost:1",
            "127.0.0.1",
            "::1:80",
            "127.0.0.1:65536",
            ":1",
            "",
        ] {
            let failure = dial(wrong).err().unwrap();
            assert_eq!(
                failure.kind(),
                transport_abi::FailureKind::BadAddress,
                "{wrong}"
            );
        }
    }
}
