//! What does an idle domain's scheduler weigh, once it has seen a thousand jobs?
//!
//! Live bytes of the heap, counted by the allocator, for ten thousand schedulers. The first jobs fill the history ring,
//! which is told apart; all that comes after (queues of 64, async jobs with parts, phases, tokens, agent jobs) must
//! leave nothing behind.

#![expect(unsafe_code, reason = "an allocator that counts has to be one")]
#![expect(clippy::unwrap_used, reason = "a bench may stop at the first surprise")]

#[path = "support/measure.rs"]
mod measure;

use std::alloc::{GlobalAlloc, Layout, System};
use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use futures::executor::block_on;
use job_core::{AgentKind, AsyncKind, Guard, JobKind, Limits, Overdue, Scheduler};
use measure::{Bar, figure};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: both calls go to the system's allocator with what the caller vouched for; counting touches no memory of theirs.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: `layout` is the caller's, who promised it is not empty.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: every block came from `System.alloc` above, with the layout it is given back with.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    let count = if measure::is_short() { 500 } else { 10_000 };
    let overdue = Overdue::new();
    let mut domains = Vec::with_capacity(count);
    let per_domain =
        |before: usize| (LIVE.load(Ordering::Relaxed) as f64 - before as f64) / count as f64;
    let start = LIVE.load(Ordering::Relaxed);
    domains.extend((0..count).map(|_| Scheduler::with("web", Limits::default(), &overdue)));
    let empty = per_domain(start);
    domains.iter().for_each(fill_history);
    let filled = per_domain(start);
    domains.iter().for_each(be_busy);
    overdue.sweep();
    let used = per_domain(start);
    println!("new            {empty:>7.0} bytes");
    println!("history ring   {:>7.0} bytes", filled - empty);
    println!("left by a thousand jobs {:>+5.0} bytes", used - filled);
    figure(
        "idle-domain",
        empty + (used - filled),
        "bytes",
        Bar::AtMost(512.0),
    );
}

/// As many jobs as the ring keeps.
fn fill_history(domain: &Scheduler) {
    for _ in 0..32 {
        domain
            .caller("status")
            .try_begin(JobKind::Query)
            .unwrap()
            .finish();
    }
}

/// About a thousand jobs of every kind, 64 of them at once now and then.
fn be_busy(domain: &Scheduler) {
    for _ in 0..12 {
        let mut save = domain
            .caller("save")
            .try_begin_async(AsyncKind::Save)
            .unwrap();
        save.set_phase("writing");
        assert!(save.report(1, 2).is_some());
        drop(save.token());
        drop(block_on(save.nested(pending())).unwrap());
        drop(block_on(save.agent(AgentKind::Thaw, pending())).unwrap());
        let mut waiting: Vec<_> = (0..64)
            .map(|_| {
                domain
                    .caller("op")
                    .begin(JobKind::Modify, pending())
                    .boxed()
            })
            .collect();
        for begin in &mut waiting {
            assert!(begin.now_or_never().is_none());
        }
        save.finish();
        for begin in waiting {
            block_on(begin).unwrap().finish();
        }
        for _ in 0..16 {
            domain
                .caller("ping")
                .try_begin_agent(AgentKind::Query)
                .unwrap()
                .finish();
        }
    }
}
