//! An event is not missed by whoever armed before the command went out.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use monitor_qmp::{Closed, ErrorKind, Event, EventSink, Monitor, Qmp, QmpEvent, command::*};
use serde_json::json;
use tests::fake_qemu::FakeQemu;
use tokio::time::Instant;

use crate::support::{scripted, scripted_with, soon};

mod support;

fn is_gone(id: &'static str) -> impl FnMut(&Event) -> bool + Send + 'static {
    move |event| match event.typed() {
        QmpEvent::DeviceDeleted(path) => path.device.as_deref() == Some(id),
        _ => false,
    }
}

/// Sends the event before the reply, as QEMU does for a device without a guest.
async fn unplug(monitor: &Monitor, qemu: &mut FakeQemu) -> Event {
    let mut gone = monitor.expect_event(is_gone("d0"));
    let (done, ()) = tokio::join!(monitor.execute(DeviceDel::new("d0"), soon()), async {
        let asked = qemu.expect("device_del").await;
        qemu.event("DEVICE_DELETED", json!({"path": "/d0/inner"}))
            .await;
        qemu.event("DEVICE_DELETED", json!({"device": "other", "path": "/o"}))
            .await;
        qemu.event("DEVICE_DELETED", json!({"device": "d0", "path": "/d0"}))
            .await;
        qemu.reply(&asked, json!({})).await;
    });
    done.unwrap();
    gone.wait(soon()).await.unwrap()
}

#[tokio::test]
async fn an_event_before_the_reply_is_not_missed() {
    let (monitor, mut qemu) = scripted().await;
    let event = unplug(&monitor, &mut qemu).await;
    assert_eq!(event.data.unwrap().get(), r#"{"device":"d0","path":"/d0"}"#);
}

#[tokio::test]
async fn the_sink_sees_the_event_before_whoever_waits() {
    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<u64>>>);
    impl EventSink for Seen {
        fn event(&mut self, event: Event) {
            self.0.lock().unwrap().push(event.sequence);
        }

        fn closed(&mut self, _: &Closed) {}
    }
    let seen = Seen::default();
    let (monitor, mut qemu) = scripted_with(true, seen.clone()).await;
    let event = unplug(&monitor, &mut qemu).await;
    let seen = seen.0.lock().unwrap().clone();
    assert_eq!(seen.len(), 3);
    assert!(seen.contains(&event.sequence));
}

#[tokio::test]
async fn one_event_answers_all_who_wait_for_it_and_each_of_them_once() {
    let (monitor, mut qemu) = scripted().await;
    let qmp: &dyn Qmp = &monitor;
    let mut first = monitor.expect_event(|event| event.name == "STOP");
    let mut second = qmp.expect_event(|event| event.name == "STOP");
    let forgotten = monitor.expect_event(|event| event.name == "STOP");
    drop(forgotten);
    qemu.event("STOP", json!({})).await;
    qemu.event("STOP", json!({})).await;
    let (one, two) = (
        first.wait(soon()).await.unwrap(),
        second.wait(soon()).await.unwrap(),
    );
    assert_eq!(one.sequence, two.sequence);
    assert_eq!(
        first.wait(soon()).await.unwrap_err().kind(),
        ErrorKind::Unsupported
    );
}

#[tokio::test(start_paused = true)]
async fn a_deadline_leaves_the_wait_armed() {
    let (monitor, mut qemu) = scripted().await;
    let mut stopped = monitor.expect_event(|event| event.name == "STOP");
    let soon_over = Instant::now() + Duration::from_secs(3);
    let error = stopped.wait(soon_over).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(
        error.to_string(),
        "cannot use the monitor: waited 3.0s, the expected event did not come"
    );
    qemu.event("STOP", json!({})).await;
    assert_eq!(stopped.wait(soon()).await.unwrap().name, "STOP");
}

#[tokio::test]
async fn the_end_of_the_connection_ends_every_wait_with_its_reason() {
    let (monitor, qemu) = scripted().await;
    let mut before = monitor.expect_event(|_| true);
    qemu.die();
    let error = before.wait(soon()).await.unwrap_err();
    assert!(matches!(error.why_closed(), Some(Closed::EndOfStream)));
    let mut after = monitor.expect_event(|_| true);
    assert_eq!(
        after.wait(soon()).await.unwrap_err().kind(),
        ErrorKind::Closed
    );
}

#[tokio::test]
async fn a_filter_may_arm_another() {
    let (monitor, mut qemu) = scripted().await;
    let next = Arc::new(Mutex::new(None));
    let mut first = monitor.expect_event({
        let (monitor, next) = (monitor.clone(), Arc::clone(&next));
        move |_| {
            *next.lock().unwrap() = Some(monitor.expect_event(|event| event.name == "RESUME"));
            true
        }
    });
    qemu.event("STOP", json!({})).await;
    first.wait(soon()).await.unwrap();
    qemu.event("RESUME", json!({})).await;
    let mut second = next.lock().unwrap().take().unwrap();
    assert_eq!(second.wait(soon()).await.unwrap().name, "RESUME");
}
