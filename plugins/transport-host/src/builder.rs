//! Collects transports from files, tables and the daemon's own code, each name once.
//!
//! Owns who has which name. Must not know how a file is checked and opened, nor how a transport is
//! used.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use transport_abi::{Table, Verified};

use crate::catalog::{Entry, Transports};
use crate::library::{self, LoadReport, Loaded, Refused};
use crate::plugin::Plugin;
use crate::{Error, ErrorKind, Transport};

/// Collects transports; see [`Transports::builder`].
#[must_use = "a builder does nothing until it is built"]
pub struct Builder {
    by_name: BTreeMap<String, Entry>,
    first_fault: Option<Error>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("names", &self.by_name.keys())
            .finish_non_exhaustive()
    }
}

impl Builder {
    pub(crate) const fn new() -> Self {
        Self {
            by_name: BTreeMap::new(),
            first_fault: None,
        }
    }

    /// Adds a transport that lives in this process. A name that is taken fails
    /// [`build`](Self::build).
    pub fn register(mut self, transport: Arc<dyn Transport>) -> Self {
        let added = self.add(transport, "this process".to_owned());
        self.note(added);
        self
    }

    /// Adds a plugin that is linked in, by the same table that would be loaded. A bad one fails
    /// [`build`](Self::build).
    pub fn register_table(mut self, table: &'static Table) -> Self {
        let added = Verified::of(table)
            .map_err(|mismatch| Error::new(ErrorKind::Mismatched(mismatch)))
            .and_then(|verified| {
                self.add(Arc::new(Plugin::new(verified)), "a linked table".to_owned())
            });
        self.note(added.map_err(|error| error.during("register", "a linked table")));
        self
    }

    /// Loads the plugin at `path`, an absolute path to a `libtransport_NAME.so` that nobody but
    /// root and we can change.
    ///
    /// Blocks on the file system, and runs the library's constructors. A library is never
    /// unloaded, not even one that is refused for what is in it.
    ///
    /// # Errors
    ///
    /// The path is not trusted, the file is no plugin, or its version or name does not fit: each a
    /// kind of its own.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<Loaded, Error> {
        let path = path.as_ref();
        let opened = library::open(path, |name| self.taken(name));
        let (verified, loaded) =
            opened.map_err(|error| error.during("load transport plugin", path.display()))?;
        self.add(
            Arc::new(Plugin::new(verified)),
            loaded.path.display().to_string(),
        )?;
        Ok(loaded)
    }

    /// Loads every `libtransport_*.so` in `dir`, in order of their names. A bad one is refused and
    /// costs no other.
    ///
    /// # Errors
    ///
    /// The folder itself: its path is relative, or it cannot be read.
    pub fn load_dir(&mut self, dir: impl AsRef<Path>) -> Result<LoadReport, Error> {
        let dir = dir.as_ref();
        let files = library::find(dir)
            .map_err(|error| error.during("search for transport plugins in", dir.display()))?;
        let mut report = LoadReport::default();
        for path in files {
            match self.load(&path) {
                Ok(loaded) => report.loaded.push(loaded),
                Err(error) => report.refused.push(Refused { path, error }),
            }
        }
        Ok(report)
    }

    /// The transports, from now on unchangeable.
    ///
    /// # Errors
    ///
    /// The first fault among what was registered: [`ErrorKind::NameTaken`] or
    /// [`ErrorKind::Mismatched`].
    pub fn build(self) -> Result<Transports, Error> {
        match self.first_fault {
            Some(fault) => Err(fault),
            None => Ok(Transports::new(self.by_name)),
        }
    }

    fn taken(&self, name: &str) -> Result<(), Error> {
        match self.by_name.get(name) {
            None => Ok(()),
            Some(entry) => Err(Error::new(ErrorKind::NameTaken {
                name: name.to_owned(),
                by: entry.origin.clone(),
            })),
        }
    }

    fn add(&mut self, transport: Arc<dyn Transport>, origin: String) -> Result<(), Error> {
        let name = transport.name().to_owned();
        self.taken(&name)
            .map_err(|error| error.during("register", &name))?;
        self.by_name.insert(name, Entry { transport, origin });
        Ok(())
    }

    fn note(&mut self, added: Result<(), Error>) {
        if let Err(fault) = added {
            self.first_fault.get_or_insert(fault);
        }
    }
}
