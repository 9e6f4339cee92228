//! Every future of the agent's client dropped at each of its polls, on a real `qemu-ga`, and a hundred commands after each.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use agent_qga::{
    FreezePlan, FreezeState, FsfreezeStatus, GetHostName, GuestFile, Limits, ProgramStream, Qga,
    QgaExt as _, digest_in_guest, download, freeze, recover, upload,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::{sleep, timeout};

use super::bench::{Bench, NAME, SECOND, exec, soon};
use crate::rig::Rig;

/// More polls than any of these futures has.
const MOST: usize = 200;
/// Long futures are dropped at each of so many polls from the start, then at every seventh.
const EACH: usize = 8;
const STRIDE: usize = 7;

/// A future's name, and how it is made.
type Named<'a> = (
    &'static str,
    Box<dyn Fn() -> BoxFuture<'a, ()> + Send + Sync + 'a>,
);

fn begin<'a>(
    name: &'static str,
    begin: Box<dyn Fn() -> BoxFuture<'a, ()> + Send + Sync + 'a>,
) -> Named<'a> {
    (name, begin)
}

/// Polls a future so often, each time it is woken, then drops it. Whether it had ended before.
async fn ends_within(polls: usize, mut future: BoxFuture<'_, ()>) -> bool {
    let mut left = polls;
    poll_fn(|cx| {
        if future.as_mut().poll(cx).is_ready() {
            return Poll::Ready(true);
        }
        left -= 1;
        if left == 0 {
            Poll::Ready(false)
        } else {
            Poll::Pending
        }
    })
    .await
}

/// A hundred commands, whose answers differ, each with its own.
async fn a_hundred(agent: &Arc<dyn Qga>, what: &str) {
    for number in 0..50 {
        let name = agent.execute(GetHostName, soon()).await;
        let name = name.unwrap_or_else(|error| panic!("{what}, {number}: {error}"));
        assert_eq!(name.host_name, "guest", "{what}");
        let status = agent.execute(FsfreezeStatus, soon()).await;
        let status = status.unwrap_or_else(|error| panic!("{what}, {number}: {error}"));
        assert_eq!(status, FreezeState::Thawed, "{what}");
    }
}

pub(super) async fn every_future_dropped_at_every_poll_of_a_real_agent_leaves_a_sound_one(
    rig: Rig,
) {
    let bench = Bench::boot(&rig).await;
    let agent = bench.connect().await;
    exec(&agent, "echo content >/mnt/file").await;
    let futures = [
        begin(
            "execute",
            Box::new(|| async { drop(agent.execute(GetHostName, soon()).await) }.boxed()),
        ),
        begin(
            "wait_ready",
            Box::new(|| async { drop(agent.wait_ready(soon()).await) }.boxed()),
        ),
        begin(
            "run",
            Box::new(|| {
                async {
                    drop(
                        agent
                            .run("/bin/true", &[], &[], Limits::default(), soon())
                            .await,
                    );
                }
                .boxed()
            }),
        ),
        begin(
            "stream",
            Box::new(|| {
                async {
                    let limits = Limits::default();
                    let stream =
                        ProgramStream::start(agent.clone(), "/bin/true", &[], &[], limits, soon())
                            .await;
                    if let Ok(mut stream) = stream {
                        while let Ok(Some(_)) = stream.next(soon()).await {}
                    }
                }
                .boxed()
            }),
        ),
        begin(
            "file",
            Box::new(|| {
                async {
                    if let Ok(mut file) =
                        GuestFile::open(agent.clone(), "/mnt/file", "r+", soon()).await
                    {
                        drop(file.read(4, soon()).await);
                        drop(file.seek(0, soon()).await);
                        drop(file.write(b"content", soon()).await);
                        drop(file.flush(soon()).await);
                        drop(file.close(soon()).await);
                    }
                }
                .boxed()
            }),
        ),
        begin(
            "upload",
            Box::new(|| {
                async { drop(upload(agent.clone(), "/mnt/up", &mut &b"up"[..], soon()).await) }
                    .boxed()
            }),
        ),
        begin(
            "download",
            Box::new(|| {
                async {
                    let mut to = Vec::new();
                    drop(
                        download(agent.clone(), "/mnt/file", &mut to, 1 << 20, None, soon()).await,
                    );
                }
                .boxed()
            }),
        ),
        begin(
            "digest_in_guest",
            Box::new(|| {
                async { drop(digest_in_guest(&*agent, "/mnt/file", soon()).await) }.boxed()
            }),
        ),
        begin(
            "freeze",
            Box::new(|| {
                async {
                    let plan = FreezePlan::new(NAME, 600 * SECOND);
                    if let Ok(lease) = freeze(agent.clone(), bench.leases(), plan, soon()).await {
                        drop(lease.thaw(soon()).await);
                    }
                }
                .boxed()
            }),
        ),
        begin(
            "recover",
            Box::new(|| {
                async { drop(recover(&*agent, bench.leases(), NAME, soon()).await) }.boxed()
            }),
        ),
    ];
    let mut drops = 0;
    for (name, begin) in &futures {
        let mut polls = 1;
        while !ends_within(polls, begin()).await {
            drops += 1;
            // What a drop leaves to a task, a thaw above all, is done when that has let go of the agent.
            let settled = async {
                while Arc::strong_count(&agent) > 1 {
                    sleep(SECOND / 100).await;
                }
            };
            let settled = timeout(60 * SECOND, settled).await;
            settled.unwrap_or_else(|_| panic!("{name} dropped at poll {polls}: a task holds on"));
            a_hundred(&agent, &format!("{name} dropped at poll {polls}")).await;
            polls += if polls < EACH { 1 } else { STRIDE };
            assert!(polls < MOST, "{name} does not end");
        }
    }
    println!(
        "figure drops-on-a-real-agent {drops} drops bar > {} ok",
        futures.len()
    );
    assert!(drops > futures.len(), "{drops} drops");
    let left = bench.leases();
    assert_eq!(
        agent_qga::LeaseStore::pending(&*left).expect("it can be read"),
        []
    );
}
