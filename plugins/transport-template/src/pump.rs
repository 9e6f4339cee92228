//! Carries bytes between a channel and the host: one thread a connection, which ends when either
//! side closes.
//!
//! Must not know what the channel is: two descriptors, one to read and one to write. A channel that
//! is one descriptor for both goes in twice, duplicated.
//!
//! ```text
//!  host ◄──► socket pair ── flow ──► outgoing
//!                         ◄── flow ── incoming
//! ```
//!
//! Invariants:
//! 1. The end of a source is passed on to its sink after the last byte: half-close comes through.
//! 2. A sink that is gone ends its flow, and the source is closed, so that who writes there learns
//!    of it.
//! 3. The thread ends with its last flow, and holds no descriptor of another connection.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use transport_abi::Failure;

/// What one flow holds at most: the capacity of a pipe.
const BUFFER: usize = 64 * 1024;
/// A pump calls nothing that is deep; the default of 2 MiB would be held for each connection.
const STACK: usize = 128 * 1024;

/// Starts to carry, and gives the host's end.
pub(crate) fn start(incoming: OwnedFd, outgoing: OwnedFd) -> Result<OwnedFd, Failure> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, hosts) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(Failure::io("make a socket pair"))?;
    let flows = flows(ours, incoming, outgoing);
    thread::Builder::new()
        .name("transport-pump".to_owned())
        .stack_size(STACK)
        .spawn(|| carry(flows))
        .map_err(Failure::io("start the pump"))?;
    Ok(hosts)
}

fn flows(ours: OwnedFd, incoming: OwnedFd, outgoing: OwnedFd) -> Vec<Flow> {
    let ours = Arc::new(ours);
    vec![
        Flow::new(End::Socket(ours.clone()), End::Channel(outgoing)),
        Flow::new(End::Channel(incoming), End::Socket(ours)),
    ]
}

/// Ends with the last flow.
fn carry(mut flows: Vec<Flow>) {
    while !flows.is_empty() {
        let Ok(gone) = wait(&flows) else {
            return; // out of memory for a poll: both sides learn it as a close
        };
        let mut gone = gone.into_iter();
        flows.retain_mut(|flow| gone.next() == Some(false) && flow.go_on());
    }
}

/// Waits until some flow can go on, and says of each whether its sink is gone.
fn wait(flows: &[Flow]) -> Result<Vec<bool>, Errno> {
    let sources = flows.iter().filter(|flow| flow.is_empty());
    let mut watched: Vec<_> = flows
        .iter()
        .map(Flow::watch_sink)
        .chain(sources.map(Flow::watch_source))
        .collect();
    retry_on_intr(|| poll(&mut watched, None))?;
    let is_gone = |sink: &PollFd<'_>| sink.revents().intersects(PollFlags::ERR | PollFlags::HUP);
    Ok(watched[..flows.len()].iter().map(is_gone).collect())
}

enum End {
    /// Both flows have it; each closes its own direction.
    Socket(Arc<OwnedFd>),
    Channel(OwnedFd),
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(socket) => socket.as_fd(),
            Self::Channel(channel) => channel.as_fd(),
        }
    }
}

/// Bytes on their way in one direction. Drop closes it at both ends.
struct Flow {
    source: End,
    sink: End,
    buffer: Box<[u8]>,
    /// What of the buffer was read and not written yet.
    pending: Range<usize>,
}

impl Flow {
    fn new(source: End, sink: End) -> Self {
        Self {
            source,
            sink,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            pending: 0..0,
        }
    }

    fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    fn watch_source(&self) -> PollFd<'_> {
        PollFd::new(&self.source, PollFlags::IN)
    }

    /// Watched also when there is nothing to write: that it is gone is always told.
    fn watch_sink(&self) -> PollFd<'_> {
        let wanted = if self.is_empty() {
            PollFlags::empty()
        } else {
            PollFlags::OUT
        };
        PollFd::new(&self.sink, wanted)
    }

    /// Reads if there is nothing, writes if there is something; false when this flow has ended.
    fn go_on(&mut self) -> bool {
        if self.is_empty() {
            match retry_on_intr(|| rustix::io::read(&self.source, &mut *self.buffer)) {
                Ok(0) => return false,
                Ok(count) => self.pending = 0..count,
                Err(error) => return error == Errno::AGAIN,
            }
        }
        match retry_on_intr(|| rustix::io::write(&self.sink, &self.buffer[self.pending.clone()])) {
            Ok(count) => self.pending.start += count,
            Err(error) => return error == Errno::AGAIN,
        }
        true
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        // A channel closes as its descriptor does; the socket is still the other flow's.
        for (end, direction) in [
            (&self.source, Shutdown::Read),
            (&self.sink, Shutdown::Write),
        ] {
            if let End::Socket(socket) = end {
                let _closed_already = rustix::net::shutdown(socket, direction);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// A pump on its thread, the host's end, and the far ends of the channel.
    struct Rig {
        pump: JoinHandle<()>,
        host: UnixStream,
        to_host: File,
        from_host: File,
    }

    fn rig() -> Rig {
        let (ours, host) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        // The pump's ends must not block; ours may.
        let (incoming, to_host) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (from_host, outgoing) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        for end in [&incoming, &outgoing] {
            rustix::fs::fcntl_setfl(end, rustix::fs::OFlags::NONBLOCK).unwrap();
        }
        let flows = flows(ours.into(), incoming, outgoing);
        Rig {
            pump: thread::spawn(|| carry(flows)),
            host,
            to_host: to_host.into(),
            from_host: from_host.into(),
        }
    }

    #[test]
    fn half_close_passes_after_the_last_byte_and_the_other_direction_goes_on() {
        let mut rig = rig();
        rig.host.write_all(b"question").unwrap();
        rig.host.shutdown(std::net::Shutdown::Write).unwrap();
        let mut heard = String::new();
        rig.from_host.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "question");
        rig.to_host.write_all(b"answer").unwrap();
        drop(rig.to_host);
        heard.clear();
        rig.host.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "answer");
        rig.pump.join().unwrap();
    }

    #[test]
    fn a_host_that_closes_ends_the_pump_though_the_channel_stays_open() {
        let Rig {
            pump,
            host,
            mut from_host,
            to_host: _open,
        } = rig();
        drop(host);
        assert_eq!(from_host.read(&mut [0]).unwrap(), 0);
        pump.join().unwrap();
    }

    #[test]
    fn a_channel_that_closes_ends_the_pump_though_the_host_keeps_its_end() {
        let Rig {
            pump,
            mut host,
            to_host,
            from_host,
        } = rig();
        drop((to_host, from_host));
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
        pump.join().unwrap();
        assert!(host.write(b"x").is_err());
    }

    #[test]
    fn a_sink_that_does_not_read_holds_up_its_own_direction_only() {
        let mut rig = rig();
        let stuffing = thread::spawn({
            let mut host = rig.host.try_clone().unwrap();
            move || host.write_all(&[7; 1 << 20])
        });
        rig.to_host.write_all(b"through").unwrap();
        let mut heard = [0; 7];
        rig.host.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"through");
        let mut stuffed = vec![0; 1 << 20];
        rig.from_host.read_exact(&mut stuffed).unwrap();
        stuffing.join().unwrap().unwrap();
        assert!(stuffed.iter().all(|byte| *byte == 7));
    }
}
