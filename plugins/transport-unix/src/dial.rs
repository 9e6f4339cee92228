//! Connecting to a unix socket. Must not know listening.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::SocketAddrUnix;
use transport_abi::{Dial, Failure, Step};

/// How soon a full backlog is tried again: QEMU's holds three, and a greeting takes it tens of
/// milliseconds.
const BACKLOG_RETRY: Duration = Duration::from_millis(2);

/// A unix socket that is being connected.
pub(crate) struct Connecting {
    socket: Option<OwnedFd>,
    address: SocketAddrUnix,
}

impl Connecting {
    pub(crate) fn new(path: &str) -> Result<Self, Failure> {
        Ok(Self {
            address: crate::address(path)?,
            socket: Some(crate::socket()?),
        })
    }
}

impl Dial for Connecting {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        let socket = self
            .socket
            .take()
            .ok_or_else(|| Failure::new("step a finished dial"))?;
        match retry_on_intr(|| rustix::net::connect(&socket, &self.address)) {
            Ok(()) => Ok(Step::Ready(socket)),
            Err(Errno::AGAIN) => {
                self.socket = Some(socket);
                Ok(Step::retry_after(BACKLOG_RETRY))
            }
            Err(error) => Err(Failure::io("connect")(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

    use super::*;

    #[test]
    fn connects_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _server = UnixListener::bind(&path).unwrap();
        let mut dial = Connecting::new(path.to_str().unwrap()).unwrap();
        assert!(matches!(dial.step(), Ok(Step::Ready(_))));
        assert!(dial.step().is_err());
    }

    #[test]
    fn full_backlog_is_tried_again_and_connects_when_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&server, 0).unwrap(); // room for one
        let path = path.to_str().unwrap();
        let mut first = Connecting::new(path).unwrap();
        assert!(matches!(first.step(), Ok(Step::Ready(_))));
        let mut second = Connecting::new(path).unwrap();
        assert!(matches!(second.step(), Ok(Step::Wait(_))));
        assert!(matches!(second.step(), Ok(Step::Wait(_))));
        let _accepted = rustix::net::accept(&server).unwrap();
        assert!(matches!(second.step(), Ok(Step::Ready(_))));
    }

    #[test]
    fn failures_keep_the_errno() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nobody");
        let mut missing = Connecting::new(path.to_str().unwrap()).unwrap();
        assert_eq!(
            missing.step().unwrap_err().os_error(),
            Some(Errno::NOENT.raw_os_error())
        );
        drop(UnixListener::bind(&path).unwrap());
        let mut dead = Connecting::new(path.to_str().unwrap()).unwrap();
        assert_eq!(
            dead.step().unwrap_err().os_error(),
            Some(Errno::CONNREFUSED.raw_os_error())
        );
    }

    #[test]
    fn too_long_a_path_is_told_with_its_length() {
        let Err(failure) = Connecting::new(&"x".repeat(108)) else {
            panic!("108 bytes do not fit")
        };
        assert_eq!(
            failure.to_string(),
            "path has 108 bytes, a unix socket takes 107"
        );
        assert!(Connecting::new(&"x".repeat(107)).is_ok());
    }
}
