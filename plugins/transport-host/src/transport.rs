//! The seam: what dials and listens, whether it was loaded, linked in, or written into the daemon.
//!
//! Must not know plugins or how the result is used.

use std::os::fd::OwnedFd;

use async_trait::async_trait;

use crate::Error;

/// Until when something may take.
pub type Deadline = tokio::time::Instant;

/// One scheme: how to dial its addresses and how to listen on them.
///
/// The host wraps every call in the deadline and checks every descriptor it gets, so an
/// implementation may leave both to it; dropping a future must give back all it holds.
#[async_trait]
pub trait Transport: Send + Sync {
    /// The scheme: `[a-z][a-z0-9-]*`.
    fn name(&self) -> &str;

    /// Whether addresses are `HOST:PORT` and the host is to resolve them first, passing on numeric
    /// ones.
    fn resolves_names(&self) -> bool {
        false
    }

    /// Connects a stream socket to `address`.
    ///
    /// # Errors
    ///
    /// The address is not understood, or the connection cannot be made by `deadline`.
    ///
    /// # Cancel safety
    ///
    /// Must be cancel safe: dropping the future gives the attempt up.
    async fn dial(&self, address: &str, deadline: Deadline) -> Result<OwnedFd, Error>;

    /// Listens on `address`; when this returns, peers can connect.
    ///
    /// # Errors
    ///
    /// The address is not understood or cannot be bound by `deadline`, or this transport only dials
    /// (the default).
    ///
    /// # Cancel safety
    ///
    /// Must be cancel safe: dropping the future unbinds.
    async fn listen(&self, address: &str, deadline: Deadline) -> Result<Box<dyn Listening>, Error> {
        let _ = (address, deadline);
        Err(Error::new(crate::ErrorKind::Unsupported {
            text: "this transport does not listen".to_owned(),
        }))
    }
}

/// What [`Transport::listen`] made. Dropping it closes it; accepted connections live on.
#[async_trait]
pub trait Listening: Send + Sync {
    /// Where peers connect, written as the transport's addresses are: with the real port for port
    /// 0.
    fn address(&self) -> &str;

    /// Takes the next peer. Several may wait at once.
    ///
    /// # Errors
    ///
    /// That peer was lost, or none came by `deadline`; the listener goes on.
    ///
    /// # Cancel safety
    ///
    /// Must be cancel safe: a peer is either returned or still there for the next call.
    async fn accept(&self, deadline: Deadline) -> Result<OwnedFd, Error>;
}
