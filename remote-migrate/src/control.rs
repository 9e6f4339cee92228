//! One migration in flight, as others see it and may stop it.
//!
//! The driving loop and any number of onlookers share a [`Control`]. Cancelling and passing the point
//! of return exclude each other here, under one short lock, so that the answer to a cancel is never a
//! guess. Nothing here knows what a phase does.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use crate::{
    pace::{Estimate, Pace},
    phase::{Phase, TooLate},
    plan::Report,
    verdict::Ruling,
};

/// How the memory moves, as the source's host reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Bytes sent so far.
    pub sent: u64,
    /// Bytes left in this pass.
    pub remaining: u64,
    /// All the guest has.
    pub total: u64,
    /// How often memory was gone over, with this time.
    pub pass: u64,
    /// Bytes the guest dirties a second, as measured over the passes before; 0 in the first.
    pub dirty_rate: u64,
    /// Whether the guest writes nothing more where it leaves: it is paused, or has gone on at the other side already
    /// (post-copy). What is left only falls then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_still: bool,
}

impl Transfer {
    /// Bytes of the guest's that need not be sent any more, as far as is known: fewer again once it has written on.
    #[must_use]
    pub fn moved(&self) -> u64 {
        self.total.saturating_sub(self.remaining)
    }

    /// The same as a share of all memory, from 0 to 100; 0 while that is unknown. It rises through a pass, and falls back
    /// as the next one begins, by what the guest has written meanwhile: to be shown with the [`pass`](Self::pass), and no
    /// measure of the time that is left. That is [`Estimate::eta`].
    #[must_use]
    pub fn percent(&self) -> f64 {
        if self.total == 0 {
            return 0.0;
        }
        100.0 * (self.moved() as f64 / self.total as f64)
    }
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Its phase.
    pub phase: Phase,
    /// The last report of the host.
    pub transfer: Transfer,
    /// What follows from it and those before; nothing while no memory moves. On both sides it is the word of the source.
    pub estimate: Estimate,
}

impl Progress {
    fn at(phase: Phase) -> Self {
        Self {
            phase,
            transfer: Transfer::default(),
            estimate: Estimate::default(),
        }
    }
}

/// The control of one migration: progress out, cancel in. A clone controls the same migration.
#[derive(Clone, Debug)]
pub struct Control {
    state: watch::Sender<State>,
    progress: watch::Sender<Progress>,
    post_copy: watch::Sender<bool>,
    word: watch::Sender<Word>,
}

/// Whether an operator's word takes the place of the other side's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// The other side's is not waited for yet.
    Early,
    Open,
    Ruled(Ruling),
    /// Nobody drives it any more.
    Over(Option<Report>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Cancelled,
    Shut(Phase),
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

impl Control {
    /// For a migration that has not begun.
    #[must_use]
    pub fn new() -> Self {
        let progress = Progress::at(Phase::Begin);
        Self {
            state: watch::Sender::new(State::Open),
            progress: watch::Sender::new(progress),
            post_copy: watch::Sender::new(false),
            word: watch::Sender::new(Word::Early),
        }
    }

    /// Asks the migration to turn to post-copy, now or as soon as memory moves: the guest then runs at the
    /// destination before all of it is there, and there is no way back. Where it is not possible any more,
    /// or the host has none, the migration goes on as it was or fails as any step does.
    pub fn post_copy(&self) {
        self.post_copy.send_replace(true);
    }

    pub(crate) async fn post_copy_wanted(&self) {
        let mut wanted = self.post_copy.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = wanted.wait_for(|wanted| *wanted).await;
    }

    /// Asks the migration to turn back. `Ok` means that it will not pass the point of return, as long as
    /// the source has a guest to return to; how that ended is what the migrating call returns.
    ///
    /// # Errors
    ///
    /// [`TooLate`]: the guest was offered to the other side already, or the migration is over.
    pub fn cancel(&self) -> Result<(), TooLate> {
        let mut late = None;
        self.state.send_if_modified(|state| match *state {
            State::Open => {
                *state = State::Cancelled;
                true
            }
            State::Cancelled => false,
            State::Shut(phase) => {
                late = Some(TooLate { phase });
                false
            }
        });
        late.map_or(Ok(()), Err)
    }

    /// Rules in place of the other side, for whose word the migration waits: it waits no longer, and ends as
    /// [`resolve`](crate::resolve) does. `false` if it does not wait, since it did not come so far or is over; of two
    /// rulings the first stands. What became of it is told by [`ended`](Self::ended).
    #[must_use]
    pub fn rule(&self, ruling: Ruling) -> bool {
        let mut taken = false;
        self.word.send_if_modified(|word| {
            let is_first = *word == Word::Open;
            if is_first {
                *word = Word::Ruled(ruling);
            }
            taken = matches!(word, Word::Ruled(_));
            is_first
        });
        taken
    }

    /// Waits until nobody drives the migration any more, and says what it reported; nothing if it ended without knowing
    /// the owner, or was dropped. For ever, if it never begins.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn ended(&self) -> Option<Report> {
        let mut word = self.word.subscribe();
        let ended = word.wait_for(|word| matches!(word, Word::Over(_))).await;
        // The sender lives in `self`, so waiting cannot fail.
        match ended.map(|word| *word) {
            Ok(Word::Over(report)) => report,
            _ => None,
        }
    }

    /// Where it stands now, and every change from here on.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// One step is over, and the next one is of this phase. What moves memory has it estimated anew.
    pub(crate) fn enter(&self, phase: Phase) {
        self.progress.send_if_modified(|progress| {
            let (was, estimate) = (progress.phase, Estimate::default());
            progress.phase = phase;
            let had = std::mem::replace(&mut progress.estimate, estimate);
            was != phase || had != estimate
        });
    }

    pub(crate) fn meter(&self) -> Meter {
        Meter {
            progress: self.progress.clone(),
            began: Instant::now(),
            pace: Arc::default(),
        }
    }

    /// Passes the point of return, unless a cancel came first.
    pub(crate) fn shut(&self, phase: Phase) -> bool {
        let mut passed = true;
        self.state.send_if_modified(|state| {
            passed = *state != State::Cancelled;
            if passed {
                *state = State::Shut(phase);
            }
            passed
        });
        passed
    }

    /// Closes the door behind a migration that is over, cancelled or not.
    pub(crate) fn over(&self, phase: Phase) {
        self.state.send_replace(State::Shut(phase));
    }

    /// The other side's word is waited for. Yields when an operator's takes its place.
    pub(crate) async fn ruled(&self) -> Ruling {
        let mut word = self.word.subscribe();
        self.word.send_if_modified(|word| {
            let is_early = *word == Word::Early;
            if is_early {
                *word = Word::Open;
            }
            is_early
        });
        let ruled = word.wait_for(|word| matches!(word, Word::Ruled(_))).await;
        // The sender lives in `self`, so waiting cannot fail.
        match ruled.map(|word| *word) {
            Ok(Word::Ruled(ruling)) => ruling,
            _ => std::future::pending().await,
        }
    }

    /// Something else is waited for, and for long: who rules now is told that it is not heard.
    pub(crate) fn deaf(&self) {
        self.word.send_if_modified(|word| {
            let was_open = *word == Word::Open;
            if was_open {
                *word = Word::Early;
            }
            was_open
        });
    }

    /// Nobody drives it any more.
    pub(crate) fn left(&self, report: Option<Report>) {
        self.word.send_if_modified(|word| {
            let is_news = !matches!(word, Word::Over(_));
            if is_news {
                *word = Word::Over(report);
            }
            is_news
        });
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        *self.state.borrow() == State::Cancelled
    }

    pub(crate) async fn cancelled(&self) {
        let mut state = self.state.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = state.wait_for(|state| *state == State::Cancelled).await;
    }
}

/// Where a host reports how the memory moves.
#[derive(Clone, Debug)]
pub struct Meter {
    progress: watch::Sender<Progress>,
    began: Instant,
    pace: Arc<Mutex<Pace>>,
}

impl Meter {
    /// Shows `transfer` to everybody who watches, with what follows from it, which is also handed back. Never waits; only
    /// the last report is kept.
    pub fn report(&self, transfer: Transfer) -> Estimate {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let estimate = pace.look(self.began.elapsed(), transfer);
        self.progress.send_modify(|progress| {
            progress.transfer = transfer;
            progress.estimate = estimate;
        });
        estimate
    }
}

/// How the memory of a guest moves that arrives, where it can be watched: told by the other side, and nothing is measured
/// here.
#[derive(Clone, Debug)]
pub struct Echo {
    progress: watch::Sender<Progress>,
}

impl Default for Echo {
    fn default() -> Self {
        Self::new()
    }
}

impl Echo {
    /// Of one of which nothing was told yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            progress: watch::Sender::new(Progress::at(Phase::Perform)),
        }
    }

    /// Where it stands now, and every change from here on.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Shows what the other side told to everybody who watches. Never waits.
    pub fn tell(&self, transfer: Transfer, estimate: Estimate) {
        self.progress.send_modify(|progress| {
            progress.transfer = transfer;
            progress.estimate = estimate;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_and_the_point_of_return_exclude_each_other() {
        let first = Control::new();
        assert_eq!(first.cancel(), Ok(()));
        assert!(
            !first.shut(Phase::Finish),
            "a cancelled migration does not hand over"
        );

        let second = Control::new();
        assert!(second.shut(Phase::Finish));
        assert_eq!(
            second.cancel(),
            Err(TooLate {
                phase: Phase::Finish
            })
        );
    }

    #[tokio::test]
    async fn a_ruling_is_taken_only_while_the_other_side_is_waited_for() {
        let control = Control::new();
        assert!(!control.rule(Ruling::PeerOwns), "nobody waits for it yet");
        let ruled = tokio::join!(control.ruled(), async {
            assert!(control.rule(Ruling::PeerFenced));
            assert!(control.rule(Ruling::PeerOwns), "the first stands");
        });
        assert_eq!(ruled.0, Ruling::PeerFenced);
        control.left(None);
        assert_eq!(control.ended().await, None);
        assert!(!control.rule(Ruling::PeerFenced), "it is over");
    }
}
