//! The waiting between the calls of an operation: until a descriptor is ready, until it is worth
//! trying again, or until the deadline.
//!
//! Must not know plugins: it is given a step to repeat. Dropping a future here drops the watch
//! first, and the step with all it holds afterwards.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::Interest;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::readiness::watch;
use crate::{Deadline, Error, ErrorKind};

/// What a step came to.
pub(crate) enum Progress<T> {
    Ready(T),
    Wait(Wait),
}

pub(crate) struct Wait {
    pub(crate) fd: Option<(OwnedFd, Interest)>,
    pub(crate) retry_after: Option<Duration>,
}

impl Wait {
    fn what(&self) -> &'static str {
        match self.fd {
            None => "the next try",
            Some((_, Interest::READABLE)) => "a readable descriptor",
            Some((_, Interest::WRITABLE)) => "a writable descriptor",
            Some(_) => "a descriptor",
        }
    }

    /// Comes back when it is worth stepping again, and at `deadline` at the latest.
    async fn until(self, deadline: Deadline) -> Result<(), Error> {
        let retry = self
            .retry_after
            .and_then(|delay| Instant::now().checked_add(delay));
        let end = retry.map_or(deadline, |retry| retry.min(deadline));
        let Some((fd, interest)) = self.fd else {
            sleep_until(end).await;
            return Ok(());
        };
        let watched = watch(fd, interest).map_err(|error| match error.kind() {
            std::io::ErrorKind::PermissionDenied => {
                Error::breach("6.2", "it lent a descriptor that cannot be waited for")
            }
            _ => Error::io("watch a descriptor")(error),
        })?;
        match timeout_at(end, watched.ready(interest)).await {
            Ok(ready) => ready.map(drop).map_err(Error::io("wait for a descriptor")),
            Err(_elapsed) => Ok(()),
        }
    }
}

/// Steps until ready, waiting in between, up to `deadline`.
pub(crate) async fn drive<T>(
    deadline: Deadline,
    mut step: impl FnMut() -> Result<Progress<T>, Error>,
) -> Result<T, Error> {
    let started = Instant::now();
    let mut steps = 0;
    loop {
        steps += 1;
        let wait = match step()? {
            Progress::Ready(done) => return Ok(done),
            Progress::Wait(wait) => wait,
        };
        if Instant::now() >= deadline {
            return Err(Error::new(ErrorKind::TimedOut {
                waited: started.elapsed(),
                steps,
                last: wait.what().to_owned(),
            }));
        }
        wait.until(deadline).await?;
    }
}
