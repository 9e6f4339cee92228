//! A plugin that only dials, on the live server that its target is: what can be judged from one end.
//!
//! The server is anybody's and may serve one client at a time, so there is one connection at a time, and what goes
//! through is left to it. Must not know a host.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::calls;
use crate::process::Held;
use crate::raw::Dial;
use crate::report::{Check, Clause, Trouble};
use crate::subject::{Needs, Subject};

pub(crate) const CLAUSES: &[Clause] = &[
    Clause {
        number: "6.1",
        says: "and the host's alone: the plugin neither keeps nor closes it, dialing a server",
        needs: Needs::Server,
        check: hosts_alone,
    },
    Clause {
        number: "6.1",
        says: "what is handed over is a connected stream socket, non-blocking, close-on-exec, from a server",
        needs: Needs::Server,
        check: |subject| calls::well_handed_over("dialed", &dial(subject)?.1),
    },
    Clause {
        number: "11.1",
        says: "free gives everything back, whatever the state of a dial",
        needs: Needs::Server,
        check: freed_anywhere,
    },
];

fn dial(subject: &Subject) -> Result<(Dial, OwnedFd), Trouble> {
    let mut dial = calls::begin(subject, subject.address())?;
    let answer = dial.finish()?;
    if answer.is_failure() {
        return Err(nobody(&answer.text));
    }
    Ok((dial, answer.into_fd()?))
}

/// A plugin is not to blame for a server that is not there.
pub(crate) fn nobody(reason: &str) -> Trouble {
    Trouble::NotTried(format!("the target is no live server: {reason}"))
}

fn hosts_alone(subject: &Subject) -> Check {
    let (dial, dialed) = dial(subject)?;
    let number = dialed.as_raw_fd();
    drop(dialed);
    calls::left_alone(number, || drop(dial))
}

fn freed_anywhere(subject: &Subject) -> Check {
    // Once before counting: what is opened once and for all is no leak.
    drop(dial(subject)?);
    let before = Held::now()?.settled()?;
    drop(calls::begin(subject, subject.address())?);
    let mut stepped = calls::begin(subject, subject.address())?;
    calls::ready(stepped.step()?)?;
    drop(stepped);
    drop(dial(subject)?);
    before.must_be_back()
}
