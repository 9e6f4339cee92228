//! What is done about a migration that does not come to its end by itself. Pure: how long it runs and how far it is in, one
//! piece of advice out. [`ops::migrate`](crate::ops) asks each time it has asked QEMU, and does it.

use std::time::Duration;

use remote_migrate::Transfer;

/// What is done about a migration that does not come to its end by itself. The default does nothing about one that moves: it
/// goes on for as long as its call may take.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..Policy::default()`"
)]
pub struct Policy {
    /// For how long it goes on as it was begun. An hour.
    pub deadline: Duration,
    /// After that, these one by one, until it ends. None.
    pub then: Vec<Remedy>,
    /// How long each of them is given to help. 30 s.
    pub grace: Duration,
    /// Given up if not a byte was moved for so long. A minute; 0 is for ever.
    pub stall: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(3600),
            then: Vec::new(),
            grace: Duration::from_secs(30),
            stall: Duration::from_secs(60),
        }
    }
}

/// What may help a migration to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// QEMU takes more and more time from the guest's processors.
    Throttle,
    /// The guest may stand still for so long at the end.
    Downtime(Duration),
    /// It turns to post-copy: there is no way back then.
    PostCopy,
    /// It is given up, and the guest stays.
    GiveUp,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advice {
    /// Nothing.
    GoOn,
    /// This, once.
    Try(Remedy),
    /// It is given up, for this reason.
    GiveUp(&'static str),
}

/// A policy and what it has led to so far.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    policy: Policy,
    tried: usize,
    /// When the next remedy is due.
    due: Duration,
    moved: u64,
    /// When a byte was moved last.
    moved_at: Duration,
}

impl Watch {
    pub(crate) fn new(policy: Policy) -> Self {
        Self {
            due: policy.deadline,
            policy,
            tried: 0,
            moved: 0,
            moved_at: Duration::ZERO,
        }
    }

    /// What is to be done about a migration that runs for so long and is so far.
    pub(crate) fn look(&mut self, elapsed: Duration, transfer: Transfer) -> Advice {
        if transfer.sent != self.moved {
            (self.moved, self.moved_at) = (transfer.sent, elapsed);
        }
        let still = elapsed.saturating_sub(self.moved_at);
        if !self.policy.stall.is_zero() && still >= self.policy.stall {
            return Advice::GiveUp("not a byte was moved for as long as its policy allows");
        }
        if elapsed < self.due {
            return Advice::GoOn;
        }
        let Some(remedy) = self.policy.then.get(self.tried).copied() else {
            return Advice::GoOn;
        };
        self.tried += 1;
        self.due = elapsed.saturating_add(self.policy.grace);
        match remedy {
            Remedy::GiveUp => Advice::GiveUp("it took longer than its policy allows"),
            remedy => Advice::Try(remedy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn sent(sent: u64) -> Transfer {
        Transfer {
            sent,
            ..Transfer::default()
        }
    }

    fn watch(then: &[Remedy]) -> Watch {
        Watch::new(Policy {
            deadline: 10 * SECOND,
            then: then.to_vec(),
            grace: 5 * SECOND,
            stall: 3 * SECOND,
        })
    }

    /// What is advised each second, for a migration that moves on and on.
    fn advised(mut watch: Watch, seconds: u32) -> Vec<(u32, Advice)> {
        (0..seconds)
            .map(|now| (now, watch.look(now * SECOND, sent(u64::from(now) + 1))))
            .filter(|(_, advice)| *advice != Advice::GoOn)
            .collect()
    }

    #[test]
    fn remedies_come_in_turn_from_the_deadline_on_and_each_has_its_grace() {
        let longer = Remedy::Downtime(SECOND);
        let all = advised(watch(&[Remedy::Throttle, longer, Remedy::GiveUp]), 30);
        assert_eq!(all.len(), 3);
        assert_eq!(all[0], (10, Advice::Try(Remedy::Throttle)));
        assert_eq!(all[1], (15, Advice::Try(longer)));
        assert!(matches!(all[2], (20, Advice::GiveUp(_))));
    }

    #[test]
    fn without_a_last_resort_it_goes_on_for_ever() {
        let all = advised(watch(&[Remedy::PostCopy]), 1000);
        assert_eq!(all, [(10, Advice::Try(Remedy::PostCopy))]);
        assert!(advised(watch(&[]), 1000).is_empty());
    }

    #[test]
    fn one_that_stands_still_is_given_up_before_its_deadline_and_one_that_moves_is_not() {
        let mut standing = watch(&[]);
        assert_eq!(standing.look(SECOND, sent(7)), Advice::GoOn);
        assert_eq!(standing.look(3 * SECOND, sent(7)), Advice::GoOn);
        assert!(matches!(
            standing.look(4 * SECOND, sent(7)),
            Advice::GiveUp(_)
        ));
        let patient = Policy {
            stall: Duration::ZERO,
            ..Policy::default()
        };
        let mut patient = Watch::new(patient);
        assert_eq!(patient.look(100 * SECOND, sent(0)), Advice::GoOn);
    }
}
