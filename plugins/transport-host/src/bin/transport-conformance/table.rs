//! What lies under the symbol, and whether the host tells versions apart: on copies of the very
//! file under test, each altered in one number.
//!
//! Must not know what the functions do.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use transport_abi::{ABI_MAJOR, ABI_MINOR, MAGIC};
use transport_host::{Error, ErrorKind, Loaded, Transports};

use crate::report::{Check, Clause, Trouble, must};
use crate::subject::{Needs, Subject};

pub(crate) const CLAUSES: &[Clause] = &[
    Clause {
        number: "1.1",
        says: "the table is found under the name of its file, and loads",
        needs: Needs::Nothing,
        check: found,
    },
    Clause {
        number: "1.1",
        says: "under another name there is no symbol, and it is refused",
        needs: Needs::Nothing,
        check: another_name,
    },
    Clause {
        number: "1.2",
        says: "another major version is refused, with both versions",
        needs: Needs::Nothing,
        check: another_major,
    },
    Clause {
        number: "1.4",
        says: "a newer minor version loads if it can do with this host",
        needs: Needs::Nothing,
        check: newer_minor,
    },
    Clause {
        number: "1.4",
        says: "one that needs a newer host is refused, with both versions",
        needs: Needs::Nothing,
        check: needs_newer,
    },
    Clause {
        number: "1.5",
        says: "a flag that must be known and is not is refused",
        needs: Needs::Nothing,
        check: unknown_flag,
    },
];

/// Where these lie in a table, for ever.
const SIZE_AT: usize = 8;
const MAJOR_AT: usize = 12;
const MINOR_AT: usize = 16;
const NEEDS_MINOR_AT: usize = 20;
const FLAGS_AT: usize = 24;
const NUMBERS: usize = 32;

fn found(subject: &Subject) -> Check {
    let table = subject.table();
    must(
        table.name() == subject.scheme(),
        format!("it calls itself {:?}", table.name()),
    )
}

fn another_name(subject: &Subject) -> Check {
    let copy = Copy::of(subject)?.named("conformance_other")?;
    match load(&copy) {
        Err(error) if matches!(error.kind(), ErrorKind::NoSymbol { .. }) => Ok(()),
        other => Err(unexpected(other)),
    }
}

fn another_major(subject: &Subject) -> Check {
    let copy = Copy::of(subject)?.with(MAJOR_AT, ABI_MAJOR + 1);
    refused(
        load(&copy.in_folder("major")?),
        &format!("ABI {}", ABI_MAJOR + 1),
    )
}

fn newer_minor(subject: &Subject) -> Check {
    let copy = Copy::of(subject)?.with(MINOR_AT, ABI_MINOR + 7);
    let loaded = load(&copy.in_folder("minor")?)?;
    must(
        loaded.abi == (ABI_MAJOR, ABI_MINOR + 7),
        format!("loaded as {:?}", loaded.abi),
    )
}

fn needs_newer(subject: &Subject) -> Check {
    let copy = Copy::of(subject)?
        .with(MINOR_AT, ABI_MINOR + 7)
        .with(NEEDS_MINOR_AT, ABI_MINOR + 7);
    let version = format!("ABI {ABI_MAJOR}.{}", ABI_MINOR + 7);
    refused(load(&copy.in_folder("needs")?), &version)
}

fn unknown_flag(subject: &Subject) -> Check {
    let copy = Copy::of(subject)?.with(FLAGS_AT, 1 << 31);
    refused(
        load(&copy.in_folder("flag")?),
        &format!("ABI {ABI_MAJOR}.{}", subject.table().abi().1),
    )
}

/// Refused as a mismatch, in words that name the plugin's version and ours.
fn refused(outcome: Result<Loaded, Error>, plugins: &str) -> Check {
    match outcome {
        Err(error) if matches!(error.kind(), ErrorKind::Mismatched(_)) => {
            let text = error.to_string();
            let ours = format!("{ABI_MAJOR}.{ABI_MINOR}");
            must(
                text.contains(plugins) && text.contains(&ours),
                format!("{text:?} does not name {plugins} and {ours}"),
            )
        }
        other => Err(unexpected(other)),
    }
}

fn unexpected(outcome: Result<Loaded, Error>) -> Trouble {
    match outcome {
        Ok(loaded) => Trouble::Broken(format!("{} was loaded", loaded.path.display())),
        Err(error) => Trouble::from(error),
    }
}

fn load(path: &PathBuf) -> Result<Loaded, Error> {
    Transports::builder().load(path)
}

/// The plugin's file, in memory.
struct Copy<'a> {
    subject: &'a Subject,
    bytes: Vec<u8>,
    tables: Vec<usize>,
}

impl<'a> Copy<'a> {
    fn of(subject: &'a Subject) -> Result<Self, Trouble> {
        let bytes = fs::read(&subject.loaded.path)?;
        let tables: Vec<_> = bytes
            .windows(NUMBERS)
            .enumerate()
            .filter(|(_, window)| is_table(window))
            .map(|(at, _)| at)
            .collect();
        if tables.is_empty() {
            let reason = "its table is made at load time, not in the file";
            return Err(Trouble::NotTried(reason.to_owned()));
        }
        Ok(Self {
            subject,
            bytes,
            tables,
        })
    }

    fn with(mut self, offset: usize, number: u32) -> Self {
        for table in &self.tables {
            let at = table + offset;
            self.bytes[at..at + 4].copy_from_slice(&number.to_ne_bytes());
        }
        self
    }

    fn named(&self, stem: &str) -> Result<PathBuf, Trouble> {
        let path = self
            .subject
            .scratch()
            .join(format!("libtransport_{stem}.so"));
        self.write(path)
    }

    /// Under its own name, so in a folder of its own.
    fn in_folder(&self, folder: &str) -> Result<PathBuf, Trouble> {
        let folder = self.subject.scratch().join(folder);
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        let name = self.subject.loaded.path.file_name();
        self.write(folder.join(name.expect("what was loaded has a file name")))
    }

    fn write(&self, path: PathBuf) -> Result<PathBuf, Trouble> {
        fs::write(&path, &self.bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        Ok(path)
    }
}

fn is_table(window: &[u8]) -> bool {
    let number = |at: usize| {
        window[at..at + 4]
            .try_into()
            .map(u32::from_ne_bytes)
            .expect("four bytes")
    };
    window.starts_with(&MAGIC.to_ne_bytes())
        && number(MAJOR_AT) == ABI_MAJOR
        && number(SIZE_AT) >= 100
}
