//! What a host does locally in each step: the seam between this protocol and a hypervisor.
//!
//! Both traits are object safe. Every method is given a [`Step`]: which migration, which guest, until
//! when. Each is idempotent by migration: called again, after an error, a dropped future or a restart
//! of the daemon, it goes on from what it finds and ends in the same state. The caller drops a future
//! whose deadline has passed, and then asks `inspect` what has become of it.

use std::error::Error as StdError;

use async_trait::async_trait;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    control::{Meter, Transfer},
    message::{CopyState, Downtime, Guest, Prepared, Ran},
    pace::Estimate,
    phase::{Cookie, MigrationId, Reason, RunState},
    source::Outcome,
    verdict::GuestState,
};

/// Which migration a call belongs to, and until when it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Step {
    /// Which migration.
    pub migration: MigrationId,
    /// Which guest.
    pub domain: Uuid,
    /// When its caller stops waiting.
    pub deadline: Instant,
}

impl Step {
    pub(crate) fn new(migration: MigrationId, domain: Uuid, deadline: Instant) -> Self {
        Self {
            migration,
            domain,
            deadline,
        }
    }
}

/// Who has stopped a guest that is about to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "one of the two has")]
pub enum Stopped {
    /// Its host, and nobody else lets it run again: neither QEMU nor anybody else but [`SourceHost::confirm`].
    ByHost,
    /// QEMU, which lets it run by itself if it takes the migration for failed. If its host goes down before the last of the
    /// memory is known to be there, nothing proves that it had not run on, and who has it takes an operator's word.
    ByHypervisor,
}

/// What the source's host says of its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    /// For the destination's host.
    pub cookie: Cookie,
    /// Whether the guest runs.
    pub run: RunState,
}

/// The local steps of a guest that leaves.
#[async_trait]
pub trait SourceHost: Send + Sync {
    /// Checks that the guest can leave, and describes it.
    ///
    /// # Errors
    ///
    /// The guest cannot leave; it is as before.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time; `confirm(Kept)` follows.
    async fn begin(&self, step: Step) -> Result<Begun, HostError>;

    /// Moves the guest's memory until the guest is stopped, and holds back the last of it.
    ///
    /// `Ok` means: the guest is stopped, by whom [`Stopped`] says, and the last of the memory waits for
    /// [`complete`](Self::complete).
    ///
    /// # Errors
    ///
    /// The memory did not arrive, or not for certain. The guest may run or be stopped.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time, as cancel does; QEMU may go on sending until `confirm(Kept)` ends it.
    async fn perform(&self, step: Step, to: &Prepared, meter: &Meter)
    -> Result<Stopped, HostError>;

    /// Lets the last of the memory go. Of a guest that was stopped by its host it is called once the journal says that the
    /// guest may be offered, and again by a daemon that finds it waiting so.
    ///
    /// `Ok` means: QEMU says that all was sent and acknowledged, the guest is stopped, and neither QEMU nor anybody else
    /// lets it run again but through `confirm`.
    ///
    /// # Errors
    ///
    /// The memory did not arrive, or not for certain. A guest that was stopped by its host is stopped still.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time, as cancel does while the guest was not offered yet; QEMU may go on sending until
    /// `confirm(Kept)` ends it.
    async fn complete(&self, step: Step, meter: &Meter) -> Result<(), HostError>;

    /// Turns a migration under way to post-copy: `Ok` means that the guest is stopped here for good and the
    /// destination has all it needs to start it; the rest of the memory follows while it runs there.
    ///
    /// Called in place of a `perform` that was dropped, after the journal says so; if that one did not come
    /// to begin it, this one does. If all has moved meanwhile, that is as good.
    ///
    /// # Errors
    ///
    /// Not done, or not for certain. A guest that post-copy has stopped is never resumed but by
    /// `confirm(Kept)`, which comes only after the destination has refused it, or an operator has said that it is fenced.
    ///
    /// # Cancel safety
    ///
    /// Dropped at its deadline alone; `inspect` follows.
    async fn switch(&self, _step: Step, _to: &Prepared) -> Result<(), HostError> {
        Err(HostError::new("this host has no post-copy"))
    }

    /// Sends the rest of the memory, and waits until all is sent and acknowledged. With `to` the stream
    /// broke, and goes on over a new one.
    ///
    /// # Errors
    ///
    /// The stream is broken; the half that is here is kept.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time; QEMU goes on sending.
    async fn drain(
        &self,
        _step: Step,
        _to: Option<&Prepared>,
        _meter: &Meter,
    ) -> Result<(), HostError> {
        Err(HostError::new("this host has no post-copy"))
    }

    /// Ends the migration here: as [`Outcome`] says, from any state, also if nothing was begun.
    ///
    /// With `Kept` a migration still under way is cancelled first, and the guest runs again if it ran.
    ///
    /// # Errors
    ///
    /// It is not done; the caller looks again and calls again.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time; it is called again.
    async fn confirm(&self, step: Step, outcome: Outcome) -> Result<(), HostError>;

    /// Looks at the guest, as it is now.
    ///
    /// # Errors
    ///
    /// It cannot be seen. A guest that cannot be seen is not `Gone`.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing changes.
    async fn inspect(&self, step: Step) -> Result<GuestState, HostError>;

    /// Whether somebody has paused the guest since [`begin`](Self::begin) described it. Must not wait.
    fn was_paused(&self) -> bool {
        false
    }

    /// When the guest was stopped for its switchover, by the clock of this host in nanoseconds since 1970, if it is known.
    fn stopped_at(&self) -> Option<i64> {
        None
    }
}

/// The local steps of a guest that arrives.
#[async_trait]
pub trait DestinationHost: Send + Sync {
    /// Makes a QEMU that waits for the guest, stopped, and says where.
    ///
    /// # Errors
    ///
    /// There is no room for the guest here, or a guest of that identity lives here already;
    /// `discard` follows and must not touch the latter.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time; `discard` follows.
    async fn prepare(&self, step: Step, guest: &Guest) -> Result<Prepared, HostError>;

    /// Waits until the guest is loaded, as its own QEMU sees it, or the deadline is near.
    ///
    /// # Errors
    ///
    /// It cannot be seen now, which is no word about the copy.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing changes.
    async fn load(&self, step: Step) -> Result<Load, HostError>;

    /// Says where the source sends the rest of the memory after the stream of post-copy broke.
    ///
    /// # Errors
    ///
    /// Not now; it is asked again.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time; it is called again.
    async fn resume(&self, _step: Step) -> Result<Prepared, HostError> {
        Err(HostError::new("this host has no post-copy"))
    }

    /// Makes the loaded copy the guest, and lets it run if `run` says so.
    ///
    /// # Errors
    ///
    /// [`StartError::ran`] decides all: with [`Ran::Never`] at the first attempt the guest is given back
    /// to the source. At a later one it is not, since the earlier request may be inside QEMU still.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time, which counts as [`Ran::Maybe`]; `inspect` follows.
    async fn start(&self, step: Step, run: RunState) -> Result<(), StartError>;

    /// Why the copy came to nothing, in the words of its QEMU, if it did. Asked before it is discarded, and
    /// told to the source, whose own QEMU often knows only that the stream broke.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing changes.
    async fn trouble(&self, _step: Step) -> Option<Reason> {
        None
    }

    /// Ends the copy that this migration made, and clears its remains. Nothing to end is success.
    ///
    /// # Errors
    ///
    /// Something is left; it is called again later.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time; it is called again.
    async fn discard(&self, step: Step) -> Result<(), HostError>;

    /// Looks at the copy, as it is now.
    ///
    /// # Errors
    ///
    /// It cannot be seen. A copy that cannot be seen is not `Gone`.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing changes.
    async fn inspect(&self, step: Step) -> Result<CopyState, HostError>;

    /// When the guest was let run here, by the clock of this host in nanoseconds since 1970, if it is known.
    fn resumed_at(&self, _step: Step) -> Option<i64> {
        None
    }

    /// It is over: the source has let go of the guest, which stood still for so long, if that could be measured. Told once,
    /// unless the daemon was restarted since.
    fn moved(&self, _step: Step, _downtime: Option<Downtime>) {}

    /// How far the memory of a guest that arrives is, by the word of the source; an [`Echo`](crate::Echo) shows it
    /// on. Must not wait.
    fn transferred(&self, _migration: MigrationId, _transfer: Transfer, _estimate: Estimate) {}
}

/// How far the guest is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "loading is under way, done, or failed"
)]
pub enum Load {
    /// All is there, or in post-copy all that is needed to start it; the copy is stopped.
    Complete,
    /// The deadline came first.
    Loading,
    /// It will never be complete.
    Failed(Reason),
}

/// A host could not do its step.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct HostError(Box<dyn StdError + Send + Sync>);

impl HostError {
    /// A failure with this cause.
    #[must_use]
    pub fn new(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(cause.into())
    }

    /// The failure it was made from, as the host's own type. Its text and its causes are this error's own.
    #[must_use]
    pub fn get_ref(&self) -> &(dyn StdError + Send + Sync + 'static) {
        &*self.0
    }
}

/// The guest was not started.
#[derive(Debug, thiserror::Error)]
#[error("start guest")]
pub struct StartError {
    /// Whether it may have run all the same.
    pub ran: Ran,
    #[source]
    cause: Box<dyn StdError + Send + Sync>,
}

impl StartError {
    /// It certainly did not run: the request never reached QEMU, or QEMU refused it.
    #[must_use]
    pub fn never_ran(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            ran: Ran::Never,
            cause: cause.into(),
        }
    }

    /// It may have run: the request was sent, and no answer came.
    #[must_use]
    pub fn may_have_run(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            ran: Ran::Maybe,
            cause: cause.into(),
        }
    }
}
