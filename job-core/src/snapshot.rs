//! Plain pictures of a scheduler: who holds it, who waits at which place, what has finished.

use std::time::Duration;

use crate::error::Holder;
use crate::kind::{Kind, KindSet};
use crate::label::Label;
use crate::progress::Progress;

/// One domain's jobs at one instant: the answer to *why is this waiting*. Taking it needs no job.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// The generation of the guest.
    pub generation: u64,
    /// Whether the domain was removed.
    pub closed: bool,
    /// The holder of the normal slot: a normal job or a nested step.
    pub normal: Option<Held>,
    /// The async job.
    pub asynchronous: Option<Held>,
    /// What the async job lets pass.
    pub mask: Option<KindSet>,
    /// The holder of the agent slot.
    pub agent: Option<Held>,
    /// Those who wait, in the order in which they would go if all were eligible.
    pub waiting: Vec<Waiting>,
}

/// A running job.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Held {
    /// Who it is, for how long, in which phase and command.
    pub holder: Holder,
    /// For how long it had waited.
    pub waited: Duration,
    /// How far it is, if it told.
    pub progress: Option<Progress>,
    /// Whether its grant was picked up. One that stays unclaimed is taken back.
    pub claimed: bool,
    /// The generation it belongs to. An older one than the snapshot's is what is left of a dead guest.
    pub generation: u64,
}

/// A caller in the queue.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Waiting {
    /// The id its job will have.
    pub id: u64,
    /// What it wants.
    pub kind: Kind,
    /// Who asks.
    pub owner: Label,
    /// For how long it has been waiting.
    pub waited: Duration,
    /// Its place among those who wait for the same slot, from 1.
    pub place: usize,
    /// Who keeps it waiting.
    pub blocked_by: Option<Holder>,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It did what it was for.
    Done,
    /// It failed, and how.
    Failed(Label),
    /// It was asked to stop and undid what it had begun.
    Cancelled,
    /// The guest ended under it.
    Gone(Label),
    /// Its guard was dropped without a word.
    Dropped,
    /// Its task panicked.
    Panicked,
    /// Its guard outlived its guest for longer than the grace, and the slot was taken from it.
    Evicted,
}

/// A job that has ended. Kept in a ring; failures and cancellations are kept like successes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Finished {
    /// The job's stable id.
    pub id: u64,
    /// What it was.
    pub kind: Kind,
    /// Who opened it.
    pub owner: Label,
    /// The generation it belonged to.
    pub generation: u64,
    /// For how long it had waited.
    pub waited: Duration,
    /// For how long it ran.
    pub ran: Duration,
    /// How long ago it ended.
    pub age: Duration,
    /// The last phase it was in.
    pub phase: Option<Label>,
    /// How it ended.
    pub outcome: Outcome,
}

/// What must be kept of an async job so that a restarted daemon can take it up again.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "a daemon builds it from its own record"
)]
pub struct AsyncRecord {
    /// Its stable id.
    pub id: u64,
    /// What it is.
    pub kind: crate::AsyncKind,
    /// What it lets pass.
    pub mask: KindSet,
    /// Who opened it.
    pub owner: Label,
    /// The phase it was in.
    pub phase: Option<Label>,
    /// Whether it was past its point of return.
    pub decided: bool,
}
