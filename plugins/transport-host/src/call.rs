//! One call of a plugin's function: what goes in, and what its status, progress and failure mean.
//!
//! Safe code: the function is called by a closure that `plugin.rs` makes. Must not know operations.

use std::os::fd::RawFd;
use std::time::Duration;

use tokio::io::Interest;
use transport_abi::{ABI_MINOR, Events, RawFailure, RawProgress, RawRequest, RawText, Status};

use crate::adopt::duplicate;
use crate::wait::{Progress, Wait};
use crate::{Error, ErrorKind};

/// What a plugin can say about a failure, and the longest address of a listener.
pub(crate) const TEXT_LIMIT: usize = 512;
/// A call that takes longer than this blocked a thread of the runtime, against clause 3.1. Far
/// above what a system call takes on a busy machine, far below what a user would notice.
const SLOW_CALL: Duration = Duration::from_millis(50);

pub(crate) fn request(address: &str) -> RawRequest {
    RawRequest {
        size: size_of::<RawRequest>() as u32,
        host_minor: ABI_MINOR,
        address: RawText::of(address),
    }
}

/// A status that is no failure.
pub(crate) enum Outcome {
    Ready,
    Wait,
}

impl Outcome {
    pub(crate) fn must_be_ready(self, function: &str) -> Result<(), Error> {
        match self {
            Self::Ready => Ok(()),
            Self::Wait => Err(Error::breach("7.2", format!("{function} asks to wait"))),
        }
    }
}

/// Makes a call that can ask to wait.
pub(crate) fn step(
    transport: &str,
    function: &str,
    function_call: impl FnOnce(&mut RawProgress, &mut RawFailure) -> Status,
) -> Result<Progress<RawFd>, Error> {
    let mut progress = RawProgress {
        size: size_of::<RawProgress>() as u32,
        fd: -1,
        events: Events(0),
        flags: 0,
        retry_after_us: 0,
    };
    match call(transport, function, |failure| {
        function_call(&mut progress, failure)
    })? {
        Outcome::Ready => Ok(Progress::Ready(progress.fd)),
        Outcome::Wait => Ok(Progress::Wait(wait(&progress)?)),
    }
}

fn wait(progress: &RawProgress) -> Result<Wait, Error> {
    let retry_after =
        (progress.retry_after_us > 0).then(|| Duration::from_micros(progress.retry_after_us));
    if progress.fd < 0 {
        return match retry_after {
            Some(_) => Ok(Wait {
                fd: None,
                retry_after,
            }),
            None => Err(Error::breach("7.1", "it waits for nothing")),
        };
    }
    let both = Events(Events::READABLE.0 | Events::WRITABLE.0);
    let interest = match progress.events {
        Events::READABLE => Interest::READABLE,
        Events::WRITABLE => Interest::WRITABLE,
        events if events == both => Interest::READABLE | Interest::WRITABLE,
        Events(bits) => {
            return Err(Error::breach(
                "7.1",
                format!("it waits for events {bits:#x}"),
            ));
        }
    };
    Ok(Wait {
        fd: Some((duplicate(progress.fd)?, interest)),
        retry_after,
    })
}

/// Makes one call and turns what it answers into a result.
pub(crate) fn call(
    transport: &str,
    function: &str,
    function_call: impl FnOnce(&mut RawFailure) -> Status,
) -> Result<Outcome, Error> {
    let mut text = [0; TEXT_LIMIT];
    let mut failure = RawFailure {
        size: size_of::<RawFailure>() as u32,
        os_error: 0,
        text: text.as_mut_ptr(),
        capacity: text.len(),
        length: 0,
    };
    let status = timed(transport, function, || function_call(&mut failure));
    let (os_error, length) = (failure.os_error, failure.length.min(TEXT_LIMIT));
    let text = || match &text[..length] {
        [] => format!("call {function}: it gave no reason"),
        given => String::from_utf8_lossy(given).into_owned(),
    };
    let kind = match status {
        Status::READY => return Ok(Outcome::Ready),
        Status::WAIT => return Ok(Outcome::Wait),
        Status::BAD_ADDRESS => ErrorKind::BadAddress { text: text() },
        Status::UNSUPPORTED => ErrorKind::Unsupported { text: text() },
        Status::PANICKED => ErrorKind::Panicked { message: text() },
        Status(failed) if failed < 0 => ErrorKind::Failed { step: text() },
        Status(unknown) => {
            return Err(Error::breach(
                "8.2",
                format!("{function} answered {unknown}"),
            ));
        }
    };
    let error = Error::new(kind);
    Err(if os_error > 0 {
        error.because(std::io::Error::from_raw_os_error(os_error))
    } else {
        error
    })
}

/// Runs a call, and tells the log if it blocked.
pub(crate) fn timed<T>(transport: &str, function: &str, work: impl FnOnce() -> T) -> T {
    let started = std::time::Instant::now();
    let done = work();
    let took = started.elapsed();
    if took > SLOW_CALL {
        tracing::warn!(
            transport,
            function,
            ?took,
            "a transport plugin blocked, against clause 3.1 of transport-abi"
        );
    }
    done
}
