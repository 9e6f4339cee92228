//! What can be seen of a connection from outside: whether it is up, and how far the other clock is.
//!
//! Only shows; nobody decides by it whether a guest is taken.

use tokio::sync::watch;

use super::{clock::ClockOffset, identity::PeerIdentity, session::Agreed};
use crate::phase::Reason;

/// A window on the connections of one peer. A clone looks at the same.
#[derive(Clone, Debug, Default)]
pub struct Link(watch::Sender<LinkState>);

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkState {
    /// Whether a connection is open, with versions settled.
    pub up: bool,
    /// How many connections were opened so far.
    pub opened: u64,
    /// Who is at the other end, or was last.
    pub peer: Option<PeerIdentity>,
    /// What was settled with it.
    pub agreed: Option<Agreed>,
    /// Its clock, measured at every beat. Outlives the connection.
    pub clock: Option<ClockOffset>,
    /// Why the last connection is over, if it did not end by its owner's will.
    pub lost: Option<Reason>,
}

impl Link {
    /// Before the first connection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How it stands now, and every change from here on.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<LinkState> {
        self.0.subscribe()
    }

    /// How far the other side's clock is, by the best of the last beats.
    #[must_use]
    pub fn clock(&self) -> Option<ClockOffset> {
        self.0.borrow().clock
    }

    /// Another connection is open; its number is to be handed to [`Link::closed`].
    pub(super) fn opened(&self, peer: &PeerIdentity, agreed: Option<&Agreed>) -> u64 {
        let mut number = 0;
        self.0.send_modify(|state| {
            state.opened += 1;
            number = state.opened;
            state.up = true;
            state.peer = Some(peer.clone());
            state.agreed = agreed.cloned();
            state.lost = None;
        });
        number
    }

    pub(super) fn measured(&self, clock: Option<ClockOffset>) {
        self.0.send_if_modified(|state| {
            let news = clock.is_some() && state.clock != clock;
            if news {
                state.clock = clock;
            }
            news
        });
    }

    /// The connection of this number is over, or one that was never open if it is 0. Says nothing of one
    /// that was opened since.
    pub(super) fn closed(&self, number: u64, lost: Option<Reason>) {
        self.0.send_if_modified(|state| {
            let last = state.opened == number;
            if last {
                state.up = false;
                state.lost = lost;
            }
            last
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_old_connection_does_not_hide_the_new_one() {
        let link = Link::new();
        let peer = PeerIdentity::Vsock { cid: 3 };
        let first = link.opened(&peer, None);
        let second = link.opened(&peer, None);
        link.closed(first, Some(Reason::new("late")));
        assert!(link.watch().borrow().up && link.watch().borrow().lost.is_none());
        link.closed(second, None);
        assert!(!link.watch().borrow().up);
    }
}
