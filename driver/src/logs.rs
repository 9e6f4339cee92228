//! What QEMU and a guest's serial port say, kept in files that cannot grow without end.
//!
//! ```text
//!  QEMU ──stderr──► fifo, 64 KiB, never blocks ──► task ──► qemu.log, qemu.log.1     at most 1 MiB each,
//!  QEMU ──serial──► socket ──────────────────────► task ──► PATH, PATH.1             at most 1 MiB a second
//! ```
//!
//! While no daemon runs QEMU goes on and fills no disk: the fifo keeps the first 64 KiB, what comes after that is
//! dropped, and a serial port that nobody reads is one that is not plugged in. Knows no guest and no job.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::fs::{File, OpenOptions, rename};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

/// A file that is as long becomes the older one, in the place of the last.
const LIMIT: u64 = 1 << 20;
/// Who says more than the limit in this waits: its own pipe fills then, and nobody else pays for it.
const WINDOW: Duration = Duration::from_secs(1);
const CHUNK: usize = 8192;

/// A fifo's two ends: ours to read, and one for QEMU, to which it can always write and never waits.
pub(crate) fn fifo(path: &Path) -> io::Result<(OwnedFd, std::fs::File)> {
    use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let ours = reader(path)?;
    // Both ends: a fifo that nobody else reads is no broken pipe then, and keeps what is in it.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let theirs = rustix::fs::open(path, flags, Mode::empty())?;
    Ok((ours, theirs.into()))
}

/// The end that is ours, of a fifo that is there already.
pub(crate) fn reader(path: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Keeps what comes out of the fifo until QEMU has ended.
pub(crate) async fn keep_fifo(fifo: OwnedFd, path: PathBuf) {
    let kept = async {
        let from = pipe::Receiver::from_owned_fd(fifo)?;
        keep(from, &path).await
    };
    if let Err(error) = kept.await {
        warn!(path = %path.display(), %error, "what QEMU says is not kept");
    }
}

/// Keeps what comes out of the serial port behind that socket until QEMU has ended.
pub(crate) async fn keep_serial(socket: PathBuf, path: PathBuf) {
    let kept = async { keep(UnixStream::connect(&socket).await?, &path).await };
    if let Err(error) = kept.await {
        warn!(path = %path.display(), %error, "what the serial port says is not kept");
    }
}

async fn keep(mut from: impl AsyncRead + Unpin, path: &Path) -> io::Result<()> {
    let mut log = Log::open(path).await?;
    let mut chunk = vec![0; CHUNK];
    let (mut since, mut taken) = (Instant::now(), 0);
    loop {
        let read = from.read(&mut chunk).await?;
        if read == 0 {
            return Ok(());
        }
        log.append(&chunk[..read]).await?;
        taken += read as u64;
        if since.elapsed() >= WINDOW {
            (since, taken) = (Instant::now(), 0);
        } else if taken >= LIMIT {
            sleep_until(since + WINDOW).await;
        }
    }
}

/// A file and the one before it, neither longer than the limit.
struct Log {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Log {
    async fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .await?;
        Ok(Self {
            path: path.to_owned(),
            length: file.metadata().await?.len(),
            file,
        })
    }

    async fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if self.length + text.len() as u64 > LIMIT {
            let mut older = OsString::from(&self.path);
            older.push(".1");
            rename(&self.path, older).await?;
            *self = Self::open(&self.path).await?;
        }
        self.length += text.len() as u64;
        self.file.write_all(text).await?;
        // Who reads the file sees what was said, not what was said before that.
        self.file.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(path: &Path) -> u64 {
        std::fs::metadata(path).map_or(0, |metadata| metadata.len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_fills_two_files_and_the_last_words_are_in_the_newer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut said = vec![b'x'; 5 * LIMIT as usize];
        said.extend_from_slice(b"last words");
        keep(&said[..], &path).await.unwrap();
        assert!(length(&path) <= LIMIT);
        assert!(length(&dir.path().join("log.1")) <= LIMIT);
        assert!(std::fs::read(&path).unwrap().ends_with(b"last words"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_read_no_faster_than_the_limit_allows() {
        let dir = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let said = vec![b'x'; 10 * LIMIT as usize];
        keep(&said[..], &dir.path().join("log")).await.unwrap();
        assert!(began.elapsed() >= 9 * WINDOW);
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_reads_takes_what_fits_and_drops_the_rest() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let (ours, mut theirs) = fifo(&path).unwrap();
        drop(ours);
        theirs.write_all(b"first words").unwrap();
        while theirs.write(&[b'x'; 4096]).is_ok() {}
        let log = dir.path().join("log");
        let again = reader(&path).unwrap();
        drop(theirs);
        keep_fifo(again, log.clone()).await;
        assert!(std::fs::read(&log).unwrap().starts_with(b"first words"));
        assert!(length(&log) <= 1 << 16);
    }
}
