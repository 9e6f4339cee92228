//! The C functions, called as the contract allows but no host would: early, twice, with hardly any
//! room, and freed in every state.
//!
//! Must not know a host.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::net::{RecvFlags, SocketType, sockopt};
use transport_abi::Status;

use crate::process::Held;
use crate::raw::{Answer, Dial, Listener, PATIENCE, ROOM, identity, wait};
use crate::report::{Check, Clause, Trouble, must};
use crate::subject::{Needs, Subject};

pub(crate) const CLAUSES: &[Clause] = &[
    Clause {
        number: "6.1",
        says: "and the host's alone: the plugin neither keeps nor closes it",
        needs: Needs::Both,
        check: hosts_alone,
    },
    Clause {
        number: "6.1",
        says: "what is handed over is a connected stream socket, non-blocking, close-on-exec",
        needs: Needs::Both,
        check: handed_over,
    },
    Clause {
        number: "2.1",
        says: "operations run side by side on many threads",
        needs: Needs::Both,
        check: side_by_side,
    },
    Clause {
        number: "4.3",
        says: "odd addresses are answered, not tripped over",
        needs: Needs::Nothing,
        check: odd_addresses,
    },
    Clause {
        number: "7.1",
        says: "a listener without peers names what to wait for, and lends it as 6.2 says",
        needs: Needs::Listen,
        check: waits,
    },
    Clause {
        number: "7.3",
        says: "stepping early answers with the same wait",
        needs: Needs::Listen,
        check: early,
    },
    Clause {
        number: "8.1",
        says: "a failure says what failed, and fits into whatever room there is",
        needs: Needs::Both,
        check: failure_texts,
    },
    Clause {
        number: "10.2",
        says: "the address is whole or a failure, and can be dialed",
        needs: Needs::Both,
        check: addresses,
    },
    Clause {
        number: "11.1",
        says: "free gives everything back, whatever the state",
        needs: Needs::Both,
        check: freed_anywhere,
    },
    Clause {
        number: "11.1",
        says: "a listener that nobody met gives everything back",
        needs: Needs::Listen,
        check: freed_listener,
    },
    Clause {
        number: "11.2",
        says: "a freed listener is gone, can be made again, and leaves its connections alone",
        needs: Needs::Both,
        check: freed_and_again,
    },
];

fn listener(subject: &Subject) -> Result<Listener, Trouble> {
    subject.raw.listen(subject.address())?.map_err(failed)
}

fn failed(answer: Answer) -> Trouble {
    Trouble::Broken(format!(
        "failed: {} (errno {})",
        answer.text, answer.os_error
    ))
}

fn address_of(listener: &mut Listener) -> Result<String, Trouble> {
    listener.address(ROOM)?.map_err(failed)
}

fn meet(subject: &Subject, listener: &mut Listener) -> Result<(OwnedFd, OwnedFd), Trouble> {
    let (_dial, dialed, accepted) = meet_and_keep(subject, listener)?;
    Ok((dialed, accepted))
}

/// Connects, with both ends stepped in turn, since some transports need their listener to dial; the
/// dial is not freed yet.
fn meet_and_keep(
    subject: &Subject,
    listener: &mut Listener,
) -> Result<(Dial, OwnedFd, OwnedFd), Trouble> {
    let mut dial = begin(subject, &address_of(listener)?)?;
    let (mut dialed, mut accepted) = (None, None);
    let give_up = Instant::now() + PATIENCE;
    while Instant::now() < give_up {
        if dialed.is_none() {
            dialed = ready(dial.step()?)?;
        }
        if accepted.is_none() {
            accepted = ready(listener.accept()?)?;
        }
        if dialed.is_some() && accepted.is_some() {
            break;
        }
        thread::yield_now();
    }
    match (dialed, accepted) {
        (Some(dialed), Some(accepted)) => Ok((dial, dialed, accepted)),
        _ => Err(Trouble::Broken("dial and accept do not meet".to_owned())),
    }
}

pub(crate) fn begin(subject: &Subject, address: &str) -> Result<Dial, Trouble> {
    subject.raw.dial(address)?.map_err(failed)
}

pub(crate) fn ready(answer: Answer) -> Result<Option<OwnedFd>, Trouble> {
    match answer.status {
        Status::READY => answer.into_fd().map(Some),
        Status::WAIT => Ok(None),
        _ => Err(failed(answer)),
    }
}

fn side_by_side(subject: &Subject) -> Check {
    const THREADS: usize = 4;
    const DIALS: usize = 25;
    let mut listener = listener(subject)?;
    let address = address_of(&mut listener)?;
    // A dial is done before it is accepted, and a full backlog may refuse it at once: as many as there are threads wait there.
    let (place, places) = mpsc::channel();
    let places = Mutex::new(places);
    let takes_place = || places.lock().unwrap_or_else(PoisonError::into_inner).recv();
    (0..THREADS).for_each(|_| _ = place.send(()));
    thread::scope(|scope| {
        let dialers: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..DIALS {
                        // None is given any more once an accept has failed.
                        if takes_place().is_err() {
                            break;
                        }
                        begin(subject, &address)?.finish()?.into_fd()?;
                    }
                    Ok(())
                })
            })
            .collect();
        let accepted = (0..THREADS * DIALS).try_for_each(|_| {
            listener.next()?.into_fd()?;
            _ = place.send(());
            Ok(())
        });
        drop(place);
        // A dial that failed says more than the peer that did not come.
        for dialer in dialers {
            let panicked = |_| Err(Trouble::Broken("a thread panicked".to_owned()));
            dialer.join().unwrap_or_else(panicked)?;
        }
        accepted
    })
}

fn odd_addresses(subject: &Subject) -> Check {
    let long = "x".repeat(70_000);
    let odd = [
        ":",
        "::",
        "/",
        ".",
        " ",
        "%s%n%x",
        "a\nb",
        "\u{1f512}",
        "-1",
        "18446744073709551616:1",
        "[::1]",
        "any",
        "../../..",
        "/nonexistent/nobody",
        &long,
    ];
    for address in odd {
        if subject.table().dial().is_some()
            && let Ok(mut dial) = subject.raw.dial(address)?
        {
            let answer = dial.step()?;
            if answer.status == Status::READY {
                answer.into_fd()?;
            }
        }
        // Only what no transport can listen on: a name of a file would be made.
        if subject.table().listen().is_some() && address == long {
            let answer = subject.raw.listen(address)?;
            must(answer.is_err(), "it listens on 70000 bytes")?;
        }
    }
    Ok(())
}

fn handed_over(subject: &Subject) -> Check {
    let mut listener = listener(subject)?;
    let (dialed, accepted) = meet(subject, &mut listener)?;
    well_handed_over("dialed", &dialed)?;
    well_handed_over("accepted", &accepted)
}

pub(crate) fn well_handed_over(end: &str, fd: &OwnedFd) -> Check {
    let kind = sockopt::socket_type(fd)?;
    must(kind == SocketType::STREAM, format!("{end}: type {kind:?}"))?;
    must(!sockopt::socket_acceptconn(fd)?, format!("{end}: listens"))?;
    rustix::net::getpeername(fd)?;
    let flags = rustix::fs::fcntl_getfl(fd)?;
    must(flags.contains(OFlags::NONBLOCK), format!("{end}: blocks"))?;
    let flags = rustix::io::fcntl_getfd(fd)?;
    must(
        flags.contains(FdFlags::CLOEXEC),
        format!("{end}: survives exec"),
    )
}

fn hosts_alone(subject: &Subject) -> Check {
    let mut listener = listener(subject)?;
    let (dial, dialed, _accepted) = meet_and_keep(subject, &mut listener)?;
    let number = dialed.as_raw_fd();
    drop(dialed);
    left_alone(number, || drop(dial))
}

/// Gives the number of what was handed over, and is closed again, to a file of ours, and frees the operation.
pub(crate) fn left_alone(number: RawFd, free: impl FnOnce()) -> Check {
    let files = until_number(number)?;
    let ours = identity(number);
    free();
    if identity(number) != ours {
        std::mem::forget(files);
        return Err(Trouble::Fatal(format!(
            "descriptor {number} was closed after it was handed over, when it was another file's"
        )));
    }
    drop(files);
    Ok(())
}

/// Opens files until one has this number, which was free just now.
fn until_number(number: RawFd) -> Result<Vec<File>, Trouble> {
    let mut files = Vec::new();
    for _ in 0..64 {
        let file = File::open("/dev/null")?;
        let found = file.as_raw_fd() == number;
        files.push(file);
        if found {
            return Ok(files);
        }
    }
    // A thread of the plugin's own may have taken it meanwhile.
    Err(Trouble::NotTried(format!(
        "number {number} was taken by somebody else"
    )))
}

fn waits(subject: &Subject) -> Check {
    let mut listener = listener(subject)?;
    let answer = listener.accept()?;
    must(
        answer.status == Status::WAIT,
        format!("nobody dialed, and it answers {answer:?}"),
    )?;
    let lent = identity(answer.fd);
    wait(&answer)?;
    must(
        identity(answer.fd) == lent,
        "6.2: the lent descriptor changed before the next call",
    )
}

fn early(subject: &Subject) -> Check {
    let mut listener = listener(subject)?;
    let first = listener.accept()?;
    for _ in 0..100 {
        let again = listener.accept()?;
        let same = (again.status, again.fd, again.events) == (first.status, first.fd, first.events);
        must(same, format!("first {first:?}, then {again:?}"))?;
    }
    Ok(())
}

fn failure_texts(subject: &Subject) -> Check {
    let address = nobodys(subject)?;
    for room in [ROOM, 9, 1, 0] {
        let answer = match subject.raw.dial(&address)? {
            Err(answer) => answer,
            Ok(mut dial) => loop {
                let answer = dial.step_telling(room)?;
                match answer.status {
                    Status::WAIT => wait(&answer)?,
                    Status::READY => {
                        answer.into_fd()?;
                        let text = "somebody answers where nobody listens any more";
                        return Err(Trouble::NotTried(text.to_owned()));
                    }
                    _ => break answer,
                }
            },
        };
        must(answer.is_failure(), format!("{answer:?}"))?;
        must(room < ROOM || !answer.text.is_empty(), "it gives no reason")?;
    }
    Ok(())
}

/// An address where somebody listened until a moment ago.
fn nobodys(subject: &Subject) -> Result<String, Trouble> {
    address_of(&mut listener(subject)?)
}

fn addresses(subject: &Subject) -> Check {
    let mut listener = listener(subject)?;
    let whole = address_of(&mut listener)?;
    let exact = listener.address(whole.len())?.map_err(failed)?;
    must(exact == whole, format!("{whole:?}, then {exact:?}"))?;
    let cut = listener.address(whole.len() - 1)?;
    must(
        cut.is_err(),
        format!("{cut:?} where {whole:?} does not fit"),
    )?;
    meet(subject, &mut listener)?;
    Ok(())
}

fn freed_anywhere(subject: &Subject) -> Check {
    // Once before counting: what is opened once and for all is no leak.
    meet(subject, &mut listener(subject)?)?;
    let nobodys = nobodys(subject)?;
    let before = Held::now()?.settled()?;
    {
        let mut listener = listener(subject)?;
        let address = address_of(&mut listener)?;
        drop(begin(subject, &address)?);
        let mut stepped = begin(subject, &address)?;
        let answer = stepped.step()?;
        if answer.status == Status::READY {
            answer.into_fd()?;
        }
        drop(stepped);
        // The two above may come in as peers that have gone already, or not at all.
        drain(&mut listener)?;
        meet(subject, &mut listener)?;
    }
    if let Ok(mut dial) = subject.raw.dial(&nobodys)? {
        let answer = dial.finish()?;
        must(answer.is_failure(), "somebody else answers there")?;
    }
    before.must_be_back()
}

fn drain(listener: &mut Listener) -> Check {
    while let Some(gone) = ready(listener.accept()?)? {
        drop(gone);
    }
    Ok(())
}

fn freed_listener(subject: &Subject) -> Check {
    listener(subject)?.accept()?;
    let before = Held::now()?.settled()?;
    for _ in 0..100 {
        listener(subject)?.accept()?;
    }
    before.must_be_back()
}

fn freed_and_again(subject: &Subject) -> Check {
    let mut first = listener(subject)?;
    let address = address_of(&mut first)?;
    let (dialed, accepted) = meet(subject, &mut first)?;
    drop(first);
    rustix::io::write(&accepted, b"x")?;
    // Not at once where a thread carries it.
    poll(
        &mut [PollFd::new(&dialed, PollFlags::IN)],
        Some(&Timespec::try_from(PATIENCE)?),
    )?;
    let mut byte = [0];
    let (count, _) = rustix::net::recv(&dialed, &mut byte[..], RecvFlags::empty())?;
    must(
        (count, byte) == (1, *b"x"),
        "an accepted connection ended with its listener",
    )?;
    let mut again = subject.raw.listen(&address)?.map_err(failed)?;
    meet(subject, &mut again)?;
    Ok(())
}
