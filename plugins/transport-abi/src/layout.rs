//! The structs and numbers that cross the boundary, exactly as in `include/vmwright_transport.h`.
//!
//! Plain data: no behaviour lives here, and no size or order here may ever change.
//! `tests/header.rs` compares every offset with what a C compiler makes of the header.

#![expect(
    unsafe_code,
    reason = "declares the C structs that cross, and that the constant table may be shared"
)]

use std::marker::{PhantomData, PhantomPinned};

/// The first eight bytes of every table: `vmwtrans` as a little-endian number.
pub const MAGIC: u64 = u64::from_le_bytes(*b"vmwtrans");
/// The version that may never change under this symbol; see clause 1.2.
pub const ABI_MAJOR: u32 = 1;
/// Counts what was added at the tails since 1.0; see clause 1.4.
pub const ABI_MINOR: u32 = 0;

/// What a call answers. Negative is failure; see clause 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Status(pub i32);

impl Status {
    /// Done: the operation is begun, bound, or a descriptor is handed over.
    pub const READY: Self = Self(0);
    /// Not yet: the progress says what to wait for.
    pub const WAIT: Self = Self(1);
    /// The system or the peer said no.
    pub const FAILED: Self = Self(-1);
    /// The address is not one of this transport's.
    pub const BAD_ADDRESS: Self = Self(-2);
    /// This transport does not do that.
    pub const UNSUPPORTED: Self = Self(-3);
    /// The plugin panicked; only `free` may follow.
    pub const PANICKED: Self = Self(-4);
}

/// Bits of [`Table::flags`]; see clause 1.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Flags(pub u64);

impl Flags {
    /// Addresses are `HOST:PORT`, and the host resolves them; see clause 4.3.
    pub const HOST_PORT: Self = Self(1);
    /// All bits that this version knows.
    pub const KNOWN: Self = Self::HOST_PORT;
    /// The half in which an unknown bit means "refuse me".
    pub const MUST_KNOW: Self = Self(0xffff_ffff);

    /// Whether every bit of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Bits of [`RawProgress::events`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Events(pub u32);

impl Events {
    /// Wait until the descriptor can be read, or has hung up.
    pub const READABLE: Self = Self(1);
    /// Wait until the descriptor can be written, or has failed.
    pub const WRITABLE: Self = Self(2);
}

/// Bytes and their number; see clause 4.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct RawText {
    /// The first byte.
    pub bytes: *const u8,
    /// How many there are.
    pub length: usize,
}

impl RawText {
    /// Points at `text`, which must outlive every use.
    #[must_use]
    pub const fn of(text: &str) -> Self {
        Self {
            bytes: text.as_ptr(),
            length: text.len(),
        }
    }
}

/// What the host asks for. Filled in by the host, lent for the call.
#[derive(Debug)]
#[repr(C)]
pub struct RawRequest {
    /// The size of this struct as the host knows it.
    pub size: u32,
    /// The host's [`ABI_MINOR`].
    pub host_minor: u32,
    /// What follows `name:` in the target; see clause 4.3.
    pub address: RawText,
}

/// What a step came to. `size` is set by the host, the rest by the plugin.
#[derive(Debug)]
#[repr(C)]
pub struct RawProgress {
    /// The size of this struct as the host knows it.
    pub size: u32,
    /// Handed over when ready (clause 6.1), lent when waiting (clause 6.2), -1 for none.
    pub fd: i32,
    /// What to wait for on `fd`.
    pub events: Events,
    /// Nothing yet; zero.
    pub flags: u32,
    /// Step again after this long at the latest; 0 for never.
    pub retry_after_us: u64,
}

/// Why a call failed. The host sets `size`, `text` and `capacity`, the plugin the rest; see clause
/// 8.1.
#[derive(Debug)]
#[repr(C)]
pub struct RawFailure {
    /// The size of this struct as the host knows it.
    pub size: u32,
    /// The errno behind the failure, or 0.
    pub os_error: i32,
    /// The host's buffer.
    pub text: *mut u8,
    /// The size of that buffer.
    pub capacity: usize,
    /// How much of it the plugin filled.
    pub length: usize,
}

/// A dial in progress, known to its plugin only.
#[repr(C)]
pub struct RawDial {
    _opaque: [u8; 0],
    _marker: PhantomData<(*mut u8, PhantomPinned)>,
}

/// A listener, known to its plugin only.
#[repr(C)]
pub struct RawListener {
    _opaque: [u8; 0],
    _marker: PhantomData<(*mut u8, PhantomPinned)>,
}

/// `dial_begin`; see clause 9.1.
pub type DialBegin =
    unsafe extern "C" fn(*const RawRequest, *mut *mut RawDial, *mut RawFailure) -> Status;
/// `dial_step`; see clause 9.2.
pub type DialStep = unsafe extern "C" fn(*mut RawDial, *mut RawProgress, *mut RawFailure) -> Status;
/// `dial_free`; see clause 11.1.
pub type DialFree = unsafe extern "C" fn(*mut RawDial);
/// `listen_begin`; see clause 10.1.
pub type ListenBegin =
    unsafe extern "C" fn(*const RawRequest, *mut *mut RawListener, *mut RawFailure) -> Status;
/// `listen_step` (clause 10.1) and `listen_accept` (clause 10.2).
pub type ListenStep =
    unsafe extern "C" fn(*mut RawListener, *mut RawProgress, *mut RawFailure) -> Status;
/// `listen_address`; see clause 10.2. The arguments after the listener are the buffer, its
/// capacity, and the length written.
pub type ListenAddress =
    unsafe extern "C" fn(*mut RawListener, *mut u8, usize, *mut usize, *mut RawFailure) -> Status;
/// `listen_free`; see clause 11.2.
pub type ListenFree = unsafe extern "C" fn(*mut RawListener);

/// A transport, as it is found under its symbol; see clause 1.
///
/// A function that is `None` is null in C. Only [`Verified`](crate::Verified) says whether a table
/// can be used.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Table {
    /// [`MAGIC`].
    pub magic: u64,
    /// The size of this struct as the plugin knows it.
    pub size: u32,
    /// The plugin's [`ABI_MAJOR`].
    pub major: u32,
    /// The plugin's [`ABI_MINOR`].
    pub minor: u32,
    /// The least [`ABI_MINOR`] that the host must have.
    pub needs_minor: u32,
    /// What the host should know before it calls.
    pub flags: Flags,
    /// The scheme of its targets; see clause 1.6.
    pub name: RawText,
    /// The plugin's own version, for people.
    pub version: RawText,
    /// Starts to connect.
    pub dial_begin: Option<DialBegin>,
    /// Goes on connecting.
    pub dial_step: Option<DialStep>,
    /// Ends a dial, whatever came of it.
    pub dial_free: Option<DialFree>,
    /// Starts to listen.
    pub listen_begin: Option<ListenBegin>,
    /// Goes on until peers can connect.
    pub listen_step: Option<ListenStep>,
    /// Takes the next peer.
    pub listen_accept: Option<ListenStep>,
    /// Says where peers connect.
    pub listen_address: Option<ListenAddress>,
    /// Closes the listener.
    pub listen_free: Option<ListenFree>,
}

// SAFETY: by clause 1.1 a table and the strings it points at are constant data; the functions may
// be called from any thread by clause 2.1. Nothing in it is ever written.
unsafe impl Sync for Table {}
// SAFETY: as for Sync, and a copy of a table owns nothing: its pointers stay valid on every thread
// until the process ends.
unsafe impl Send for Table {}
