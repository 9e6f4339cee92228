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

mod load;
mod reconnect;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use job_core::{AsyncJob, AsyncKind, AsyncRecord, GoneWhy, Guard, KindSet, Label};
use monitor_qmp::command::{self, RunState};
use remote_migrate::{DestinationStage, Owner, Record, Side};
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
use crate::ops::dump::over as dump_over;
use crate::ops::save::{blocking, end as end_saved, stop_writing};
use crate::ops::start::{LOCK, Sockets, connect, give_up, refuse_if_running};
use crate::ops::{AsyncOp, Deadline};
use crate::process::{Process, lock_holder};
use crate::records::{Identity, Running, Work};
use crate::recovery::{Action, Findings, decide};
use crate::save_file::SaveFile;

pub(crate) use load::recover_all;
pub(crate) use reconnect::reconnect;

/// A QEMU that listens has taken its lock long before: it does so between fork and exec.
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
    /// It is left as it was found: another host may have it. Its migration is taken up again, or to be resolved.
    InDoubt,
    /// Its QEMU runs and cannot be reached, for this reason. That is tried again.
    Unreachable(String),
    /// Its record cannot be read and was put there, for this reason. Its QEMU may run.
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

    /// A migration that was in doubt is settled.
    pub(crate) fn settled(&self, recovered: Recovered) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |known: &&mut Recovered| {
            known.uuid == recovered.uuid && known.became == Became::InDoubt
        };
        match all.iter_mut().find(is_it) {
            Some(known) => *known = recovered,
            None => all.push(recovered),
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
    if let Some(live) = domain.0.live().filter(|live| has_ended(live)) {
        let _late = gone(&domain, &live, Instant::now() + ENDING).await;
    }
    tell(&domain, name, became.clone());
    // Parts may have come or gone while no driver was there.
    domain.0.settle_parts();
    if let Became::Unreachable(_) = became
        && let Some(live) = domain.0.live()
    {
        let watchers = domain.0.context.watchers.clone();
        watchers.spawn(reconnect(domain, live));
    }
}

fn has_ended(live: &Live) -> bool {
    let process = live.process.as_ref();
    process.is_some_and(|process| process.exited().now_or_never().is_some())
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
    let found = findings(op.domain(), work.as_ref(), false).await?;
    remains(work.as_ref(), decide(work.as_ref(), found)).await
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
    let found = findings(domain, work.as_ref(), false).await?;
    let action = decide(work.as_ref(), found);
    let became = remains(work.as_ref(), action).await?;
    domain.0.forget_guest().await;
    let why = match action {
        Action::Saved => GoneWhy::Left("the guest was saved".into()),
        Action::Unborn => GoneWhy::Died("it was not brought up to its end".into()),
        _ => GoneWhy::Died("QEMU ended while no driver was there".into()),
    };
    domain.0.observe(Observation::Ended(why));
    Ok(became)
}

/// What is left of the work of a guest whose QEMU has ended.
async fn remains(work: Option<&Work>, action: Action) -> Result<Became, Error> {
    if action == Action::DropFile {
        drop_file(work).await?;
    }
    Ok(match action {
        Action::Saved => Became::Finished,
        Action::Unborn => Became::Undone,
        Action::Unsettled | Action::Taken => Became::InDoubt,
        _ => Became::Ended,
    })
}

/// Removes the file of a job that is not whole, if it is the one that job wrote.
async fn drop_file(work: Option<&Work>) -> Result<(), Error> {
    match work.cloned() {
        Some(Work::Save { path, save, .. }) => {
            blocking(move || match SaveFile::state_of(&path, save) {
                Some(_) => std::fs::remove_file(&path).map_err(failed_to("remove", &path)),
                None => Ok(()),
            })
            .await
        }
        Some(Work::Dump { file, .. }) => blocking(move || file.remove()).await,
        _ => Ok(()),
    }
}

async fn findings(domain: &Domain, work: Option<&Work>, is_there: bool) -> Result<Findings, Error> {
    let file = match work {
        Some(Work::Save { path, save, .. } | Work::Restore { path, save, .. }) => {
            let (path, save) = (path.clone(), *save);
            blocking(move || Ok(SaveFile::state_of(&path, save))).await?
        }
        _ => None,
    };
    let (is_arriving, was_taken, is_leaving) = match work {
        Some(Work::MigrationIn | Work::MigrationOut) => {
            let records = domain.0.context.migrations().await?;
            let mut mine = records
                .iter()
                .filter(|record| record.domain() == domain.uuid());
            let arrives = |record: &Record| match record {
                Record::Destination(record) => record.stage != DestinationStage::Preparing,
                Record::Source(_) => false,
            };
            let owns = |record: &Record| {
                record.side() == Side::Destination && record.owner() == Owner::Destination
            };
            (
                mine.clone().any(arrives),
                mine.clone().any(owns),
                mine.any(|record| record.side() == Side::Source),
            )
        }
        _ => (false, false, false),
    };
    Ok(Findings {
        is_there,
        file,
        is_arriving,
        was_taken,
        is_leaving,
    })
}

/// Finishes or undoes the work that was at a guest whose monitor answers.
async fn settle(op: &mut AsyncOp, live: &Arc<Live>) -> Result<Became, Error> {
    let domain = op.domain().clone();
    let work = domain.0.noted().await.and_then(|record| record.job);
    let work = work.map(|job| job.work);
    let found = findings(&domain, work.as_ref(), true).await?;
    let action = decide(work.as_ref(), found);
    op.set_phase("settling");
    let became = match action {
        Action::Run => {
            let monitor = op.monitor().await?;
            let status = monitor.execute(command::QueryStatus).await?.status;
            // One that has run already, and stopped by itself, is not started again.
            if matches!(status, RunState::PreLaunch | RunState::Paused) {
                monitor.execute(command::Cont).await?;
            }
            Became::Finished
        }
        Action::UndoSave { run } => {
            stop_writing(op, run).await?;
            drop_file(work.as_ref()).await?;
            Became::Undone
        }
        Action::UndoDump => {
            // Its pipe ended with whoever read it.
            dump_over(op).await?;
            drop_file(work.as_ref()).await?;
            Became::Undone
        }
        Action::Done => Became::Finished,
        Action::EndSaved => {
            if let Some(Work::Save { path, .. }) = &work {
                end_saved(op, path).await;
            }
            ended(live).await?;
            Became::Finished
        }
        Action::EndUnborn => {
            give_up(live);
            ended(live).await?;
            Became::Undone
        }
        Action::LeavePaused => Became::Finished,
        Action::Unsettled | Action::Taken => Became::InDoubt,
        _ => Became::Kept,
    };
    if !matches!(action, Action::EndSaved | Action::EndUnborn) {
        domain.0.tell(What::Started {
            generation: live.generation,
        });
    }
    // The job may be one that an earlier driver began: what is written of it goes by what it is, not by this op.
    // One that moves stays written down until it is settled.
    let moves = matches!(work, Some(Work::MigrationOut | Work::MigrationIn));
    if !(action == Action::Unsettled && moves) {
        domain.0.work_is_over().await?;
    }
    Ok(became)
}

async fn ended(live: &Live) -> Result<(), Error> {
    let Some(process) = &live.process else {
        return Ok(());
    };
    let ended = timeout(ENDING, process.exited()).await;
    ended.map(drop).map_err(|_| {
        Cause::TimedOut {
            what: "QEMU to end",
            waited: ENDING,
        }
        .into()
    })
}
