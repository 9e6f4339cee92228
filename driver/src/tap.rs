#![expect(
    unsafe_code,
    reason = "asks the tun driver for a device, which is an ioctl"
)]
//! Opening a tap device that somebody else made, for QEMU to be given: it may not open one itself, nor run a script.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::error::{Cause, io as failed_to};

/// Opens the tap device of that name. Never makes one: one that comes into being without bridge and rules would look
/// connected and not be.
pub(crate) fn open(interface: &str) -> Result<OwnedFd, Cause> {
    let name = CString::new(interface)
        .map_err(|_| Cause::BadRequest(format!("{interface:?} contains a zero byte")))?;
    // SAFETY: the name is a string with its final zero, which the call only reads.
    if unsafe { libc::if_nametoindex(name.as_ptr()) } == 0 {
        let error = io::Error::last_os_error();
        return Err(failed_to("find the tap device", interface)(error));
    }
    let path = "/dev/net/tun";
    let tun = OpenOptions::new().read(true).write(true).open(path);
    let tun = tun.map_err(failed_to("open", path))?;
    ask(&tun, interface).map_err(failed_to("open the tap device", interface))?;
    Ok(tun.into())
}

fn ask(tun: &File, interface: &str) -> io::Result<()> {
    // SAFETY: all of it is plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = interface.bytes().map(|byte| byte as libc::c_char);
    let room = request.ifr_name.len() - 1;
    for (place, byte) in request.ifr_name[..room].iter_mut().zip(name) {
        *place = byte;
    }
    // Whole frames, with the header by which QEMU offloads checksums (tuntap.txt of the kernel).
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `ifreq`, which lives until the call returns.
    let answer = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
