//! How a peer is reached, once and again after its connection was lost.

use std::{error::Error as StdError, net::SocketAddr, path::PathBuf};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::Instant,
};

use super::{identity::PeerIdentity, tls::Tls};

/// A stream of bytes both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection that was just made.
pub struct Dialled {
    /// The bytes.
    pub stream: Box<dyn Stream>,
    /// Who is at the other end, as the kernel or TLS vouches for it.
    pub identity: PeerIdentity,
}

impl Dialled {
    /// A connection over `stream` to `identity`.
    #[must_use]
    pub fn new(stream: impl Stream + 'static, identity: PeerIdentity) -> Self {
        Self {
            stream: Box::new(stream),
            identity,
        }
    }
}

/// Why nobody was reached.
pub type DialError = Box<dyn StdError + Send + Sync>;

/// A way to the peer. An async closure without arguments is one.
#[async_trait]
pub trait Dial: Send + Sync {
    /// Makes a new connection, by `deadline` if it can.
    ///
    /// # Errors
    ///
    /// There is none to be had.
    ///
    /// # Cancel safety
    ///
    /// Dropped at its deadline; nothing is left then.
    async fn dial(&self, deadline: Instant) -> Result<Dialled, DialError>;
}

#[async_trait]
impl<F, D> Dial for F
where
    F: Fn() -> D + Send + Sync,
    D: Future<Output = Result<Dialled, DialError>> + Send,
{
    async fn dial(&self, _deadline: Instant) -> Result<Dialled, DialError> {
        self().await
    }
}

/// To a daemon of this host, by the path of its socket.
#[derive(Clone, Debug)]
pub struct UnixDial {
    path: PathBuf,
}

impl UnixDial {
    /// To this path.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

#[async_trait]
impl Dial for UnixDial {
    async fn dial(&self, _deadline: Instant) -> Result<Dialled, DialError> {
        let stream = UnixStream::connect(&self.path).await?;
        let identity = PeerIdentity::of_unix(&stream)?;
        Ok(Dialled::new(stream, identity))
    }
}

/// To a daemon with this address, which must prove its name, and whose name must be on the allow-list.
#[derive(Clone, Debug)]
pub struct TlsDial {
    address: SocketAddr,
    name: String,
    tls: Tls,
}

impl TlsDial {
    /// To `address`, where a peer with the DNS name `name` must be.
    #[must_use]
    pub fn new(address: SocketAddr, name: impl Into<String>, tls: Tls) -> Self {
        Self {
            address,
            name: name.into(),
            tls,
        }
    }
}

#[async_trait]
impl Dial for TlsDial {
    async fn dial(&self, deadline: Instant) -> Result<Dialled, DialError> {
        let stream = TcpStream::connect(self.address).await?;
        // A request is one small write that somebody waits for.
        stream.set_nodelay(true)?;
        let (stream, identity) = self.tls.connect(stream, &self.name, deadline).await?;
        Ok(Dialled::new(stream, identity))
    }
}
