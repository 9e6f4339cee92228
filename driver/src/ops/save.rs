//! A guest into a file, and back out of it. Both are long operations of many visits to the monitor, with phases and
//! progress; both can be cancelled until the point of return, and undo what they did.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use job_core::{AsyncKind, GoneWhy, Guard};
use monitor_qmp::command::{self, MigrationStatus};
use tokio::time::{Instant, timeout};
use tracing::warn;
use uuid::Uuid;

use crate::domain::Domain;
use crate::error::{Cause, Error, io};
use crate::ops::destroy::cleaned_up;
use crate::ops::migrate::only_capabilities;
use crate::ops::parts::{check_there, refuse_unsettled};
use crate::ops::start::{as_it_runs, bring_up, give_up, refuse_if_moved, run};
use crate::ops::{AsyncOp, Call};
use crate::records::{Memory, Work};
use crate::save_file::{Head, SaveFile, State};
use crate::stream_tls;

/// How often QEMU is asked how far it is. Its events tell when it is done.
const POLL: Duration = Duration::from_millis(100);
/// What undoing may take, whatever was left of the job's own time.
const UNDO: Duration = Duration::from_secs(30);
/// Milliseconds that a guest which runs on may stand still at the end: QEMU's own default.
const DOWNTIME: u64 = 300;
/// QEMU's own limit, 128 MiB/s, is meant for networks; with 0 the disk takes what it takes.
const UNLIMITED: u64 = 0;
/// The name under which QEMU keeps the file's descriptor.
const FD_NAME: &str = "vmwright-save";

/// How a guest is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..SaveOptions::default()`"
)]
pub struct SaveOptions {
    /// Whether the guest runs on while its memory is written. The file grows by what it changes meanwhile. A paused
    /// guest is written once.
    pub live: bool,
    /// At most so many bytes a second.
    pub bandwidth: Option<u64>,
}

/// What became of a save.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Saved {
    /// The file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
}

impl Domain {
    /// Saves the guest to a new file and ends it. [`Driver::restore`](crate::Driver::restore) brings it back.
    ///
    /// This is QEMU's migration, to the file's descriptor in place of another QEMU, with a header of ours before it that says
    /// what the guest is made of and whether the file is whole; a restore is the other end of that migration.
    ///
    /// Cancelled or failed, the guest goes on as before and the file is removed. Once the file is complete there is no
    /// way back: the guest is in the file, and its QEMU ends.
    pub fn save(&self, path: impl Into<PathBuf>, options: SaveOptions) -> Call<Saved> {
        let (domain, path) = (self.clone(), path.into());
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::Save.default_mask();
            let work = move |op: AsyncOp| save(op, path, options);
            let live = domain.0.live();
            let saved = domain
                .run_async("save", AsyncKind::Save, mask, deadline, work)
                .await?;
            if let Some(live) = live {
                // Done means that the name, the disks and the run directory are free.
                cleaned_up(&domain, &live, deadline).await?;
            }
            Ok(saved)
        })
    }

    /// Starts the guest from its file. It runs if it ran when it was saved.
    pub(crate) fn restore_from(&self, path: PathBuf) -> Call<()> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::Start.default_mask();
            let work = move |op: AsyncOp| restore(op, path);
            domain
                .run_async("restore", AsyncKind::Start, mask, deadline, work)
                .await
        })
    }
}

async fn save(mut op: AsyncOp, path: PathBuf, options: SaveOptions) -> Result<Saved, Error> {
    if !path.is_absolute() {
        return Err(
            Cause::BadRequest(format!("{} is not an absolute path", path.display())).into(),
        );
    }
    op.set_phase("preparing");
    refuse_unsettled(op.domain()).await?;
    // What is here of one that may run elsewhere is no guest to be kept.
    refuse_if_moved(op.domain()).await?;
    let status = op.monitor().await?.execute(command::QueryStatus).await?;
    let head = Head {
        guest: as_it_runs(op.domain()).await?,
        was_running: status.running,
        save: Uuid::new_v4(),
    };
    // Before there is a file, so that none is left that nobody knows of.
    let work = Work::Save {
        path: path.clone(),
        save: head.save,
        was_running: head.was_running,
    };
    op.note_work(work).await?;
    let guest = head.guest.clone();
    let file = Arc::new(blocking(move || SaveFile::create(&path, &head)).await?);
    let written = async {
        write(&mut op, &file, options).await?;
        check_there(&mut op, &guest).await?;
        op.check_cancelled()
    };
    let written = written.await;
    if let Err(error) = written {
        undo(&mut op, &file, status.running).await;
        return Err(error);
    }

    op.job().pass_point_of_return();
    op.set_phase("finishing");
    let complete = file.clone();
    if let Err(error) = blocking(move || complete.set_state(State::Complete)).await {
        // The guest is whole in QEMU still, and only there.
        undo(&mut op, &file, status.running).await;
        return Err(error);
    }
    let bytes = file.length();
    op.set_phase("ending");
    end(&mut op, &file.path).await;
    Ok(Saved {
        path: file.path.clone(),
        bytes,
    })
}

/// Writes the guest's memory into a new file, which is whole when this returns. The guest stands still then, whole in QEMU,
/// too. Whatever fails leaves a file that is not whole, for whoever undoes this.
pub(crate) async fn memory_into(
    op: &mut AsyncOp,
    memory: Memory,
    was_running: bool,
    options: SaveOptions,
) -> Result<(), Error> {
    let head = Head {
        guest: as_it_runs(op.domain()).await?,
        was_running,
        save: memory.save,
    };
    let file = Arc::new(blocking(move || SaveFile::create(&memory.path, &head)).await?);
    write(op, &file, options).await?;
    blocking(move || file.set_state(State::Complete)).await
}

/// Removes the file of that save, however far it is.
pub(crate) async fn drop_memory(memory: Memory) -> Result<(), Error> {
    let Memory { path, save } = memory;
    blocking(move || match SaveFile::state_of(&path, save) {
        Some(_) => std::fs::remove_file(&path).map_err(io("remove", &path)),
        None => Ok(()),
    })
    .await
}

/// Has QEMU write the guest, and follows it to the end.
async fn write(op: &mut AsyncOp, file: &SaveFile, options: SaveOptions) -> Result<(), Error> {
    let descriptor = OwnedFd::from(file.file.try_clone().map_err(io("duplicate", &file.path))?);
    let monitor = op.monitor().await?;
    if !options.live {
        monitor.execute(command::Stop).await?;
    }
    // A migration may have left them otherwise. A file answers nothing on a return path.
    monitor.execute(only_capabilities(&[])).await?;
    stream_tls::take_off(&monitor).await?;
    let mut parameters = command::MigrateSetParameters::default();
    parameters.max_bandwidth = Some(options.bandwidth.unwrap_or(UNLIMITED));
    // A migration that was given up has left less, with which one that runs on might never be saved.
    parameters.downtime_limit = Some(DOWNTIME);
    monitor.execute(parameters).await?;
    monitor
        .execute_with_fds(
            command::Getfd {
                fdname: FD_NAME.into(),
            },
            vec![descriptor],
        )
        .await?;
    monitor
        .execute(command::Migrate::new(format!("fd:{FD_NAME}")))
        .await?;
    drop(monitor);
    op.set_phase("writing");
    follow(op, None).await
}

/// Follows QEMU's migration, out of it or into it, to its end. `file` is what a guest is read from; how far that is, QEMU
/// does not tell.
async fn follow(op: &mut AsyncOp, file: Option<&SaveFile>) -> Result<(), Error> {
    let began = Instant::now();
    loop {
        op.check_cancelled()?;
        if Instant::now() >= op.deadline() {
            return Err(Cause::TimedOut {
                what: "QEMU to move the guest's state",
                waited: began.elapsed(),
            }
            .into());
        }
        let info = op.monitor().await?.execute(command::QueryMigrate).await?;
        let (done, total) = match (file, &info.ram) {
            (Some(file), _) => (file.passed(), file.length()),
            (None, Some(ram)) => (ram.total.saturating_sub(ram.remaining), ram.total),
            (None, None) => (0, 0),
        };
        let is_over = match &info.status {
            Some(MigrationStatus::Completed) => true,
            Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                let reason = info
                    .error_desc
                    .unwrap_or_else(|| "QEMU gave it up without a reason".into());
                return Err(Cause::Failed(reason).into());
            }
            _ => false,
        };
        op.report(if is_over { total } else { done }, total);
        if is_over {
            return Ok(());
        }
        op.pause(POLL).await;
    }
}

/// Leaves the guest as it was and no file behind.
async fn undo(op: &mut AsyncOp, file: &SaveFile, was_running: bool) {
    op.extend(UNDO);
    op.set_phase("undoing");
    if let Err(error) = stop_writing(op, was_running).await
        && op.job().check().is_ok()
    {
        warn!(
            domain = op.domain().name(),
            error = format!("{error:#}"),
            "a save was not undone"
        );
        return op.leave_unsettled().await;
    }
    let path = file.path.clone();
    if let Err(error) =
        blocking(move || std::fs::remove_file(&path).map_err(io("remove", &path))).await
    {
        warn!(
            domain = op.domain().name(),
            error = format!("{error:#}"),
            "a partial save was left behind"
        );
    }
}

pub(crate) async fn stop_writing(op: &mut AsyncOp, was_running: bool) -> Result<(), Error> {
    op.monitor().await?.execute(command::MigrateCancel).await?;
    loop {
        let info = op.monitor().await?.execute(command::QueryMigrate).await?;
        match info.status {
            // Completed: the cancellation came too late for QEMU, which holds the guest stopped and whole.
            None
            | Some(
                MigrationStatus::None
                | MigrationStatus::Cancelled
                | MigrationStatus::Failed
                | MigrationStatus::Completed,
            ) => break,
            // The token has fired already: a plain wait.
            Some(_) => tokio::time::sleep(POLL).await,
        }
        if Instant::now() >= op.deadline() {
            return Err(Cause::TimedOut {
                what: "QEMU to give the save up",
                waited: UNDO,
            }
            .into());
        }
    }
    let monitor = op.monitor().await?;
    if was_running && !monitor.execute(command::QueryStatus).await?.running {
        monitor.execute(command::Cont).await?;
    }
    Ok(())
}

/// The guest is in the file: its QEMU ends, asked first, killed if it does not.
pub(crate) async fn end(op: &mut AsyncOp, path: &Path) {
    op.extend(UNDO);
    let Some(live) = op.live() else { return };
    live.doom(GoneWhy::Left(
        format!("the guest was saved to {}", path.display()).into(),
    ));
    if let Ok(monitor) = op.monitor().await {
        // Its answer may be lost with the connection it ends; the process is what counts.
        let _answer = monitor.execute(command::Quit).await;
    }
    let Some(process) = &live.process else { return };
    if timeout(op.domain().0.context.defaults.terminate, process.exited())
        .await
        .is_err()
        && let Err(error) = process.kill()
    {
        warn!(domain = op.domain().name(), %error, "QEMU of a saved guest could not be killed");
    }
}

async fn restore(mut op: AsyncOp, path: PathBuf) -> Result<(), Error> {
    let (file, head) = blocking(move || SaveFile::open(&path)).await?;
    let file = Arc::new(file);
    refuse_if_moved(op.domain()).await?;
    let work = Work::Restore {
        path: file.path.clone(),
        save: head.save,
        was_running: head.was_running,
    };
    let live = bring_up(&mut op, &head.guest, work).await?;
    op.set_phase("reading");
    let read = async {
        file.rewind()?;
        let descriptor = OwnedFd::from(file.file.try_clone().map_err(io("duplicate", &file.path))?);
        let monitor = op.monitor().await?;
        monitor
            .execute_with_fds(
                command::Getfd {
                    fdname: FD_NAME.into(),
                },
                vec![descriptor],
            )
            .await?;
        monitor
            .execute(command::MigrateIncoming::new(format!("fd:{FD_NAME}")))
            .await?;
        drop(monitor);
        follow(&mut op, Some(&file)).await?;
        // The last moment at which a request to stop counts: from the next line on the guest is here.
        op.check_cancelled()?;
        op.job().pass_point_of_return();
        // Before the guest runs: from then on the file is its past.
        let restored = file.clone();
        blocking(move || restored.set_state(State::Restored)).await
    };
    if let Err(error) = read.await {
        give_up(&live);
        return Err(error);
    }
    op.extend(UNDO);
    // What was saved is the guest as it ran. A definition that is kept is another matter: it is for the next start.
    op.with_state(|records| {
        if !records.persistent {
            records.definition = Some(head.guest);
        }
    })?;
    op.domain().0.store_definition().await?;
    // What fails from here on leaves a whole guest, paused: it must not be ended for that.
    run(&mut op, &live, head.was_running).await
}

/// What touches a disk, off the threads that everybody shares.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Cause> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| Cause::Panicked(error.to_string()))??)
}
