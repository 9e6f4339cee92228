//! An open file in the guest, which closes itself.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::runtime::Handle;
use tokio::time::{Duration, Instant};

use crate::agent::{Deadline, Qga};
use crate::command::{
    Command, FileClose, FileFlush, FileOpen, FileRead, FileSeek, FileWrite, Whence,
};
use crate::error::{Closed, Effect, Error};
use crate::ext::QgaExt as _;

/// What one command of a copy carries, in bytes. It is held a few times over, in base64 and as
/// JSON, and an emulated serial port carries it in well under a second.
pub const CHUNK: usize = 128 * 1024;

/// What one [`GuestFile::read`] asks for at most: in base64 it fits the default
/// [`Options::max_message`](crate::Options::max_message).
const READ_MAX: usize = 8 << 20;

/// How long a file that was dropped may take to be closed.
const CLOSE: Duration = Duration::from_secs(30);

/// A file that is open in the guest.
///
/// Drop has the agent close it, by a task on the runtime it was opened on; it never blocks and may
/// happen on any thread. What drop cannot do is to close it when the agent does not answer within
/// half a minute: then it stays open until the agent ends.
#[must_use = "the file is closed as soon as it is dropped"]
pub struct GuestFile {
    qga: Arc<dyn Qga>,
    handle: i64,
    runtime: Handle,
    /// Where the next read or write begins.
    at: u64,
    /// The place in the guest may be another: a read or a write was dropped or failed.
    torn: bool,
    open: bool,
}

impl GuestFile {
    /// Opens a file. `mode` is as for `fopen`, such as `r`, `w+` or `a`.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`]. If the effect is `Unknown`, it may stay open until the agent ends.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a file that was opened for nobody is closed.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn open(
        qga: Arc<dyn Qga>,
        path: &str,
        mode: &str,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let command = FileOpen {
            path: path.to_owned(),
            mode: Some(mode.to_owned()),
        };
        let opening = tokio::spawn(async move {
            let handle = qga.execute(command, deadline).await?;
            Ok(Self {
                qga,
                handle,
                runtime: Handle::current(),
                at: 0,
                torn: false,
                open: true,
            })
        });
        opening
            .await
            .unwrap_or_else(|_| Err(stopped(FileOpen::NAME)))
    }

    /// Reads up to `count` bytes, and up to 8 MiB; none means that the end was met.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`]; `UnexpectedReply` if the agent answers more than was asked for, or neither
    /// bytes nor the end.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the next call reads from the same place.
    pub async fn read(&mut self, count: usize, deadline: Deadline) -> Result<Vec<u8>, Error> {
        let count = count.min(READ_MAX);
        self.mend(deadline).await?;
        let command = FileRead {
            handle: self.handle,
            count: Some(count as u64),
        };
        self.torn = true;
        let chunk = self.qga.execute(command, deadline).await?;
        let lie = |what: &str| Err(Error::unexpected_reply(FileRead::NAME, &what));
        if chunk.buf_b64.len() > count.div_ceil(3) * 4 {
            return lie("more bytes than it was asked for");
        }
        let bytes = BASE64
            .decode(chunk.buf_b64)
            .map_err(|error| Error::unexpected_reply(FileRead::NAME, &error))?;
        if bytes.len() as u64 != chunk.count || bytes.len() > count {
            return lie("another number of bytes than it says");
        }
        if bytes.is_empty() && !chunk.eof && count > 0 {
            return lie("neither bytes nor the end");
        }
        self.at += bytes.len() as u64;
        self.torn = false;
        Ok(bytes)
    }

    /// Writes all bytes, in chunks.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`]; `UnexpectedReply` if the agent says that it wrote none, or too many.
    ///
    /// # Cancel safety
    ///
    /// Of a call that was dropped, the beginning may be written; the next call writes from where
    /// the last whole chunk ended. Not so in mode `a`, which always writes at the end.
    pub async fn write(&mut self, mut bytes: &[u8], deadline: Deadline) -> Result<(), Error> {
        while !bytes.is_empty() {
            self.mend(deadline).await?;
            let piece = &bytes[..bytes.len().min(CHUNK)];
            let command = FileWrite {
                handle: self.handle,
                buf_b64: BASE64.encode(piece),
                count: None,
            };
            self.torn = true;
            let written = self.qga.execute(command, deadline).await?.count;
            let count = usize::try_from(written).unwrap_or(usize::MAX);
            if count == 0 || count > piece.len() {
                let what = format!("{written} of {} bytes written", piece.len());
                return Err(Error::unexpected_reply(FileWrite::NAME, &what));
            }
            self.at += written;
            self.torn = false;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    /// Goes to a place, counted from the beginning.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it is where it was or where it should be, and the next read or write begins
    /// where it should.
    pub async fn seek(&mut self, place: u64, deadline: Deadline) -> Result<(), Error> {
        self.at = place;
        self.torn = true;
        self.mend(deadline).await
    }

    /// Has the guest write what it holds back.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn flush(&mut self, deadline: Deadline) -> Result<(), Error> {
        let command = FileFlush {
            handle: self.handle,
        };
        self.qga.execute(command, deadline).await.map(drop)
    }

    /// Closes it, and tells whether that went well: a guest's disk may be full only then.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`]. It is not closed again.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped, it is closed by the drop, if that is still to be done.
    pub async fn close(mut self, deadline: Deadline) -> Result<(), Error> {
        let command = FileClose {
            handle: self.handle,
        };
        let closed = self.qga.execute(command, deadline).await.map(drop);
        self.open = closed
            .as_ref()
            .is_err_and(|error| error.effect() == Effect::None);
        closed
    }

    /// Goes back to where the last call that ended well left off.
    async fn mend(&mut self, deadline: Deadline) -> Result<(), Error> {
        if self.torn {
            let offset = i64::try_from(self.at).unwrap_or(i64::MAX);
            let command = FileSeek {
                handle: self.handle,
                offset,
                whence: Whence::Set,
            };
            let position = self.qga.execute(command, deadline).await?.position;
            if position != offset {
                let what = format!("at {position}, not at {offset}");
                return Err(Error::unexpected_reply(FileSeek::NAME, &what));
            }
            self.torn = false;
        }
        Ok(())
    }
}

impl Drop for GuestFile {
    fn drop(&mut self) {
        if self.open {
            let (qga, handle) = (self.qga.clone(), self.handle);
            self.runtime.spawn(async move {
                let deadline = Instant::now() + CLOSE;
                if let Err(error) = qga.execute(FileClose { handle }, deadline).await {
                    tracing::debug!(%error, "a file may stay open in the guest");
                }
            });
        }
    }
}

impl fmt::Debug for GuestFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestFile")
            .field("handle", &self.handle)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

pub(crate) fn stopped(command: &str) -> Error {
    Error::closed(command, Closed::Stopped, Effect::Unknown)
}
