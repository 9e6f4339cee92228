//! Which files may become part of this process: those that only root and we can change.
//!
//! The whole chain is judged, from the file to `/`, on its canonical path: if nobody else can write
//! to any folder of it, nobody can swap the file between the check and the load. Must not know what
//! is in the file.

use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};

use crate::{Error, ErrorKind};

const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;
const ROOT: u32 = 0;

/// The canonical path of `path`, if it may be loaded.
pub(crate) fn trusted(path: &Path) -> Result<PathBuf, Error> {
    let unreadable = |path: &Path, error| {
        Error::new(ErrorKind::Unreadable {
            path: path.to_owned(),
        })
        .because(error)
    };
    let canonical = path
        .canonicalize()
        .map_err(|error| unreadable(path, error))?;
    let ours = rustix::process::geteuid().as_raw();
    for (height, link) in canonical.ancestors().enumerate() {
        let found = rustix::fs::lstat(link).map_err(|error| unreadable(link, error.into()))?;
        judge(link, height, &Facts::of(&found), ours).map_err(Error::new)?;
    }
    Ok(canonical)
}

struct Facts {
    is_file: bool,
    owner: u32,
    mode: u32,
}

impl Facts {
    fn of(found: &Stat) -> Self {
        Self {
            is_file: FileType::from_raw_mode(found.st_mode).is_file(),
            owner: found.st_uid,
            mode: found.st_mode & 0o7777,
        }
    }
}

/// Judges one link of the chain; the file itself has height 0, its own folder 1.
fn judge(path: &Path, height: usize, facts: &Facts, ours: u32) -> Result<(), ErrorKind> {
    let path = || path.to_owned();
    if height == 0 && !facts.is_file {
        return Err(ErrorKind::NotAFile { path: path() });
    }
    if facts.owner != ROOT && facts.owner != ours {
        return Err(ErrorKind::ForeignOwner {
            path: path(),
            owner: facts.owner,
            ours,
        });
    }
    // In a sticky folder of root's, such as /tmp, others can add names but not replace ours. As the
    // file's own folder that is not enough: whoever comes first owns the name.
    let tolerated = height > 1 && facts.owner == ROOT && facts.mode & STICKY != 0;
    if facts.mode & WRITABLE_BY_OTHERS != 0 && !tolerated {
        return Err(ErrorKind::WritableByOthers {
            path: path(),
            mode: facts.mode,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: u32 = 1000;

    fn file(owner: u32, mode: u32) -> Facts {
        Facts {
            is_file: true,
            owner,
            mode,
        }
    }

    fn folder(owner: u32, mode: u32) -> Facts {
        Facts {
            is_file: false,
            owner,
            mode,
        }
    }

    fn verdict(height: usize, facts: &Facts) -> Result<(), ErrorKind> {
        judge(Path::new("/p"), height, facts, OURS)
    }

    #[test]
    fn files_of_root_and_ours_pass_and_others_do_not() {
        assert_eq!(verdict(0, &file(0, 0o755)), Ok(()));
        assert_eq!(verdict(0, &file(OURS, 0o700)), Ok(()));
        assert!(matches!(
            verdict(0, &file(1001, 0o755)),
            Err(ErrorKind::ForeignOwner {
                owner: 1001,
                ours: OURS,
                ..
            })
        ));
        assert!(matches!(
            verdict(3, &folder(1001, 0o755)),
            Err(ErrorKind::ForeignOwner { .. })
        ));
    }

    #[test]
    fn what_group_or_others_can_write_is_refused_at_every_height() {
        for mode in [0o775, 0o757, 0o777] {
            assert!(matches!(
                verdict(0, &file(0, mode)),
                Err(ErrorKind::WritableByOthers { .. })
            ));
            for height in 1..4 {
                assert!(matches!(
                    verdict(height, &folder(0, mode)),
                    Err(ErrorKind::WritableByOthers { .. })
                ));
            }
        }
    }

    #[test]
    fn a_sticky_folder_of_root_is_tolerated_above_but_not_as_the_files_own() {
        assert_eq!(verdict(2, &folder(0, 0o1777)), Ok(()));
        assert!(matches!(
            verdict(1, &folder(0, 0o1777)),
            Err(ErrorKind::WritableByOthers { .. })
        ));
        assert!(matches!(
            verdict(2, &folder(OURS, 0o1777)),
            Err(ErrorKind::WritableByOthers { .. })
        ));
        assert!(matches!(
            verdict(0, &file(0, 0o1777)),
            Err(ErrorKind::WritableByOthers { .. })
        ));
    }

    #[test]
    fn only_a_regular_file_can_be_loaded() {
        assert!(matches!(
            verdict(0, &folder(0, 0o755)),
            Err(ErrorKind::NotAFile { .. })
        ));
    }
}
