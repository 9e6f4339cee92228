//! The `vsock-unix:` transport: a target's address is `PATH:PORT`, a guest's vsock port behind the
//! unix socket of its VMM.
//!
//! ```text
//!  connect PATH ── full backlog ──► again in 2 ms
//!    └─► "CONNECT PORT\n" ── "OK n\n" ──► the guest's own bytes from here on
//!                         ├─ the end  ──► nobody listens on that port
//!                         └─ a reset  ──► the guest's driver is not up yet
//! ```
//!
//! ```
//! let table = transport_abi::Verified::of(&transport_vsock_unix::TABLE).unwrap();
//! assert_eq!((table.name(), table.resolves_names()), ("vsock-unix", false));
//! ```
//!
//! # Limits
//!
//! It only dials: what a guest dials, its VMM brings to the unix socket `PATH_PORT`. The peer that the
//! kernel knows is the VMM, not the guest.
//!
//! # What this crate does not know
//!
//! The host, deadlines, which VMM it is, and vsock itself.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use transport_abi::{CannotListen, Dial, Failure, Request, Step, Transport, export_transport};

/// How soon a full backlog is tried again: a unix socket never signals that there is room.
const BACKLOG_RETRY: Duration = Duration::from_millis(2);
/// `OK ` and a number of 32 bits; more is no answer.
const LONGEST_ANSWER: usize = "OK 4294967295\n".len();

struct VsockUnix;

impl Transport for VsockUnix {
    const NAME: &'static str = "vsock-unix";
    type Dial = Connecting;
    type Listen = CannotListen;

    fn begin_dial(request: &Request<'_>) -> Result<Connecting, Failure> {
        let (path, port) = parse(request.address())?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(Failure::io("make a unix socket"))?;
        Ok(Connecting {
            socket: Some(socket),
            address: SocketAddrUnix::new(path).map_err(Failure::io("read the path"))?,
            question: format!("CONNECT {port}\n"),
            phase: Phase::Connecting,
        })
    }
}

export_transport!(VsockUnix, "vsock_unix");

/// The port is what follows the last colon; a path may have others.
fn parse(address: &str) -> Result<(&str, u32), Failure> {
    address
        .rsplit_once(':')
        .filter(|(path, _)| !path.is_empty())
        .and_then(|(path, port)| Some((path, port.parse().ok()?)))
        .ok_or_else(|| Failure::bad_address(format!("{address:?} is not PATH:PORT")))
}

struct Connecting {
    socket: Option<OwnedFd>,
    address: SocketAddrUnix,
    question: String,
    phase: Phase,
}

enum Phase {
    Connecting,
    Asking,
    /// What of the answer has come.
    Hearing(Vec<u8>),
}

/// How far a phase came.
enum Come {
    Far,
    NotYet,
}

impl Connecting {
    /// Goes on until there is something to wait for, or everything is done.
    fn go_on(&mut self, socket: &OwnedFd) -> Result<Come, Failure> {
        loop {
            match &mut self.phase {
                Phase::Connecting => {
                    match retry_on_intr(|| rustix::net::connect(socket, &self.address)) {
                        Ok(()) => self.phase = Phase::Asking,
                        Err(Errno::AGAIN) => return Ok(Come::NotYet),
                        Err(error) => return Err(Failure::io("connect")(error)),
                    }
                }
                // So short, and the first on this socket: it goes whole or not at all.
                Phase::Asking => {
                    match rustix::net::send(socket, self.question.as_bytes(), SendFlags::NOSIGNAL) {
                        Ok(_) => self.phase = Phase::Hearing(Vec::new()),
                        Err(Errno::INTR) => {}
                        Err(error) => return Err(Failure::io("ask for the port")(error)),
                    }
                }
                Phase::Hearing(answer) => return hear(socket, answer),
            }
        }
    }
}

impl Dial for Connecting {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        let socket = self
            .socket
            .take()
            .ok_or_else(|| Failure::new("step a finished dial"))?;
        match self.go_on(&socket)? {
            Come::Far => Ok(Step::Ready(socket)),
            Come::NotYet => {
                let socket: &OwnedFd = self.socket.insert(socket);
                Ok(match self.phase {
                    Phase::Connecting => Step::retry_after(BACKLOG_RETRY),
                    Phase::Asking | Phase::Hearing(_) => Step::readable(socket.as_fd()),
                })
            }
        }
    }
}

/// Reads the answer byte by byte: whatever follows it belongs to whom the host talks to.
fn hear(socket: &OwnedFd, answer: &mut Vec<u8>) -> Result<Come, Failure> {
    while answer.len() < LONGEST_ANSWER {
        let mut byte = [0];
        match retry_on_intr(|| rustix::net::recv(socket, &mut byte[..], RecvFlags::empty())) {
            Ok((0, _)) => {
                return Err(Failure::io("connect: nobody listens on that port")(
                    Errno::CONNREFUSED,
                ));
            }
            Ok(_) => answer.push(byte[0]),
            Err(Errno::AGAIN) => return Ok(Come::NotYet),
            Err(error) => return Err(Failure::io("hear the answer")(error)),
        }
        if byte == *b"\n" {
            break;
        }
    }
    if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
        return Ok(Come::Far);
    }
    let answer = String::from_utf8_lossy(answer);
    Err(Failure::new(format!(
        "connect: the answer is {answer:?}, not OK"
    )))
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    /// A dial of port 9, and the VMM's end of it, connected and asked.
    fn asked() -> (tempfile::TempDir, Connecting, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm:1.vsock");
        let vmm = UnixListener::bind(&path).unwrap();
        let target = format!("{}:9", path.display());
        let mut dial = VsockUnix::begin_dial(&Request::new(&target)).unwrap();
        assert!(matches!(dial.step(), Ok(Step::Wait(_))));
        let mut far = vmm.accept().unwrap().0;
        let mut question = [0; 10];
        far.read_exact(&mut question).unwrap();
        assert_eq!(&question, b"CONNECT 9\n");
        (dir, dial, far)
    }

    #[test]
    fn an_answer_in_any_pieces_connects_and_leaves_what_follows() {
        for cut in 0..="OK 9".len() {
            let (_dir, mut dial, mut far) = asked();
            let (early, late) = b"OK 9\n{\"QMP\":1}".split_at(cut);
            far.write_all(early).unwrap();
            assert!(matches!(dial.step(), Ok(Step::Wait(_))), "{cut}");
            far.write_all(late).unwrap();
            let Ok(Step::Ready(stream)) = dial.step() else {
                panic!("answered, cut at {cut}")
            };
            let mut rest = [0; 9];
            UnixStream::from(stream).read_exact(&mut rest).unwrap();
            assert_eq!(&rest, b"{\"QMP\":1}");
        }
    }

    #[test]
    fn a_port_without_a_listener_is_refused() {
        let (_dir, mut dial, far) = asked();
        drop(far);
        let failure = dial.step().unwrap_err();
        assert_eq!(failure.os_error(), Some(Errno::CONNREFUSED.raw_os_error()));
    }

    #[test]
    fn another_answer_is_told_and_a_long_one_is_cut() {
        for (answer, told) in [
            ("NO 9\n", "\"NO 9\\n\""),
            ("OK 123456789012345678", "\"OK 12345678901\""),
        ] {
            let (_dir, mut dial, mut far) = asked();
            far.write_all(answer.as_bytes()).unwrap();
            let text = dial.step().unwrap_err().to_string();
            assert!(text.contains(told), "{text}");
        }
    }

    #[test]
    fn full_backlog_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let vmm = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&vmm, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&vmm, 0).unwrap(); // room for one
        let _first = UnixStream::connect(&path).unwrap();
        let target = format!("{}:9", path.display());
        let mut dial = VsockUnix::begin_dial(&Request::new(&target)).unwrap();
        assert!(matches!(dial.step(), Ok(Step::Wait(_))));
        assert!(matches!(dial.phase, Phase::Connecting));
        let _accepted = rustix::net::accept(&vmm).unwrap();
        assert!(matches!(dial.step(), Ok(Step::Wait(_))));
        assert!(matches!(dial.phase, Phase::Hearing(_)));
    }

    #[test]
    fn scraps_are_no_addresses() {
        for wrong in [
            "",
            "/run/s",
            "/run/s:",
            ":9",
            "/run/s:x",
            "/run/s:4294967296",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse("/run/a:b:9").unwrap(), ("/run/a:b", 9));
    }
}
