//! Question: what does one typed command cost in allocations and writes? At most four and one.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![expect(
    unsafe_code,
    reason = "counts allocations by standing before the system's allocator"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    io,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use monitor_qmp::{Deadline, Monitor, Options, Qmp, Wire, command::QueryStatus};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::UnixStream,
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches a thread-local
// without destructor, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`, which is passed on as it is.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `alloc` above, so from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A unix socket that counts its writes.
struct Counted(UnixStream, Arc<AtomicUsize>);

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, bytes, &[])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Wire for Counted {
    fn passes_fds(&self) -> bool {
        true
    }

    fn poll_send(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.0).poll_send(cx, bytes, fds);
        self.1
            .fetch_add(usize::from(sent.is_ready()), Ordering::Relaxed);
        sent
    }
}

/// Answers from a thread of its own, so that only the client's allocations are counted.
fn answering() -> std::os::unix::net::UnixStream {
    let (client, ours) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let mut stream = UnixStream::from_std(ours).unwrap();
            let greeting = r#"{"QMP":{"version":{"qemu":{"major":9,"minor":0,"micro":0}},"capabilities":["oob"]}}"#;
            stream.write_all(greeting.as_bytes()).await.unwrap();
            let mut request = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut request).await {
                let text = std::str::from_utf8(&request[..count]).unwrap();
                let id = text
                    .rsplit_once("\"id\":")
                    .map_or_else(String::new, |(_, id)| {
                        format!(", \"id\": {}", id.trim_end_matches('}'))
                    });
                let reply = format!(
                    "{{\"return\": {{\"status\": \"running\", \"running\": true}}{id}}}\r\n"
                );
                stream.write_all(reply.as_bytes()).await.unwrap();
            }
        });
    });
    client.set_nonblocking(true).unwrap();
    client
}

const ROUNDS: usize = 1000;

#[test]
fn a_typed_command_takes_four_allocations_and_one_write() {
    let client = answering();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (concrete, boxed, writes) = runtime.block_on(async {
        let deadline = Deadline::now() + std::time::Duration::from_secs(60);
        let writes = Arc::new(AtomicUsize::new(0));
        let wire = Counted(UnixStream::from_std(client).unwrap(), Arc::clone(&writes));
        let monitor = Monitor::connect(wire, Options::default(), (), deadline)
            .await
            .unwrap();
        let qmp: &dyn Qmp = &monitor;
        for _ in 0..100 {
            monitor.execute(QueryStatus, deadline).await.unwrap();
        }

        writes.store(0, Ordering::Relaxed);
        let start = ALLOCATIONS.get();
        for _ in 0..ROUNDS {
            monitor.execute(QueryStatus, deadline).await.unwrap();
        }
        let concrete = ALLOCATIONS.get() - start;
        let written = writes.load(Ordering::Relaxed);
        let start = ALLOCATIONS.get();
        for _ in 0..ROUNDS {
            qmp.execute(QueryStatus, deadline).await.unwrap();
        }
        (concrete, ALLOCATIONS.get() - start, written)
    });
    let per = |count: usize| count as f64 / ROUNDS as f64;
    println!(
        "{} allocations, {} through dyn, {} writes",
        per(concrete),
        per(boxed),
        per(writes)
    );
    assert_eq!(writes, ROUNDS);
    assert!(
        per(concrete) <= 4.0,
        "{} allocations a command",
        per(concrete)
    );
    assert!(
        per(boxed) <= 5.0,
        "{} allocations a command through dyn",
        per(boxed)
    );
}
