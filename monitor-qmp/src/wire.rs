//! What a monitor needs from a stream: bytes both ways, and descriptors where the stream can.
//!
//! Knows nothing of QMP. The one rule: descriptors belong to the bytes they travel with, and
//! are sent once.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd},
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

/// The most descriptors that one message may carry (the kernel's `SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// A stream to QEMU.
///
/// Implemented for [`UnixStream`], which passes descriptors; [`NoFds`] makes one of any other
/// stream.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whether descriptors reach the peer.
    fn passes_fds(&self) -> bool;

    /// Writes some of `bytes`, with `fds` riding on the first of them.
    ///
    /// Once any byte was taken the descriptors are sent and must not be given again.
    ///
    /// # Errors
    ///
    /// Those of the stream; [`io::ErrorKind::Unsupported`] if `fds` is not empty and the stream
    /// passes none.
    fn poll_send(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Poll<io::Result<usize>>;
}

impl Wire for UnixStream {
    fn passes_fds(&self) -> bool {
        true
    }

    fn poll_send(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Poll<io::Result<usize>> {
        if fds.is_empty() {
            return self.poll_write(cx, bytes);
        }
        loop {
            ready!(self.poll_write_ready(cx))?;
            match self.try_io(Interest::WRITABLE, || send_with_fds(&self, bytes, fds)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let rights = SendAncillaryMessage::ScmRights(fds);
    let mut space = vec![MaybeUninit::uninit(); rights.size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(rights) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors",
        ));
    }
    let sent = sendmsg(
        stream.as_fd(),
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

/// Any stream as a [`Wire`] that passes no descriptors.
#[derive(Debug)]
pub struct NoFds<T>(pub T);

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Wire for NoFds<T> {
    fn passes_fds(&self) -> bool {
        false
    }

    fn poll_send(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Poll<io::Result<usize>> {
        if !fds.is_empty() {
            return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
        }
        self.poll_write(cx, bytes)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for NoFds<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for NoFds<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
