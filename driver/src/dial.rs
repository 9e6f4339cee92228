//! Another daemon over a transport, as over `vsock:`, and who is there as the kernel says.
//!
//! Knows transports and the wire, which do not know each other, and nothing of what is asked. Who may be there is the
//! allow-list's matter, on both ends.

use std::io;

use async_trait::async_trait;
use remote_migrate::wire::{Dial, DialError, Dialled, PeerIdentity};
use tokio::time::Instant;
use transport_host::{Peer, Transports};

/// To a daemon at a target of a transport, such as `vsock:3:7000`.
#[derive(Clone)]
pub struct TransportDial {
    transports: Transports,
    target: String,
}

impl TransportDial {
    /// To `target`, through one of these.
    #[must_use]
    pub fn new(transports: Transports, target: impl Into<String>) -> Self {
        let target = target.into();
        Self { transports, target }
    }
}

#[async_trait]
impl Dial for TransportDial {
    async fn dial(&self, deadline: Instant) -> Result<Dialled, DialError> {
        let stream = self.transports.dial(&self.target, deadline).await?;
        let identity = identity(stream.peer())?;
        Ok(Dialled::new(stream, identity))
    }
}

/// Who that is to an allow-list. An address alone is nobody, but where plaintext is allowed from it.
pub(crate) fn identity(peer: &Peer) -> io::Result<PeerIdentity> {
    Ok(match *peer {
        Peer::Unix { uid, pid, .. } => PeerIdentity::Unix {
            uid,
            pid: pid.and_then(|pid| i32::try_from(pid).ok()),
        },
        Peer::Vsock { cid, .. } => PeerIdentity::Vsock { cid },
        Peer::Inet(addr) => PeerIdentity::Tcp { addr },
        _ => {
            let why = "the kernel does not say who is at the other end";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
    })
}

#[cfg(test)]
mod tests {
    use remote_migrate::wire::AllowList;

    use super::*;

    #[test]
    fn each_is_let_in_by_what_the_kernel_says_of_it_and_by_the_list_for_that_alone() {
        let allow = AllowList::nobody().uid(7).cid(3);
        let is_allowed = |peer| allow.check(&identity(&peer).unwrap()).is_ok();
        let vsock = |cid| Peer::Vsock { cid, port: 9 };
        let unix = |uid| Peer::Unix {
            uid,
            gid: 3,
            pid: Some(3),
        };
        assert!(is_allowed(vsock(3)) && is_allowed(unix(7)));
        assert!(!is_allowed(vsock(7)) && !is_allowed(unix(3)));
        assert!(!is_allowed(Peer::Inet("192.0.2.7:9".parse().unwrap())));
    }

    #[test]
    fn whom_the_kernel_does_not_know_is_nobody_to_be_allowed() {
        let error = identity(&Peer::Unidentified).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
