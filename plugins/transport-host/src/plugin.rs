//! A verified table as a [`Transport`]: calls its functions, one operation at a time.
//!
//! Dropping a future here frees the operation; that is all there is to cancelling. Must not know
//! where the table came from.
//!
//! Invariants:
//! 1. A lent descriptor is duplicated before the call's lock is released; only the duplicate is
//!    watched, and it is gone before the next call.
//! 2. Every operation is freed exactly once, by its drop.

#![expect(unsafe_code, reason = "calls the C functions of a verified table")]

use std::os::fd::{OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use transport_abi::{DialFunctions, ListenFunctions, RawDial, RawListener, Verified};

use crate::adopt::adopt;
use crate::call::{TEXT_LIMIT, call, request, step, timed};
use crate::transport::{Listening, Transport};
use crate::wait::{Progress, drive};
use crate::{Deadline, Error, ErrorKind};

pub(crate) struct Plugin {
    table: Verified,
}

impl Plugin {
    pub(crate) const fn new(table: Verified) -> Self {
        Self { table }
    }
}

#[async_trait]
impl Transport for Plugin {
    fn name(&self) -> &str {
        self.table.name()
    }

    fn resolves_names(&self) -> bool {
        self.table.resolves_names()
    }

    async fn dial(&self, address: &str, deadline: Deadline) -> Result<OwnedFd, Error> {
        let functions = self
            .table
            .dial()
            .ok_or_else(|| unsupported("this transport does not dial"))?;
        let mut dial = Dial::begin(self.table.name(), functions, address)?;
        drive(deadline, || adopted(dial.step()?)).await
    }

    async fn listen(&self, address: &str, deadline: Deadline) -> Result<Box<dyn Listening>, Error> {
        let functions = self
            .table
            .listen()
            .ok_or_else(|| unsupported("this transport does not listen"))?;
        let mut listener = Listener::begin(self.table.name(), functions, address)?;
        drive(deadline, || listener.step()).await?;
        let address = listener.address()?;
        Ok(Box::new(PluginListening {
            listener: Mutex::new(listener),
            address,
        }))
    }
}

struct PluginListening {
    listener: Mutex<Listener>,
    address: String,
}

#[async_trait]
impl Listening for PluginListening {
    fn address(&self) -> &str {
        &self.address
    }

    async fn accept(&self, deadline: Deadline) -> Result<OwnedFd, Error> {
        // The lock is held for one call, which never blocks, so callers that wait at the same time
        // do not hold each other up.
        drive(deadline, || {
            adopted(
                self.listener
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .accept()?,
            )
        })
        .await
    }
}

fn unsupported(text: &str) -> Error {
    Error::new(ErrorKind::Unsupported {
        text: text.to_owned(),
    })
}

fn adopted(progress: Progress<RawFd>) -> Result<Progress<OwnedFd>, Error> {
    Ok(match progress {
        Progress::Ready(raw) => Progress::Ready(adopt(raw)?),
        Progress::Wait(wait) => Progress::Wait(wait),
    })
}

/// A dial of a plugin, freed on drop.
struct Dial {
    transport: &'static str,
    functions: DialFunctions,
    raw: NonNull<RawDial>,
}

// SAFETY: clause 2.1: any thread may call, as long as calls do not overlap; `&mut self` and drop
// see to that.
unsafe impl Send for Dial {}

impl Dial {
    fn begin(
        transport: &'static str,
        functions: DialFunctions,
        address: &str,
    ) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        call(transport, "dial_begin", |failure| {
            // SAFETY: all three point at our own variables of full size (clauses 2.3 and 2.4), and
            // `address` outlives the call (4.2).
            unsafe { (functions.begin)(&request(address), &mut raw, failure) }
        })?
        .must_be_ready("dial_begin")?;
        let raw = NonNull::new(raw)
            .ok_or_else(|| Error::breach("9.1", "dial_begin is ready but set no operation"))?;
        Ok(Self {
            transport,
            functions,
            raw,
        })
    }

    fn step(&mut self) -> Result<Progress<RawFd>, Error> {
        step(self.transport, "dial_step", |progress, failure| {
            // SAFETY: `raw` came from this table's `dial_begin`, is not yet freed, and `&mut self`
            // keeps other calls on it out (clause 2.1). After ready or a failure our caller drops
            // us without another step (clause 9.2).
            unsafe { (self.functions.step)(self.raw.as_ptr(), progress, failure) }
        })
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        // SAFETY: clause 11.1: the one and only free, of an operation that `dial_begin` made.
        timed(self.transport, "dial_free", || unsafe {
            (self.functions.free)(self.raw.as_ptr());
        });
    }
}

/// A listener of a plugin, freed on drop.
struct Listener {
    transport: &'static str,
    functions: ListenFunctions,
    raw: NonNull<RawListener>,
    panicked: bool,
}

// SAFETY: a listener may move between threads like a dial (clause 2.1); whoever shares it puts a
// lock around it.
unsafe impl Send for Listener {}

impl Listener {
    fn begin(
        transport: &'static str,
        functions: ListenFunctions,
        address: &str,
    ) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        call(transport, "listen_begin", |failure| {
            // SAFETY: request, handle and failure are locals that the plugin may use until it
            // returns and no longer (clauses 4.2, 5.1).
            unsafe { (functions.begin)(&request(address), &mut raw, failure) }
        })?
        .must_be_ready("listen_begin")?;
        let raw = NonNull::new(raw)
            .ok_or_else(|| Error::breach("10.1", "listen_begin is ready but set no listener"))?;
        Ok(Self {
            transport,
            functions,
            raw,
            panicked: false,
        })
    }

    fn step(&mut self) -> Result<Progress<()>, Error> {
        let progress = step(self.transport, "listen_step", |progress, failure| {
            // SAFETY: a listener that `listen_begin` made and that is not bound yet: the state in
            // which clause 10.1 allows this call.
            unsafe { (self.functions.step)(self.raw.as_ptr(), progress, failure) }
        })?;
        Ok(match progress {
            Progress::Ready(_) => Progress::Ready(()),
            Progress::Wait(wait) => Progress::Wait(wait),
        })
    }

    fn accept(&mut self) -> Result<Progress<RawFd>, Error> {
        if self.panicked {
            return Err(Error::new(ErrorKind::Panicked {
                message: "in an earlier accept; listen again".to_owned(),
            }));
        }
        let progress = step(self.transport, "listen_accept", |progress, failure| {
            // SAFETY: bound, since `listen_step` was ready before this listener could be reached;
            // not panicked, so clause 12.1 allows more calls; alone, through `&mut self`.
            unsafe { (self.functions.accept)(self.raw.as_ptr(), progress, failure) }
        });
        self.panicked =
            matches!(&progress, Err(error) if matches!(error.kind(), ErrorKind::Panicked { .. }));
        progress
    }

    fn address(&mut self) -> Result<String, Error> {
        let mut buffer = [0; TEXT_LIMIT];
        let mut length = 0;
        call(self.transport, "listen_address", |failure| {
            // SAFETY: the buffer is ours and as large as said; the listener is bound (clause 10.2).
            unsafe {
                (self.functions.address)(
                    self.raw.as_ptr(),
                    buffer.as_mut_ptr(),
                    buffer.len(),
                    &mut length,
                    failure,
                )
            }
        })?
        .must_be_ready("listen_address")?;
        let written = buffer
            .get(..length)
            .and_then(|bytes| std::str::from_utf8(bytes).ok());
        written
            .map(str::to_owned)
            .ok_or_else(|| Error::breach("10.2", "listen_address wrote no address"))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: last use of the handle; accepted connections do not depend on it (clause 11.2).
        timed(self.transport, "listen_free", || unsafe {
            (self.functions.free)(self.raw.as_ptr());
        });
    }
}
