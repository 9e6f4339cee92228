//! A connected socket as a tokio stream, whatever its family; with descriptors beside the bytes
//! where the family can.
//!
//! Must not know which transport made it.

#![expect(
    unsafe_code,
    reason = "reads straight into the caller's uninitialised buffer"
)]

use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use rustix::io::{Errno, FdFlags, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketType,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::peer::{self, Peer};
use crate::readiness::watch;
use crate::{Error, ErrorKind};

/// The kernel's SCM_MAX_FD: how many descriptors one message carries at most.
const MAX_FDS: usize = 253;
/// The kernel's UIO_MAXIOV: how many slices one message gathers at most.
const MAX_SLICES: usize = 1024;

/// A connected stream socket.
///
/// Closes on drop. No transport is involved any more: reads and writes go straight to the kernel.
pub struct Stream {
    io: AsyncFd<OwnedFd>,
    peer: Peer,
    passes_fds: bool,
}

impl Stream {
    /// Adopts a connected stream socket, wherever it came from.
    ///
    /// Makes it non-blocking and close-on-exec, and asks the kernel who is at the other end.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Breach`] if it is no connected stream socket; [`ErrorKind::Failed`] if the peer
    /// is gone already or the system refuses to watch it.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn adopt(fd: OwnedFd) -> Result<Self, Error> {
        match rustix::net::sockopt::socket_type(&fd) {
            Ok(SocketType::STREAM) => {}
            Ok(_) => return Err(breach("no stream socket")),
            Err(_) => return Err(breach("no socket")),
        }
        let (family, peer) = peer::identify(fd.as_fd()).map_err(|error| no_peer(&fd, error))?;
        let flags =
            rustix::fs::fcntl_getfl(&fd).map_err(Error::io("read the descriptor's flags"))?;
        if !flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
                .map_err(Error::io("make the socket non-blocking"))?;
        }
        rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)
            .map_err(Error::io("make the socket close on exec"))?;
        let io = watch(fd, Interest::READABLE | Interest::WRITABLE)
            .map_err(Error::io("watch the socket"))?;
        Ok(Self {
            io,
            peer,
            passes_fds: family == AddressFamily::UNIX,
        })
    }

    /// Who is at the other end, as the kernel says.
    #[must_use]
    pub const fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether descriptors can be sent: on unix sockets.
    #[must_use]
    pub const fn passes_fds(&self) -> bool {
        self.passes_fds
    }

    /// Gives the socket back, still non-blocking.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.io.into_inner()
    }

    /// Sends `bytes` with `fds` riding on the first of them.
    ///
    /// When this is ready with `n`, the first `n` bytes and all descriptors are sent: what is left
    /// goes without them. While it is pending, nothing is.
    ///
    /// # Errors
    ///
    /// As `sendmsg`; `Unsupported` if there are descriptors and this is no unix socket,
    /// `InvalidInput` if they have no byte to ride on or are more than 253. Nothing was sent.
    ///
    /// # Cancel safety
    ///
    /// A poll that is not repeated has sent nothing.
    pub fn poll_send(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Poll<io::Result<usize>> {
        if fds.is_empty() {
            return self.poll_write(cx, bytes);
        }
        if !self.passes_fds {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "descriptors pass over unix sockets only",
            )));
        }
        if bytes.is_empty() || fds.len() > MAX_FDS {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "cannot send {} descriptors on {} bytes",
                    fds.len(),
                    bytes.len()
                ),
            )));
        }
        self.poll_sendmsg(cx, &[IoSlice::new(bytes)], fds)
    }

    fn poll_sendmsg(
        &self,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        self.poll_io(cx, |socket| {
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fits = fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds));
            debug_assert!(fits, "space for MAX_FDS descriptors is enough for fewer");
            Ok(retry_on_intr(|| {
                rustix::net::sendmsg(socket, bytes, &mut control, SendFlags::NOSIGNAL)
            })?)
        })
    }

    fn poll_io<T>(
        &self,
        cx: &mut Context<'_>,
        mut send: impl FnMut(&OwnedFd) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        loop {
            let mut guard = ready!(self.io.poll_write_ready(cx))?;
            if let Ok(done) = guard.try_io(|io| send(io.get_ref())) {
                return Poll::Ready(done);
            }
        }
    }
}

/// Why a socket has no peer: it never can have one, or it went.
fn no_peer(fd: &OwnedFd, error: Errno) -> Error {
    if rustix::net::sockopt::socket_acceptconn(fd) == Ok(true) {
        return breach("a listening socket");
    }
    Error::io("ask for the peer")(error)
}

fn breach(what: &str) -> Error {
    Error::new(ErrorKind::Breach {
        clause: "6.1",
        text: format!("descriptor is {what}"),
    })
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.io.poll_read_ready(cx))?;
            // SAFETY: the slice is only given to the kernel, which writes to it and never
            // de-initialises.
            let room = unsafe { buf.unfilled_mut() };
            let received = guard.try_io(|io| {
                let receive = || {
                    let ((filled, _), _) =
                        rustix::net::recv(io.get_ref(), &mut *room, RecvFlags::empty())?;
                    Ok(filled.len())
                };
                Ok(retry_on_intr(receive)?)
            });
            match received {
                Ok(Ok(count)) => {
                    // SAFETY: recv has just written the first `count` bytes of the unfilled part.
                    unsafe { buf.assume_init(count) };
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_io(cx, |socket| {
            Ok(retry_on_intr(|| {
                rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)
            })?)
        })
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_sendmsg(cx, &bytes[..bytes.len().min(MAX_SLICES)], &[])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // a socket has no buffer of ours
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(rustix::net::shutdown(
            self.io.get_ref(),
            Shutdown::Write,
        )?))
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("fd", self.io.get_ref())
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}
