//! Question: what does an idle connection hold? At most 16 KiB, also after it once received 10 MB,
//! and what does one typed command allocate?

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![expect(
    unsafe_code,
    reason = "counts memory by standing before the system's allocator"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream as Peer;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agent_qga::{Agent, GetTime, Options, QgaExt as _};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::time::Instant;

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is passed on as it is.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `at` came from `alloc` above, so from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const CONNECTIONS: usize = 20;
const LIMIT: usize = 16 * 1024;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// The other end: answers the sync it hears, then each further request with `answer`. It allocates
/// nothing while it does.
fn answer(peer: &mut Peer, requests: usize, answer: &[u8]) {
    let mut heard = [0; 4096];
    for _ in 0..requests {
        let mut length = 0;
        while !heard[..length].ends_with(b"\n") {
            length += peer.read(&mut heard[length..]).unwrap();
        }
        let asked = &heard[..length];
        match asked.windows(5).position(|window| window == b"\"id\":") {
            Some(at) => {
                let digits = asked[at + 5..]
                    .split(|byte| !byte.is_ascii_digit())
                    .next()
                    .unwrap();
                peer.write_all(b"\xFF{\"return\": ").unwrap();
                peer.write_all(digits).unwrap();
                peer.write_all(b"}\n").unwrap();
            }
            None => peer.write_all(answer).unwrap(),
        }
    }
}

/// One program, one test: another test's memory would be counted with it.
#[test]
fn an_idle_connection_holds_little_also_after_a_big_answer() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let big = format!("{{\"return\": \"{}\"}}\n", "x".repeat(10 << 20)).into_bytes();
    let mut peers = Vec::with_capacity(CONNECTIONS);
    let mut agents = Vec::with_capacity(CONNECTIONS);
    let per_connection =
        |before: usize| HELD.load(Ordering::Relaxed).saturating_sub(before) / CONNECTIONS;

    let before = HELD.load(Ordering::Relaxed);
    runtime.block_on(async {
        for _ in 0..CONNECTIONS {
            let (ours, theirs) = Peer::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            peers.push(theirs);
            let stream = UnixStream::from_std(ours).unwrap();
            agents.push(Agent::new(stream, Options::default()));
        }
        tokio::task::yield_now().await;
    });
    let fresh = per_connection(before);

    let mut allocations = 0;
    for (agent, peer) in agents.iter().zip(&mut peers) {
        std::thread::scope(|scope| {
            scope.spawn(|| answer(peer, 3, b"{\"return\": 5}\n"));
            runtime.block_on(async {
                agent.execute(GetTime, soon()).await.unwrap();
                let counted = CALLS.load(Ordering::Relaxed);
                assert_eq!(agent.execute(GetTime, soon()).await.unwrap(), 5);
                allocations = CALLS.load(Ordering::Relaxed) - counted;
            });
        });
    }
    let asked = per_connection(before);

    for (agent, peer) in agents.iter().zip(&mut peers) {
        std::thread::scope(|scope| {
            scope.spawn(|| answer(peer, 1, &big));
            runtime.block_on(async {
                let asked = agent.execute_raw("guest-big", Value::Null, soon()).await;
                assert!(asked.unwrap().is_string());
            });
        });
    }
    let after_big = per_connection(before);

    println!(
        "idle connection: fresh {fresh} B, after two commands {asked} B, after 10 MB {after_big} B"
    );
    println!("one typed command: {allocations} allocations");
    assert!(fresh <= LIMIT && asked <= LIMIT && after_big <= LIMIT);
    assert!(allocations <= 8, "{allocations} allocations");
}
