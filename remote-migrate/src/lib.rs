//! placeholder
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")
)]
mod control;
pub mod destination;
mod drive;
mod error;
mod host;
mod journal;
mod message;
mod peer;
mod phase;
mod serve;
pub mod source;
pub mod verdict;
pub use control::*;
pub use drive::*;
pub use error::*;
pub use host::*;
pub use journal::*;
pub use message::*;
pub use peer::{Effect, InProcess, Peer, PeerError, Service};
pub use phase::*;
pub use serve::*;
