//! How soon is a guest started and destroyed, beside the same QEMU started by hand, and a hundred found again?

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use driver::{Became, Driver, Guest, Launch, Launcher, Plain, StartOptions};
use monitor_qmp::{Monitor, NoFds, Options};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::figures::{Bar, Figures};
use crate::rig::{Env, Rig};
use crate::{SECOND, ms, quantile, started};

const PAUSED: StartOptions = StartOptions { paused: true };

pub(crate) async fn run(env: &Env, figures: &mut Figures, rounds: usize) {
    let rig = Rig::new(env);
    beside_by_hand(&rig, figures, "machine-none", rounds, |name| {
        rig.empty(name)
    })
    .await;
    beside_by_hand(&rig, figures, "guest", rounds, |name| rig.guest(name)).await;
    destroy(&rig, figures, rounds).await;
}

/// Keeps the arguments QEMU was started with.
#[derive(Clone, Default)]
struct Recorded(Arc<Mutex<Vec<OsString>>>);

#[async_trait]
impl Launcher for Recorded {
    async fn launch(&self, launch: Launch) -> io::Result<(u32, OwnedFd)> {
        *self.0.lock().expect("nobody panics with it") = launch.arguments.clone();
        Plain.launch(launch).await
    }
}

/// A start of ours, and the same QEMU with the same arguments by hand, in turn.
async fn beside_by_hand(
    rig: &Rig,
    figures: &mut Figures,
    name: &str,
    rounds: usize,
    guest: impl Fn(&str) -> Guest,
) {
    let recorded = Recorded::default();
    let transports = rig.env.transports().expect("they load");
    let driver = Driver::builder(transports, rig.dir.path().join(name))
        .qemu(&rig.env.qemu)
        .launcher(recorded.clone())
        .build()
        .expect("the directories can be made");
    let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let began = Instant::now();
        let domain = driver.start(guest(&format!("{name}-{round}")), PAUSED);
        let domain = domain.await.expect("it starts");
        let our_time = began.elapsed();
        domain.destroy().await.expect("it ends");
        domain.remove().await.expect("it is off");
        let arguments = recorded.0.lock().expect("nobody panics with it").clone();
        let hands_time = start_by_hand(rig, arguments).await;
        // The first finds nothing in the caches.
        if round > 0 {
            ours.push(our_time);
            by_hand.push(hands_time);
        }
    }
    let (ours, by_hand) = (quantile(&mut ours, 0.5), quantile(&mut by_hand, 0.5));
    figures.put(
        &format!("start-paused-{name}-p50"),
        ms(ours),
        "ms",
        Bar::None,
    );
    figures.put(
        &format!("start-by-hand-{name}-p50"),
        ms(by_hand),
        "ms",
        Bar::None,
    );
    let ratio = ours.as_secs_f64() / by_hand.as_secs_f64();
    figures.put(&format!("start-{name}-ratio"), ratio, "x", Bar::AtMost(1.5));
}

/// From the fork up to a monitor that has negotiated. The process is ended again after that.
async fn start_by_hand(rig: &Rig, arguments: Vec<OsString>) -> Duration {
    let path = rig.dir.path().join("hand.sock");
    let began = Instant::now();
    let _nothing = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("it can be bound");
    let mut kept = Vec::new();
    let arguments = arguments.into_iter().map(|argument| {
        let text = argument.to_string_lossy().into_owned();
        passed(&text, &listener, rig.dir.path(), &mut kept).unwrap_or(text)
    });
    let mut command = Command::new(&rig.env.qemu);
    command.args(arguments.collect::<Vec<_>>());
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().expect("QEMU starts");
    let stream = UnixStream::connect(&path).await.expect("it listens");
    let deadline = Instant::now() + 30 * SECOND;
    let monitor = Monitor::connect(NoFds(stream), Options::default(), (), deadline).await;
    let took = began.elapsed();
    drop(monitor.expect("it greets"));
    end(&mut child);
    took
}

/// The argument with descriptors of ours in it, if it names one: QEMU must find under that number what it expects.
fn passed(
    text: &str,
    monitor: &UnixListener,
    dir: &Path,
    kept: &mut Vec<OwnedFd>,
) -> Option<String> {
    let at = text.find("fd=")?;
    let digits = text[at + 3..]
        .bytes()
        .take_while(u8::is_ascii_digit)
        .count();
    let fd: OwnedFd = if text.contains("id=monitor") {
        monitor.try_clone().expect("it can be").into()
    } else if text.contains("id=agent") {
        let path = dir.join("hand.agent");
        let _nothing = std::fs::remove_file(&path);
        UnixListener::bind(path).expect("it can be bound").into()
    } else {
        // QEMU takes a descriptor from its set only if it was opened as it would have.
        let path = dir.join("hand.console");
        let opened = OpenOptions::new().append(true).create(true).open(path);
        opened.expect("it can be made").into()
    };
    rustix::io::fcntl_setfd(&fd, FdFlags::empty()).expect("it is open");
    let text = format!(
        "{}{}{}",
        &text[..at + 3],
        fd.as_raw_fd(),
        &text[at + 3 + digits..]
    );
    kept.push(fd);
    Some(text)
}

fn end(child: &mut Child) {
    child.kill().expect("it runs");
    child.wait().expect("it is ours");
}

/// From the call to the domain being off and cleaned up, and, beside it, from the signal to QEMU's own end.
async fn destroy(rig: &Rig, figures: &mut Figures, rounds: usize) {
    let (mut ours, mut own) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let guest = rig.guest(&format!("end-{round}"));
        let domain = rig.driver.start(guest, StartOptions::default());
        let domain = domain.await.expect("it starts");
        let began = Instant::now();
        domain.destroy().await.expect("it ends");
        ours.push(began.elapsed());
        let guest = rig.guest(&format!("own-end-{round}"));
        let domain = rig.driver.start(guest, StartOptions::default());
        let domain = domain.await.expect("it starts");
        own.push(own_end(domain.observed().pid.expect("it runs")).await);
    }
    figures.put(
        "destroy-p50",
        ms(quantile(&mut ours, 0.5)),
        "ms",
        Bar::AtMost(50.0),
    );
    let own = ms(quantile(&mut own, 0.5));
    figures.put("qemus-own-end-after-sigterm-p50", own, "ms", Bar::None);
}

async fn own_end(pid: u32) -> Duration {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).expect("it runs");
    let began = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    let ended = tokio::task::spawn_blocking(move || {
        let mut waited = [rustix::event::PollFd::new(
            &pidfd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut waited, None).expect("it can be waited for");
    });
    ended.await.expect("no panic");
    began.elapsed()
}

/// A driver that comes back to a hundred guests.
pub(crate) async fn restart(env: &Env, figures: &mut Figures, count: usize) {
    let rig = Rig::new(env);
    for number in 0..count {
        drop(started(&rig, &format!("m{number}")).await);
    }
    let left = rig.leave().await;
    let began = Instant::now();
    let rig = Rig::again(left);
    let all = rig.driver.recovered(began + 30 * SECOND).await;
    let took = began.elapsed().as_secs_f64();
    let all = all.expect("all were looked at");
    assert!(
        all.iter().all(|found| found.became == Became::Kept),
        "{all:?}"
    );
    assert_eq!(all.len(), count);
    figures.put(
        &format!("restart-with-{count}"),
        took,
        "s",
        Bar::AtMost(2.0),
    );
}
