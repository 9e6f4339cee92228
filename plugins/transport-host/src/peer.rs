//! Who is at the other end of a socket, as the kernel says. Must not know transports: a plugin's
//! word counts for nothing.

#![expect(
    unsafe_code,
    reason = "reads SO_PEERCRED and sockaddr_vm, which rustix does not do safely or at all"
)]

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny};

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each variant names its fields")]
pub enum Peer {
    /// A process of this machine: who connected, or who listened when we connected.
    Unix {
        uid: u32,
        gid: u32,
        pid: Option<u32>,
    },
    /// A virtual machine, or the host as seen from one.
    Vsock { cid: u32, port: u32 },
    /// A network address, which says where but not who.
    Inet(SocketAddr),
    /// Nobody the kernel knows: one end of a socket pair, whose other end a plugin pumps, or
    /// another family.
    Unidentified,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix {
                uid,
                pid: Some(pid),
                ..
            } => write!(f, "uid {uid} pid {pid}"),
            Self::Unix { uid, pid: None, .. } => write!(f, "uid {uid}"),
            Self::Vsock { cid, port } => write!(f, "cid {cid} port {port}"),
            Self::Inet(address) => address.fmt(f),
            Self::Unidentified => f.write_str("unidentified"),
        }
    }
}

/// Asks the kernel who is at the other end of `fd`, a connected socket, and of which family it is.
pub(crate) fn identify(fd: BorrowedFd<'_>) -> Result<(AddressFamily, Peer), Errno> {
    // The peer's address is of the socket's own family; one call tells both.
    let Some(far) = rustix::net::getpeername(fd)? else {
        let family = rustix::net::sockopt::socket_domain(fd)?;
        return Ok((family, Peer::Unidentified));
    };
    let family = far.address_family();
    let peer = match family {
        AddressFamily::UNIX if is_named(&far) || is_named(&rustix::net::getsockname(fd)?) => {
            credentials(fd)?
        }
        AddressFamily::INET | AddressFamily::INET6 => {
            SocketAddr::try_from(far).map_or(Peer::Unidentified, Peer::Inet)
        }
        AddressFamily::VSOCK => vsock(&far).unwrap_or(Peer::Unidentified),
        // Both ends of a socket pair are unnamed, and its credentials would be our own: they prove
        // nothing.
        _ => Peer::Unidentified,
    };
    Ok((family, peer))
}

/// Whether a unix address says more than its family.
fn is_named(address: &SocketAddrAny) -> bool {
    address.addr_len() as usize > size_of::<libc::sa_family_t>()
}

fn credentials(fd: BorrowedFd<'_>) -> Result<Peer, Errno> {
    // rustix's UCred has a pid that cannot be 0, but the kernel answers 0 for a process of another
    // pid namespace.
    let mut found = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `found` is a ucred of exactly the size that `size` says, and both are locals that
    // outlive the call.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut size,
        )
    };
    if answer != 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL));
    }
    Ok(Peer::Unix {
        uid: found.uid,
        gid: found.gid,
        pid: u32::try_from(found.pid).ok().filter(|pid| *pid != 0),
    })
}

fn vsock(address: &SocketAddrAny) -> Option<Peer> {
    if (address.addr_len() as usize) < size_of::<libc::sockaddr_vm>() {
        return None;
    }
    // SAFETY: at least a sockaddr_vm of bytes is initialised, as just checked; it is plain
    // integers, read unaligned.
    let address = unsafe {
        address
            .as_ptr()
            .cast::<libc::sockaddr_vm>()
            .read_unaligned()
    };
    Some(Peer::Vsock {
        cid: address.svm_cid,
        port: address.svm_port,
    })
}
