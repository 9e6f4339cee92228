//! A connection that comes back tells of every gap, resyncs first, and repeats nothing.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use monitor_qmp::{
    Closed, Deadline, Dial, Effect, Error, ErrorKind, Event, Followed, Greeting, Health, Monitor,
    NoFds, Options, Patience, Qmp, Reconnect, command::*,
};
use serde_json::json;
use tests::fake_qemu::FakeQemu;
use tokio::{io::DuplexStream, sync::mpsc, time::Instant};

/// A deadline that a working conversation never meets.
fn soon() -> Deadline {
    Instant::now() + Duration::from_secs(20)
}

/// Hands each connection's other end to the test; after `left` of them nobody is there.
struct Dialler {
    qemus: mpsc::UnboundedSender<FakeQemu>,
    left: usize,
}

#[async_trait]
impl Dial for Dialler {
    type Wire = NoFds<DuplexStream>;

    async fn dial(&mut self) -> io::Result<Self::Wire> {
        self.left = self
            .left
            .checked_sub(1)
            .ok_or(io::ErrorKind::ConnectionRefused)?;
        let (client, qemu) = FakeQemu::over_memory();
        self.qemus.send(qemu).unwrap();
        Ok(NoFds(client))
    }

    async fn resync(&mut self, monitor: &Monitor, _: u64) -> Result<(), Error> {
        monitor.execute(QueryStatus, soon()).await.map(drop)
    }
}

#[derive(Clone, Default)]
struct Story(Arc<Mutex<Vec<String>>>);

impl Story {
    fn tell(&self, text: String) {
        self.0.lock().unwrap().push(text);
    }
}

impl Followed for Story {
    fn connected(&mut self, epoch: u64, _: &Greeting) {
        self.tell(format!("connected {epoch}"));
    }

    fn event(&mut self, epoch: u64, event: Event) {
        self.tell(format!("{} {epoch}", event.name));
    }

    fn lost(&mut self, epoch: u64, why: &Closed) {
        self.tell(format!("lost {epoch}: {why}"));
    }
}

async fn resynced(qemus: &mut mpsc::UnboundedReceiver<FakeQemu>) -> FakeQemu {
    let mut qemu = qemus.recv().await.unwrap();
    qemu.negotiate(true).await;
    let status = json!({"running": true, "status": "running"});
    qemu.reply_to("query-status", status).await;
    qemu
}

async fn connected(
    left: usize,
    patience: Patience,
) -> (
    Reconnect,
    FakeQemu,
    mpsc::UnboundedReceiver<FakeQemu>,
    Story,
) {
    let (sender, mut qemus) = mpsc::unbounded_channel();
    let dial = Dialler {
        qemus: sender,
        left,
    };
    let story = Story::default();
    let connect = Reconnect::connect(dial, Options::default(), patience, story.clone(), soon());
    let (reconnect, qemu) = tokio::join!(connect, resynced(&mut qemus));
    (reconnect.unwrap(), qemu, qemus, story)
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_told_and_nothing_is_sent_twice() {
    let (reconnect, mut qemu, mut qemus, story) = connected(2, Patience::default()).await;
    let qmp: &dyn Qmp = &reconnect;
    qemu.event("STOP", json!({})).await;
    let (cut, ()) = tokio::join!(qmp.execute(Cont, soon()), async {
        qemu.expect("cont").await;
        qemu.die();
    });
    let error = cut.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Closed, Effect::Unknown)
    );

    // A call in the gap waits for the next connection, and for its resync.
    let (name, mut qemu) = tokio::join!(qmp.execute(QueryName, soon()), async {
        let mut qemu = resynced(&mut qemus).await;
        qemu.reply_to("query-name", json!({"name": "n"})).await;
        qemu
    });
    assert_eq!(name.unwrap().name.as_deref(), Some("n"));
    assert_eq!((reconnect.epoch(), qmp.health()), (2, Health::Ok));
    let mut resumed = qmp.expect_event(|event| event.name == "RESUME");
    qemu.event("RESUME", json!({})).await;
    resumed.wait(soon()).await.unwrap();
    let story = story.0.lock().unwrap().clone();
    assert_eq!(
        story,
        [
            "connected 1",
            "STOP 1",
            "lost 1: QEMU closed the connection",
            "connected 2",
            "RESUME 2"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn patience_ends_with_the_reason_of_the_last_end() {
    let mut patience = Patience::default();
    patience.give_up = Some(Duration::from_secs(60));
    let (reconnect, qemu, _qemus, _) = connected(1, patience).await;
    let qmp: &dyn Qmp = &reconnect;
    let first = reconnect.current().unwrap();
    qemu.die();
    first.closed().await;
    let shortly = Instant::now() + Duration::from_secs(1);
    let error = qmp.execute(QueryName, shortly).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::None)
    );
    assert_eq!(qmp.health(), Health::Unresponsive);
    assert!(matches!(qmp.closed().await, Closed::EndOfStream));
    let error = qmp.execute(QueryName, soon()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Closed, Effect::None)
    );
}

#[tokio::test(start_paused = true)]
async fn a_resync_that_fails_is_tried_again_on_a_new_connection() {
    let (reconnect, qemu, mut qemus, _) = connected(3, Patience::default()).await;
    qemu.die();
    let mut useless = qemus.recv().await.unwrap();
    useless.negotiate(true).await;
    let asked = useless.expect("query-status").await;
    useless
        .refuse(&asked, "GenericError", "another guest")
        .await;
    useless.expect_end().await;
    let _qemu = resynced(&mut qemus).await;
    reconnect.settled(soon()).await.unwrap();
    assert_eq!(reconnect.epoch(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_frees_the_monitor_for_good() {
    let (reconnect, mut qemu, mut qemus, _) = connected(9, Patience::default()).await;
    drop(reconnect.clone());
    drop(reconnect);
    qemu.expect_end().await;
    assert!(qemus.recv().await.is_none(), "dialled again for nobody");
}
