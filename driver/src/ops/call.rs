//! A call that has not begun: what to do, and how long it may take.

use std::fmt;
use std::future::IntoFuture;
use std::pin::Pin;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::Error;
use crate::ops::Deadline;

/// A call that has not begun. Awaiting it begins it; until then its deadline may be changed.
///
/// The deadline covers all of it: the wait for the job, for commands of callers that left, and its own commands.
#[must_use = "nothing happens until it is awaited"]
pub struct Call<T> {
    limit: Limit,
    begin: Box<dyn FnOnce(Deadline) -> Running<T> + Send>,
}

type Running<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

#[derive(Clone, Copy, Debug)]
enum Limit {
    For(Duration),
    Until(Deadline),
}

impl<T> Call<T> {
    pub(crate) fn new<F>(
        limit: Duration,
        begin: impl FnOnce(Deadline) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        Self {
            limit: Limit::For(limit),
            begin: Box::new(move |deadline| Box::pin(begin(deadline))),
        }
    }

    /// Gives it so long, from when it is awaited.
    pub fn deadline(self, limit: Duration) -> Self {
        Self {
            limit: Limit::For(limit),
            ..self
        }
    }

    /// Gives it until then.
    pub fn until(self, deadline: Deadline) -> Self {
        Self {
            limit: Limit::Until(deadline),
            ..self
        }
    }
}

impl<T> IntoFuture for Call<T> {
    type Output = Result<T, Error>;
    type IntoFuture = Running<T>;

    fn into_future(self) -> Self::IntoFuture {
        let deadline = match self.limit {
            Limit::For(limit) => in_time(limit),
            Limit::Until(deadline) => deadline,
        };
        (self.begin)(deadline)
    }
}

impl<T> fmt::Debug for Call<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// That long from now. What the clock cannot count is as good as a century.
fn in_time(limit: Duration) -> Deadline {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    let now = Instant::now();
    now.checked_add(limit).unwrap_or_else(|| now + CENTURY)
}
