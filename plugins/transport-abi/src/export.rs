//! From the traits of `plugin.rs` to the C functions of the table.
//!
//! Every call goes through [`stop_panics`]; nothing else here runs the plugin's code. Must not know
//! any transport.

#![expect(
    unsafe_code,
    reason = "reads and writes what the host lends, and stops panics"
)]

use std::any::Any;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::layout::{
    ABI_MAJOR, ABI_MINOR, Events, Flags, MAGIC, RawDial, RawFailure, RawListener, RawProgress,
    RawRequest, RawText, Status, Table,
};
use crate::plugin::{
    Addressing, Dial, Failure, FailureKind, Interest, Listen, Request, Step, Transport, Wait,
};

/// Exports a [`Transport`] under its symbol, as `pub static TABLE`.
///
/// The second argument is the symbol's stem: the transport's name with `_` for `-`. It has to be a
/// literal, since symbols are made before constants are known; a stem that does not fit
/// [`Transport::NAME`] does not compile.
///
/// ```compile_fail
/// # use transport_abi::*;
/// # struct Unix;
/// # impl Transport for Unix {
/// #     const NAME: &'static str = "unix";
/// #     type Dial = Never;
/// #     type Listen = CannotListen;
/// #     fn begin_dial(_: &Request<'_>) -> Result<Never, Failure> { Err(Failure::new("no")) }
/// # }
/// # struct Never;
/// # impl Dial for Never { fn step(&mut self) -> Result<Step<'_>, Failure> { Err(Failure::new("no")) } }
/// export_transport!(Unix, "tcp");
/// # fn main() {}
/// ```
///
/// ```
/// # use transport_abi::*;
/// # struct Unix;
/// # impl Transport for Unix {
/// #     const NAME: &'static str = "unix";
/// #     type Dial = Never;
/// #     type Listen = CannotListen;
/// #     fn begin_dial(_: &Request<'_>) -> Result<Never, Failure> { Err(Failure::new("no")) }
/// # }
/// # struct Never;
/// # impl Dial for Never { fn step(&mut self) -> Result<Step<'_>, Failure> { Err(Failure::new("no")) } }
/// export_transport!(Unix, "unix");
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! export_transport {
    ($transport:ty, $stem:literal) => {
        /// The transport as the host finds it: under its symbol in the file, or by this name where
        /// it is linked in.
        #[unsafe(export_name = concat!("vmwright_transport_", $stem, "_v1"))]
        pub static TABLE: $crate::Table =
            $crate::Table::of::<$transport>(env!("CARGO_PKG_VERSION"));

        const _: () = assert!(
            $crate::stem_matches(<$transport as $crate::Transport>::NAME, $stem),
            "the stem must be the transport's name, with _ for -"
        );
    };
}

/// Whether `stem` is `name` with `_` for `-`.
#[must_use]
pub const fn stem_matches(name: &str, stem: &str) -> bool {
    let (name, stem) = (name.as_bytes(), stem.as_bytes());
    let mut at = 0;
    while at < name.len() && at < stem.len() {
        let expected = if name[at] == b'-' { b'_' } else { name[at] };
        if stem[at] != expected {
            return false;
        }
        at += 1;
    }
    name.len() == stem.len()
}

impl Table {
    /// The table of `T`; `version` is the plugin's own.
    #[must_use]
    pub const fn of<T: Transport>(version: &'static str) -> Self {
        Self {
            magic: MAGIC,
            size: size_of::<Self>() as u32,
            major: ABI_MAJOR,
            minor: ABI_MINOR,
            needs_minor: 0,
            flags: match T::ADDRESSING {
                Addressing::Opaque => Flags(0),
                Addressing::HostPort => Flags::HOST_PORT,
            },
            name: RawText::of(T::NAME),
            version: RawText::of(version),
            dial_begin: Some(dial_begin::<T>),
            dial_step: Some(dial_step::<T>),
            dial_free: Some(dial_free::<T>),
            listen_begin: Some(listen_begin::<T>),
            listen_step: Some(listen_step::<T>),
            listen_accept: Some(listen_accept::<T>),
            listen_address: Some(listen_address::<T>),
            listen_free: Some(listen_free::<T>),
        }
    }
}

unsafe extern "C" fn dial_begin<T: Transport>(
    request: *const RawRequest,
    dial: *mut *mut RawDial,
    failure: *mut RawFailure,
) -> Status {
    stop_panics(failure, || {
        // SAFETY: `request` is not null (clause 2.3) and, with its address, lent until we return
        // (clause 4.2).
        let request = unsafe { read_request(&*request) }?;
        let begun = Box::into_raw(Box::new(T::begin_dial(&request)?));
        // SAFETY: by clause 2.3 `dial` points at the host's variable for the operation that this
        // call makes.
        unsafe { dial.write(begun.cast()) };
        Ok(Status::READY)
    })
}

unsafe extern "C" fn dial_step<T: Transport>(
    dial: *mut RawDial,
    progress: *mut RawProgress,
    failure: *mut RawFailure,
) -> Status {
    stop_panics(failure, || {
        // SAFETY: `dial` came from `dial_begin` of this table and is not freed (clause 2.3); no
        // other call on it runs (clause 2.1), so the reference is the only one.
        let dial = unsafe { &mut *dial.cast::<T::Dial>() };
        Ok(hand_over(dial.step()?, progress))
    })
}

unsafe extern "C" fn dial_free<T: Transport>(dial: *mut RawDial) {
    // SAFETY: boxed by `dial_begin` as this very type, and by clause 11.1 freed once, here.
    drop_quietly(unsafe { Box::from_raw(dial.cast::<T::Dial>()) });
}

unsafe extern "C" fn listen_begin<T: Transport>(
    request: *const RawRequest,
    listener: *mut *mut RawListener,
    failure: *mut RawFailure,
) -> Status {
    stop_panics(failure, || {
        // SAFETY: as in `dial_begin`: not null, and the address outlives the call but not more
        // (clauses 2.3 and 4.2); a listener that keeps it has to copy it, as the lifetime of
        // `Request` asks.
        let request = unsafe { read_request(&*request) }?;
        let begun = Box::into_raw(Box::new(T::begin_listen(&request)?));
        // SAFETY: `listener` is where the host wants the new listener (clause 2.3); written only
        // now that it exists (10.1).
        unsafe { listener.write(begun.cast()) };
        Ok(Status::READY)
    })
}

unsafe extern "C" fn listen_step<T: Transport>(
    listener: *mut RawListener,
    progress: *mut RawProgress,
    failure: *mut RawFailure,
) -> Status {
    stop_panics(failure, || {
        // SAFETY: made by `listen_begin` of this table, and the host steps a listener from one
        // place at a time (clause 2.1).
        let listener = unsafe { &mut *listener.cast::<T::Listen>() };
        Ok(match listener.step()? {
            Step::Ready(()) => Status::READY,
            Step::Wait(wait) => lend(wait, progress),
        })
    })
}

unsafe extern "C" fn listen_accept<T: Transport>(
    listener: *mut RawListener,
    progress: *mut RawProgress,
    failure: *mut RawFailure,
) -> Status {
    stop_panics(failure, || {
        // SAFETY: a bound listener of this table (clause 10.2); accepts on it never overlap (clause
        // 2.1).
        let listener = unsafe { &mut *listener.cast::<T::Listen>() };
        Ok(hand_over(listener.accept()?, progress))
    })
}

unsafe extern "C" fn listen_address<T: Transport>(
    listener: *mut RawListener,
    buffer: *mut u8,
    capacity: usize,
    length: *mut usize,
    failure: *mut RawFailure,
) -> Status {
    stop_panics(failure, || {
        // SAFETY: a live listener of this table (clause 2.3); shared access is enough, and clause
        // 2.1 keeps writers out.
        let listener = unsafe { &*listener.cast::<T::Listen>() };
        let address = listener.address()?;
        if address.len() > capacity {
            return Err(Failure::new(format!(
                "tell the address: {} bytes, the host takes {capacity}",
                address.len()
            )));
        }
        // SAFETY: `buffer` has room for `capacity` bytes and is the host's, so it cannot overlap
        // our string.
        unsafe { buffer.copy_from_nonoverlapping(address.as_ptr(), address.len()) };
        // SAFETY: `length` is the host's variable beside that buffer, not null by clause 2.3.
        unsafe { length.write(address.len()) };
        Ok(Status::READY)
    })
}

unsafe extern "C" fn listen_free<T: Transport>(listener: *mut RawListener) {
    // SAFETY: boxed by `listen_begin` as a `T::Listen`; the host gave up its last handle with this
    // call (clause 11.1).
    drop_quietly(unsafe { Box::from_raw(listener.cast::<T::Listen>()) });
}

/// # Safety
///
/// The address that `request` points at is readable for `'a`.
unsafe fn read_request<'a>(request: &RawRequest) -> Result<Request<'a>, Failure> {
    let RawText { bytes, length } = request.address;
    let address = match length {
        0 => &[],
        // SAFETY: promised by our caller; clause 4.1 makes the pair of pointer and length describe
        // one readable string.
        _ => unsafe { std::slice::from_raw_parts(bytes, length) },
    };
    let address = std::str::from_utf8(address)
        .map_err(|_| Failure::bad_address("read the address: not UTF-8"))?;
    Ok(Request {
        address,
        host_minor: request.host_minor,
    })
}

fn hand_over(step: Step<'_, OwnedFd>, progress: *mut RawProgress) -> Status {
    match step {
        Step::Ready(fd) => {
            // SAFETY: clause 2.3: `progress` is the host's struct for this call. From here on the
            // descriptor is the host's (6.1).
            unsafe { (*progress).fd = fd.into_raw_fd() };
            Status::READY
        }
        Step::Wait(wait) => lend(wait, progress),
    }
}

fn lend(wait: Wait<'_>, progress: *mut RawProgress) -> Status {
    let (fd, events) = match wait.fd {
        None => (-1, Events(0)),
        Some((fd, Interest::Readable)) => (fd.as_raw_fd(), Events::READABLE),
        Some((fd, Interest::Writable)) => (fd.as_raw_fd(), Events::WRITABLE),
    };
    // SAFETY: as in `hand_over`, but the descriptor is only lent: the operation it borrows from
    // lives on (clause 6.2). The fields written are those of version 1.0, which every `size` covers
    // (clause 2.4).
    let progress = unsafe { &mut *progress };
    progress.fd = fd;
    progress.events = events;
    progress.retry_after_us = wait.retry_after.map_or(0, |delay| micros(delay).max(1));
    Status::WAIT
}

fn micros(delay: Duration) -> u64 {
    u64::try_from(delay.as_micros()).unwrap_or(u64::MAX)
}

/// Runs the plugin's code; whatever it does, the host gets a status.
fn stop_panics(failure: *mut RawFailure, call: impl FnOnce() -> Result<Status, Failure>) -> Status {
    // A value that panicked half-way is only dropped afterwards (clause 12.1), so nobody looks at a
    // broken one.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => {
            report(failure, error.text(), error.os_error());
            match error.kind() {
                FailureKind::Failed => Status::FAILED,
                FailureKind::BadAddress => Status::BAD_ADDRESS,
                FailureKind::Unsupported => Status::UNSUPPORTED,
            }
        }
        Err(payload) => {
            report(failure, panic_message(&*payload), None);
            drop_quietly(payload);
            Status::PANICKED
        }
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "a panic that is no text",
    }
}

fn report(failure: *mut RawFailure, text: &str, os_error: Option<i32>) {
    // SAFETY: clause 2.3: not null, and the host's to lend for this call; `size` covers at least
    // these fields (clause 2.4).
    let failure = unsafe { &mut *failure };
    let length = text.floor_char_boundary(failure.capacity);
    // SAFETY: clause 8.1: `text` has room for `capacity` bytes, of which `length` is at most that
    // many.
    unsafe { failure.text.copy_from_nonoverlapping(text.as_ptr(), length) };
    failure.length = length;
    failure.os_error = os_error.unwrap_or(0);
}

/// Drops what may panic while it drops; a panic in that panic's payload is leaked rather than
/// thrown.
fn drop_quietly<T>(value: T) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        std::mem::forget(payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stem_is_the_name_with_underscores() {
        assert!(stem_matches("unix", "unix"));
        assert!(stem_matches("vsock-unix", "vsock_unix"));
        assert!(!stem_matches("vsock-unix", "vsock-unix"));
        assert!(!stem_matches("unix", "unixx"));
        assert!(!stem_matches("unixx", "unix"));
    }
}
