//! A listener as the daemon sees it: accepts streams whose peers the kernel identified.
//!
//! Must not know which transport made it.

use std::fmt;

use tokio::time::{Instant, timeout_at};

use crate::transport::Listening;
use crate::{Deadline, Error, ErrorKind, Stream};

/// Accepts peers until dropped.
///
/// Drop closes it, and removes what it made in the file system if that is still its own. Accepted
/// streams live on.
pub struct Listener {
    target: String,
    listening: Box<dyn Listening>,
}

impl Listener {
    pub(crate) fn new(scheme: &str, listening: Box<dyn Listening>) -> Self {
        Self {
            target: format!("{scheme}:{}", listening.address()),
            listening,
        }
    }

    /// Where peers connect, as a target with the real port for port 0. It can be dialed if it
    /// leaves nothing open (`0.0.0.0`, `any`).
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Takes the next peer. Several tasks may wait at once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`]: nobody came by `deadline`. [`ErrorKind::Failed`]: that peer was
    /// lost, or descriptors ran out; the listener goes on. [`ErrorKind::Panicked`]: the plugin is
    /// out; listen again.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. A peer is either returned or still there for the next call.
    pub async fn accept(&self, deadline: Deadline) -> Result<Stream, Error> {
        let started = Instant::now();
        let accepted = timeout_at(deadline, self.listening.accept(deadline))
            .await
            .unwrap_or_else(|_elapsed| {
                let last = "a peer".to_owned();
                Err(Error::new(ErrorKind::TimedOut {
                    waited: started.elapsed(),
                    steps: 0,
                    last,
                }))
            });
        accepted
            .and_then(Stream::adopt)
            .map_err(|error| error.during("accept on", &self.target))
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}
