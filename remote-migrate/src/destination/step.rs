//! What the destination's machine asks to be done, and what can come of it. Words only.

use crate::{
    journal::DestinationRecord,
    message::{CopyState, Guest, Prepared, Ran, Reply, Request},
    phase::{Phase, Reason, RunState},
    verdict::{Heard, Ruling},
};

/// What the destination does now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "an executor must know every action"
)]
pub enum DestinationAction {
    /// Nothing: a request, a cancel, a ruling or a look at the state may be handed in.
    Wait,
    /// Store the record; answer `Recorded` or `RecordFailed`.
    Record(DestinationRecord),
    /// Have the host make a QEMU that waits for the guest; answer `Prepared` or `PrepareFailed`.
    Prepare(Guest),
    /// Wait until all is loaded; answer `Loaded`, `Loading` or `LoadFailed`.
    Load,
    /// Have the host start the guest; answer `Started` or `StartFailed`.
    Start(RunState),
    /// Have the host say where to send the rest of the memory; answer `Prepared` or `PrepareFailed`.
    Resume,
    /// Have the host look at its copy; answer `Local` or `InspectFailed`.
    Inspect,
    /// Have the host end its copy; answer `Discarded` or `DiscardFailed`.
    Discard,
    /// Remove the record; answer `Forgotten` or `ForgetFailed`.
    Forget,
    /// Answer the request; then `Replied`.
    Reply(Reply),
    /// What was begun without a request is over; then `Replied`.
    Done(DestinationEnd),
}

/// How something that no request began has ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a caller must tell them apart")]
pub enum DestinationEnd {
    /// Nothing is left to do here, or nothing but to repeat the final answer to the source.
    Settled,
    /// Not decided, or not possible now, for this reason: the source, an operator or a later try decides. What was ruled is
    /// not done.
    Waiting(Reason),
    /// Cancel came when the copy was complete already: only the source can still turn back.
    TooLate(Phase),
    /// Both sides claim the guest.
    Conflict,
}

/// What is handed in, and what came of an action.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "the outcomes of the actions above")]
#[expect(missing_docs, reason = "each is named at its action")]
pub enum DestinationInput {
    /// A request of the source.
    Request(Request),
    /// Set right what a restart or a broken link left, given what the source says.
    Reconcile(Heard),
    /// The daemon here wants no part in it.
    Cancel,
    /// An operator decides in place of the source.
    Rule(Ruling),
    Recorded,
    RecordFailed,
    Prepared(Prepared),
    PrepareFailed(Reason),
    Loaded,
    Loading,
    LoadFailed(Reason),
    Started,
    StartFailed {
        ran: Ran,
        why: Reason,
    },
    Local(CopyState),
    InspectFailed,
    Discarded,
    DiscardFailed,
    Forgotten,
    ForgetFailed,
    Replied,
}
