//! The file a guest is saved to: a head of ours, then QEMU's own migration stream.
//!
//! The head says whether the state behind it is whole and what guest it is of, so that a file that was cut off, or
//! restored already, is not started from. It has a fixed size, so that it can be rewritten in place.
//!
//! ```text
//!  0      "VMWRIGHT SAVE 1\n"
//!  16     "partial \n" | "complete\n" | "restored\n"
//!  25     the length of the JSON text, 8 digits and "\n"
//!  34     the JSON text: the guest, whether it ran, when it was saved
//!  16384  QEMU's stream
//! ```

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Cause, io};
use crate::guest::Guest;

const MAGIC: &[u8; 16] = b"VMWRIGHT SAVE 1\n";
const TEXT: usize = 34;
/// Where QEMU's stream begins.
const HEAD: usize = 16384;

/// What a save file says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Head {
    /// The guest as it was defined.
    pub(crate) guest: Guest,
    /// Whether it ran when it was saved, and should after it was restored.
    pub(crate) was_running: bool,
    /// Which save wrote it, so that no other file of the same path is taken for its own.
    #[serde(default)]
    pub(crate) save: Uuid,
}

/// How far a save file got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// QEMU had not written all of it.
    Partial,
    /// The guest is in it, and nowhere else.
    Complete,
    /// A guest was started from it: what it holds is the past.
    Restored,
}

impl State {
    const ALL: [Self; 3] = [Self::Partial, Self::Complete, Self::Restored];

    fn word(self) -> &'static [u8; 9] {
        match self {
            Self::Partial => b"partial \n",
            Self::Complete => b"complete\n",
            Self::Restored => b"restored\n",
        }
    }
}

/// An open save file.
#[derive(Debug)]
pub(crate) struct SaveFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
}

impl SaveFile {
    /// Makes a new one, partial, at the place where QEMU goes on writing. One that exists is not touched.
    pub(crate) fn create(path: &Path, head: &Head) -> Result<Self, Cause> {
        let text =
            serde_json::to_string(head).map_err(|error| Cause::BadRequest(error.to_string()))?;
        if TEXT + text.len() > HEAD {
            return Err(Cause::BadRequest(format!(
                "the description is {} bytes long, too long to be saved",
                text.len()
            )));
        }
        let mut head = Vec::with_capacity(HEAD);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(State::Partial.word());
        head.extend_from_slice(format!("{:08}\n", text.len()).as_bytes());
        head.extend_from_slice(text.as_bytes());
        head.resize(HEAD, b'\n');
        let file = make_whole(path, &head).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => Cause::Exists(format!("{} exists already", path.display())),
            _ => io("make", path)(error),
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// How far the file there is, if it is the one that this save wrote. What cannot be read is not.
    pub(crate) fn state_of(path: &Path, save: Uuid) -> Option<State> {
        let (_, state, head) = Self::read(path).ok()?;
        (head.save == save).then_some(state)
    }

    /// Opens one to restore from, at the place where QEMU goes on reading.
    pub(crate) fn open(path: &Path) -> Result<(Self, Head), Cause> {
        let damaged = |reason: &str| Cause::Damaged {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let (file, state, head) = Self::read(path)?;
        match state {
            State::Complete => Ok((file, head)),
            State::Partial => Err(damaged(
                "was not saved to its end: the guest was not lost with it, look where it ran",
            )),
            State::Restored => Err(damaged(
                "was restored already: starting from it again would run the past twice",
            )),
        }
    }

    fn read(path: &Path) -> Result<(Self, State, Head), Cause> {
        let damaged = |reason: &str| Cause::Damaged {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(io("open", path))?;
        let mut head = vec![0; HEAD];
        file.read_exact(&mut head)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => damaged("is too short for a saved guest"),
                _ => io("read", path)(error),
            })?;
        if &head[..16] != MAGIC {
            return Err(damaged("is not a saved guest, or one of a newer version"));
        }
        let state = State::ALL
            .into_iter()
            .find(|state| state.word()[..] == head[16..25])
            .ok_or_else(|| damaged("does not say whether it is whole"))?;
        let length = std::str::from_utf8(&head[25..33])
            .ok()
            .and_then(|digits| digits.parse::<usize>().ok());
        let text = length
            .and_then(|length| head.get(TEXT..TEXT + length))
            .ok_or_else(|| damaged("has a damaged head"))?;
        let parsed = serde_json::from_slice(text)
            .map_err(|error| damaged(&format!("has a damaged head: {error}")))?;
        Ok((
            Self {
                path: path.to_owned(),
                file,
            },
            state,
            parsed,
        ))
    }

    /// Records how far it got. On the disk when this returns: the guest ends right after a save is complete.
    pub(crate) fn set_state(&self, state: State) -> Result<(), Cause> {
        let write = || {
            self.file.sync_all()?;
            self.file.write_all_at(state.word(), 16)?;
            self.file.sync_all()
        };
        write().map_err(io("record the state of", &self.path))?;
        let folder = self.path.parent().unwrap_or_else(|| Path::new("/"));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(io("flush the folder", folder))
    }

    /// How many bytes of QEMU's stream have passed, read or written: the offset is shared with QEMU's descriptor.
    pub(crate) fn passed(&self) -> u64 {
        (&self.file)
            .stream_position()
            .unwrap_or(0)
            .saturating_sub(HEAD as u64)
    }

    /// How many bytes of QEMU's stream it holds.
    pub(crate) fn length(&self) -> u64 {
        self.file
            .metadata()
            .map_or(0, |metadata| metadata.len())
            .saturating_sub(HEAD as u64)
    }

    /// Back to where QEMU's stream begins.
    pub(crate) fn rewind(&self) -> Result<(), Cause> {
        (&self.file)
            .seek(SeekFrom::Start(HEAD as u64))
            .map(|_| ())
            .map_err(io("seek in", &self.path))
    }
}

/// A new file with that head, which is there as a whole or not at all: a daemon that is killed here leaves none that
/// nobody could tell whose it is.
pub(crate) fn make_whole(path: &Path, head: &[u8]) -> std::io::Result<File> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    let mut file = match rustix::fs::open(
        folder,
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    ) {
        Ok(file) => File::from(file),
        // A file system without nameless files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            let mut file = options.open(path)?;
            file.write_all(head)?;
            return Ok(file);
        }
        Err(error) => return Err(error.into()),
    };
    file.write_all(head)?;
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, nameless, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(folder: &Path) -> SaveFile {
        let head = Head {
            guest: Guest::new("web"),
            was_running: true,
            save: Uuid::from_u128(7),
        };
        let file = SaveFile::create(&folder.join("web.save"), &head).unwrap();
        (&file.file).write_all(b"stream").unwrap();
        file
    }

    #[test]
    fn a_complete_file_gives_back_its_guest_and_the_stream_behind_the_head() {
        let folder = tempfile::tempdir().unwrap();
        let file = saved(folder.path());
        assert_eq!((file.passed(), file.length()), (6, 6));
        file.set_state(State::Complete).unwrap();
        let (mut file, head) = SaveFile::open(&file.path).unwrap();
        assert_eq!(head.guest.name, "web");
        let mut stream = String::new();
        file.file.read_to_string(&mut stream).unwrap();
        assert_eq!(stream, "stream");
    }

    #[test]
    fn what_is_not_a_complete_save_is_refused_by_its_own_reason() {
        let folder = tempfile::tempdir().unwrap();
        let file = saved(folder.path());
        let reason = |path: &Path| match SaveFile::open(path).expect_err("refused") {
            Cause::Damaged { reason, .. } => reason,
            other => panic!("{other:?}"),
        };
        assert!(reason(&file.path).contains("not saved to its end"));
        let save = Uuid::from_u128(7);
        assert_eq!(SaveFile::state_of(&file.path, save), Some(State::Partial));
        assert_eq!(SaveFile::state_of(&file.path, Uuid::nil()), None);
        file.set_state(State::Restored).unwrap();
        assert!(reason(&file.path).contains("restored already"));

        let text = folder.path().join("text");
        std::fs::write(&text, "a letter").unwrap();
        assert!(reason(&text).contains("too short"));
        std::fs::write(&text, vec![b'x'; HEAD + 1]).unwrap();
        assert!(reason(&text).contains("not a saved guest"));
    }

    #[test]
    fn a_file_that_is_there_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let file = saved(folder.path());
        let head = Head {
            guest: Guest::new("other"),
            was_running: false,
            save: Uuid::nil(),
        };
        assert!(matches!(
            SaveFile::create(&file.path, &head),
            Err(Cause::Exists(_))
        ));
    }
}
