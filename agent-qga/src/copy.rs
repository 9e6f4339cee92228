//! Whole files, copied in and out of the guest.
//!
//! A copy goes in chunks of [`CHUNK`] bytes, whatever the file's size, and has a digest. Reading
//! a file that the guest is writing gives what was there at the time, chunk by chunk; no digest
//! helps against a guest that lies about its own files.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout_at;

use crate::agent::{Deadline, Qga};
use crate::command::{Command, FileRead, FileWrite};
use crate::error::Error;
use crate::ext::{Limits, QgaExt as _};
use crate::file::{CHUNK, GuestFile};

/// The SHA-256 of a file. Shown and read as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// As bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// A text that is no SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a digest is 64 hexadecimal digits")]
#[non_exhaustive]
pub struct NoDigest;

impl FromStr for Digest {
    type Err = NoDigest;

    fn from_str(text: &str) -> Result<Self, NoDigest> {
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(NoDigest);
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| NoDigest)?;
        }
        Ok(Self(bytes))
    }
}

/// A copy that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transferred {
    /// How many bytes.
    pub bytes: u64,
    /// Their digest.
    pub sha256: Digest,
}

/// Copies a file out of the guest.
///
/// `expected` is what the digest must be, if that is known: from an earlier copy, or from
/// [`digest_in_guest`]. No more than `limit` bytes are taken.
///
/// # Errors
///
/// As [`Qga::call`]; `TooLarge` past `limit`, `DigestMismatch`, and `Local` if `to` fails. `to` then
/// holds an unknown part of the file.
///
/// # Cancel safety
///
/// Cancel safe towards the guest. What `to` got is an unknown part of the file.
///
/// # Panics
///
/// Outside of a tokio runtime.
pub async fn download(
    qga: Arc<dyn Qga>,
    path: &str,
    to: &mut (impl AsyncWrite + Unpin + Send),
    limit: u64,
    expected: Option<Digest>,
    deadline: Deadline,
) -> Result<Transferred, Error> {
    let mut file = GuestFile::open(qga, path, "r", deadline).await?;
    let mut content = Content::default();
    loop {
        let bytes = file.read(CHUNK, deadline).await?;
        if bytes.is_empty() {
            break;
        }
        content.add(&bytes);
        if content.bytes > limit {
            return Err(Error::file_too_large(FileRead::NAME, limit));
        }
        local(FileRead::NAME, deadline, to.write_all(&bytes)).await?;
    }
    local(FileRead::NAME, deadline, to.flush()).await?;
    file.close(deadline).await?;
    let done = content.done();
    match expected {
        Some(expected) => same(FileRead::NAME, expected, done.sha256).map(|()| done),
        None => Ok(done),
    }
}

/// Copies into a file of the guest, reads it back, and compares.
///
/// The file is made anew, and there under its name while it is written.
///
/// # Errors
///
/// As [`Qga::call`]; `DigestMismatch` if the guest reads back something else, and `Local` if `from`
/// fails. The guest then holds an unknown part of the file.
///
/// # Cancel safety
///
/// Cancel safe towards later calls. The guest holds an unknown part of the file.
///
/// # Panics
///
/// Outside of a tokio runtime.
pub async fn upload(
    qga: Arc<dyn Qga>,
    path: &str,
    from: &mut (impl AsyncRead + Unpin + Send),
    deadline: Deadline,
) -> Result<Transferred, Error> {
    let mut file = GuestFile::open(qga, path, "w+", deadline).await?;
    let mut content = Content::default();
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = local(FileWrite::NAME, deadline, from.read(&mut chunk)).await?;
        if count == 0 {
            break;
        }
        content.add(&chunk[..count]);
        file.write(&chunk[..count], deadline).await?;
    }
    drop(chunk);
    file.flush(deadline).await?;
    let sent = content.done();
    file.seek(0, deadline).await?;
    let mut found = Content::default();
    // One byte more than was sent is one too many: a guest cannot make this last.
    while found.bytes <= sent.bytes {
        let bytes = file.read(CHUNK, deadline).await?;
        if bytes.is_empty() {
            break;
        }
        found.add(&bytes);
    }
    file.close(deadline).await?;
    same(FileWrite::NAME, sent.sha256, found.done().sha256).map(|()| sent)
}

/// The digest of a file as the guest's own `sha256sum` tells it. Nothing is copied.
///
/// # Errors
///
/// As [`QgaExt::run`](crate::QgaExt::run); `Refused` with class `sha256sum` if the program failed,
/// `UnexpectedReply` if it told no digest.
///
/// # Cancel safety
///
/// Cancel safe.
pub async fn digest_in_guest(
    qga: &dyn Qga,
    path: &str,
    deadline: Deadline,
) -> Result<Digest, Error> {
    const PROGRAM: &str = "sha256sum";
    let limits = Limits {
        stdout: 64,
        stderr: 256,
    };
    // By its standard input: names with odd characters are quoted in its output.
    let arguments = ["-c", "exec sha256sum <\"$0\"", path];
    let output = qga
        .run("/bin/sh", &arguments, b"", limits, deadline)
        .await?;
    if !output.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(Error::refused(PROGRAM, PROGRAM, why.trim()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    text.parse()
        .map_err(|error: NoDigest| Error::unexpected_reply(PROGRAM, &error))
}

/// What has passed so far.
#[derive(Default)]
struct Content {
    bytes: u64,
    hasher: Sha256,
}

impl Content {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.hasher.update(bytes);
    }

    fn done(self) -> Transferred {
        Transferred {
            bytes: self.bytes,
            sha256: Digest(self.hasher.finalize().into()),
        }
    }
}

fn same(command: &str, expected: Digest, found: Digest) -> Result<(), Error> {
    if expected == found {
        return Ok(());
    }
    Err(Error::digest_mismatch(
        command,
        expected.to_string(),
        found.to_string(),
    ))
}

/// The local end of a transfer has the same deadline.
async fn local<T>(
    command: &str,
    deadline: Deadline,
    step: impl Future<Output = io::Result<T>>,
) -> Result<T, Error> {
    match timeout_at(deadline, step).await {
        Ok(done) => done.map_err(|error| Error::local(command, error)),
        Err(late) => Err(Error::local(command, late.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_shown_and_read_alike() {
        let digest = Digest::of(b"abc");
        // FIPS 180-2, appendix B.1.
        let shown = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), shown);
        assert_eq!(shown.parse(), Ok(digest));
        for wrong in [
            "",
            &shown[1..],
            &shown.replace('b', "g"),
            "ü".repeat(32).as_str(),
        ] {
            assert_eq!(wrong.parse::<Digest>(), Err(NoDigest), "{wrong}");
        }
    }
}
