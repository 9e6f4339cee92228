//! From a number that a plugin gave to a descriptor that is ours: checked, and only once.
//!
//! A number that fails a check is neither closed nor used, since it may be somebody else's (clause
//! 14.3 of transport-abi). Must not know sockets' families or peers.

#![expect(
    unsafe_code,
    reason = "turns numbers that plugins hand over into owned descriptors"
)]

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{LazyLock, Mutex, PoisonError};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::Error;

/// Which file each number stood for when a plugin handed it over. As long as the number still
/// stands for it, it was not closed, and a second handing over would give it two owners. Never
/// larger than the process may have descriptors.
static HANDED_OVER: LazyLock<Mutex<HashMap<RawFd, Identity>>> = LazyLock::new(Mutex::default);

type Identity = (u64, u64);

/// Takes over a descriptor under clause 6.1.
pub(crate) fn adopt(raw: RawFd) -> Result<OwnedFd, Error> {
    if raw < 0 {
        return Err(breach(raw, "which is no descriptor"));
    }
    let mut handed_over = HANDED_OVER.lock().unwrap_or_else(PoisonError::into_inner);
    let identity = identify(raw)?;
    if handed_over.get(&raw) == Some(&identity) {
        return Err(breach(raw, "which it handed over before"));
    }
    handed_over.insert(raw, identity);
    // SAFETY: clause 6.1: open (just seen), the plugin no longer touches it, and handed over once:
    // the entry we hold says that nobody in this process got it from here before.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// A duplicate of a descriptor that is lent under clause 6.2.
pub(crate) fn duplicate(raw: RawFd) -> Result<OwnedFd, Error> {
    // SAFETY: borrowed for this one call, in which the plugin does not run on this operation, so by
    // clause 6.2 it stays open; if that is a lie, the kernel answers EBADF.
    let lent = unsafe { BorrowedFd::borrow_raw(raw) };
    rustix::io::fcntl_dupfd_cloexec(lent, 0).map_err(|error| match error {
        Errno::BADF => Error::breach(
            "6.2",
            format!("it lent descriptor {raw}, which is not open"),
        ),
        other => Error::io("duplicate a descriptor")(other),
    })
}

fn identify(raw: RawFd) -> Result<Identity, Error> {
    // SAFETY: borrowed to be looked at only; a number that is not open, against clause 6.1, fails
    // with EBADF and is left alone.
    let given = unsafe { BorrowedFd::borrow_raw(raw) };
    let found = rustix::fs::fstat(given).map_err(|error| match error {
        Errno::BADF => breach(raw, "which is not open"),
        other => Error::io("look at a descriptor")(other),
    })?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(breach(raw, "which is no socket"));
    }
    Ok((found.st_dev, found.st_ino))
}

fn breach(raw: RawFd, what: &str) -> Error {
    Error::breach("6.1", format!("it handed over descriptor {raw}, {what}"))
}
