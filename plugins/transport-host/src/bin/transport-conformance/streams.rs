//! What a daemon sees: bytes through both ends, and dials that come to nothing.
//!
//! Goes through the host, with its deadlines and checks. Must not know the C functions.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout_at;
use transport_abi::{CannotListen, Dial, Failure, Request, Step, Table, Transport};
use transport_host::{Deadline, Error, ErrorKind, Stream, Transports};

use crate::process::{Held, beat};
use crate::report::{Check, Clause, Trouble, must, with_causes};
use crate::subject::{Needs, Subject, soon};

pub(crate) const CLAUSES: &[Clause] = &[
    Clause {
        number: "6.1",
        says: "no byte at all, and half-close: both ends read the end",
        needs: Needs::Both,
        check: |subject| subject.run(no_byte),
    },
    Clause {
        number: "6.1",
        says: "1 MiB both ways at once, and half-close: all of it arrives, then the end",
        needs: Needs::Both,
        check: |subject| subject.run(mebibyte_both_ways),
    },
    Clause {
        number: "6.1",
        says: "half-close leaves the other direction open",
        needs: Needs::Both,
        check: |subject| subject.run(answer_after_half_close),
    },
    Clause {
        number: "6.3",
        says: "closing one end ends the other: it reads the end, and its writes fail",
        needs: Needs::Both,
        check: |subject| subject.run(close),
    },
    Clause {
        number: "8.1",
        says: "refused: dialing where nobody listens fails, and does not wait",
        needs: Needs::Both,
        check: |subject| subject.run(refused),
    },
    Clause {
        number: "3.2",
        says: "limit: a dial that nobody accepts ends by its deadline and leaves nothing",
        needs: Needs::Both,
        check: |subject| subject.run(dial_limit),
    },
    Clause {
        number: "3.2",
        says: "limit: an accept that nobody dials ends by its deadline, and the listener goes on",
        needs: Needs::Listen,
        check: |subject| subject.run(accept_limit),
    },
    Clause {
        number: "3.2",
        says: "cancel: a dial dropped half-way leaves nothing, and the next one works",
        needs: Needs::Both,
        check: |subject| subject.run(cancelled_dials),
    },
    Clause {
        number: "3.2",
        says: "cancel: an accept dropped half-way loses no peer",
        needs: Needs::Both,
        check: |subject| subject.run(cancelled_accept),
    },
    Clause {
        number: "3.2",
        says: "unreachable: a dial that nothing answers ends by its deadline and leaves nothing",
        needs: Needs::Dial,
        check: |subject| subject.run(unreachable),
    },
    Clause {
        number: "12.1",
        says: "a panic in another plugin costs this one nothing",
        needs: Needs::Both,
        check: |subject| subject.run(panic_beside),
    },
];

const MIB: usize = 1 << 20;
/// Short enough to wait for, long enough for what would work to work.
const LIMIT: Duration = Duration::from_millis(250);
/// How late a busy machine may notice a deadline.
const LATE: Duration = Duration::from_secs(5);
/// More than any backlog that the kernel allows by default.
const UNACCEPTED: usize = 9000;

async fn no_byte(subject: &Subject) -> Check {
    let (_listener, mut dialed, mut accepted) = subject.meet().await?;
    dialed.shutdown().await?;
    at_end(&mut accepted).await?;
    accepted.shutdown().await?;
    at_end(&mut dialed).await
}

async fn at_end(stream: &mut Stream) -> Check {
    let count = timeout_at(soon(), stream.read(&mut [0; 16])).await??;
    must(count == 0, format!("{count} bytes where the end was due"))
}

async fn mebibyte_both_ways(subject: &Subject) -> Check {
    let (_listener, dialed, accepted) = subject.meet().await?;
    let both = async { tokio::join!(exchange(dialed, 1), exchange(accepted, 2)) };
    let (by_dialer, by_listener) = timeout_at(soon(), both).await?;
    must(by_dialer? == pattern(2), "the dialer got other bytes")?;
    must(by_listener? == pattern(1), "the listener got other bytes")
}

/// Sends a pattern, half-closes, and gives what the other end sent until it did.
async fn exchange(mut stream: Stream, seed: u8) -> std::io::Result<Vec<u8>> {
    let (mut read, mut write) = tokio::io::split(&mut stream);
    let sending = async {
        write.write_all(&pattern(seed)).await?;
        write.shutdown().await
    };
    let mut received = Vec::with_capacity(MIB);
    tokio::try_join!(sending, read.read_to_end(&mut received))?;
    Ok(received)
}

/// Bytes whose place can be told from their value, more or less.
fn pattern(seed: u8) -> Vec<u8> {
    (0..MIB)
        .map(|at| (at % 251) as u8 ^ (at >> 12) as u8 ^ seed)
        .collect()
}

async fn answer_after_half_close(subject: &Subject) -> Check {
    let (_listener, mut dialed, mut accepted) = subject.meet().await?;
    dialed.shutdown().await?;
    at_end(&mut accepted).await?;
    accepted.write_all(b"still here").await?;
    drop(accepted);
    let mut rest = Vec::new();
    timeout_at(soon(), dialed.read_to_end(&mut rest)).await??;
    must(rest == b"still here", format!("{rest:?} came"))
}

async fn close(subject: &Subject) -> Check {
    for dialer_closes in [true, false] {
        let (_listener, dialed, accepted) = subject.meet().await?;
        let (closed, mut left) = if dialer_closes {
            (dialed, accepted)
        } else {
            (accepted, dialed)
        };
        drop(closed);
        at_end(&mut left).await?;
        let failing = async { while left.write_all(&[0; 4096]).await.is_ok() {} };
        if timeout_at(soon(), failing).await.is_err() {
            return Err(Trouble::Broken("its writes go on and on".to_owned()));
        }
    }
    Ok(())
}

async fn refused(subject: &Subject) -> Check {
    let target = subject.listen().await?.target().to_owned();
    match subject.transports.dial(&target, soon()).await {
        Err(error) if matches!(error.kind(), ErrorKind::Failed { .. }) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(stream) => Err(Trouble::NotTried(format!(
            "somebody else answers at {target}: {}",
            stream.peer()
        ))),
    }
}

async fn dial_limit(subject: &Subject) -> Check {
    let listener = subject.listen().await?;
    subject.join(&listener).await?;
    let before = Held::now()?.settled()?;
    for _ in 0..UNACCEPTED {
        beat();
        match dial_end(subject, listener.target()).await? {
            End::Connected => {}
            End::ByLimit => return before.must_be_back(),
            // Vsock resets what its backlog has no room for, just as where nobody listens: to wait for
            // room would be to wait for nobody.
            End::Refused(reason) => {
                before.must_be_back()?;
                let reason = format!("a full backlog refuses at once: {reason}");
                return Err(Trouble::NotTried(reason));
            }
        }
    }
    let reason = format!("{UNACCEPTED} peers connect before any is accepted");
    Err(Trouble::NotTried(reason))
}

/// How a dial ended that breaks no clause.
enum End {
    Connected,
    ByLimit,
    /// The other side said no; "try again" is no such answer.
    Refused(String),
}

async fn dial_end(subject: &Subject, target: &str) -> Result<End, Trouble> {
    let deadline = Deadline::now() + LIMIT;
    match subject.transports.dial(target, deadline).await {
        Ok(_connected) => Ok(End::Connected),
        Err(error) if is_timeout(&error) => {
            let late = Deadline::now().saturating_duration_since(deadline);
            must(late < LATE, format!("{late:?} after its deadline"))?;
            Ok(End::ByLimit)
        }
        Err(error) if is_refusal(&error) => Ok(End::Refused(with_causes(&error))),
        Err(error) => Err(error.into()),
    }
}

fn is_refusal(error: &Error) -> bool {
    let refusals = [Errno::CONNREFUSED, Errno::CONNRESET].map(Errno::raw_os_error);
    error
        .os_error()
        .is_some_and(|error| refusals.contains(&error))
}

fn is_timeout(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut { .. })
}

async fn accept_limit(subject: &Subject) -> Check {
    let listener = subject.listen().await?;
    for _ in 0..2 {
        let deadline = Deadline::now() + LIMIT;
        match listener.accept(deadline).await {
            Err(error) if is_timeout(&error) => {
                let late = Deadline::now().saturating_duration_since(deadline);
                must(late < LATE, format!("{late:?} after its deadline"))?;
            }
            Err(error) => return Err(error.into()),
            Ok(stream) => {
                let peer = stream.peer();
                return Err(Trouble::Broken(format!("{peer} came, but nobody dialed")));
            }
        }
    }
    Ok(())
}

async fn cancelled_dials(subject: &Subject) -> Check {
    const DIALS: usize = 100;
    let (listener, ..) = subject.meet().await?;
    let before = Held::now()?.settled()?;
    for _ in 0..DIALS {
        let dial = pin!(subject.transports.dial(listener.target(), soon()));
        drop(polled_once(dial).await);
    }
    // Those that connected in that one poll are in the backlog, with both ends to be closed.
    loop {
        let patience = Deadline::now() + LIMIT;
        match listener.accept(patience).await {
            Ok(gone) => drop(gone),
            Err(error) if is_timeout(&error) => break,
            // A peer that is lost costs nobody else (clause 10.3).
            Err(error) if matches!(error.kind(), ErrorKind::Failed { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    before.must_be_back()?;
    subject.join(&listener).await?;
    Ok(())
}

async fn cancelled_accept(subject: &Subject) -> Check {
    let listener = subject.listen().await?;
    for _ in 0..100 {
        let early = polled_once(pin!(listener.accept(soon()))).await;
        must(early.is_none(), "a peer came, but nobody dialed")?;
        let (mut dialed, mut accepted) = subject.join(&listener).await?;
        dialed.write_all(b"!").await?;
        let byte = timeout_at(soon(), accepted.read_u8()).await??;
        must(byte == b'!', "the wrong peer")?;
    }
    Ok(())
}

async fn polled_once<F: Future>(mut future: Pin<&mut F>) -> Option<F::Output> {
    poll_fn(|cx| {
        Poll::Ready(match future.as_mut().poll(cx) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        })
    })
    .await
}

async fn unreachable(subject: &Subject) -> Check {
    let Some(target) = &subject.unreachable else {
        let reason = "no target for it was given (--unreachable)";
        return Err(Trouble::NotTried(reason.to_owned()));
    };
    let before = Held::now()?.settled()?;
    match dial_end(subject, target).await {
        Ok(End::ByLimit) => before.must_be_back(),
        Ok(End::Connected) => Err(Trouble::NotTried(format!("somebody answers at {target}"))),
        // A network that says so at once is just as good.
        Ok(End::Refused(reason)) | Err(Trouble::Broken(reason)) => {
            before.must_be_back()?;
            Err(Trouble::NotTried(format!("it fails at once: {reason}")))
        }
        Err(other) => Err(other),
    }
}

/// Panics in its first step.
struct Panics;

impl Transport for Panics {
    const NAME: &'static str = "panics";
    type Dial = Self;
    type Listen = CannotListen;

    fn begin_dial(_: &Request<'_>) -> Result<Self, Failure> {
        Ok(Self)
    }
}

impl Dial for Panics {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        panic!("as it was written to")
    }
}

static PANICS: Table = Table::of::<Panics>("0");

async fn panic_beside(subject: &Subject) -> Check {
    let listener = subject.listen().await?;
    let beside = Transports::builder().register_table(&PANICS).build()?;
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let outcome = beside.dial("panics:now", soon()).await;
    std::panic::set_hook(loud);
    match outcome {
        Err(error) if matches!(error.kind(), ErrorKind::Panicked { .. }) => {}
        other => return Err(Trouble::Broken(format!("it came to {other:?}"))),
    }
    subject.join(&listener).await?;
    Ok(())
}
