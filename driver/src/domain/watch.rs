//! A domain's observed state as a stream of which a slow reader sees the newest.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::Stream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::state::Observed;
use super::{Domain, Inner};

/// Follows what is known of a guest, from [`Domain::watch`]. Costs its domain nothing while nobody reads it.
pub struct Watch {
    domain: Arc<Inner>,
    changes: watch::Receiver<u64>,
    is_over: bool,
}

impl Watch {
    pub(super) fn new(domain: &Domain) -> Self {
        let mut changes = domain.0.board.changes();
        // The first look is at what is known already.
        changes.mark_changed();
        Self {
            domain: domain.0.clone(),
            changes,
            is_over: false,
        }
    }

    /// What is known now, if that was not seen yet, else once it changes; none once the domain was removed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: what was not returned is returned next time, or what is newer.
    pub async fn next(&mut self) -> Option<Arc<Observed>> {
        if self.is_over || self.changes.changed().await.is_err() {
            return None;
        }
        // In this order: who is told of the end has seen the last state.
        self.is_over = self.domain.is_closed.load(Ordering::SeqCst);
        Some(self.domain.observed())
    }

    /// The same as a stream, which ends when the domain is removed.
    pub fn into_stream(self) -> impl Stream<Item = Arc<Observed>> + Send {
        futures::stream::unfold(self, |mut watch| async move {
            let observed = watch.next().await?;
            Some((observed, watch))
        })
    }
}

/// Whether anything was observed of a guest since, for whoever asks its QEMU again then.
pub(crate) struct Changes(watch::Receiver<u64>);

impl Domain {
    /// Learns of what is observed from now on.
    pub(crate) fn changes(&self) -> Changes {
        Changes(self.0.board.changes())
    }
}

impl Changes {
    /// Waits until something was observed, or so long.
    ///
    /// Cancel safe.
    pub(crate) async fn wait(&mut self, limit: Duration) {
        // Nothing for so long is a reason to ask as well.
        let _in_time = self.come_within(limit).await;
    }

    /// Waits so long. Whether something was observed before that.
    ///
    /// Cancel safe.
    pub(crate) async fn come_within(&mut self, limit: Duration) -> bool {
        timeout(limit, self.0.changed()).await.is_ok()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("domain", &self.domain.name)
            .finish_non_exhaustive()
    }
}
