//! The guest of one generation: its process, its monitor, its agent, and how it is known to end.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use agent_qga::Qga;
use job_core::GoneWhy;
use monitor_qmp::{Qmp, QmpEvent, Request, Timestamp, command};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::domain::Inner;
use crate::domain::state::Observation;
use crate::guest::{Guest, Serial};
use crate::logs;
use crate::process::Process;

/// The chardev of the agent's channel, as the command line names it.
const AGENT_CHARDEV: &str = "agent";
/// What QEMU says on its standard error, and the fifo through which it does.
pub(crate) const LOG: &str = "qemu.log";
pub(crate) const STDERR: &str = "stderr";
/// Where a serial port is read that goes to a log.
pub(crate) const SERIAL: &str = "serial.sock";
/// Reading what is left in a fifo takes no longer than the reader's turn.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the questions after a connect or a silence may take. They hold up nobody.
const RESYNC: Duration = Duration::from_secs(30);

pub(crate) struct Live {
    pub(crate) generation: u64,
    /// QEMU's process, if it is known.
    pub(crate) process: Option<Arc<Process>>,
    /// Whether this driver started it, so that its files are ours.
    pub(crate) is_ours: bool,
    monitor: OnceLock<Arc<dyn Qmp>>,
    agent: OnceLock<Arc<dyn Qga>>,
    closed: CancellationToken,
    /// This driver lets go of it, and it runs on.
    released: CancellationToken,
    /// All that QEMU said on its standard error is in its log.
    said: CancellationToken,
    /// Why it will end, if somebody here decided so.
    doom: Mutex<Option<GoneWhy>>,
    /// Whether a guest that arrives may have run here.
    has_run: AtomicBool,
    /// Whether somebody paused it since it was last looked at for a migration.
    was_paused: AtomicBool,
    /// When QEMU stopped it last, and let it run last, by QEMU's clock in nanoseconds since 1970; 0 if it did not.
    stopped: AtomicI64,
    resumed: AtomicI64,
}

impl Live {
    pub(crate) fn new(generation: u64, process: Option<Arc<Process>>, is_ours: bool) -> Self {
        Self {
            generation,
            process,
            is_ours,
            monitor: OnceLock::new(),
            agent: OnceLock::new(),
            closed: CancellationToken::new(),
            released: CancellationToken::new(),
            said: CancellationToken::new(),
            doom: Mutex::new(None),
            has_run: AtomicBool::new(false),
            was_paused: AtomicBool::new(false),
            stopped: AtomicI64::new(0),
            resumed: AtomicI64::new(0),
        }
    }

    /// QEMU told that it stopped the guest, or let it run.
    pub(crate) fn turned(&self, event: &QmpEvent, at: Timestamp) {
        let place = match event {
            QmpEvent::Stop => &self.stopped,
            QmpEvent::Resume => &self.resumed,
            _ => return,
        };
        let since = at
            .to_system_time()
            .and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        let nanos = since.and_then(|since| i64::try_from(since.as_nanos()).ok());
        place.store(nanos.unwrap_or(0), Ordering::Relaxed);
    }

    /// Somebody pauses it: it is not let run where it arrives, or stays, without being told to. Yields what was noted before.
    pub(crate) fn note_pause(&self, is_paused: bool) -> bool {
        self.was_paused.swap(is_paused, Ordering::Relaxed)
    }

    pub(crate) fn was_paused(&self) -> bool {
        self.was_paused.load(Ordering::Relaxed)
    }

    pub(crate) fn stopped_at(&self) -> Option<i64> {
        Some(self.stopped.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }

    pub(crate) fn resumed_at(&self) -> Option<i64> {
        Some(self.resumed.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }

    pub(crate) fn monitor(&self) -> Option<&Arc<dyn Qmp>> {
        self.monitor.get()
    }

    pub(crate) fn agent(&self) -> Option<&Arc<dyn Qga>> {
        self.agent.get()
    }

    /// Set once, when the monitor has greeted.
    pub(crate) fn set_monitor(&self, monitor: Arc<dyn Qmp>) {
        let _known = self.monitor.set(monitor);
    }

    /// Set once, when the agent's channel is connected.
    pub(crate) fn set_agent(&self, agent: Arc<dyn Qga>) {
        let _known = self.agent.set(agent);
    }

    /// The monitor's connection has ended.
    pub(crate) fn monitor_closed(&self) {
        self.closed.cancel();
    }

    /// From here on nobody follows it to its end.
    pub(crate) fn release(&self) {
        self.released.cancel();
    }

    /// Waits until this driver lets go of it.
    pub(crate) async fn released(&self) {
        self.released.cancelled().await;
    }

    /// Waits until the monitor's connection has ended.
    pub(crate) async fn wait_monitor_closed(&self) {
        self.closed.cancelled().await;
    }

    /// Keeps what QEMU says and what comes out of its serial port, until both have ended.
    pub(crate) fn keep_logs(&self, domain: &Inner, guest: &Guest, stderr: OwnedFd) {
        let (directory, watchers) = (domain.run_dir(), &domain.context.watchers);
        let parting = domain.context.parting.clone();
        let (log, said) = (directory.join(LOG), self.said.clone());
        let keep = logs::keep_fifo(stderr, log);
        watchers.spawn(async move {
            parting.run_until_cancelled(keep).await;
            said.cancel();
        });
        if let Serial::Log(path) = &guest.serial {
            let parting = domain.context.parting.clone();
            let keep = logs::keep_serial(directory.join(SERIAL), path.clone());
            watchers.spawn(async move { parting.run_until_cancelled(keep).await });
        }
    }

    /// Waits until QEMU, which has ended, has had its last word.
    pub(crate) async fn wait_said(&self) {
        if self.is_ours {
            let _late = timeout(LAST_WORDS, self.said.cancelled()).await;
        }
    }

    /// From here on the guest may have run.
    pub(crate) fn mark_run(&self) {
        self.has_run.store(true, Ordering::SeqCst);
    }

    /// QEMU has refused to let it run, and it does not.
    pub(crate) fn mark_not_run(&self) {
        self.has_run.store(false, Ordering::SeqCst);
    }

    pub(crate) fn has_run(&self) -> bool {
        self.has_run.load(Ordering::SeqCst)
    }

    /// Decides how it ends, before it does. The first decision stands.
    pub(crate) fn doom(&self, why: GoneWhy) {
        self.doom
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(why);
    }

    pub(crate) fn doomed(&self) -> Option<GoneWhy> {
        self.doom
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Asks QEMU for what no event tells: after connecting, and after a silence. Writes only what is observed, so it needs no
/// job (R11's exception).
pub(crate) async fn resync(domain: &Arc<Inner>, live: &Arc<Live>) {
    if let Err(error) = ask(domain, live).await {
        warn!(domain = %domain.name, %error, "the guest's state could not be read again");
    }
}

async fn ask(domain: &Arc<Inner>, live: &Arc<Live>) -> Result<(), monitor_qmp::Error> {
    let Some(monitor) = live.monitor() else {
        return Ok(());
    };
    let deadline = Instant::now() + RESYNC;
    let reply = monitor
        .call(Request::new(&command::QueryStatus, deadline)?)
        .await?;
    // An answer that cannot be read says nothing; the next event will.
    if let Ok(status) = reply.decode::<command::Status>() {
        domain.observe(Observation::Status(status.status, reply.sequence));
    }
    let channels = monitor.execute(command::QueryChardev, deadline).await?;
    let agent = channels
        .iter()
        .find(|channel| channel.label == AGENT_CHARDEV);
    if let Some(agent) = agent {
        domain.observe(Observation::AgentPort(agent.frontend_open));
    }
    Ok(())
}

/// Asks QEMU how far its migration is, which an earlier driver was told by events. Writes only what is observed.
pub(crate) async fn resync_migration(
    domain: &Arc<Inner>,
    live: &Arc<Live>,
) -> Result<(), monitor_qmp::Error> {
    let Some(monitor) = live.monitor() else {
        return Ok(());
    };
    let request = Request::new(&command::QueryMigrate, Instant::now() + RESYNC)?;
    let reply = monitor.call(request).await?;
    // As above.
    if let Ok(info) = reply.decode::<command::MigrationInfo>()
        && let Some(status) = info.status
    {
        domain.observe(Observation::Migration(status, reply.sequence));
    }
    Ok(())
}
