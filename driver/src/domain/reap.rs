//! Notices that a guest ended, whatever ended it, and cleans up after it.
//!
//! One task a guest. It learns of the end from the pidfd and from the monitor's end of file, whichever comes first; the
//! process is believed, since a monitor may be lost while QEMU runs on.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use job_core::{Cleanup, GoneWhy};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::domain::live::LOG;
use crate::domain::state::Observation;
use crate::domain::{Domain, Inner, Live};
use crate::ops::recover::reconnect;
use crate::process::{Exit, Process};

/// After the monitor's end of file the process is given this long to end too. QEMU closes its sockets while it exits;
/// measured, the pidfd follows within 2 ms.
pub(crate) const EXIT_AFTER_EOF: Duration = Duration::from_secs(1);
/// An ended process leaves its events in the socket, with the end of file behind them: reading them takes no longer than
/// the reader's turn.
const LAST_EVENTS: Duration = Duration::from_secs(1);
/// The clean-up waits for the guards of the old guest, which are evicted after ten seconds.
const CLEANUP: Duration = Duration::from_secs(60);

/// Follows a guest to its end. A lost connection begins a new generation of the same process, which is followed in turn.
pub(crate) fn reap(domain: Arc<Inner>, live: Arc<Live>) -> BoxFuture<'static, ()> {
    Box::pin(follow(domain, live))
}

async fn follow(domain: Arc<Inner>, live: Arc<Live>) {
    let parting = domain.context.parting.clone();
    let end = async {
        tokio::select! {
            // First: a connection that is let go of is not lost.
            biased;
            () = live.released() => None,
            end = end_of(&domain, &live) => Some(end),
        }
    };
    // A driver that goes away, or lets go of one, leaves its guests running.
    let Some(Some((why, is_over))) = parting.run_until_cancelled(end).await else {
        return;
    };
    info!(domain = %domain.name, generation = live.generation, %why, "guest ended");
    if is_over {
        // In this order: who sees that it is off finds no job of the old guest in the way.
        let cleanup = domain.end_generation(live.generation, &why);
        domain.observe(Observation::Ended(why));
        clean_up(&domain, &live, cleanup).await;
        return;
    }
    // Nobody may believe that the guest is gone: its process runs on.
    drop(domain.end_generation(live.generation, &why));
    let Some(process) = live.process.clone() else {
        // Without a process to watch, the connection was all there was of it.
        domain.observe(Observation::Lost);
        Domain(domain.clone()).forget_attached().await;
        domain.observe(Observation::Ended(why));
        domain.clear_live(&live);
        return;
    };
    let next = Live::new(
        domain.scheduler.generation(),
        Some(process.clone()),
        live.is_ours,
    );
    next.note_pause(live.was_paused());
    let next = Arc::new(next);
    domain.observe(Observation::Launched {
        generation: next.generation,
        pid: Some(process.pid()),
    });
    domain.observe(Observation::Lost);
    domain.replace_live(&live, &next);
    let watchers = &domain.context.watchers;
    watchers.spawn(reconnect(Domain(domain.clone()), next.clone()));
    watchers.spawn(reap(domain.clone(), next));
}

/// How the guest ended, and whether its process did.
async fn end_of(domain: &Inner, live: &Live) -> (GoneWhy, bool) {
    let exited = async |process: &Process| {
        let exit = process.exited().await;
        live.wait_said().await;
        if live.monitor().is_some() {
            // What it told last is on its way through the monitor: why it shut down, above all.
            let _late = timeout(LAST_EVENTS, live.wait_monitor_closed()).await;
        }
        (why(domain, live, exit), true)
    };
    match &live.process {
        Some(process) => tokio::select! {
            end = exited(process) => end,
            () = live.wait_monitor_closed() => match timeout(EXIT_AFTER_EOF, exited(process)).await {
                Ok(end) => end,
                Err(_) if live.doomed().is_some() => exited(process).await,
                Err(_) => {
                    let text = format!("its monitor's connection was lost while QEMU, process {}, runs on", process.pid());
                    (GoneWhy::Left(text.into()), false)
                }
            },
        },
        None => {
            live.wait_monitor_closed().await;
            let why = live.doomed().or_else(|| {
                domain
                    .observed()
                    .shutdown
                    .as_ref()
                    .map(|_| GoneWhy::ShutDown)
            });
            let lost = || {
                GoneWhy::Left("its monitor's connection ended, and its process is not known".into())
            };
            (why.unwrap_or_else(lost), false)
        }
    }
}

fn why(domain: &Inner, live: &Live, exit: Exit) -> GoneWhy {
    if let Some(doom) = live.doomed() {
        return doom;
    }
    let was_told = domain.observed().shutdown.is_some();
    match exit {
        Exit::Status(0) | Exit::Unknown if was_told => GoneWhy::ShutDown,
        exit => died(domain, live, exit),
    }
}

fn died(domain: &Inner, live: &Live, exit: Exit) -> GoneWhy {
    let words = if live.is_ours {
        last_words(&domain.run_dir())
    } else {
        String::new()
    };
    let text = if words.is_empty() {
        format!("QEMU {exit}")
    } else {
        format!("QEMU {exit}: {words}")
    };
    GoneWhy::Died(text.into())
}

/// The first job of the next generation: nothing of the old guest is left when it ends.
async fn clean_up(domain: &Arc<Inner>, live: &Arc<Live>, cleanup: Cleanup) {
    let job = match cleanup.begin(sleep(CLEANUP)).await {
        Ok(job) => job,
        Err(error) => {
            warn!(domain = %domain.name, %error, "clean-up goes ahead without its job");
            return finish(domain, live).await;
        }
    };
    domain.publish_holder();
    finish(domain, live).await;
    job.finish();
    domain.publish_holder();
}

async fn finish(domain: &Arc<Inner>, live: &Arc<Live>) {
    if live.is_ours {
        domain.forget_guest().await;
        debug!(domain = %domain.name, "cleaned up");
    } else {
        Domain(domain.clone()).forget_attached().await;
    }
    domain.clear_live(live);
}

/// What each QEMU says once, before we connect.
const WAITS: &str = "info: QEMU waiting for connection on";

/// The end of what QEMU said on its standard error.
pub(crate) fn last_words(run_dir: &Path) -> String {
    const ENOUGH: u64 = 1024;
    let tail = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(run_dir.join(LOG))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(ENOUGH)))?;
        let mut tail = Vec::new();
        file.take(ENOUGH).read_to_end(&mut tail)?;
        Ok(tail)
    };
    let tail = tail().unwrap_or_default();
    let text = String::from_utf8_lossy(&tail);
    let mut lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains(WAITS))
        .rev()
        .take(3)
        .collect();
    lines.reverse();
    lines.join("; ")
}
