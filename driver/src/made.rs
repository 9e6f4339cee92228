//! A file that a job makes: written down before it is made, and known again after a kill at any instant, so that what is
//! removed is never somebody else's.
//!
//! ```text
//!  named in the record ─► made, with its mark in it ─► its inode in the record ─► empty, ready to be filled
//!                          there whole or not at all     from here on it is known whatever is in it
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Cause, io};
use crate::save_file::make_whole;

/// What a file begins with that was made and is not known by its inode yet.
const MARK: &str = "vmwright made this: ";

/// A file that a job makes, or is about to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// Where.
    pub(crate) path: PathBuf,
    /// What is in it at first; no other file has that.
    mark: Uuid,
    /// Which file it is, once it is there: device and inode.
    inode: Option<(u64, u64)>,
}

impl Made {
    /// One that is to be. Refused if something is there already.
    pub(crate) fn plan(path: &Path) -> Result<Self, Cause> {
        if !path.is_absolute() {
            let text = format!("{} is not an absolute path", path.display());
            return Err(Cause::BadRequest(text));
        }
        match fs::symlink_metadata(path) {
            Ok(_) => Err(exists(path)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self {
                path: path.to_owned(),
                mark: Uuid::new_v4(),
                inode: None,
            }),
            Err(error) => Err(io("look at", path)(error)),
        }
    }

    /// One of a test that touches no file.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Self {
        Self {
            path: "/nowhere".into(),
            mark: Uuid::nil(),
            inode: None,
        }
    }

    /// Makes it, with its mark in it. To be written down before it is [emptied](Self::empty).
    pub(crate) fn make(&mut self) -> Result<(), Cause> {
        let made = make_whole(&self.path, self.text().as_bytes()).and_then(|file| file.metadata());
        let metadata = made.map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => exists(&self.path),
            _ => io("make", &self.path)(error),
        })?;
        self.inode = Some((metadata.dev(), metadata.ino()));
        Ok(())
    }

    /// The file without its mark, open for writing.
    pub(crate) fn empty(&self) -> Result<File, Cause> {
        let options = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .truncate(true)
                .clone()
        };
        let file = options().mode(0o600).open(&self.path);
        file.map_err(io("open", &self.path))
    }

    /// Removes it, if it is there and the one that was made.
    pub(crate) fn remove(&self) -> Result<(), Cause> {
        if !self.is_there().map_err(io("look at", &self.path))? {
            return Ok(());
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(io("remove", &self.path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Flushes what is in it, and that it is there.
    pub(crate) fn flush(&self) -> Result<(), Cause> {
        let folder = self.path.parent().unwrap_or_else(|| Path::new("/"));
        File::open(&self.path)
            .and_then(|file| file.sync_all())
            .and_then(|()| File::open(folder)?.sync_all())
            .map_err(io("flush", &self.path))
    }

    fn is_there(&self) -> std::io::Result<bool> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&self.path);
        let file = match file {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Ok(false),
            file => file?,
        };
        let metadata = file.metadata()?;
        if self.inode == Some((metadata.dev(), metadata.ino())) {
            return Ok(true);
        }
        // A kill between the making and the note of it.
        let text = self.text();
        let mut head = Vec::new();
        file.take(text.len() as u64 + 1).read_to_end(&mut head)?;
        Ok(self.inode.is_none() && head == text.as_bytes())
    }

    fn text(&self) -> String {
        format!("{MARK}{}\n", self.mark)
    }
}

fn exists(path: &Path) -> Cause {
    Cause::Exists(format!("{} exists already", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_is_known_again_at_every_step_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let planned = Made::plan(&path).unwrap();
        planned.remove().unwrap();
        let mut made = planned.clone();
        made.make().unwrap();
        // The kill came before the inode was written down.
        planned.remove().unwrap();
        assert!(!path.exists());
        let mut made_again = made.clone();
        made_again.make().unwrap();
        made_again.empty().unwrap().write_all(b"content").unwrap();
        made_again.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_somebody_else_has_put_there_is_neither_written_over_nor_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let mut planned = Made::plan(&path).unwrap();
        fs::write(&path, b"theirs").unwrap();
        assert!(Made::plan(&path).is_err());
        assert!(planned.make().is_err());
        planned.remove().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        fs::remove_file(&path).unwrap();
        planned.make().unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        fs::write(&path, b"theirs").unwrap();
        planned.remove().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        assert!(Made::plan(Path::new("relative")).is_err());
    }
}
