//! What the source's machine asks to be done, and what can come of it. Words only.

use crate::{
    host::Stopped,
    journal::SourceRecord,
    message::{Prepared, Reply, Request},
    phase::{Cookie, Owner, RunState},
    verdict::GuestState,
};

/// What the source does now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "an executor must know every action"
)]
pub enum SourceAction {
    /// Store the record; answer `Recorded` or `RecordFailed`.
    Record(SourceRecord),
    /// Have the host describe the guest; answer `Begun` or `BeginFailed`.
    Begin,
    /// Ask the destination; answer `Answered` or `Silent`.
    Ask(Request),
    /// Have the host move the memory, and hold back the last of it once the guest is stopped; answer `Performed` or
    /// `PerformFailed`.
    Perform(Prepared),
    /// Have the host let the last of the memory go; answer `Completed` or `CompleteFailed`.
    Complete,
    /// Have the host turn to post-copy; answer `Switched` or `SwitchFailed`.
    Switch(Prepared),
    /// Have the host send the rest of the memory; answer `Drained` or `DrainFailed`.
    Drain,
    /// Have the host send the rest of the memory there, over a new stream; answer `Drained` or `DrainFailed`.
    Resume(Prepared),
    /// Have the host look at its copy; answer `Local` or `InspectFailed`.
    Inspect,
    /// Have the host end its copy or go on with it; answer `Confirmed` or `ConfirmFailed`.
    Confirm(Outcome),
    /// Remove the record; answer `Forgotten` or `ForgetFailed`.
    Forget,
    /// Wait a while; answer `Retry`, or `GiveUp` if there was waiting enough.
    Pause,
    /// Over.
    Done(SourceEnd),
}

/// What becomes of the source's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a copy is kept or it is not")]
pub enum Outcome {
    /// It stays the guest: end what is left of the migration and let it run, if it ran before.
    Kept(RunState),
    /// It is not the guest any more, or dead: end it and clear its remains.
    Released,
}

/// How a run of the machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceEnd {
    /// Who owns the guest.
    pub owner: Owner,
    /// How it came to this.
    pub why: EndWhy,
    /// Whether both sides are through and the record is gone; else the migration is to be taken up again.
    pub settled: bool,
}

/// Whether the protocol ran its course.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a caller must tell them apart")]
pub enum EndWhy {
    /// It did, to one of its ends.
    Protocol,
    /// A later life of this daemon works on the migration; this one has touched nothing since.
    Superseded,
    /// The destination contradicts what the source knows for certain.
    Conflict,
}

/// What came of an action.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "the outcomes of the actions above")]
#[expect(missing_docs, reason = "each is named at its action")]
pub enum SourceInput {
    Recorded,
    RecordFailed,
    Begun {
        cookie: Cookie,
        run: RunState,
    },
    BeginFailed,
    Answered(Reply),
    /// No answer. `sent` is false only if the request certainly never left.
    Silent {
        sent: bool,
    },
    /// No answer, and the request never left: the destination is too old to be told that the guest was paused.
    Untold,
    Performed(Stopped),
    PerformFailed,
    Completed,
    CompleteFailed,
    /// In place of an outcome of `Perform`: turn to post-copy.
    Switch,
    Switched,
    SwitchFailed,
    Drained,
    DrainFailed,
    Local(GuestState),
    InspectFailed,
    Confirmed,
    ConfirmFailed,
    Forgotten,
    ForgetFailed,
    Retry,
    GiveUp,
}
