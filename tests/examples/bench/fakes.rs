//! Thousands of QEMUs in a process of their own: each connection says in its first line which one it is for. Told over
//! the standard input which of them are silent; the rest is asked of a fake through its own monitor.
//!
//! ```text
//!  x-events {count, every-us}   so many events, each with the time it was sent at, in nanoseconds of the monotonic clock
//! ```
//!
//! Knows no driver.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tests::fake_qemu::FakeQemu;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Serves on that socket until the standard input ends.
pub(crate) async fn serve(path: &Path) {
    let listener = UnixListener::bind(path).expect("the socket can be bound");
    let (silent, is_silent) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            // Out of descriptors, say: whoever started us counted them.
            let (stream, _) = listener.accept().await.expect("a connection is taken");
            tokio::spawn(one(stream, is_silent.clone()));
        }
    });
    say("ready");
    let told = tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            silent.send_replace(line.parse::<u64>().expect("how many are silent"));
            say("done");
        }
    });
    told.await.expect("no panic");
}

fn say(line: &str) {
    println!("{line}");
    std::io::stdout().flush().expect("somebody listens");
}

/// One QEMU. It is silent, and keeps what it is asked, while its number is among the silent ones.
async fn one(mut stream: UnixStream, mut is_silent: watch::Receiver<u64>) {
    let Some(number) = number(&mut stream).await else {
        return;
    };
    let mut qemu = FakeQemu::on(stream);
    qemu.greet(true).await;
    while let Some(asked) = qemu.next().await {
        let told = is_silent
            .wait_for(|silent| number >= *silent)
            .await
            .map(drop);
        if told.is_err() {
            return;
        }
        let value = match &*asked.name {
            "query-name" => json!({"name": format!("m{number}")}),
            "query-uuid" => json!({"UUID": format!("{:032x}", u128::from(number) + 1)}),
            "query-status" => json!({"running": true, "status": "running"}),
            "query-chardev" => json!([]),
            _ => json!({}),
        };
        qemu.reply(&asked, value).await;
        if asked.name == "x-events" {
            events(&mut qemu, &asked.arguments).await;
        }
    }
}

async fn number(stream: &mut UnixStream) -> Option<u64> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await.ok()? {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    String::from_utf8(line).ok()?.parse().ok()
}

async fn events(qemu: &mut FakeQemu, arguments: &Value) {
    let count = arguments["count"].as_u64().expect("how many");
    let pause = Duration::from_micros(arguments["every-us"].as_u64().expect("how often"));
    let began = Instant::now();
    for number in 0..count {
        if !pause.is_zero() {
            sleep_until(began + pause * u32::try_from(number).expect("few")).await;
        }
        let data = json!({"qom-path": "/machine/peripheral/balloon0", "sent": monotonic()});
        qemu.event("BALLOON_X", data).await;
    }
}

/// The clock that all processes of a host share, in nanoseconds.
pub(crate) fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec * 1_000_000_000 + now.tv_nsec).expect("the host was started before")
}
