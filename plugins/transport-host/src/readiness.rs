//! The one place where a descriptor meets tokio's reactor.
//!
//! Must not know what the descriptor is for.

#![expect(unsafe_code, reason = "registers owned descriptors with the reactor")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches `fd`, which the result owns; dropping it deregisters first and closes then.
///
/// # Panics
///
/// Outside a tokio runtime.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open until dropped, always names the same descriptor, and is moved
    // into the `AsyncFd`; nothing here replaces what it refers to, and a plugin that was lent to us
    // cannot, since we watch a duplicate (clause 6.2).
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(|error| error.into_parts().1)
}
