//! The C functions of an exported transport, called as a host calls them: statuses, texts, waits,
//! and panics everywhere.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![expect(unsafe_code, reason = "calls the exported C functions")]

use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use transport_abi::{
    ABI_MINOR, Dial, Events, Failure, Listen, RawDial, RawFailure, RawListener, RawProgress,
    RawRequest, RawText, Request, Status, Step, Transport, Verified,
};

static DROPPED: AtomicUsize = AtomicUsize::new(0);

/// Does what its address says.
struct Script;

struct Act {
    script: String,
    pair: Option<(UnixStream, UnixStream)>,
}

impl Drop for Act {
    fn drop(&mut self) {
        DROPPED.fetch_add(1, Ordering::Relaxed);
        assert_ne!(self.script, "panic in drop", "asked to");
    }
}

impl Act {
    fn new(script: &str) -> Result<Self, Failure> {
        match script {
            "panic in begin" => panic!("asked to, in begin"),
            "malformed" => Err(Failure::bad_address("cannot read it")),
            _ => Ok(Self {
                script: script.to_owned(),
                pair: Some(UnixStream::pair().unwrap()),
            }),
        }
    }

    fn act(&mut self) -> Result<Step<'_>, Failure> {
        match self.script.as_str() {
            "panic in step" => std::panic::panic_any(7), // not even a text
            "errno" => Err(Failure::io("open the gate")(
                std::io::Error::from_raw_os_error(111),
            )),
            "long" => Err(Failure::new("ü".repeat(400))),
            "retry" => Ok(Step::retry_after(Duration::from_nanos(1))),
            "readable" => Ok(Step::readable(self.pair.as_ref().unwrap().0.as_fd())),
            _ => Ok(Step::Ready(self.pair.take().unwrap().0.into())),
        }
    }
}

impl Transport for Script {
    const NAME: &'static str = "script";
    type Dial = Act;
    type Listen = Act;

    fn begin_dial(request: &Request<'_>) -> Result<Act, Failure> {
        Act::new(request.address())
    }

    fn begin_listen(request: &Request<'_>) -> Result<Act, Failure> {
        Act::new(request.address())
    }
}

impl Dial for Act {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        self.act()
    }
}

impl Listen for Act {
    fn accept(&mut self) -> Result<Step<'_>, Failure> {
        self.act()
    }

    fn address(&self) -> Result<String, Failure> {
        Ok(self.script.clone())
    }
}

transport_abi::export_transport!(Script, "script");

/// One call's answer: the status, the failure's text and errno, and the progress.
struct Answer {
    status: Status,
    text: String,
    os_error: i32,
    progress: RawProgress,
}

fn call(function: impl FnOnce(&mut RawProgress, &mut RawFailure) -> Status) -> Answer {
    let mut text = [0; 65];
    let mut progress = RawProgress {
        size: size_of::<RawProgress>() as u32,
        fd: -1,
        events: Events(0),
        flags: 0,
        retry_after_us: 0,
    };
    let mut failure = RawFailure {
        size: size_of::<RawFailure>() as u32,
        os_error: 0,
        text: text.as_mut_ptr(),
        capacity: 64,
        length: 0,
    };
    let status = function(&mut progress, &mut failure);
    let (length, os_error) = (failure.length, failure.os_error);
    assert_eq!(text[64], 0, "nothing is written past the capacity");
    Answer {
        status,
        text: String::from_utf8(text[..length].to_vec()).unwrap(),
        os_error,
        progress,
    }
}

fn request(address: &str) -> RawRequest {
    RawRequest {
        size: size_of::<RawRequest>() as u32,
        host_minor: ABI_MINOR,
        address: RawText::of(address),
    }
}

/// Begins a dial of `script`, steps once if that worked, and frees it.
fn dial(script: &str) -> Answer {
    let functions = Verified::of(&TABLE).unwrap().dial().unwrap();
    let mut dial: *mut RawDial = null_mut();
    // SAFETY: clause 2.3: the request, the handle and the failure are locals of full size.
    let begun =
        call(|_, failure| unsafe { (functions.begin)(&request(script), &mut dial, failure) });
    if begun.status != Status::READY {
        assert!(dial.is_null(), "clause 9.1: nothing to free");
        return begun;
    }
    // SAFETY: begun just above, and called from here alone (clause 2.1).
    let stepped = call(|progress, failure| unsafe { (functions.step)(dial, progress, failure) });
    // SAFETY: the one free that clause 11.1 asks for.
    unsafe { (functions.free)(dial) };
    stepped
}

#[test]
fn a_descriptor_is_handed_over_open() {
    let answer = dial("connect");
    assert_eq!(answer.status, Status::READY);
    // SAFETY: clause 6.1: handed over once, to us.
    let mut stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(answer.progress.fd) });
    assert_eq!(
        stream.read(&mut [0]).unwrap(),
        0,
        "its far end went with the operation"
    );
}

#[test]
fn waits_carry_a_descriptor_or_a_time_that_is_never_zero() {
    let answer = dial("readable");
    assert_eq!(
        (
            answer.status,
            answer.progress.events,
            answer.progress.retry_after_us
        ),
        (Status::WAIT, Events::READABLE, 0)
    );
    assert!(answer.progress.fd >= 0);
    let answer = dial("retry");
    assert_eq!(
        (
            answer.status,
            answer.progress.fd,
            answer.progress.retry_after_us
        ),
        (Status::WAIT, -1, 1)
    );
}

#[test]
fn failures_carry_text_and_errno_within_the_capacity() {
    let answer = dial("malformed");
    assert_eq!(
        (answer.status, answer.text.as_str(), answer.os_error),
        (Status::BAD_ADDRESS, "cannot read it", 0)
    );
    let answer = dial("errno");
    assert_eq!(
        (answer.status, answer.text.as_str(), answer.os_error),
        (Status::FAILED, "open the gate", 111)
    );
    assert_eq!(dial("long").text, "ü".repeat(32), "cut between characters");
}

#[test]
fn panics_stop_at_the_boundary_wherever_they_start() {
    let answer = dial("panic in begin");
    assert_eq!(
        (answer.status, answer.text.as_str()),
        (Status::PANICKED, "asked to, in begin")
    );
    assert_eq!(dial("panic in step").status, Status::PANICKED);
    let before = DROPPED.load(Ordering::Relaxed);
    assert_eq!(dial("panic in drop").status, Status::READY);
    assert!(DROPPED.load(Ordering::Relaxed) > before);
}

#[test]
fn a_listener_goes_through_all_its_calls() {
    let functions = Verified::of(&TABLE).unwrap().listen().unwrap();
    let mut listener: *mut RawListener = null_mut();
    // SAFETY: clause 2.3 as for a dial, with the listener's own begin.
    let begun =
        call(|_, failure| unsafe { (functions.begin)(&request("here"), &mut listener, failure) });
    assert_eq!(begun.status, Status::READY);
    // SAFETY: begun and not yet bound: the state that clause 10.1 steps in.
    let bound = call(|progress, failure| unsafe { (functions.step)(listener, progress, failure) });
    assert_eq!(bound.status, Status::READY);
    let (mut buffer, mut length) = ([0u8; 8], 0);
    // SAFETY: bound (clause 10.2), and the buffer has the capacity that is told.
    let told = call(|_, failure| unsafe {
        (functions.address)(
            listener,
            buffer.as_mut_ptr(),
            buffer.len(),
            &mut length,
            failure,
        )
    });
    assert_eq!(
        (told.status, &buffer[..length]),
        (Status::READY, &b"here"[..])
    );
    // SAFETY: the same buffer, said to be shorter than it is.
    let short = call(|_, failure| unsafe {
        (functions.address)(listener, buffer.as_mut_ptr(), 3, &mut length, failure)
    });
    assert_eq!(
        (short.status, short.text.as_str()),
        (
            Status::FAILED,
            "tell the address: 4 bytes, the host takes 3"
        )
    );
    // SAFETY: bound, so clause 10.2 lets it accept.
    let accepted =
        call(|progress, failure| unsafe { (functions.accept)(listener, progress, failure) });
    assert_eq!(accepted.status, Status::READY);
    // SAFETY: accepted just now, and by clause 6.1 nobody else's.
    let stream = unsafe { OwnedFd::from_raw_fd(accepted.progress.fd) };
    // SAFETY: freed once (clause 11.1); what was accepted stays open (clause 11.2).
    unsafe { (functions.free)(listener) };
    assert!(stream.as_raw_fd() >= 0 && stream.try_clone().is_ok());
}
