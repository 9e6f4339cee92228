//! How a connection failed, as this side sees it. What the other side says is a [`Fault`], carried inside.

use std::{error::Error as StdError, io, time::Duration};

use super::{
    frame::TooLong, identity::Refused, message::Fault, message::FaultKind, session::SessionError,
    tls::TlsError,
};
use crate::phase::Reason;

/// A connection that could not be made, or is over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Nobody could be reached.
    #[error("dial peer")]
    Dial(#[source] Box<dyn StdError + Send + Sync>),
    /// There was no answer to the dialling, the handshake or the greeting.
    #[error("connect to peer: no greeting came in {after:?}")]
    Late {
        /// The time it had.
        after: Duration,
    },
    /// The request before was not answered by the deadline of this one.
    #[error("ask peer: an earlier request is still asked")]
    Busy,
    /// The peer is not the one it should be, or may not connect.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The handshake failed, or its other side says after it that this one is not believed.
    #[error("agree with peer on TLS")]
    Tls(#[source] TlsError),
    /// The stream failed.
    #[error("{doing} peer")]
    Io {
        /// What was under way.
        doing: &'static str,
        /// What the stream says.
        #[source]
        source: io::Error,
    },
    /// The peer hung up.
    #[error("hear peer: it hung up")]
    Closed,
    /// What the peer says, or its silence, ended it.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The answer did not come by the deadline of its request.
    #[error("hear answer of peer by the deadline")]
    NoAnswer,
}

impl From<TooLong> for WireError {
    fn from(error: TooLong) -> Self {
        Self::Session(error.into())
    }
}

impl WireError {
    /// What the other side says was wrong, if it said anything.
    #[must_use]
    pub fn remote(&self) -> Option<&Fault> {
        match self {
            Self::Session(SessionError::Fault(fault)) => Some(fault),
            _ => None,
        }
    }

    /// What the other side is told before this one hangs up.
    pub(super) fn fault(&self) -> Option<Fault> {
        match self {
            Self::Session(error) => error.fault(),
            Self::Refused(refused) => Some(Fault {
                kind: FaultKind::Forbidden,
                text: Reason::of(refused),
            }),
            _ => None,
        }
    }

    pub(super) fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| match source.kind() {
            // TLS without its last word, and a socket closed with bytes unread: both are a peer that is gone.
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => match TlsError::of(&source) {
                Some(error) => Self::Tls(error),
                None => Self::Io { doing, source },
            },
        }
    }
}
