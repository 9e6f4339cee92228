//! Who is at the other end, and whether that one may be.
//!
//! An identity is what the kernel or a certificate vouches for, never what the peer says of itself. Nobody
//! is allowed who is not named. Knows nothing of requests: whoever is let in may ask them all.

use std::{
    collections::BTreeSet,
    fmt, io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::{TcpStream, UnixStream};

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerIdentity {
    /// A process of this host, as the kernel says.
    Unix {
        /// Its user when it connected.
        uid: u32,
        /// Its number, if the kernel knows it. For people; numbers are given again.
        pid: Option<i32>,
    },
    /// A virtual machine, or the host of one, as the kernel says.
    Vsock {
        /// Its context id.
        cid: u32,
    },
    /// Whoever has this address now. Nobody vouches for it.
    Tcp {
        /// Where the connection seems to come from.
        addr: SocketAddr,
    },
    /// The holder of a certificate of our authority.
    Tls {
        /// The DNS names in it.
        names: Vec<String>,
    },
}

impl PeerIdentity {
    /// The process at the other end of a unix socket.
    ///
    /// # Errors
    ///
    /// The kernel does not say.
    pub fn of_unix(stream: &UnixStream) -> io::Result<Self> {
        let cred = stream.peer_cred()?;
        Ok(Self::Unix {
            uid: cred.uid(),
            pid: cred.pid(),
        })
    }

    /// The address at the other end of a tcp connection without TLS.
    ///
    /// # Errors
    ///
    /// The connection is broken already.
    pub fn of_tcp(stream: &TcpStream) -> io::Result<Self> {
        let addr = stream.peer_addr()?;
        Ok(Self::Tcp { addr })
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix {
                uid,
                pid: Some(pid),
            } => write!(f, "uid {uid} (pid {pid})"),
            Self::Unix { uid, pid: None } => write!(f, "uid {uid}"),
            Self::Vsock { cid } => write!(f, "cid {cid}"),
            Self::Tcp { addr } => write!(f, "{addr} without TLS"),
            Self::Tls { names } if names.is_empty() => f.write_str("a certificate without names"),
            Self::Tls { names } => write!(f, "certificate of {}", names.join(", ")),
        }
    }
}

/// Who may be at the other end. It begins with nobody.
///
/// ```
/// use remote_migrate::wire::{AllowList, PeerIdentity};
///
/// let allow = AllowList::nobody().uid(0).name("b.example");
/// assert!(allow.check(&PeerIdentity::Unix { uid: 0, pid: None }).is_ok());
///
/// let stranger = PeerIdentity::Tcp { addr: "192.0.2.7:4000".parse()? };
/// assert_eq!(
///     allow.check(&stranger).unwrap_err().to_string(),
///     "admit 192.0.2.7:4000 without TLS: plaintext is not allowed from there",
/// );
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList {
    uids: BTreeSet<u32>,
    cids: BTreeSet<u32>,
    names: BTreeSet<String>,
    plaintext: BTreeSet<IpAddr>,
}

impl AllowList {
    /// Nobody.
    #[must_use]
    pub fn nobody() -> Self {
        Self::default()
    }

    /// And processes of this user, over unix sockets.
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.uids.insert(uid);
        self
    }

    /// And this context, over vsock.
    #[must_use]
    pub fn cid(mut self, cid: u32) -> Self {
        self.cids.insert(cid);
        self
    }

    /// And the holder of a certificate with this very DNS name. A wildcard in a certificate is no name.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.names.insert(name.to_ascii_lowercase());
        self
    }

    /// And whoever has this address, without TLS: anybody on the way can read the guest's description, and
    /// take or destroy the guest. For networks where nobody else is.
    #[must_use]
    pub fn allow_plaintext(mut self, from: IpAddr) -> Self {
        self.plaintext.insert(from.to_canonical());
        self
    }

    /// Whether that one may.
    ///
    /// # Errors
    ///
    /// [`Refused`]: no. It says who and why.
    pub fn check(&self, who: &PeerIdentity) -> Result<(), Refused> {
        let (allowed, why) = match who {
            PeerIdentity::Unix { uid, .. } => {
                (self.uids.contains(uid), "the uid is not on the allow-list")
            }
            PeerIdentity::Vsock { cid } => {
                (self.cids.contains(cid), "the cid is not on the allow-list")
            }
            PeerIdentity::Tcp { addr } => (
                self.plaintext.contains(&addr.ip().to_canonical()),
                "plaintext is not allowed from there",
            ),
            PeerIdentity::Tls { names } => (
                names
                    .iter()
                    .any(|name| self.names.contains(&name.to_ascii_lowercase())),
                "none of the names is on the allow-list",
            ),
        };
        allowed.then_some(()).ok_or_else(|| Refused {
            who: who.clone(),
            why,
        })
    }
}

/// Whoever is at the other end may not be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("admit {who}: {why}")]
#[non_exhaustive]
pub struct Refused {
    /// Who.
    pub who: PeerIdentity,
    /// Why not.
    pub why: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_let_in_by_default() {
        for who in [
            PeerIdentity::Unix { uid: 0, pid: None },
            PeerIdentity::Vsock { cid: 2 },
            PeerIdentity::Tcp {
                addr: "127.0.0.1:1".parse().unwrap(),
            },
            PeerIdentity::Tls { names: Vec::new() },
            PeerIdentity::Tls {
                names: vec![String::new()],
            },
        ] {
            let refused = AllowList::nobody().check(&who).unwrap_err();
            assert_eq!(refused.who, who);
        }
    }

    #[test]
    fn each_sort_is_let_in_by_its_own_list_alone() {
        let allow = AllowList::nobody().uid(7);
        assert!(
            allow
                .check(&PeerIdentity::Unix { uid: 7, pid: None })
                .is_ok()
        );
        assert!(allow.check(&PeerIdentity::Vsock { cid: 7 }).is_err());
    }

    #[test]
    fn a_name_is_matched_whole_and_without_case() {
        let allow = AllowList::nobody().name("B.example");
        let tls = |name: &str| PeerIdentity::Tls {
            names: vec![name.into()],
        };
        assert!(allow.check(&tls("b.EXAMPLE")).is_ok());
        for name in ["*.example", "b.example.org", "ab.example", "example"] {
            assert!(allow.check(&tls(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn an_address_is_the_same_when_it_is_mapped_into_the_newer_family() {
        let allow = AllowList::nobody().allow_plaintext("192.0.2.7".parse().unwrap());
        let addr = "[::ffff:192.0.2.7]:9".parse().unwrap();
        assert!(allow.check(&PeerIdentity::Tcp { addr }).is_ok());
    }
}
