//! What can go wrong with a guest command: whose fault, and what it may have done.
//!
//! It knows no stream and no task. Text that came from the guest enters an error only through
//! [`printable`], so that an error can be logged or shown on a terminal as it is.

use std::fmt::{self, Write as _};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::protocol::{Garbled, Refusal, Signal};

/// As much of the guest's text as an error repeats, in characters.
const GUEST_TEXT: usize = 256;

/// Why a guest command failed.
///
/// [`kind`](Self::kind) is for programs, the text for people; [`effect`](Self::effect) decides
/// whether asking again is safe.
#[derive(Debug)]
pub struct Error {
    command: String,
    effect: Effect,
    cause: Cause,
}

/// What the command may have done in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "closed by nature: not sent, refused, or nobody knows"
)]
pub enum Effect {
    /// No byte of it was sent.
    None,
    /// The agent answered that it will not do it.
    Refused,
    /// It was sent, and what became of it is not known.
    Unknown,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blame {
    /// The request could not have worked, or this process refused it.
    Caller,
    /// The guest: silent, slow, unwilling or lying.
    Guest,
    /// The connection between them.
    Link,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Other commands had the agent until the deadline.
    Busy,
    /// The agent answered no sync in time: it is not running, stopped, or the guest is.
    Unresponsive,
    /// The same, and the monitor said that nobody in the guest has the port open.
    NotListening,
    /// The command was sent and not answered in time, or its deadline had passed before.
    TimedOut,
    /// `run`: the program had not ended by the deadline, and goes on in the guest.
    StillRunning,
    /// The guest was reset, or its agent restarted, while the command was under way.
    SessionLost,
    /// The agent answered with an error; see [`Error::class`] and [`Error::desc`].
    Refused,
    /// The agent refused because the guest's file systems are frozen.
    Frozen,
    /// The answer is no answer: not JSON, or not of the agent's shape.
    Malformed,
    /// The answer is longer than [`Options::max_message`](crate::Options::max_message).
    TooLarge,
    /// The answer is nested deeper than [`Options::max_depth`](crate::Options::max_depth).
    TooDeep,
    /// The agent answered, but not what this command answers.
    UnexpectedReply,
    /// The arguments cannot be written as JSON.
    InvalidArguments,
    /// The guest's file systems were frozen already, and not by us.
    ForeignFreeze,
    /// The guest's file systems were frozen already, by a process of ours that did not thaw them.
    LeasePending,
    /// A freeze could not be recorded, or its record not be read.
    LeaseStore,
    /// A freeze was not answered in time, and was then seen to be thawed.
    FreezeUndone,
    /// A file's content is not what was sent or expected.
    DigestMismatch,
    /// This side of a transfer failed: the file or stream that the bytes came from or went to.
    Local,
    /// Something in this process stands before the agent and refused, as an allow-list does.
    Denied,
    /// The connection has ended.
    Closed,
}

/// Why a connection ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Closed {
    /// The other end closed it: QEMU exited, or took the channel away.
    Eof,
    /// Reading or writing failed.
    Failed(Arc<io::Error>),
    /// The task that served it is gone with its runtime.
    Stopped,
}

/// The measured facts; their texts complete "cannot execute NAME: ".
#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("the deadline passed before it was sent")]
    Expired,
    #[error("waited {waited:.1?} for other commands to end")]
    Busy { waited: Duration },
    #[error("the agent answered no sync within {waited:.1?}")]
    Unresponsive { waited: Duration },
    #[error("nobody in the guest has the port open, waited {waited:.1?}")]
    NotListening { waited: Duration },
    #[error("sent and not answered within {waited:.1?}")]
    TimedOut { waited: Duration },
    #[error("the program runs on as pid {pid} after {waited:.1?}")]
    StillRunning { pid: i64, waited: Duration },
    #[error("sent and lost: {signal}")]
    SessionLost { signal: Signal },
    #[error("the agent refused: {desc} ({class})")]
    Refused { class: String, desc: String },
    #[error("the guest's file systems are frozen: {desc} ({class})")]
    Frozen { class: String, desc: String },
    #[error("{0}")]
    Garbled(Garbled),
    #[error("the agent answered something else: {0}")]
    UnexpectedReply(String),
    #[error("the arguments cannot be written as JSON")]
    InvalidArguments(#[source] serde_json::Error),
    #[error("the guest is frozen already, not by us")]
    ForeignFreeze,
    #[error("the guest is frozen already, by a freeze of ours that was recorded {age:.1?} ago")]
    LeasePending { age: Duration },
    #[error("the record of the freeze failed")]
    LeaseStore(#[source] io::Error),
    #[error("{}", undone(*waited, *was_frozen))]
    FreezeUndone { waited: Duration, was_frozen: bool },
    #[error("the file's digest is {found}, expected {expected}")]
    DigestMismatch { expected: String, found: String },
    #[error("the local end of the transfer failed")]
    Local(#[source] io::Error),
    #[error("the file is longer than {limit} bytes")]
    FileTooLarge { limit: u64 },
    #[error("denied: {0}")]
    Denied(String),
    #[error("{0}")]
    Closed(#[source] Closed),
}

impl Error {
    /// What sort of failure it is.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match &self.cause {
            Cause::Busy { .. } => ErrorKind::Busy,
            Cause::Unresponsive { .. } => ErrorKind::Unresponsive,
            Cause::NotListening { .. } => ErrorKind::NotListening,
            Cause::Expired | Cause::TimedOut { .. } => ErrorKind::TimedOut,
            Cause::StillRunning { .. } => ErrorKind::StillRunning,
            Cause::SessionLost { .. } => ErrorKind::SessionLost,
            Cause::Refused { .. } => ErrorKind::Refused,
            Cause::Frozen { .. } => ErrorKind::Frozen,
            Cause::Garbled(Garbled::Malformed) => ErrorKind::Malformed,
            Cause::Garbled(Garbled::TooLarge) => ErrorKind::TooLarge,
            Cause::Garbled(Garbled::TooDeep) => ErrorKind::TooDeep,
            Cause::UnexpectedReply(_) => ErrorKind::UnexpectedReply,
            Cause::InvalidArguments(_) => ErrorKind::InvalidArguments,
            Cause::ForeignFreeze => ErrorKind::ForeignFreeze,
            Cause::LeasePending { .. } => ErrorKind::LeasePending,
            Cause::LeaseStore(_) => ErrorKind::LeaseStore,
            Cause::FreezeUndone { .. } => ErrorKind::FreezeUndone,
            Cause::DigestMismatch { .. } => ErrorKind::DigestMismatch,
            Cause::Local(_) => ErrorKind::Local,
            Cause::FileTooLarge { .. } => ErrorKind::TooLarge,
            Cause::Denied(_) => ErrorKind::Denied,
            Cause::Closed(_) => ErrorKind::Closed,
        }
    }

    /// What the command may have done in the guest.
    #[must_use]
    pub const fn effect(&self) -> Effect {
        self.effect
    }

    /// Whose fault it is.
    #[must_use]
    pub const fn blame(&self) -> Blame {
        match &self.cause {
            Cause::Expired
            | Cause::InvalidArguments(_)
            | Cause::Denied(_)
            | Cause::LeasePending { .. }
            | Cause::LeaseStore(_)
            | Cause::Local(_) => Blame::Caller,
            Cause::Closed(_) => Blame::Link,
            _ => Blame::Guest,
        }
    }

    /// The command that failed.
    #[must_use]
    pub fn command(&self) -> &str {
        &self.command
    }

    /// The agent's class of error, such as `CommandNotFound`, if it answered with one.
    ///
    /// The guest's text: shortened, control characters escaped.
    #[must_use]
    pub fn class(&self) -> Option<&str> {
        match &self.cause {
            Cause::Refused { class, .. } | Cause::Frozen { class, .. } => Some(class),
            _ => None,
        }
    }

    /// The agent's own words, if it answered with an error.
    ///
    /// The guest's text: shortened, control characters escaped.
    #[must_use]
    pub fn desc(&self) -> Option<&str> {
        match &self.cause {
            Cause::Refused { desc, .. } | Cause::Frozen { desc, .. } => Some(desc),
            _ => None,
        }
    }

    /// Whether the agent may be there later although it was not now, and nothing was done.
    #[must_use]
    pub const fn is_not_ready(&self) -> bool {
        matches!(
            self.kind(),
            ErrorKind::Unresponsive | ErrorKind::NotListening
        )
    }

    /// For what stands before an agent and does not let `command` pass.
    #[must_use]
    pub fn denied(command: &str, why: impl Into<String>) -> Self {
        Self::new(command, Effect::None, Cause::Denied(why.into()))
    }

    /// For what answers in an agent's place, with an error as an agent would.
    #[must_use]
    pub fn refused(command: &str, class: &str, desc: &str) -> Self {
        let cause = Cause::Refused {
            class: printable(class),
            desc: printable(desc),
        };
        Self::new(command, Effect::Refused, cause)
    }

    /// For what answers in an agent's place, when it sent `command` and heard nothing.
    #[must_use]
    pub fn timed_out(command: &str, waited: Duration) -> Self {
        Self::new(command, Effect::Unknown, Cause::TimedOut { waited })
    }

    /// For what answers in an agent's place, when its connection has ended.
    #[must_use]
    pub fn closed(command: &str, why: Closed, effect: Effect) -> Self {
        Self::new(command, effect, Cause::Closed(why))
    }

    pub(crate) fn expired(command: &str) -> Self {
        Self::new(command, Effect::None, Cause::Expired)
    }

    /// For what stands before an agent, when others had it for as long as `command` could wait.
    #[must_use]
    pub fn busy(command: &str, waited: Duration) -> Self {
        Self::new(command, Effect::None, Cause::Busy { waited })
    }

    /// For what stands before an agent that is out of reach for now. Nothing was sent.
    #[must_use]
    pub fn out_of_reach(command: &str, waited: Duration) -> Self {
        Self::no_sync(command, waited, false)
    }

    pub(crate) fn no_sync(command: &str, waited: Duration, port_closed: bool) -> Self {
        let cause = if port_closed {
            Cause::NotListening { waited }
        } else {
            Cause::Unresponsive { waited }
        };
        Self::new(command, Effect::None, cause)
    }

    pub(crate) fn still_running(command: &str, pid: i64, waited: Duration) -> Self {
        Self::new(
            command,
            Effect::Unknown,
            Cause::StillRunning { pid, waited },
        )
    }

    pub(crate) fn session_lost(command: &str, signal: Signal) -> Self {
        Self::new(command, Effect::Unknown, Cause::SessionLost { signal })
    }

    pub(crate) fn refusal(command: &str, refusal: &Refusal) -> Self {
        Self::refused(command, &refusal.class, &refusal.desc)
    }

    pub(crate) fn garbled(command: &str, garbled: Garbled) -> Self {
        Self::new(command, Effect::Unknown, Cause::Garbled(garbled))
    }

    pub(crate) fn invalid_arguments(command: &str, error: serde_json::Error) -> Self {
        Self::new(command, Effect::None, Cause::InvalidArguments(error))
    }

    /// `why` may quote the guest. The command was done, but the caller cannot see with what result.
    pub(crate) fn unexpected_reply(command: &str, why: &impl fmt::Display) -> Self {
        let why = printable(&why.to_string());
        Self::new(command, Effect::Unknown, Cause::UnexpectedReply(why))
    }

    pub(crate) fn foreign_freeze(command: &str) -> Self {
        Self::new(command, Effect::None, Cause::ForeignFreeze)
    }

    pub(crate) fn lease_pending(command: &str, age: Duration) -> Self {
        Self::new(command, Effect::None, Cause::LeasePending { age })
    }

    pub(crate) fn lease_store(command: &str, error: io::Error) -> Self {
        Self::new(command, Effect::None, Cause::LeaseStore(error))
    }

    pub(crate) fn freeze_undone(command: &str, waited: Duration, was_frozen: bool) -> Self {
        let cause = Cause::FreezeUndone { waited, was_frozen };
        Self::new(command, Effect::None, cause)
    }

    pub(crate) fn digest_mismatch(command: &str, expected: String, found: String) -> Self {
        let cause = Cause::DigestMismatch { expected, found };
        Self::new(command, Effect::Unknown, cause)
    }

    pub(crate) fn local(command: &str, error: io::Error) -> Self {
        Self::new(command, Effect::Unknown, Cause::Local(error))
    }

    pub(crate) fn file_too_large(command: &str, limit: u64) -> Self {
        Self::new(command, Effect::None, Cause::FileTooLarge { limit })
    }

    /// A refusal that turned out to be a freeze.
    pub(crate) fn into_frozen(mut self) -> Self {
        if let Cause::Refused { class, desc } = self.cause {
            self.cause = Cause::Frozen { class, desc };
        }
        self
    }

    /// A failure of a later step, when an earlier one was done.
    pub(crate) const fn into_unknown(mut self) -> Self {
        self.effect = Effect::Unknown;
        self
    }

    /// A failure of a question, when nothing but questions was asked yet.
    pub(crate) const fn into_none(mut self) -> Self {
        self.effect = Effect::None;
        self
    }

    fn new(command: &str, effect: Effect, cause: Cause) -> Self {
        Self {
            command: printable(command),
            effect,
            cause,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot execute {}: {}", self.command, self.cause)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            Cause::InvalidArguments(error) => Some(error),
            Cause::Closed(Closed::Failed(error)) => Some(&**error),
            Cause::LeaseStore(error) | Cause::Local(error) => Some(error),
            _ => None,
        }
    }
}

fn undone(waited: Duration, was_frozen: bool) -> String {
    let found = if was_frozen {
        "found frozen and thawed"
    } else {
        "found thawed"
    };
    format!("not answered in time, and {found} after {waited:.1?}")
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eof => "the agent's channel was closed",
            Self::Failed(_) => "the agent's channel failed",
            Self::Stopped => "the agent's task was stopped",
        })
    }
}

impl std::error::Error for Closed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed(error) => Some(&**error),
            _ => None,
        }
    }
}

/// `text` shortened, and with every character escaped that is not simply seen.
///
/// Keeps ASCII and letters of any script; escapes control characters, and whatever can reorder,
/// hide or recolour the line it stands in.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::new();
    let mut characters = text.chars();
    for character in characters.by_ref().take(GUEST_TEXT) {
        let plain = character == ' ' || character.is_ascii_graphic() || character.is_alphanumeric();
        if plain {
            shown.push(character);
        } else {
            shown.extend(character.escape_unicode());
        }
    }
    let rest = characters.as_str().len();
    if rest > 0 {
        write!(shown, " ({rest} bytes more)").expect("writing to a string cannot fail");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_text_cannot_act_on_a_terminal_or_fill_a_log() {
        let error = Error::refused(
            "guest-ping",
            "Generic\nError",
            "\u{1b}[2J\u{202e}gnp.exe ümlaut",
        );
        assert_eq!(
            error.to_string(),
            r"cannot execute guest-ping: the agent refused: \u{1b}[2J\u{202e}gnp.exe ümlaut (Generic\u{a}Error)"
        );
        let long = Error::refused("guest-ping", "", &"x".repeat(1 << 20));
        assert!(long.to_string().len() < 400, "{}", long.to_string().len());
    }

    #[test]
    fn a_freeze_keeps_the_agents_words() {
        let error = Error::refused("guest-exec", "CommandNotFound", "disabled").into_frozen();
        assert_eq!(error.kind(), ErrorKind::Frozen);
        assert_eq!(error.class(), Some("CommandNotFound"));
        assert_eq!(error.desc(), Some("disabled"));
    }
}
