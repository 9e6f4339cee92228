//! The words both sides share: phases, sides, owners, ids, and the opaque cookies between them.
//!
//! Nothing here acts or waits. The phases are those of libvirt's migration protocol 3, because
//! operators know them; what each phase may assume is this crate's own and stands in the front page.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

/// Names one migration, on both sides and in every message, for as long as either remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationId(Uuid);

impl MigrationId {
    /// A new id that nobody else has.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The id with this number, for a caller that makes its own.
    #[must_use]
    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The number behind the id.
    #[must_use]
    pub const fn as_uuid(&self) -> Uuid {
        self.0
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which life of the source speaks: the source counts one up, durably, each time it takes a
/// migration up again.
///
/// The destination remembers the highest epoch it has met and answers a lower one with
/// [`Reply::Stale`](crate::Reply::Stale), so that a message delayed from an earlier life of the
/// source daemon decides nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(u64);

impl Epoch {
    /// The epoch of a migration that was never taken up again.
    pub const FIRST: Self = Self(1);

    /// The last that is believed. A source that died and came back each second would need 136 years for it: whoever
    /// names a later one is broken or lies, and near the end of the numbers nobody could count past that lie, so that the
    /// true source would be stale for ever.
    pub const LAST: Self = Self(1 << 32);

    /// Whether a source may be in it.
    #[must_use]
    pub fn is_believable(self) -> bool {
        (Self::FIRST..=Self::LAST).contains(&self)
    }

    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The five steps of a migration, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "the protocol has these five phases and no other"
)]
pub enum Phase {
    /// The source describes the guest.
    Begin,
    /// The destination makes a QEMU that waits for the guest.
    Prepare,
    /// The source moves the guest's memory, and stops the guest at the end.
    Perform,
    /// The source gives the guest away; the destination takes it and lets it run.
    Finish,
    /// The source ends its own copy, or goes on with it.
    Confirm,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begin => "begin",
            Self::Prepare => "prepare",
            Self::Perform => "perform",
            Self::Finish => "finish",
            Self::Confirm => "confirm",
        })
    }
}

/// One of the two daemons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "a migration has two sides")]
pub enum Side {
    /// The daemon whose guest leaves; it drives.
    Source,
    /// The daemon that receives the guest; it answers.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Who has the right to run the guest, as far as the one who says so knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "every migration ends in one of these four, by name"
)]
pub enum Owner {
    /// The source, and nobody else will ever start this copy.
    Source,
    /// The destination.
    Destination,
    /// Either: the guest was offered and no final answer is known. Nothing may be started or ended.
    InDoubt,
    /// Neither: the last complete copy was killed from outside. The loss is certain.
    Nobody,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::InDoubt => "in doubt",
            Self::Nobody => "nobody",
        })
    }
}

/// Whether the guest ran when the migration began, and so whether its new owner lets it run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "a guest runs or it does not")]
pub enum RunState {
    /// It ran; whoever ends up with it lets it run.
    Running,
    /// Its user had paused it; it changes hands paused.
    Paused,
}

/// What a step hands to the step on the other side: text that only the two hosts understand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cookie(Arc<str>);

impl Cookie {
    /// The most a cookie may hold: escaped at worst, it still fits into one message between daemons.
    pub const MAX: usize = 256 * 1024;

    /// A cookie with this text.
    ///
    /// # Errors
    ///
    /// [`CookieError`]: the text is longer than [`Cookie::MAX`].
    pub fn new(text: impl Into<Arc<str>>) -> Result<Self, CookieError> {
        let text = text.into();
        if text.len() > Self::MAX {
            return Err(CookieError::TooLong { length: text.len() });
        }
        Ok(Self(text))
    }

    /// A cookie that carries nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self(Arc::from(""))
    }

    /// A cookie that carries `value` as JSON.
    ///
    /// # Errors
    ///
    /// [`CookieError`]: the value has no JSON form, or one longer than [`Cookie::MAX`].
    pub fn encode(value: &impl Serialize) -> Result<Self, CookieError> {
        Self::new(serde_json::to_string(value).map_err(CookieError::Json)?)
    }

    /// The value that [`Cookie::encode`] put in on the other side.
    ///
    /// # Errors
    ///
    /// [`CookieError::Json`]: the other side put in something else.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, CookieError> {
        serde_json::from_str(&self.0).map_err(CookieError::Json)
    }

    /// The text as it is.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Cookie {
    type Error = CookieError;

    fn try_from(text: String) -> Result<Self, CookieError> {
        Self::new(text)
    }
}

impl From<Cookie> for String {
    fn from(cookie: Cookie) -> Self {
        cookie.0.as_ref().to_owned()
    }
}

/// Why a cookie could not be made or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CookieError {
    /// More text than a message may carry.
    #[error("keep cookie of {length} bytes: the limit is {} bytes", Cookie::MAX)]
    TooLong {
        /// How long it was.
        length: usize,
    },
    /// Not the JSON that was expected.
    #[error("convert cookie to or from json")]
    Json(#[source] serde_json::Error),
}

/// Why one side refused, in words that may cross to the other side and stay in a journal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Reason(Arc<str>);

impl Reason {
    /// The most that is kept of a reason: enough for a chain of causes, too little to fill a disk.
    pub const MAX: usize = 4096;

    /// `text`, cut at [`Reason::MAX`] bytes.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut end = text.len().min(Self::MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self(Arc::from(&text[..end]))
    }

    /// An error and all its causes, joined by `: `.
    #[must_use]
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        Self::new(&text)
    }

    /// The words.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self::new(&text)
    }
}

impl From<Reason> for String {
    fn from(reason: Reason) -> Self {
        reason.0.as_ref().to_owned()
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Cancel came after the point of return: the guest was already offered to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancel migration: too late, it is in its {phase} phase")]
pub struct TooLate {
    /// Where the migration was.
    pub phase: Phase,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_over_its_limit_is_refused_however_it_arrives() {
        let long = "x".repeat(Cookie::MAX + 1);
        assert!(matches!(
            Cookie::new(long.clone()),
            Err(CookieError::TooLong { .. })
        ));
        let json = serde_json::to_string(&long).unwrap();
        assert!(serde_json::from_str::<Cookie>(&json).is_err());
    }

    #[test]
    fn a_reason_is_cut_between_characters() {
        let reason = Reason::new(&"é".repeat(Reason::MAX));
        assert!(reason.as_str().len() <= Reason::MAX);
        assert!(reason.as_str().chars().all(|c| c == 'é'));
    }

    #[test]
    fn a_reason_names_the_whole_chain() {
        #[derive(Debug, thiserror::Error)]
        #[error("start guest")]
        struct Outer(#[source] std::io::Error);
        let chain = Outer(std::io::Error::other("no memory"));
        assert_eq!(Reason::of(&chain).as_str(), "start guest: no memory");
    }
}
