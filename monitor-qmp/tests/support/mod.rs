//! What the tests of a conversation share.

use std::time::Duration;

use monitor_qmp::{Deadline, EventSink, Monitor, NoFds, Options};
use tests::fake_qemu::FakeQemu;
use tokio::time::Instant;

/// A deadline that a working conversation never meets.
pub(crate) fn soon() -> Deadline {
    Instant::now() + Duration::from_secs(20)
}

/// A monitor on a fake over memory, negotiated with the out-of-band lane.
pub(crate) async fn scripted() -> (Monitor, FakeQemu) {
    scripted_with(true, ()).await
}

pub(crate) async fn scripted_with(oob: bool, sink: impl EventSink) -> (Monitor, FakeQemu) {
    let (client, mut qemu) = FakeQemu::over_memory();
    let connect = Monitor::connect(NoFds(client), Options::default(), sink, soon());
    let (monitor, _) = tokio::join!(connect, qemu.negotiate(oob));
    (monitor.unwrap(), qemu)
}
