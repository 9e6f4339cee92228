//! Finding the guests of an earlier driver again, and finishing or undoing what it was at. Decides nothing: the table in
//! [`recovery`](crate::recovery) does.
//!
//! ```text
//!  record ─► process? ─► monitor? ─► table ─► action ─► the job is over, the guest goes on
//!              │ gone      │ silent: lost, tried again for as long as QEMU runs
//!              ▼           ▼
//!            ended       only a destroy ends it
//! ```
//!
//! Each guest has a task and a job of its own, so one that cannot be reached delays no other.

mod attached;
mod carry_on;
mod load;
mod reconnect;
mod settle;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use job_core::{AsyncJob, AsyncKind, AsyncRecord, GoneWhy, Guard, KindSet, Label};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use uuid::Uuid;

use crate::context::Context;
use crate::domain::state::{Observation, Run};
use crate::domain::{Domain, Live, STDERR, reap};
use crate::error::{Cause, Error, ErrorKind, io as failed_to};
use crate::events::What;
use crate::logs;
use crate::ops::block_jobs::track_again;
use crate::ops::destroy::cleaned_up;
use crate::ops::start::{LOCK, Sockets, connect, refuse_if_running};
use crate::ops::{AsyncOp, Deadline};
use crate::process::{Process, lock_holder};
use crate::records::{Identity, Running, Work};
use crate::recovery::{Action, decide};

use self::carry_on::carry_on;
use self::settle::{of_the_gone, remains, settle};
pub(crate) use load::recover_all;
pub(crate) use reconnect::{reconnect, settle_left};

/// A QEMU that listens has taken its lock long before: it does so before it is the program.
const LOCKED_BY: Duration = Duration::from_secs(5);
/// One that was killed ends within this, or is the kernel's matter.
const ENDING: Duration = Duration::from_secs(10);

/// What became of a guest that an earlier driver left, and of the job that was at it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Recovered {
    /// What the guest is called; of a record that cannot be read, its key.
    pub name: Label,
    /// Its identity, where it is known.
    pub uuid: Option<Uuid>,
    /// What was being done with it: `start`, `save` and so on.
    pub job: Option<Label>,
    /// What became of both.
    pub became: Became,
}

/// What became of a guest and of the job that was at it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Became {
    /// It runs on; no job was at it.
    Kept,
    /// It had ended while no driver was there.
    Ended,
    /// The job was brought to its end.
    Finished,
    /// The job was undone, as if it had never begun.
    Undone,
    /// The job goes on, under a job of its own; what becomes of it is told as news.
    GoesOn,
    /// It was on its way from one host to another, and the only complete copy was killed: no host has it any more.
    Lost,
    /// It is left as it was found: another host may have it. Its migration is taken up again, or to be resolved.
    InDoubt,
    /// Its QEMU runs and cannot be reached, for this reason. That is tried again.
    Unreachable(String),
    /// Its record cannot be read and was put there, for this reason. Its QEMU may run. One of a migration stays where it was,
    /// and its guest is neither started nor moved until an operator takes the record away.
    SetAside {
        /// Where the record is now.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// What became of all of them, so far.
#[derive(Debug, Default)]
pub(crate) struct Recoveries {
    all: Mutex<Vec<Recovered>>,
    tasks: TaskTracker,
}

impl Recoveries {
    /// Waits until each was looked at once.
    pub(crate) async fn wait(&self) {
        self.tasks.wait().await;
    }

    pub(crate) fn all(&self) -> Vec<Recovered> {
        self.all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A migration that was in doubt is settled. One that this driver itself began, or took a guest in by, is no matter of an
    /// earlier one: there is no end to those, so they are told as news and not kept.
    pub(crate) fn settled(&self, recovered: Recovered, is_earlier: bool) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |known: &&mut Recovered| {
            known.uuid == recovered.uuid && known.became == Became::InDoubt
        };
        match all.iter_mut().find(is_it) {
            Some(known) => *known = recovered,
            None if is_earlier => all.push(recovered),
            None => {}
        }
    }

    fn add(&self, recovered: Recovered) {
        self.all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(recovered);
    }
}

/// Takes the job that was at the guest, before anybody sees the domain, and begins to find the guest.
fn begin(context: &Arc<Context>, domain: Domain, record: Running) {
    domain.0.take_up(record.clone());
    // Not off: whether a process runs is not known yet.
    let generation = domain.0.scheduler.generation();
    let pid = record.process.as_ref().map(|process| process.pid);
    domain.0.observe(Observation::Launched { generation, pid });
    domain.0.observe(Observation::Lost);
    let (id, owner) = match &record.job {
        Some(job) => (job.id, job.owner.clone()),
        None => (0, "recover".to_owned()),
    };
    let restored = domain.0.scheduler.restore(AsyncRecord {
        id,
        kind: kind(record.job.as_ref().map(|job| &job.work)),
        mask: KindSet::DESTROY_ONLY,
        owner: owner.into(),
        phase: None,
        decided: false,
    });
    let job = restored.expect("nobody else knows the domain yet");
    // They take jobs, and wait for this one.
    track_again(&domain, &record);
    context.recoveries.tasks.spawn(async move {
        let context = domain.0.context.clone();
        let parting = context.parting.clone();
        // A driver that goes away at once leaves all as it was.
        parting
            .run_until_cancelled(recover(domain, job, record))
            .await;
    });
}

/// The kind of job that some work is done under.
fn kind(work: Option<&Work>) -> AsyncKind {
    match work {
        None | Some(Work::Start { .. } | Work::Restore { .. }) => AsyncKind::Start,
        Some(Work::Save { .. }) => AsyncKind::Save,
        Some(Work::Dump { .. }) => AsyncKind::Dump,
        Some(Work::Snapshot(_) | Work::Inside { .. }) => AsyncKind::Snapshot,
        Some(Work::Backup(_)) => AsyncKind::Backup,
        Some(Work::MigrationOut) => AsyncKind::MigrationOut,
        Some(Work::MigrationIn) => AsyncKind::MigrationIn,
    }
}

async fn recover(domain: Domain, job: AsyncJob, record: Running) {
    let deadline = Instant::now() + domain.0.context.defaults.connect;
    let name = record.job.as_ref().map(|job| job.work.name().into());
    let work = move |op: AsyncOp| find(op, record, deadline);
    let became = match domain.run_with("recover".into(), job, deadline, work).await {
        Ok(became) => became,
        Err(error) => Became::Unreachable(format!("{error:#}")),
    };
    // What is told as ended leaves nothing behind.
    let has_ended = |live: &Arc<Live>| {
        let process = live.process.as_ref();
        process.is_some_and(|process| process.has_ended())
    };
    if let Some(live) = domain.0.live().filter(has_ended) {
        let _late = gone(&domain, &live, Instant::now() + ENDING).await;
    }
    tell(&domain, name, became.clone());
    // Parts may have come or gone while no driver was there.
    domain.0.settle_parts_again();
    if became == Became::GoesOn {
        let watchers = domain.0.context.watchers.clone();
        watchers.spawn(carry_on(domain.clone()));
    }
    if let Became::Unreachable(_) = became
        && let Some(live) = domain.0.live()
    {
        let watchers = domain.0.context.watchers.clone();
        watchers.spawn(reconnect(domain, live));
    }
}

/// Waits until the guest is off and cleaned up.
async fn gone(domain: &Domain, live: &Arc<Live>, deadline: Deadline) -> Result<(), Error> {
    let is_off = |observed: &crate::Observed| observed.run == Run::Off;
    domain.wait_for(is_off, deadline).await?;
    cleaned_up(domain, live, deadline).await
}

fn tell(domain: &Domain, job: Option<Label>, became: Became) {
    domain.0.count(|tally| &tally.recoveries);
    info!(
        domain = domain.name(),
        ?job,
        ?became,
        "guest of an earlier driver"
    );
    let recovered = Recovered {
        name: domain.0.name.clone(),
        uuid: Some(domain.uuid()),
        job,
        became,
    };
    domain.0.context.recoveries.add(recovered.clone());
    domain.0.tell(What::Recovered(recovered));
}

/// Finds the guest, and does what the table says.
async fn find(mut op: AsyncOp, record: Running, deadline: Deadline) -> Result<Became, Error> {
    op.set_phase("finding");
    let domain = op.domain().clone();
    let sockets = Sockets::of(&domain, &record.guest);
    let Some(process) = process(&domain, record.process, &sockets.monitor, deadline).await? else {
        let work = record.job.map(|job| job.work);
        return bury(&op, work).await;
    };
    let generation = op.job().generation();
    let pid = Some(process.pid());
    let live = Arc::new(Live::new(generation, Some(Arc::new(process)), true));
    live.note_pause(record.job.as_ref().is_some_and(|job| job.is_paused));
    domain.0.set_live(&live)?;
    let stderr = domain.0.run_dir().join(STDERR);
    match logs::reader(&stderr) {
        Ok(said) => live.keep_logs(&domain.0, &record.guest, said),
        Err(error) => warn!(domain = domain.name(), %error, "what QEMU says is not kept"),
    }
    domain.0.observe(Observation::Launched { generation, pid });
    domain.0.observe(Observation::Lost);
    let watchers = &domain.0.context.watchers;
    watchers.spawn(reap(domain.0.clone(), live.clone()));

    op.set_phase("connecting");
    if let Err(error) = connect(&domain, &live, &sockets, deadline).await {
        return op_or_gone(&op, error).await;
    }
    domain.0.count(|tally| &tally.reconnects);
    match settle(&mut op, &live).await {
        Ok(became) => Ok(became),
        Err(error) => op_or_gone(&op, error).await,
    }
}

/// A guest that died while it was looked for has ended; else the failure stands.
async fn op_or_gone(op: &AsyncOp, error: Error) -> Result<Became, Error> {
    let live = op.live();
    let has_ended = match live.as_ref().and_then(|live| live.process.as_ref()) {
        Some(process) => timeout(crate::domain::EXIT_AFTER_EOF, process.exited())
            .await
            .is_ok(),
        None => true,
    };
    if !has_ended && error.kind() != ErrorKind::Gone {
        return Err(error);
    }
    // Who is told that it ended finds it off. The reaper saw the same end.
    let is_off = |observed: &crate::Observed| observed.run == Run::Off;
    op.domain()
        .wait_for(is_off, Instant::now() + ENDING)
        .await?;
    let work = op.domain().0.noted().await.and_then(|record| record.job);
    let work = work.map(|job| job.work);
    let found = of_the_gone(op.domain(), work.as_ref()).await?;
    remains(op, work.as_ref(), decide(work.as_ref(), found)).await
}

/// The process of the guest, if it runs.
async fn process(
    domain: &Domain,
    known: Option<Identity>,
    socket: &Path,
    deadline: Deadline,
) -> Result<Option<Process>, Error> {
    if let Some(known) = known {
        return adopt(known.pid, |pid| {
            Identity::of(pid).is_ok_and(|found| found == known)
        });
    }
    // The earlier driver was killed between the launch and the note of it.
    let lock: PathBuf = domain.0.run_dir().join(LOCK);
    let until = deadline.min(Instant::now() + LOCKED_BY);
    loop {
        let holder = lock_holder(&lock).map_err(failed_to("ask for the lock on", &lock))?;
        if let Some(pid) = holder {
            return adopt(pid, |pid| {
                lock_holder(&lock).is_ok_and(|holder| holder == Some(pid))
            });
        }
        if refuse_if_running(socket).await.is_ok() {
            return Ok(None);
        }
        if Instant::now() >= until {
            let text = "something listens on its monitor's socket that did not lock its directory";
            return Err(Cause::State(text.into()).into());
        }
        // A lock cannot be waited for without being taken.
        sleep(Duration::from_millis(5)).await;
    }
}

/// The process of that number, if it is the one that is meant.
fn adopt(pid: u32, is_it: impl FnOnce(u32) -> bool) -> Result<Option<Process>, Error> {
    match Process::adopt(pid, is_it) {
        Ok(process) => Ok(Some(process)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(failed_to("watch process", pid.to_string())(error).into()),
    }
}

/// The guest ended while no driver was there: what it left goes.
async fn bury(op: &AsyncOp, work: Option<Work>) -> Result<Became, Error> {
    let domain = op.domain();
    let found = of_the_gone(domain, work.as_ref()).await?;
    let action = decide(work.as_ref(), found);
    let became = remains(op, work.as_ref(), action).await?;
    domain.0.forget_guest().await;
    let why = match action {
        Action::Saved => GoneWhy::Left("the guest was saved".into()),
        Action::Unborn => GoneWhy::Died("it was not brought up to its end".into()),
        _ => GoneWhy::Died("QEMU ended while no driver was there".into()),
    };
    domain.0.observe(Observation::Ended(why));
    Ok(became)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(became: Became) -> Recovered {
        Recovered {
            name: "web".into(),
            uuid: Some(Uuid::nil()),
            job: None,
            became,
        }
    }

    #[test]
    fn what_an_earlier_driver_left_is_remembered_and_what_this_one_settles_of_its_own_is_not() {
        let recoveries = Recoveries::default();
        recoveries.add(found(Became::InDoubt));
        for _ in 0..9 {
            recoveries.settled(found(Became::Finished), false);
        }
        let all = recoveries.all();
        assert_eq!((all.len(), &all[0].became), (1, &Became::Finished));
        recoveries.settled(found(Became::Undone), true);
        assert_eq!(recoveries.all().len(), 2);
    }
}
