//! A bounded log with sequence numbers. Readers keep a cursor; one that is too slow is told how much it missed.
//!
//! The writer never waits for a reader, and a reader costs no memory. What is kept, [`Ring`] decides: the bound is one of
//! entries and of bytes, since how long an event is, QEMU says.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures::Stream;
use tokio::sync::watch;

use crate::events::News;
use crate::events::ring::{Bound, Ring};

/// The last things that happened.
pub(crate) struct Log {
    ring: Mutex<Ring<Arc<News>>>,
    /// How many were ever written, for those who wait for the next.
    written: watch::Sender<u64>,
    /// How often a reader was told that it missed some.
    gaps: AtomicU64,
}

/// What a subscriber reads.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// Something happened.
    News {
        /// Its number; without gaps within one driver or domain.
        sequence: u64,
        /// What happened.
        news: Arc<News>,
    },
    /// The subscriber was too slow and missed these: read the state again. What each device and each job told last, and
    /// which ended, is left out last: it comes with its own number, between gaps.
    Gap {
        /// How many.
        missed: u64,
    },
}

impl Log {
    pub(crate) fn new(bound: Bound) -> Self {
        Self {
            ring: Mutex::new(Ring::new(bound)),
            written: watch::Sender::new(0),
            gaps: AtomicU64::new(0),
        }
    }

    /// How often a reader was told that it missed some.
    pub(crate) fn gaps(&self) -> u64 {
        self.gaps.load(Ordering::Relaxed)
    }

    pub(crate) fn push(&self, news: Arc<News>) {
        let (mark, weight) = (news.mark(), news.weight());
        let old = {
            let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
            let old = ring.push(news, mark, weight);
            self.written.send_replace(ring.written());
            old
        };
        drop(old);
    }

    /// The entry at `cursor`, or how many were missed before the next that is there.
    fn read(&self, cursor: u64) -> Option<Notice> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let (sequence, news) = ring.at_or_after(cursor)?;
        if cursor < sequence {
            self.gaps.fetch_add(1, Ordering::Relaxed);
            let missed = sequence - cursor;
            return Some(Notice::Gap { missed });
        }
        let news = news.clone();
        Some(Notice::News { sequence, news })
    }
}

/// A reader of a log, from its place on. Dropping it costs nobody anything.
pub struct Subscription {
    log: Arc<Log>,
    written: watch::Receiver<u64>,
    cursor: u64,
}

impl Subscription {
    /// Reads what comes after now.
    pub(crate) fn from_now(log: &Arc<Log>) -> Self {
        let cursor = *log.written.borrow();
        Self {
            log: log.clone(),
            written: log.written.subscribe(),
            cursor,
        }
    }

    /// Reads from the number `cursor` on, as far as it is still there.
    pub(crate) fn from(log: &Arc<Log>, cursor: u64) -> Self {
        Self {
            cursor,
            ..Self::from_now(log)
        }
    }

    /// The next thing that happened, or how much was missed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Notice {
        loop {
            self.written.mark_unchanged();
            if let Some(notice) = self.log.read(self.cursor) {
                self.cursor += match &notice {
                    Notice::News { .. } => 1,
                    Notice::Gap { missed } => *missed,
                };
                return notice;
            }
            if self.written.changed().await.is_err() {
                // Cannot be: the log, which sends, is held by this subscription.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The same as a stream, which never ends.
    pub fn into_stream(self) -> impl Stream<Item = Notice> + Send {
        futures::stream::unfold(self, |mut subscription| async move {
            let notice = subscription.next().await;
            Some((notice, subscription))
        })
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("cursor", &self.cursor)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::What;
    use std::time::SystemTime;
    use uuid::Uuid;

    const THREE: Bound = Bound {
        entries: 3,
        bytes: usize::MAX,
    };

    fn news() -> Arc<News> {
        Arc::new(News {
            uuid: Uuid::nil(),
            name: "d".into(),
            at: SystemTime::UNIX_EPOCH,
            what: What::Defined,
        })
    }

    #[tokio::test]
    async fn a_slow_reader_is_told_what_it_missed_and_reads_on() {
        let log = Arc::new(Log::new(THREE));
        let mut slow = Subscription::from_now(&log);
        for _ in 0..5 {
            log.push(news());
        }
        assert!(matches!(slow.next().await, Notice::Gap { missed: 2 }));
        for expected in 2..5 {
            assert!(
                matches!(slow.next().await, Notice::News { sequence, .. } if sequence == expected)
            );
        }
    }

    #[tokio::test]
    async fn what_a_job_ended_with_is_read_between_two_gaps() {
        let log = Arc::new(Log::new(Bound {
            entries: 6,
            ..THREE
        }));
        let mut slow = Subscription::from_now(&log);
        for _ in 0..5 {
            log.push(news());
        }
        let gone = What::Gone {
            generation: 1,
            why: job_core::GoneWhy::ShutDown,
        };
        log.push(Arc::new(News {
            what: gone,
            ..News::clone(&news())
        }));
        for _ in 0..20 {
            log.push(news());
        }
        assert!(matches!(slow.next().await, Notice::Gap { missed: 5 }));
        let Notice::News { sequence: 5, news } = slow.next().await else {
            panic!("it is still there")
        };
        assert!(matches!(news.what, What::Gone { generation: 1, .. }));
        assert!(matches!(slow.next().await, Notice::Gap { missed: 15 }));
        assert!(matches!(
            slow.next().await,
            Notice::News { sequence: 21, .. }
        ));
        assert_eq!(log.gaps(), 2);
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_woken_by_the_next_entry() {
        let log = Arc::new(Log::new(THREE));
        let mut reader = Subscription::from_now(&log);
        let reading = tokio::spawn(async move { reader.next().await });
        tokio::task::yield_now().await;
        log.push(news());
        assert!(matches!(
            reading.await.unwrap(),
            Notice::News { sequence: 0, .. }
        ));
    }

    #[tokio::test]
    async fn a_cursor_reads_again_what_is_still_there() {
        let log = Arc::new(Log::new(THREE));
        for _ in 0..3 {
            log.push(news());
        }
        let mut again = Subscription::from(&log, 1);
        assert!(matches!(
            again.next().await,
            Notice::News { sequence: 1, .. }
        ));
    }

    #[tokio::test]
    async fn what_is_long_takes_the_place_of_more() {
        let bound = Bound {
            entries: 100,
            bytes: 3 * news().weight(),
        };
        let log = Arc::new(Log::new(bound));
        let mut reader = Subscription::from_now(&log);
        for _ in 0..5 {
            log.push(news());
        }
        assert!(matches!(reader.next().await, Notice::Gap { missed: 2 }));
        let long = What::Phase {
            job: 1,
            phase: "x".repeat(bound.bytes).into(),
        };
        log.push(Arc::new(News {
            what: long,
            ..News::clone(&news())
        }));
        // Longer than all that may be kept, and still the newest.
        assert!(matches!(reader.next().await, Notice::Gap { missed: 3 }));
        assert!(matches!(
            reader.next().await,
            Notice::News { sequence: 5, .. }
        ));
    }
}
