//! The guest's memory into a file, for a post-mortem. The guest stands still meanwhile, and goes on if it ran.
//!
//! ```text
//!  QEMU ──► pipe ──► splice ──► file
//!            └─ cut by a cancel, the deadline, the end of the daemon: QEMU's next write fails, and it lets the guest go on
//! ```
//!
//! QEMU has no command to stop a dump, and refuses `stop`, `cont` and a second dump while one is under way. What it cannot
//! do is write into a pipe that nobody reads. So the file is not handed to it: what it writes passes through here, unread.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use job_core::{AsyncKind, Guard};
use monitor_qmp::command::{self, DumpStatus, RunState};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::net::unix::pipe::Receiver;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use crate::domain::Domain;
use crate::error::{Cause, Error, io};
use crate::made::Made;
use crate::ops::save::blocking;
use crate::ops::{AsyncOp, Call};
use crate::records::Work;

/// How often QEMU is asked how far it is. The end of the pipe tells when it is done.
const POLL: Duration = Duration::from_millis(100);
/// What undoing may take, whatever was left of the job's own time.
const UNDO: Duration = Duration::from_secs(30);
/// The name under which QEMU keeps its end of the pipe.
const FD_NAME: &str = "vmwright-dump";
/// As much as a pipe holds for whoever has no privileges.
const PIPE: usize = 1 << 20;

/// How memory is laid out in a dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DumpFormat {
    /// An ELF core with the guest's physical memory. As long as that.
    #[default]
    Elf,
    /// What `makedumpfile` calls flattened, each page compressed by zlib: `makedumpfile -R` or `crash` read it.
    KdumpZlib,
    /// The same by lzo, where QEMU was built with it.
    KdumpLzo,
    /// The same by snappy, where QEMU was built with it.
    KdumpSnappy,
}

impl DumpFormat {
    /// QEMU's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Elf => "elf",
            Self::KdumpZlib => "kdump-zlib",
            Self::KdumpLzo => "kdump-lzo",
            Self::KdumpSnappy => "kdump-snappy",
        }
    }
}

/// What became of a dump.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Dumped {
    /// The file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
}

impl Domain {
    /// Writes the guest's memory to a new file. The guest stands still meanwhile; if it ran, it runs again afterwards.
    ///
    /// Cancelled, failed or out of time, the file is removed and the guest runs on at once, whatever was left to write; so
    /// it does when this driver is killed, and the next one removes the file. A format that QEMU was not built with is
    /// refused as [`State`](crate::ErrorKind::State).
    pub fn dump(&self, path: impl Into<PathBuf>, format: DumpFormat) -> Call<Dumped> {
        let (domain, path) = (self.clone(), path.into());
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let mask = AsyncKind::Dump.default_mask();
            let work = move |op: AsyncOp| dump(op, path, format);
            domain
                .run_async("dump", AsyncKind::Dump, mask, deadline, work)
                .await
        })
    }
}

async fn dump(mut op: AsyncOp, path: PathBuf, format: DumpFormat) -> Result<Dumped, Error> {
    op.set_phase("preparing");
    let monitor = op.monitor().await?;
    let known = monitor
        .execute(command::QueryDumpGuestMemoryCapability)
        .await?;
    if !known.formats.iter().any(|known| known == format.name()) {
        let (wanted, known) = (format.name(), known.formats.join(", "));
        let text = format!("this QEMU dumps no {wanted}, of formats it has {known}");
        return Err(Cause::State(text).into());
    }
    let was_running = monitor.execute(command::QueryStatus).await?.running;
    drop(monitor);
    let file = op.make_file(&path, |file| Work::Dump {
        file,
        is_whole: false,
        was_running,
    });
    let file = file.await?;
    let written = write(&mut op, &file, format).await;
    let written = match written {
        Ok(bytes) => op.check_cancelled().map(|()| bytes),
        Err(error) => Err(error),
    };
    let bytes = match written {
        Ok(bytes) => bytes,
        Err(error) => {
            undo(&mut op, &file).await;
            return Err(error);
        }
    };
    op.job().pass_point_of_return();
    op.set_phase("finishing");
    let whole = file.clone();
    op.extend(UNDO);
    if let Err(error) = blocking(move || whole.flush()).await {
        undo(&mut op, &file).await;
        return Err(error);
    }
    // From here on a kill leaves the file: nobody is told of it, and it is whole.
    let work = Work::Dump {
        file,
        is_whole: true,
        was_running,
    };
    op.note_work(work).await?;
    op.set_phase("ending");
    Ok(Dumped { path, bytes })
}

/// Has QEMU dump into a pipe, and what comes out of it poured into the file, to the end of both.
async fn write(op: &mut AsyncOp, file: &Made, format: DumpFormat) -> Result<u64, Error> {
    let failed = || io("make a pipe to", file.path.clone());
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed()(error.into()))?;
    // A shorter pipe is slower, and as good.
    if let Err(error) = fcntl_setpipe_size(&reader, PIPE) {
        debug!(%error, "the pipe of a dump is as long as pipes are");
    }
    rustix::io::ioctl_fionbio(&reader, true).map_err(|error| failed()(error.into()))?;
    let reader = Receiver::from_owned_fd(reader).map_err(failed())?;
    let empty = file.clone();
    let open = blocking(move || empty.empty()).await?;
    start(op, writer, format).await?;
    op.set_phase("writing");
    let began = Instant::now();
    let pouring = pour(reader, open, &file.path);
    tokio::pin!(pouring);
    let bytes = loop {
        tokio::select! {
            poured = &mut pouring => break poured?,
            () = op.pause(POLL) => {}
        }
        op.check_cancelled()?;
        if Instant::now() >= op.deadline() {
            return Err(Cause::TimedOut {
                what: "QEMU to dump the guest's memory",
                waited: began.elapsed(),
            }
            .into());
        }
        let dump = op.monitor().await?.execute(command::QueryDump).await?;
        op.report(dump.completed, dump.total);
    };
    let dump = over(op).await?;
    op.report(dump.completed, dump.total);
    if dump.status != DumpStatus::Completed {
        let text = "QEMU gave the dump up; its log may say why";
        return Err(Cause::Failed(text.into()).into());
    }
    Ok(bytes)
}

async fn start(op: &mut AsyncOp, writer: OwnedFd, format: DumpFormat) -> Result<(), Error> {
    let monitor = op.monitor().await?;
    let fdname = FD_NAME.to_owned();
    monitor
        .execute_with_fds(command::Getfd { fdname }, vec![writer])
        .await?;
    let mut dump = command::DumpGuestMemory::detached(format!("fd:{FD_NAME}"));
    dump.format = Some(format.name().to_owned());
    monitor.execute(dump).await?;
    Ok(())
}

/// Pours the pipe into the file until QEMU closes it. Dropped, the pipe is cut as soon as the piece under way is written.
async fn pour(reader: Receiver, file: File, path: &Path) -> Result<u64, Error> {
    let (reader, file) = (Arc::new(reader), Arc::new(file));
    let mut bytes = 0;
    loop {
        reader
            .readable()
            .await
            .map_err(io("read a pipe to", path))?;
        let (from, to) = (reader.clone(), file.clone());
        // A disk may be slow, and a file has no other way to say so.
        let piece = blocking(move || {
            Ok(from.try_io(|| {
                let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
                Ok(splice(&*from, None, &*to, None, PIPE, flags)?)
            }))
        });
        match piece.await? {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes += count as u64,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(io("write", path)(error).into()),
        }
    }
}

/// Waits until QEMU has nothing to do with the dump any more: it tells of the end first, and then lets the guest go on.
pub(crate) async fn over(op: &mut AsyncOp) -> Result<command::DumpResult, Error> {
    let mut news = op.domain().subscribe();
    let began = Instant::now();
    loop {
        let monitor = op.monitor().await?;
        let dump = monitor.execute(command::QueryDump).await?;
        let status = monitor.execute(command::QueryStatus).await?.status;
        drop(monitor);
        if dump.status != DumpStatus::Active && status != RunState::SaveVm {
            return Ok(dump);
        }
        if Instant::now() >= op.deadline() {
            return Err(Cause::TimedOut {
                what: "QEMU to give the dump up",
                waited: began.elapsed(),
            }
            .into());
        }
        // An event tells of the end, another that the guest goes on; how it is, only QEMU itself.
        let _news_or_late = timeout(POLL, news.next()).await;
    }
}

/// Leaves the guest as it was and no file behind. The pipe is cut already.
async fn undo(op: &mut AsyncOp, file: &Made) {
    op.extend(UNDO);
    op.set_phase("undoing");
    let file = file.clone();
    let undone = match over(op).await {
        Ok(_) => blocking(move || file.remove()).await,
        Err(error) => Err(error),
    };
    if let Err(error) = undone
        && op.job().check().is_ok()
    {
        let error = format!("{error:#}");
        warn!(domain = op.domain().name(), error, "a dump was not undone");
        op.leave_unsettled().await;
    }
}
