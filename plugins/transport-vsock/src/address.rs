//! `CID:PORT` as text and as the kernel's `sockaddr_vm`. Must not know sockets.

#![expect(
    unsafe_code,
    reason = "rustix passes on the bytes of a sockaddr_vm but does not make them"
)]

use std::fmt;

use libc::sockaddr_vm;
use rustix::net::SocketAddrAny;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use transport_abi::Failure;

/// VMADDR_CID_ANY and VMADDR_PORT_ANY.
const ANY: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    cid: u32,
    port: u32,
}

impl Address {
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let part = |part: &str| {
            if part == "any" {
                Some(ANY)
            } else {
                part.parse().ok()
            }
        };
        text.split_once(':')
            .and_then(|(cid, port)| {
                Some(Self {
                    cid: part(cid)?,
                    port: part(port)?,
                })
            })
            .ok_or_else(|| {
                Failure::bad_address(format!("{text:?} is not CID:PORT, each a number or any"))
            })
    }

    /// The address in `raw`, if it is one of this family.
    pub(crate) fn of(raw: &SocketAddrAny) -> Option<Self> {
        if raw.address_family() != rustix::net::AddressFamily::VSOCK
            || (raw.addr_len() as usize) < size_of::<sockaddr_vm>()
        {
            return None;
        }
        // SAFETY: clause 5.1 is not touched, this is the kernel's answer to us: `addr_len` bytes
        // are initialised, enough for a sockaddr_vm of plain integers, which is copied out without
        // asking for its alignment.
        let raw = unsafe { raw.as_ptr().cast::<sockaddr_vm>().read_unaligned() };
        Some(Self {
            cid: raw.svm_cid,
            port: raw.svm_port,
        })
    }

    /// Whether it leaves something to the kernel, so that one cannot connect to it.
    pub(crate) const fn is_partial(self) -> bool {
        self.cid == ANY || self.port == ANY
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cid {
            ANY => write!(f, "any:{}", self.port),
            cid => write!(f, "{cid}:{}", self.port),
        }
    }
}

// SAFETY: `with_sockaddr` passes a whole sockaddr_vm that lives on its stack, of the family that
// its fields are for, and its exact size; the kernel gets nothing longer-lived than that call, as
// clause 5.1 asks of everything here.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        let raw = sockaddr_vm {
            svm_family: libc::AF_VSOCK as libc::sa_family_t,
            svm_reserved1: 0,
            svm_port: self.port,
            svm_cid: self.cid,
            svm_zero: [0; 4],
        };
        f(
            (&raw const raw).cast(),
            size_of::<sockaddr_vm>() as SocketAddrLen,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for text in ["3:1024", "any:9", "2:0"] {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
        assert!(Address::parse("any:any").unwrap().is_partial());
        assert!(!Address::parse("1:1").unwrap().is_partial());
    }

    #[test]
    fn kernel_form_and_back() {
        let address = Address { cid: 3, port: 1024 };
        assert_eq!(Address::of(&address.as_any()), Some(address));
        let other = rustix::net::SocketAddrUnix::new("/s").unwrap().as_any();
        assert_eq!(Address::of(&other), None);
    }

    #[test]
    fn scraps_are_no_addresses() {
        for wrong in [
            "",
            "3",
            "3:",
            ":3",
            "3:4:5",
            "-1:4",
            "host:4",
            "4294967296:1",
        ] {
            assert!(Address::parse(wrong).is_err(), "{wrong}");
        }
    }
}
