//! Whether a table can be used: magic, version, size, flags, name, functions, in this order.
//!
//! Pure: it reads the table and nothing else, so tests hand it tables of versions that do not exist
//! yet. Must not know where a table came from.

#![expect(
    unsafe_code,
    reason = "reads a table whose size is known only once its first bytes are read"
)]

use std::fmt;
use std::mem::{MaybeUninit, offset_of};

use crate::layout::{
    ABI_MAJOR, ABI_MINOR, DialBegin, DialFree, DialStep, Flags, ListenAddress, ListenBegin,
    ListenFree, ListenStep, MAGIC, RawText, Table,
};

/// The size of the table in version 1.0, below which nothing is taken (clause 1.3).
const SIZE_1_0: usize = offset_of!(Table, listen_free) + size_of::<Option<ListenFree>>();
const NAME_LIMIT: usize = 32;
const VERSION_LIMIT: usize = 64;

/// A table that passed every check that can be made without calling it.
#[derive(Debug, Clone, Copy)]
pub struct Verified {
    name: &'static str,
    version: &'static str,
    minor: u32,
    flags: Flags,
    dial: Option<DialFunctions>,
    listen: Option<ListenFunctions>,
}

/// The functions of clause 9.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "documented at Table")]
#[non_exhaustive]
pub struct DialFunctions {
    pub begin: DialBegin,
    pub step: DialStep,
    pub free: DialFree,
}

/// The functions of clause 10.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "documented at Table")]
#[non_exhaustive]
pub struct ListenFunctions {
    pub begin: ListenBegin,
    pub step: ListenStep,
    pub accept: ListenStep,
    pub address: ListenAddress,
    pub free: ListenFree,
}

impl Verified {
    /// Checks a table that is linked in.
    ///
    /// # Errors
    ///
    /// The table breaks clause 1.
    pub fn of(table: &'static Table) -> Result<Self, Mismatch> {
        // SAFETY: a whole table of this very version, constant for the life of the process.
        unsafe { Self::read(table) }
    }

    /// Checks the table at `table`, which may be of another version and so of another size.
    ///
    /// # Errors
    ///
    /// Not a table, or of a version that this one cannot talk to; both versions are in the message.
    ///
    /// # Safety
    ///
    /// At least 16 bytes are readable at `table`; and if they are the magic, a size and
    /// [`ABI_MAJOR`], clause 1 holds for it.
    pub unsafe fn read(table: *const Table) -> Result<Self, Mismatch> {
        if table.is_null() || !table.is_aligned() {
            return Err(Mismatch::NotATable { found: None });
        }
        // SAFETY: our caller promises 16 readable bytes; magic, size and major are the first 16 for
        // ever (clause 1.2).
        let (magic, size, major) =
            unsafe { ((*table).magic, (*table).size as usize, (*table).major) };
        if magic != MAGIC {
            return Err(Mismatch::NotATable { found: Some(magic) });
        }
        if major != ABI_MAJOR {
            return Err(Mismatch::Major { plugin: major });
        }
        if size < SIZE_1_0 {
            return Err(Mismatch::Truncated {
                size,
                least: SIZE_1_0,
            });
        }
        // SAFETY: by clause 1.3 `size` bytes can be read and lie as we know them; whatever an older
        // plugin lacks is zero, which is a null function or an empty text.
        let table = unsafe { known_part::<Table>(table, size).assume_init() };
        if table.needs_minor > ABI_MINOR {
            return Err(Mismatch::NeedsNewerHost {
                plugin: table.minor,
                needs: table.needs_minor,
            });
        }
        let unknown = table.flags.0 & Flags::MUST_KNOW.0 & !Flags::KNOWN.0;
        if unknown != 0 {
            return Err(Mismatch::UnknownFlags {
                bits: unknown,
                plugin: table.minor,
            });
        }
        // SAFETY: the table is one by magic, version and size, so clause 1.1 makes its strings
        // readable for ever.
        let (name, version) = unsafe {
            (
                text(table.name, NAME_LIMIT),
                text(table.version, VERSION_LIMIT),
            )
        };
        let name = name.filter(|name| is_name(name)).ok_or(Mismatch::BadName)?;
        let version = version.ok_or(Mismatch::BadVersionText)?;
        let (dial, listen) = (dial_functions(&table)?, listen_functions(&table)?);
        if dial.is_none() && listen.is_none() {
            return Err(Mismatch::Incomplete {
                group: "dial and listen",
            });
        }
        Ok(Self {
            name,
            version,
            minor: table.minor,
            flags: table.flags,
            dial,
            listen,
        })
    }

    /// The scheme of its targets.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The plugin's own version.
    #[must_use]
    pub const fn version(&self) -> &'static str {
        self.version
    }

    /// The ABI version that the plugin was built with.
    #[must_use]
    pub const fn abi(&self) -> (u32, u32) {
        (ABI_MAJOR, self.minor)
    }

    /// Whether the host resolves its addresses.
    #[must_use]
    pub const fn resolves_names(&self) -> bool {
        self.flags.contains(Flags::HOST_PORT)
    }

    /// How to dial, if it does.
    #[must_use]
    pub const fn dial(&self) -> Option<DialFunctions> {
        self.dial
    }

    /// How to listen, if it does.
    #[must_use]
    pub const fn listen(&self) -> Option<ListenFunctions> {
        self.listen
    }
}

/// The first `size` bytes of a table as a `T`, which may know more fields or fewer; zero where
/// there are none.
///
/// # Safety
///
/// `size` bytes are readable at `table`.
unsafe fn known_part<T>(table: *const Table, size: usize) -> MaybeUninit<T> {
    let mut known = MaybeUninit::<T>::zeroed();
    let shared = size.min(size_of::<T>());
    let known_bytes = known.as_mut_ptr().cast::<u8>();
    // SAFETY: our caller promises `size` bytes, and no more than `T` has room for are taken.
    unsafe { known_bytes.copy_from_nonoverlapping(table.cast(), shared) };
    known
}

fn dial_functions(table: &Table) -> Result<Option<DialFunctions>, Mismatch> {
    match (table.dial_begin, table.dial_step, table.dial_free) {
        (Some(begin), Some(step), Some(free)) => Ok(Some(DialFunctions { begin, step, free })),
        (None, None, None) => Ok(None),
        _ => Err(Mismatch::Incomplete { group: "dial" }),
    }
}

fn listen_functions(table: &Table) -> Result<Option<ListenFunctions>, Mismatch> {
    let found = (
        table.listen_begin,
        table.listen_step,
        table.listen_accept,
        table.listen_address,
        table.listen_free,
    );
    match found {
        (Some(begin), Some(step), Some(accept), Some(address), Some(free)) => {
            Ok(Some(ListenFunctions {
                begin,
                step,
                accept,
                address,
                free,
            }))
        }
        (None, None, None, None, None) => Ok(None),
        _ => Err(Mismatch::Incomplete { group: "listen" }),
    }
}

/// # Safety
///
/// `raw` points at that many bytes, constant until the process ends.
unsafe fn text(raw: RawText, limit: usize) -> Option<&'static str> {
    if raw.length > limit || raw.bytes.is_null() {
        return None;
    }
    // SAFETY: not null, of a length that clause 1.6 allows, and by our caller's word constant for
    // ever.
    std::str::from_utf8(unsafe { std::slice::from_raw_parts(raw.bytes, raw.length) }).ok()
}

fn is_name(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_lowercase())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// Why a table cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each variant names its fields")]
pub enum Mismatch {
    /// What is under the symbol is no table.
    NotATable { found: Option<u64> },
    /// Built for an ABI that shares nothing with this one.
    Major { plugin: u32 },
    /// Smaller than a table can be.
    Truncated { size: usize, least: usize },
    /// The plugin cannot do without what this host does not have.
    NeedsNewerHost { plugin: u32, needs: u32 },
    /// The plugin asks for something that this host does not know.
    UnknownFlags { bits: u64, plugin: u32 },
    /// The name breaks clause 1.6.
    BadName,
    /// The version text breaks clause 1.6.
    BadVersionText,
    /// Some functions of a group are there and others not, or there are none at all.
    Incomplete { group: &'static str },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotATable { found: None } => f.write_str("no transport table under the symbol"),
            Self::NotATable { found: Some(magic) } => {
                write!(
                    f,
                    "no transport table under the symbol: magic is {magic:#018x}, must be {MAGIC:#018x}"
                )
            }
            Self::Major { plugin } => {
                write!(
                    f,
                    "plugin speaks transport ABI {plugin}, host speaks {ABI_MAJOR}.{ABI_MINOR}; build it against ABI {ABI_MAJOR}"
                )
            }
            Self::Truncated { size, least } => {
                write!(f, "table has {size} bytes, ABI {ABI_MAJOR}.0 has {least}")
            }
            Self::NeedsNewerHost { plugin, needs } => write!(
                f,
                "plugin speaks transport ABI {ABI_MAJOR}.{plugin} and needs a host of {ABI_MAJOR}.{needs}, \
                 host speaks {ABI_MAJOR}.{ABI_MINOR}; use a newer host or an older plugin"
            ),
            Self::UnknownFlags { bits, plugin } => write!(
                f,
                "plugin speaks transport ABI {ABI_MAJOR}.{plugin} and asks for {bits:#x}, \
                 which host {ABI_MAJOR}.{ABI_MINOR} does not know; use a newer host or an older plugin"
            ),
            Self::BadName => f.write_str("table's name is not [a-z][a-z0-9-]* of at most 32 bytes"),
            Self::BadVersionText => f.write_str("table's version is not UTF-8 of at most 64 bytes"),
            Self::Incomplete { group } => write!(f, "table lacks {group} functions"),
        }
    }
}

impl std::error::Error for Mismatch {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as some later version may know it: the host of the future is this one, with more.
    #[repr(C)]
    struct Later {
        known: Table,
        added: Option<ListenStep>,
        added_text: RawText,
    }

    /// A table of version 1.0 whose last byte is the last one of a page, before one that cannot be
    /// read: a host that looks beyond `size` does not survive it.
    #[test]
    fn a_host_that_knows_more_reads_no_more_than_an_older_plugin_has() {
        const PAGE: usize = 4096;
        let pages = std::ptr::null_mut();
        let (readable, private) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a fresh mapping wherever the kernel likes; it overlaps nothing.
        let pages = unsafe { libc::mmap(pages, 2 * PAGE, readable, private, -1, 0) };
        assert_ne!(pages, libc::MAP_FAILED);
        // SAFETY: the second of the two pages just mapped; nothing lies in it.
        let guarded = unsafe { libc::mprotect(pages.byte_add(PAGE), PAGE, libc::PROT_NONE) };
        assert_eq!(guarded, 0);
        // SAFETY: inside the first page.
        let table = unsafe { pages.byte_add(PAGE - SIZE_1_0) }.cast::<Table>();
        // SAFETY: room for exactly the bytes of version 1.0, which all zeros are a value of.
        unsafe { table.cast::<u8>().write_bytes(0, SIZE_1_0) };
        // SAFETY: as above; `minor` lies in the part that every version has.
        unsafe { (*table).minor = 5 };

        // SAFETY: exactly `SIZE_1_0` bytes are readable there, and zeros are a value of all that
        // `Later` adds.
        let later = unsafe { known_part::<Later>(table, SIZE_1_0).assume_init() };
        assert_eq!(later.known.minor, 5);
        assert!(later.added.is_none() && later.added_text.bytes.is_null());
        // SAFETY: the mapping of above, which nothing points into any more.
        assert_eq!(unsafe { libc::munmap(pages, 2 * PAGE) }, 0);
    }
}
