//! From a path to a verified table: find, check, open, read; and never unload.
//!
//! What may be loaded is `policy.rs`'s business, what a table must be is `transport-abi`'s. Must
//! not know dialing.

#![expect(
    unsafe_code,
    reason = "loads shared libraries and reads the table in them"
)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use transport_abi::{Table, Verified};

use crate::policy;
use crate::{Error, ErrorKind};

const PREFIX: &str = "libtransport_";
const SUFFIX: &str = ".so";

/// A plugin that was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// The scheme of its targets.
    pub name: String,
    /// The canonical path it came from.
    pub path: PathBuf,
    /// Its own version.
    pub version: String,
    /// The ABI version it was built with, major and minor.
    pub abi: (u32, u32),
}

/// What came of the plugins of a folder.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct LoadReport {
    /// Those that can be used.
    pub loaded: Vec<Loaded>,
    /// Those that cannot, each with its reason.
    pub refused: Vec<Refused>,
}

/// A plugin of a folder that was refused.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// The file.
    pub path: PathBuf,
    /// The reason.
    pub error: Error,
}

/// The plugins in `dir`, in order of their names.
pub(crate) fn find(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    if !dir.is_absolute() {
        return Err(Error::new(ErrorKind::RelativePath));
    }
    let unreadable = |error| {
        Error::new(ErrorKind::Unreadable {
            path: dir.to_owned(),
        })
        .because(error)
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if stem(&path).is_ok() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Opens the plugin at `path`, unless `admit` objects to its name before any of its code ran.
pub(crate) fn open(
    path: &Path,
    admit: impl FnOnce(&str) -> Result<(), Error>,
) -> Result<(Verified, Loaded), Error> {
    if !path.is_absolute() {
        return Err(Error::new(ErrorKind::RelativePath));
    }
    let stem = stem(path)?;
    let canonical = policy::trusted(path)?;
    admit(&stem.replace('_', "-"))?;
    let verified = read_table(&canonical, stem)?;
    if !transport_abi::stem_matches(verified.name(), stem) {
        return Err(Error::new(ErrorKind::WrongName {
            name: verified.name().to_owned(),
            stem: stem.to_owned(),
        }));
    }
    let loaded = Loaded {
        name: verified.name().to_owned(),
        path: canonical,
        version: verified.version().to_owned(),
        abi: verified.abi(),
    };
    tracing::info!(transport = %loaded.name, path = %loaded.path.display(), version = %loaded.version, "loaded transport plugin");
    Ok((verified, loaded))
}

fn read_table(canonical: &Path, stem: &str) -> Result<Verified, Error> {
    // Symbols stay the plugin's own, all are resolved now rather than at the first call, and
    // nothing is ever unloaded: threads and thread-local destructors of a plugin would outlive its
    // code.
    let flags = RTLD_NOW | RTLD_LOCAL | libc::RTLD_NODELETE;
    // SAFETY: opening runs the file's constructors. `policy::trusted` found that only root and we
    // could have put it there, so that is code this daemon would run anyway.
    let library = unsafe { Library::open(Some(canonical), flags) }
        .map_err(|error| Error::new(ErrorKind::NotALibrary).because(error))?;
    let symbol = format!("vmwright_transport_{stem}_v1");
    // SAFETY: a data symbol is read as a pointer to it; the type says nothing yet about what lies
    // there.
    let table = unsafe { library.get::<*const Table>(&symbol) }
        .map(|found| found.into_raw().cast::<Table>().cast_const())
        .map_err(|error| Error::new(ErrorKind::NoSymbol { symbol }).because(error));
    std::mem::forget(library);
    // SAFETY: the symbol names our contract and its version, so clause 1.1 holds for what it marks:
    // constant, and mapped for good because of RTLD_NODELETE.
    unsafe { Verified::read(table?) }
        .map_err(|mismatch| Error::new(ErrorKind::Mismatched(mismatch)))
}

fn stem(path: &Path) -> Result<&str, Error> {
    path.file_name()
        .and_then(OsStr::to_str)
        .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX))
        .filter(|stem| !stem.is_empty())
        .ok_or_else(|| {
            Error::new(ErrorKind::BadFileName {
                path: path.to_owned(),
            })
        })
}
