//! The signal that asks a job to stop: cancelled by somebody, or its guest is gone.
//!
//! Knows no runtime: whoever waits is woken through the waker it left. Fires once and stays fired.

use std::fmt;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use crate::error::GoneWhy;
use crate::label::Label;
use crate::sync::{Arc, Mutex, lock};

/// Why a job should stop.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// Somebody asked. The holder undoes what it did through its own nested steps.
    Cancelled(Label),
    /// The guest is gone; there is nothing left to undo in it.
    Gone {
        /// The generation that ended.
        generation: u64,
        /// How it ended.
        why: GoneWhy,
    },
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancelled(by) => write!(f, "cancelled by \"{by}\""),
            Self::Gone { generation, why } => write!(f, "generation {generation} is gone: {why}"),
        }
    }
}

/// A handle on one job's stop signal. Clones share it.
#[derive(Clone)]
pub struct Token(Arc<Mutex<Signal>>);

#[derive(Default)]
struct Signal {
    stop: Option<Stop>,
    waiting: Vec<(u64, Waker)>,
    next: u64,
}

impl Token {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Signal::default())))
    }

    /// Why the job should stop, once somebody said so.
    #[must_use]
    pub fn stopped(&self) -> Option<Stop> {
        lock(&self.0).stop.clone()
    }

    /// Waits until the job should stop.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropping the future only stops the waiting.
    pub async fn stop(&self) -> Stop {
        let mut place = Place {
            token: self,
            id: None,
        };
        poll_fn(|cx| place.poll(cx.waker(), |_| true)).await
    }

    /// Waits until the guest is gone, whether the job was cancelled before or not.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropping the future only stops the waiting.
    pub async fn gone(&self) -> GoneWhy {
        let mut place = Place {
            token: self,
            id: None,
        };
        poll_fn(
            |cx| match place.poll(cx.waker(), |stop| matches!(stop, Stop::Gone { .. })) {
                Poll::Ready(Stop::Gone { why, .. }) => Poll::Ready(why),
                Poll::Ready(Stop::Cancelled(_)) | Poll::Pending => Poll::Pending,
            },
        )
        .await
    }

    /// Fires, unless it has. A guest that is gone overrides a cancellation: there is nothing left to undo.
    pub(crate) fn fire(&self, stop: Stop) {
        let waiting = {
            let mut signal = lock(&self.0);
            match (&signal.stop, &stop) {
                (None, _) | (Some(Stop::Cancelled(_)), Stop::Gone { .. }) => {
                    signal.stop = Some(stop);
                }
                _ => return,
            }
            std::mem::take(&mut signal.waiting)
        };
        for (_, waker) in waiting {
            waker.wake();
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Token").field(&self.stopped()).finish()
    }
}

/// One waiter's place among those to wake; leaves with it.
struct Place<'a> {
    token: &'a Token,
    id: Option<u64>,
}

impl Place<'_> {
    /// Ready with the signal once it is one that `counts`.
    fn poll(&mut self, waker: &Waker, counts: impl Fn(&Stop) -> bool) -> Poll<Stop> {
        let mine = waker.clone();
        let mut signal = lock(&self.token.0);
        if let Some(stop) = signal.stop.as_ref().filter(|stop| counts(stop)) {
            return Poll::Ready(stop.clone());
        }
        let id = *self.id.get_or_insert_with(|| {
            signal.next += 1;
            signal.next
        });
        let old = match signal.waiting.iter_mut().find(|(other, _)| *other == id) {
            Some((_, place)) => Some(std::mem::replace(place, mine)),
            None => {
                signal.waiting.push((id, mine));
                None
            }
        };
        drop(signal);
        drop(old);
        Poll::Pending
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let mut signal = lock(&self.token.0);
        let mine = signal.waiting.iter().position(|(other, _)| *other == id);
        let waker = mine.map(|index| signal.waiting.swap_remove(index));
        drop(signal);
        drop(waker);
    }
}
