//! The task that keeps one freeze, from the first question to the last thaw.
//!
//! It outlives the call that started it and the lease that call returned, and ends when the agent
//! said that the guest is thawed, or when the connection is gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::store::{LeaseRecord, Shelf};
use super::{FreezeEnd, FreezeLease, FreezePlan, FreezeWatch, Thawed, ThawedBy};
use crate::agent::{Deadline, Qga};
use crate::command::{
    Command, FreezeState, FsfreezeFreeze, FsfreezeFreezeList, FsfreezeStatus, FsfreezeThaw,
};
use crate::error::{Closed, Effect, Error, ErrorKind};
use crate::ext::QgaExt as _;

/// How long one thaw may take before it is asked again: twice what a sync may, so that an agent
/// that is slow but there is not asked for nothing.
const TRY: Duration = Duration::from_secs(10);

/// The first and the longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

type Handed = oneshot::Sender<Result<FreezeLease, Error>>;

/// Freezes, hands the lease over, and sees to its end.
pub(super) async fn keep(
    qga: Arc<dyn Qga>,
    shelf: Shelf,
    plan: FreezePlan,
    deadline: Deadline,
    handed: Handed,
) {
    let record = LeaseRecord::new(&plan.guest, plan.hold, &plan.mountpoints);
    let since = Instant::now();
    let warden = Warden {
        qga,
        shelf,
        record,
        since,
        until: since.checked_add(plan.hold).unwrap_or(deadline),
    };
    match warden.begin(&plan, deadline).await {
        Begun::Frozen(file_systems) => warden.hold(file_systems, handed).await,
        // That the caller has left is no news: nothing is frozen.
        Begun::Not(error) => drop(handed.send(Err(error))),
        Begun::Unknown(error) => warden.settle(error, handed).await,
    }
}

/// Thaws and sees that it is so, however often it must ask until `deadline`.
pub(super) async fn thaw_by(qga: &dyn Qga, deadline: Deadline) -> Result<i64, Error> {
    let mut pause = PAUSES.0;
    loop {
        let error = match thaw(qga, deadline.min(Instant::now() + TRY)).await {
            Ok(file_systems) => return Ok(file_systems),
            Err(error) if error.kind() == ErrorKind::Closed => return Err(error),
            Err(error) => error,
        };
        if deadline <= Instant::now() + pause {
            return Err(error);
        }
        sleep_until(Instant::now() + pause).await;
        pause = PAUSES.1.min(pause * 2);
    }
}

/// One thaw, checked. A guest that is not frozen has nothing against it.
async fn thaw(qga: &dyn Qga, deadline: Deadline) -> Result<i64, Error> {
    let file_systems = qga.execute(FsfreezeThaw, deadline).await?;
    match qga.execute(FsfreezeStatus, deadline).await {
        Ok(FreezeState::Thawed) => Ok(file_systems),
        Ok(_) => Err(Error::refused(
            FsfreezeThaw::NAME,
            "",
            "still frozen after the thaw",
        )),
        // An agent that will not say is taken at its word.
        Err(error) if error.effect() == Effect::Refused => Ok(file_systems),
        Err(error) => Err(error),
    }
}

/// What came of asking for a freeze.
enum Begun {
    Frozen(i64),
    /// Nothing is frozen on our behalf, and the record is gone.
    Not(Error),
    /// It may be frozen, now or soon.
    Unknown(Error),
}

struct Warden {
    qga: Arc<dyn Qga>,
    shelf: Shelf,
    record: LeaseRecord,
    since: Instant,
    until: Instant,
}

impl Warden {
    async fn begin(&self, plan: &FreezePlan, deadline: Deadline) -> Begun {
        if let Err(error) = self.check(deadline).await {
            return Begun::Not(error.into_none());
        }
        if let Err(error) = self.shelf.put(&self.record).await {
            // A store may fail after it wrote.
            self.forget().await;
            return Begun::Not(error);
        }
        let limit = deadline
            .min(self.until)
            .min(Instant::now() + plan.answer_within);
        let answer = if plan.mountpoints.is_empty() {
            self.qga.execute(FsfreezeFreeze, limit).await
        } else {
            let list = FsfreezeFreezeList {
                mountpoints: plan.mountpoints.clone(),
            };
            self.qga.execute(list, limit).await
        };
        let error = match answer {
            Ok(file_systems) => return Begun::Frozen(file_systems),
            Err(error) => error,
        };
        match (error.effect(), error.kind()) {
            (Effect::None, _) => {
                self.forget().await;
                Begun::Not(error)
            }
            // Between the question and the freeze somebody else was faster.
            (_, ErrorKind::Frozen) => {
                self.forget().await;
                Begun::Not(Error::foreign_freeze(FsfreezeFreeze::NAME))
            }
            // An agent that fails half-way thaws what it froze. It says so itself, or it is done.
            (Effect::Refused, _) => match self.status(deadline).await {
                Ok(FreezeState::Thawed) => {
                    self.forget().await;
                    Begun::Not(error)
                }
                _ => Begun::Unknown(error),
            },
            (Effect::Unknown, _) => Begun::Unknown(error),
        }
    }

    /// Refuses to freeze what is frozen.
    async fn check(&self, deadline: Deadline) -> Result<(), Error> {
        if self.status(deadline).await? == FreezeState::Thawed {
            return Ok(());
        }
        let ours = self.shelf.of(&self.record.guest).await?;
        Err(match ours.first() {
            Some(record) => Error::lease_pending(FsfreezeFreeze::NAME, record.age()),
            None => Error::foreign_freeze(FsfreezeFreeze::NAME),
        })
    }

    async fn status(&self, deadline: Deadline) -> Result<FreezeState, Error> {
        self.qga.execute(FsfreezeStatus, deadline).await
    }

    /// Hands the lease over and thaws when it is time.
    async fn hold(self, file_systems: i64, handed: Handed) {
        let (release, released) = oneshot::channel();
        let (ending, end) = watch::channel(None);
        let lease = FreezeLease {
            release,
            watch: FreezeWatch { end },
            file_systems,
            until: self.until,
        };
        // A lease that nobody takes is dropped here, and that releases it.
        drop(handed.send(Ok(lease)));
        let by = tokio::select! {
            asked = released => if asked.is_ok() { ThawedBy::Holder } else { ThawedBy::Drop },
            () = sleep_until(self.until) => ThawedBy::Deadline,
        };
        if by == ThawedBy::Deadline {
            let guest = &self.record.guest;
            tracing::warn!(%guest, "a freeze outlived its time and is thawed");
        }
        let end = match self.thaw_at_last().await {
            Ok(file_systems) => FreezeEnd::Thawed(Thawed {
                by,
                file_systems,
                held: self.since.elapsed(),
            }),
            Err(why) => FreezeEnd::Lost(why),
        };
        ending.send_replace(Some(end));
    }

    /// Finds out what became of a freeze that was not answered, and thaws it.
    async fn settle(self, error: Error, handed: Handed) {
        // An agent does one thing at a time: once it answers again, the freeze is done or lost.
        let mut pause = PAUSES.0;
        let found = loop {
            match self.status(Instant::now() + TRY).await {
                Ok(FreezeState::Thawed) => break Ok(false),
                Ok(_) => break Ok(true),
                Err(error) if error.effect() == Effect::Refused => break Ok(true),
                Err(error) if error.kind() == ErrorKind::Closed => break Err(error),
                Err(_) => {}
            }
            sleep_until(Instant::now() + pause).await;
            pause = PAUSES.1.min(pause * 2);
        };
        let settled = match found {
            Ok(false) => {
                self.forget().await;
                true
            }
            Ok(true) => self.thaw_at_last().await.is_ok(),
            Err(_) => false,
        };
        let waited = self.since.elapsed();
        let was_frozen = matches!(found, Ok(true));
        let told = if settled {
            Error::freeze_undone(FsfreezeFreeze::NAME, waited, was_frozen)
        } else {
            error
        };
        // A caller that has left was told by its own deadline.
        drop(handed.send(Err(told)));
    }

    /// Thaws, however long the agent does not answer, and removes the record.
    async fn thaw_at_last(&self) -> Result<i64, Closed> {
        let mut pause = PAUSES.0;
        loop {
            match thaw(&*self.qga, Instant::now() + TRY).await {
                Ok(file_systems) => {
                    self.forget().await;
                    return Ok(file_systems);
                }
                Err(error) if error.kind() == ErrorKind::Closed => {
                    return Err(self.qga.closed().await);
                }
                Err(error) => {
                    let guest = &self.record.guest;
                    tracing::warn!(%guest, %error, "the guest is not thawed yet");
                }
            }
            sleep_until(Instant::now() + pause).await;
            pause = PAUSES.1.min(pause * 2);
        }
    }

    async fn forget(&self) {
        if let Err(error) = self.shelf.remove(&self.record).await {
            let guest = &self.record.guest;
            tracing::warn!(%guest, %error, "the record of a freeze that is over stays behind");
        }
    }
}
