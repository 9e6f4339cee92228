//! The functions of a table, called one by one, each call watched: what it wrote where, how long it
//! took, whether it panicked.
//!
//! Must not know what a clause is after. Unlike a host it does not hide an operation's steps, and
//! hands out descriptors as numbers, so that a clause can look at what was done to them.

#![expect(unsafe_code, reason = "calls the C functions of the plugin under test")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use transport_abi::{
    ABI_MINOR, DialFunctions, Events, ListenFunctions, RawDial, RawFailure, RawListener,
    RawProgress, RawRequest, RawText, Status, Table, Verified,
};

use crate::process::beat;
use crate::report::{Trouble, must};

/// A call that takes longer blocks. Far above what a busy machine adds to a few system calls.
const BLOCKS: Duration = Duration::from_secs(1);
/// How long a plugin may wait for what is certain to come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);
/// What a failure's text may take.
pub(crate) const ROOM: usize = 512;
/// Written past the end of everything that is lent; still there afterwards, or clause 2.4 is
/// broken.
const CANARY: u8 = 0x5a;
const CANARIES: usize = 64;

pub(crate) struct Raw {
    table: Verified,
}

impl Raw {
    /// Opens a plugin that the host has loaded before, and so found worth it.
    pub(crate) fn open(path: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let stem = path.file_stem().and_then(|name| name.to_str());
        let stem = stem.and_then(|name| name.strip_prefix("libtransport_"));
        let symbol = format!("vmwright_transport_{}_v1", stem.ok_or("no plugin's name")?);
        // SAFETY: the host has loaded this very file, so its constructors ran already.
        let library =
            unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NODELETE) }?;
        // SAFETY: read as a pointer to data, and that it is the host has seen.
        let table = unsafe { library.get::<*const Table>(&symbol) }?.into_raw();
        std::mem::forget(library);
        // SAFETY: the host read the same table a moment ago and found clause 1 kept; it is constant
        // (1.1).
        let table = unsafe { Verified::read(table.cast::<Table>().cast_const()) }?;
        Ok(Self { table })
    }

    pub(crate) const fn table(&self) -> &Verified {
        &self.table
    }

    /// Begins to dial. The address is gone from memory when this returns (clause 4.2).
    pub(crate) fn dial(&self, address: &str) -> Result<Result<Dial, Answer>, Trouble> {
        let functions = self.table.dial().ok_or_else(|| lacking("dial"))?;
        let mut raw = std::ptr::null_mut();
        let answer = lent(address, |request| {
            called("dial_begin", ROOM, |_, failure| {
                // SAFETY: three variables of ours, all of full size and not null (clause 2.3).
                unsafe { (functions.begin)(request, &mut raw, failure) }
            })
        })?;
        begun(answer, NonNull::new(raw)).map(|begun| begun.map(|raw| Dial { functions, raw }))
    }

    /// Begins to listen, and binds.
    pub(crate) fn listen(&self, address: &str) -> Result<Result<Listener, Answer>, Trouble> {
        let functions = self.table.listen().ok_or_else(|| lacking("listen"))?;
        let mut raw = std::ptr::null_mut();
        let answer = lent(address, |request| {
            called("listen_begin", ROOM, |_, failure| {
                // SAFETY: as for a dial, with a variable for a listener; the request is lent for
                // this call (clause 4.2).
                unsafe { (functions.begin)(request, &mut raw, failure) }
            })
        })?;
        let listener = match begun(answer, NonNull::new(raw))? {
            Ok(raw) => Listener { functions, raw },
            Err(answer) => return Ok(Err(answer)),
        };
        let bound = until_ready(|| {
            called("listen_step", ROOM, |progress, failure| {
                // SAFETY: begun above and not yet bound, which is when clause 10.1 has it stepped.
                unsafe { (functions.step)(listener.raw.as_ptr(), progress, failure) }
            })
        })?;
        Ok(if bound.status == Status::READY {
            Ok(listener)
        } else {
            Err(bound)
        })
    }
}

/// What a call came to.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) text: String,
    pub(crate) os_error: i32,
    pub(crate) fd: RawFd,
    pub(crate) events: Events,
    pub(crate) retry_after_us: u64,
}

impl Answer {
    pub(crate) fn is_failure(&self) -> bool {
        self.status.0 < 0
    }

    /// The descriptor that a call handed over.
    pub(crate) fn into_fd(self) -> Result<OwnedFd, Trouble> {
        must(
            self.status == Status::READY,
            format!("not ready but {self:?}"),
        )?;
        must(self.fd >= 0, format!("ready with descriptor {}", self.fd))?;
        // SAFETY: clause 6.1: handed over by this call, to nobody but us.
        Ok(unsafe { OwnedFd::from_raw_fd(self.fd) })
    }
}

/// Freed on drop.
pub(crate) struct Dial {
    functions: DialFunctions,
    raw: NonNull<RawDial>,
}

// SAFETY: by clause 2.1 any thread may call; a dial has one owner, so that calls never overlap.
unsafe impl Send for Dial {}

impl Dial {
    pub(crate) fn step(&mut self) -> Result<Answer, Trouble> {
        self.step_telling(ROOM)
    }

    /// Steps with that much room for a failure's text.
    pub(crate) fn step_telling(&mut self, room: usize) -> Result<Answer, Trouble> {
        called("dial_step", room, |progress, failure| {
            // SAFETY: not freed before drop, and `&mut self` keeps calls apart (clause 2.1).
            unsafe { (self.functions.step)(self.raw.as_ptr(), progress, failure) }
        })
    }

    /// Steps and waits until it is connected or failed.
    pub(crate) fn finish(&mut self) -> Result<Answer, Trouble> {
        until_ready(|| self.step())
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        // SAFETY: the one free that clause 11.1 asks for, in whatever state the clause left it.
        unsafe { (self.functions.free)(self.raw.as_ptr()) }
    }
}

/// A bound listener, freed on drop.
pub(crate) struct Listener {
    functions: ListenFunctions,
    raw: NonNull<RawListener>,
}

impl Listener {
    pub(crate) fn accept(&mut self) -> Result<Answer, Trouble> {
        called("listen_accept", ROOM, |progress, failure| {
            // SAFETY: bound (clause 10.2) and alone, through `&mut self`.
            unsafe { (self.functions.accept)(self.raw.as_ptr(), progress, failure) }
        })
    }

    /// Waits for a peer.
    pub(crate) fn next(&mut self) -> Result<Answer, Trouble> {
        until_ready(|| self.accept())
    }

    /// Its address, told with that much room for it.
    pub(crate) fn address(&mut self, room: usize) -> Result<Result<String, Answer>, Trouble> {
        let mut buffer = vec![CANARY; room + CANARIES];
        let mut length = 0;
        let answer = called("listen_address", ROOM, |_, failure| {
            // SAFETY: the buffer has more room than is told, and the listener is bound (10.2).
            unsafe {
                let buffer = buffer.as_mut_ptr();
                (self.functions.address)(self.raw.as_ptr(), buffer, room, &mut length, failure)
            }
        })?;
        untouched("listen_address", &buffer[room..])?;
        if answer.status != Status::READY {
            return Ok(Err(answer));
        }
        must(length <= room, format!("{length} bytes where {room} fit"))?;
        Ok(Ok(String::from_utf8(buffer[..length].to_vec())?))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: the listener's one free (clause 11.1); nothing is called on it after.
        unsafe { (self.functions.free)(self.raw.as_ptr()) }
    }
}

fn lacking(group: &str) -> Trouble {
    Trouble::NotTried(format!("the table has no {group} functions"))
}

/// Clause 9.1, also for listeners: an operation or a failure, never both.
fn begun<T>(
    answer: Answer,
    raw: Option<NonNull<T>>,
) -> Result<Result<NonNull<T>, Answer>, Trouble> {
    match (answer.status, raw) {
        (Status::READY, Some(raw)) => Ok(Ok(raw)),
        (Status::READY, None) => Err(Trouble::Broken("9.1: ready, but no operation".to_owned())),
        (Status::WAIT, _) => Err(Trouble::Broken("7.2: a begin asks to wait".to_owned())),
        (_, Some(_)) => Err(Trouble::Broken(
            "9.1: failed, but set an operation".to_owned(),
        )),
        (_, None) => Ok(Err(answer)),
    }
}

/// Lends `address` for the call, and overwrites it then.
fn lent<T>(address: &str, call: impl FnOnce(&RawRequest) -> T) -> T {
    let mut bytes = address.as_bytes().to_vec();
    let request = RawRequest {
        size: size_of::<RawRequest>() as u32,
        host_minor: ABI_MINOR,
        address: RawText {
            bytes: bytes.as_ptr(),
            length: bytes.len(),
        },
    };
    let answer = call(&request);
    bytes.fill(CANARY);
    answer
}

/// A struct that crosses, with something behind it that must not change.
#[repr(C)]
struct Lent<T> {
    value: T,
    behind: [u8; CANARIES],
}

/// Makes one call with `room` for its failure's text.
fn called(
    function: &str,
    room: usize,
    call: impl FnOnce(&mut RawProgress, &mut RawFailure) -> Status,
) -> Result<Answer, Trouble> {
    let mut text = vec![CANARY; room + CANARIES];
    let mut progress = Lent {
        value: RawProgress {
            size: size_of::<RawProgress>() as u32,
            fd: -1,
            events: Events(0),
            flags: 0,
            retry_after_us: 0,
        },
        behind: [CANARY; CANARIES],
    };
    let mut failure = Lent {
        value: RawFailure {
            size: size_of::<RawFailure>() as u32,
            os_error: 0,
            text: text.as_mut_ptr(),
            capacity: room,
            length: 0,
        },
        behind: [CANARY; CANARIES],
    };
    beat();
    let started = Instant::now();
    let status = call(&mut progress.value, &mut failure.value);
    let took = started.elapsed();
    beat();

    let RawFailure {
        os_error, length, ..
    } = failure.value;
    must(took < BLOCKS, format!("3.1: {function} took {took:?}"))?;
    untouched(function, &progress.behind)?;
    untouched(function, &failure.behind)?;
    untouched(function, &text[room..])?;
    must(
        length <= room,
        format!("8.1: {function} tells of {length} bytes, the host lent {room}"),
    )?;
    let text = String::from_utf8(text[..length].to_vec())?;
    must(
        status != Status::PANICKED,
        format!("{function} panicked: {text}"),
    )?;
    must(
        status.0 <= Status::WAIT.0,
        format!("8.2: {function} answered {}", status.0),
    )?;
    let RawProgress {
        fd,
        events,
        retry_after_us,
        ..
    } = progress.value;
    Ok(Answer {
        status,
        text,
        os_error,
        fd,
        events,
        retry_after_us,
    })
}

fn untouched(function: &str, behind: &[u8]) -> Result<(), Trouble> {
    must(
        behind.iter().all(|byte| *byte == CANARY),
        format!("2.4: {function} wrote past what it was lent"),
    )
}

/// Repeats a step, waiting for what it asks for, until it is ready or failed.
fn until_ready(mut step: impl FnMut() -> Result<Answer, Trouble>) -> Result<Answer, Trouble> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let answer = step()?;
        if answer.status != Status::WAIT {
            return Ok(answer);
        }
        must(
            Instant::now() < give_up,
            format!("still waiting after {PATIENCE:?}: {answer:?}"),
        )?;
        wait(&answer)?;
    }
}

/// Waits as the answer says, but never long at once: what is asked for is certain to come.
pub(crate) fn wait(answer: &Answer) -> Result<(), Trouble> {
    const TICK: Duration = Duration::from_millis(100);
    let asked = match answer.retry_after_us {
        0 => TICK,
        micros => TICK.min(Duration::from_micros(micros)),
    };
    let timeout = Timespec::try_from(asked)?;
    must(
        answer.fd >= 0 || answer.retry_after_us > 0,
        "7.1: a wait for nothing",
    )?;
    if answer.fd < 0 {
        poll(&mut [], Some(&timeout))?;
        return Ok(());
    }
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, answer.events.0 & Events::READABLE.0 != 0);
    flags.set(PollFlags::OUT, answer.events.0 & Events::WRITABLE.0 != 0);
    must(
        !flags.is_empty(),
        format!("7.1: a wait for events {:#x}", answer.events.0),
    )?;
    // SAFETY: clause 6.2: lent, and open until the next call on its operation, which comes after
    // this.
    let lent = unsafe { BorrowedFd::borrow_raw(answer.fd) };
    let mut watched = [PollFd::from_borrowed_fd(lent, flags)];
    poll(&mut watched, Some(&timeout))?;
    must(
        !watched[0].revents().contains(PollFlags::NVAL),
        format!("6.2: lent descriptor {} is not open", answer.fd),
    )
}

/// What a descriptor stands for, if it is open.
pub(crate) fn identity(fd: RawFd) -> Option<(u64, u64)> {
    // SAFETY: only looked at, and a number that is not open is an error, not a danger.
    let looked_at = unsafe { BorrowedFd::borrow_raw(fd) };
    let found = rustix::fs::fstat(looked_at).ok()?;
    Some((found.st_dev, found.st_ino))
}
