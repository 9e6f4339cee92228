//! The shared list of domains that have something to look after: a grant nobody picked up, a guard that outlived its guest.
//!
//! So that no domain needs a timer of its own: a daemon runs one, and only while the list is not empty. Knows no clock.

use std::fmt;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use crate::shared::Shared;
use crate::sync::{Arc, Mutex, lock};

/// The domains a sweep has to look at. Clones share the list.
///
/// ```
/// # async fn timer(overdue: job_core::Overdue, tick: impl AsyncFn()) {
/// loop {
///     overdue.filled().await;
///     tick().await; // about a second, of whatever runtime the daemon uses
///     overdue.sweep();
/// }
/// # }
/// ```
#[derive(Clone, Default)]
pub struct Overdue(Arc<Mutex<List>>);

#[derive(Default)]
struct List {
    // Strong, since a domain leaves the list at the next sweep, and a weak one would need a second count.
    domains: Vec<Arc<Shared>>,
    waker: Option<Waker>,
}

impl Overdue {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until a domain is on the list. For one timer: a second one that waits takes the first one's place.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropping the future only stops the waiting.
    pub async fn filled(&self) {
        poll_fn(|cx| {
            let mine = cx.waker().clone();
            let mut list = lock(&self.0);
            if !list.domains.is_empty() {
                return Poll::Ready(());
            }
            let old = list.waker.replace(mine);
            drop(list);
            drop(old);
            Poll::Pending
        })
        .await;
    }

    /// Looks at every domain on the list: takes back grants that nobody picked up for a second, and evicts guards that
    /// outlived their guest by ten. Those that still have something stay on it.
    pub fn sweep(&self) {
        let mut domains = std::mem::take(&mut lock(&self.0).domains);
        domains.retain(Shared::sweep);
        self.fill(domains);
    }

    pub(crate) fn add(&self, domain: &Arc<Shared>) {
        self.fill(vec![domain.clone()]);
    }

    fn fill(&self, mut domains: Vec<Arc<Shared>>) {
        let waker = {
            let mut list = lock(&self.0);
            list.domains.append(&mut domains);
            if list.domains.is_empty() {
                return;
            }
            list.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl fmt::Debug for Overdue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overdue")
            .field("domains", &lock(&self.0).domains.len())
            .finish()
    }
}
