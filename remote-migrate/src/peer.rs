//! How one side asks the other: a request in, an answer or silence out.
//!
//! [`Peer`] is the asking end, [`Service`] the answering end; [`InProcess`] joins the two without a
//! wire. A peer knows nothing of phases: it carries values, within a deadline, and says whether a
//! request that got no answer can have left.

use std::{error::Error as StdError, sync::Arc};

use async_trait::async_trait;
use tokio::time::{Instant, timeout_at};

use crate::{
    message::{Answer, Request, Underway},
    wire::ClockOffset,
};

/// The other daemon, as it can be asked.
#[async_trait]
pub trait Peer: Send + Sync {
    /// Asks, and waits for the answer to this very request until `deadline`.
    ///
    /// # Errors
    ///
    /// No answer came. [`PeerError::effect`] is `None` only if the request certainly never left, and
    /// never will.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up waiting; the request may arrive all the same.
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError>;

    /// How far the other side's clock is from ours, if that was measured.
    fn clock(&self) -> Option<ClockOffset> {
        None
    }

    /// Tells the other side in passing how far a migration is. Never waits; of two that come soon one after the other the
    /// later one is told, and a link that is down or slow loses it.
    fn tell(&self, _underway: Underway) {}
}

/// Whoever answers a peer's requests.
#[async_trait]
pub trait Service: Send + Sync {
    /// Answers, by `deadline` if it can.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses the answer, not what was begun; asked again, it is answered.
    async fn serve(&self, request: Request, deadline: Instant) -> Answer;

    /// Hears how far a migration is. Must not wait.
    fn hear(&self, _underway: Underway) {}
}

/// What a request that got no answer may have done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "it may have left or it did not")]
pub enum Effect {
    /// Nothing: it never left this process.
    None,
    /// Unknown: it may have arrived.
    Unknown,
}

/// No answer.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct PeerError {
    what: &'static str,
    effect: Effect,
    untold: bool,
    #[source]
    cause: Option<Box<dyn StdError + Send + Sync>>,
}

impl PeerError {
    /// The request never left: no connection could be made, or it was refused by its own limits.
    #[must_use]
    pub fn not_sent(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            what: "reach peer",
            effect: Effect::None,
            untold: false,
            cause: Some(cause.into()),
        }
    }

    /// The request may have arrived, and the answer did not.
    #[must_use]
    pub fn no_answer(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            what: "hear answer of peer",
            effect: Effect::Unknown,
            untold: false,
            cause: Some(cause.into()),
        }
    }

    /// The request never left, since the peer is too old to heed its [`run`](Request::run): asked without it, it would
    /// let run a guest that was paused meanwhile.
    #[must_use]
    pub fn untold(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            what: "tell peer that the guest was paused",
            effect: Effect::None,
            untold: true,
            cause: Some(cause.into()),
        }
    }

    /// Whether it is [`PeerError::untold`].
    #[must_use]
    pub fn is_untold(&self) -> bool {
        self.untold
    }

    /// What the request may have done.
    #[must_use]
    pub fn effect(&self) -> Effect {
        self.effect
    }

    fn late() -> Self {
        Self {
            what: "hear answer of peer by the deadline",
            effect: Effect::Unknown,
            untold: false,
            cause: None,
        }
    }

    fn other_answer() -> Self {
        Self {
            what: "match answer of peer: it names another migration or epoch",
            effect: Effect::Unknown,
            untold: false,
            cause: None,
        }
    }
}

/// A peer in the same process: for moves within one host, and for tests.
#[derive(Clone)]
pub struct InProcess {
    service: Arc<dyn Service>,
}

impl InProcess {
    /// A peer that is answered by `service`.
    #[must_use]
    pub fn new(service: Arc<dyn Service>) -> Self {
        Self { service }
    }
}

#[async_trait]
impl Peer for InProcess {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        timeout_at(deadline, self.service.serve(request, deadline))
            .await
            .map_err(|_| PeerError::late())
    }

    fn clock(&self) -> Option<ClockOffset> {
        // It is the same one.
        Some(ClockOffset {
            nanos: 0,
            error: std::time::Duration::ZERO,
        })
    }

    fn tell(&self, underway: Underway) {
        self.service.hear(underway);
    }
}

/// Asks, and takes no answer after `deadline` and none that belongs to something else.
pub(crate) async fn ask(
    peer: &dyn Peer,
    request: Request,
    deadline: Instant,
) -> Result<Answer, PeerError> {
    let (migration, epoch) = (request.migration, request.epoch);
    let answer = timeout_at(deadline, peer.ask(request, deadline))
        .await
        .map_err(|_| PeerError::late())??;
    if (answer.migration, answer.epoch) == (migration, epoch) {
        Ok(answer)
    } else {
        Err(PeerError::other_answer())
    }
}
