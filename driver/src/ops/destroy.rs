//! Ending a guest, whatever it takes: cancel, ask QEMU to end, kill it. Bounded in total, and never behind a stuck job.

use std::sync::Arc;
use std::time::Duration;

use job_core::{Ask, AsyncKind, GoneWhy, JobKind, KindSet};
use monitor_qmp::{Health, command};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{Instrument, info_span, warn};

use crate::domain::state::Run;
use crate::domain::{Domain, Live};
use crate::error::{Cause, Error, ErrorKind, io};
use crate::ops::{Call, Deadline, observed_only};
use crate::process::Process;

/// A QEMU known to be silent is not waited for any longer than this before it is killed.
const SILENT: Duration = Duration::from_millis(200);

impl Domain {
    /// Ends the guest now: cancels what runs, asks QEMU to end (`SIGTERM`), kills it if it does not, and waits until it
    /// is cleaned up. Takes no job, so nothing that is stuck can be in its way; all who hold or wait learn that the guest
    /// is gone.
    ///
    /// A QEMU that the kernel cannot end keeps the domain as it is, and the call times out; the state does not lie.
    pub fn destroy(&self) -> Call<()> {
        let domain = self.clone();
        Call::new(
            self.0.context.defaults.destroy,
            move |deadline| async move {
                let span = info_span!("operation", domain = %domain.0.name, owner = "destroy");
                let work = end(domain.clone(), deadline).instrument(span);
                match domain.0.context.tracker.spawn(work).await {
                    Ok(result) => {
                        result.map_err(|error| error.told_of(&"destroy".into(), &domain.0.name))
                    }
                    Err(error) => Err(domain.error("destroy", Cause::Panicked(error.to_string()))),
                }
            },
        )
    }
}

async fn end(domain: Domain, deadline: Deadline) -> Result<(), Error> {
    let began = Instant::now();
    if domain.0.context.closing.is_cancelled() {
        return Err(Cause::ShuttingDown.into());
    }
    if domain.0.is_observed {
        return Err(observed_only("a destroy"));
    }
    let is_job_cancelled = domain.0.scheduler.cancel_async("destroy").is_ok();
    let live = match domain.0.live() {
        Some(live) => live,
        None if is_job_cancelled => match started_after_all(&domain, deadline).await? {
            Some(live) => live,
            None => return Ok(()),
        },
        None => return Err(Cause::State("no guest runs in it".into()).into()),
    };
    live.doom(GoneWhy::Destroyed);
    match &live.process {
        Some(process) => kill(&domain, &live, process, deadline).await?,
        None => quit(&domain, deadline).await?,
    }
    let generation = live.generation;
    let is_over = move |observed: &crate::Observed| {
        observed.generation != generation || observed.run == Run::Off
    };
    let timed_out = |_| Cause::TimedOut {
        what: "QEMU to end",
        waited: began.elapsed(),
    };
    domain
        .wait_for(is_over, deadline)
        .await
        .map_err(timed_out)?;
    cleaned_up(&domain, &live, deadline).await
}

/// A start that was cancelled before it had a process may have got one meanwhile. Its guest, if so.
async fn started_after_all(
    domain: &Domain,
    deadline: Deadline,
) -> Result<Option<Arc<Live>>, Error> {
    let ask = Ask::new("destroy", sleep_until(deadline));
    tokio::select! {
        launched = domain.wait_for(|observed| observed.run != Run::Off, deadline) => drop(launched?),
        ended = domain.0.jobs.begin_async(ask, AsyncKind::Start, KindSet::DESTROY_ONLY) => drop(ended?),
    }
    Ok(domain.0.live())
}

async fn kill(
    domain: &Domain,
    live: &Live,
    process: &Process,
    deadline: Deadline,
) -> Result<(), Error> {
    let defaults = domain.0.context.defaults;
    let is_silent = live
        .monitor()
        .is_some_and(|monitor| monitor.health() == Health::Unresponsive);
    let patience = if is_silent {
        SILENT
    } else {
        defaults.terminate
    };
    let signalled = |error| io("signal QEMU, process", process.pid().to_string())(error);
    process.terminate().map_err(signalled)?;
    if timeout_at(deadline.min(Instant::now() + patience), process.exited())
        .await
        .is_err()
    {
        warn!(domain = %domain.0.name, pid = process.pid(), "QEMU did not end in time and is killed");
        process.kill().map_err(signalled)?;
    }
    Ok(())
}

/// Without a process to signal, QEMU itself must do it.
async fn quit(domain: &Domain, deadline: Deadline) -> Result<(), Error> {
    let work = |mut op: crate::Op| async move {
        op.monitor()?.execute(command::Quit).await?;
        Ok(())
    };
    match domain
        .run("destroy", JobKind::Destroy, deadline, work)
        .await
    {
        Err(error) if error.kind() != ErrorKind::Gone => Err(error),
        _ => Ok(()),
    }
}

/// Waits for the clean-up, which is the first job of the next generation: once ours of the same kind is granted, it is
/// done.
pub(crate) async fn cleaned_up(
    domain: &Domain,
    live: &Arc<Live>,
    deadline: Deadline,
) -> Result<(), Error> {
    while domain
        .0
        .live()
        .is_some_and(|found| Arc::ptr_eq(&found, live))
    {
        let turn = domain
            .0
            .jobs
            .begin(Ask::new("destroy", sleep_until(deadline)), JobKind::Destroy)
            .await;
        match turn {
            Ok(job) => job.finish(),
            // The generation ended while we stood in line: stand in that of the next.
            Err(job_core::BeginError::Gone { .. }) => {}
            Err(job_core::BeginError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        tokio::task::yield_now().await;
    }
    Ok(())
}
