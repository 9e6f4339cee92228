//! One file a record, to whose end each version of it is added: the last that is whole counts.
//!
//! ```text
//!  VERSION RS VERSION RS VERSION RS     the third counts
//!  VERSION RS VERSION RS VERS           the second: a host went down in the middle of the third
//!  VERSION                              what an earlier release wrote, which replaced the file
//! ```
//!
//! For what is waited for while a guest stands still: to add costs the file system one commit, to replace the file two, of
//! its text and of its name (1.3 against 6.2 ms, ext4, measured). Room is taken when the file is made, so that a disk
//! that is full says so then and not at a later version.
//!
//! Knows neither shelves nor what a version says.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// ASCII's record separator. No JSON text has it, not even in a string.
const END: u8 = 0x1e;
/// What a file may have before it is replaced by its last version. A migration writes ten, of half a KiB each; more come
/// only from a daemon that is killed again and again, or a peer that begins anew again and again.
const ROOM: u64 = 16 * 1024;

/// A history of one version, for a new file.
///
/// # Errors
///
/// The version has the byte that ends one.
pub(super) fn of(version: &[u8]) -> io::Result<Vec<u8>> {
    if version.contains(&END) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a record with a record separator in it",
        ));
    }
    Ok([version, &[END]].concat())
}

/// Takes room for the versions to come.
///
/// # Errors
///
/// The disk is full. A file system that cannot do it is no error.
pub(super) fn reserve(file: &File) -> io::Result<()> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, ROOM) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        done => Ok(done?),
    }
}

/// Adds `version` to the history at `path`, and returns when it is on the disk. `false`: nothing was done, since there is
/// none that it could be added to; it is to be replaced by a new one.
///
/// # Errors
///
/// Its predecessor counts.
pub(super) fn add(path: &Path, version: &[u8]) -> io::Result<bool> {
    let text = of(version)?;
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    let length = file.metadata()?.len();
    let mut last = [0];
    if length == 0 || length + text.len() as u64 > ROOM {
        return Ok(false);
    }
    file.read_exact_at(&mut last, length - 1)?;
    if last != [END] {
        return Ok(false);
    }
    let added = file
        .write_all_at(&text, length)
        .and_then(|()| file.sync_data());
    if let Err(error) = added {
        // The first failure is the one to tell. What this one leaves has no end, or is one that was not promised.
        let _cut = file.set_len(length);
        return Err(error);
    }
    Ok(true)
}

/// The version that counts.
pub(super) fn last(history: &[u8]) -> &[u8] {
    let Some(end) = history.iter().rposition(|byte| *byte == END) else {
        return history;
    };
    let whole = &history[..end];
    let begin = whole.iter().rposition(|byte| *byte == END);
    &whole[begin.map_or(0, |before| before + 1)..]
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn history(versions: &[&[u8]]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let all: Vec<_> = versions
            .iter()
            .map(|version| of(version).unwrap())
            .collect();
        fs::write(&path, all.concat()).unwrap();
        (dir, path)
    }

    #[test]
    fn wherever_a_version_was_cut_off_it_is_whole_or_its_predecessor_is() {
        let (_dir, path) = history(&[b"{1}"]);
        assert!(add(&path, b"{\n22\n}").unwrap());
        assert!(add(&path, b"{333}").unwrap());
        let whole = fs::read(&path).unwrap();
        let first = of(b"{1}").unwrap().len();
        let second = first + of(b"{\n22\n}").unwrap().len();
        for cut in first..=whole.len() {
            let expected: &[u8] = match cut {
                cut if cut == whole.len() => b"{333}",
                cut if cut >= second => b"{\n22\n}",
                _ => b"{1}",
            };
            assert_eq!(last(&whole[..cut]), expected, "{cut}");
        }
    }

    #[test]
    fn nothing_is_added_behind_what_has_no_end() {
        for left in [&b"{1"[..], b"", b"{1}\x1e{2"] {
            let (_dir, path) = history(&[]);
            fs::write(&path, left).unwrap();
            assert!(!add(&path, b"{3}").unwrap());
            assert_eq!(fs::read(&path).unwrap(), left);
        }
        let (_dir, path) = history(&[]);
        fs::remove_file(&path).unwrap();
        assert!(!add(&path, b"{3}").unwrap(), "there is no file");
    }

    #[test]
    fn a_history_ends_where_its_room_does() {
        let (_dir, path) = history(&[b"{}"]);
        let mut added = 0;
        while add(&path, &[b' '; 1000]).unwrap() {
            added += 1;
        }
        assert_eq!(added, 16);
        assert!(fs::metadata(&path).unwrap().len() <= ROOM);
    }

    #[test]
    fn room_is_taken_before_it_is_needed() {
        let (_dir, path) = history(&[b"{}"]);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        reserve(&file).unwrap();
        let about = file.metadata().unwrap();
        assert!(about.blocks() * 512 >= ROOM, "{}", about.blocks());
        assert_eq!(about.len(), 3);
    }

    #[test]
    fn a_version_cannot_pretend_to_be_two() {
        let (_dir, path) = history(&[b"{}"]);
        assert!(add(&path, b"{1}\x1e{2}").is_err());
        assert_eq!(last(&fs::read(&path).unwrap()), b"{}");
    }
}
