//! TLS for streams that cross a network: one own authority, both sides with a certificate of it.
//!
//! Version 1.3 alone, with the primitives of `ring`. Nothing is resumed, so that every connection shows
//! its certificate. Knows no addresses: a stream comes in, a stream and who is behind it come out.

use std::{fmt, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::{error::WireError, identity::PeerIdentity};

/// Tells this protocol from others that are served with certificates of the same authority.
const PROTOCOL: &[u8] = b"vmwright-migrate";

/// What a daemon shows of itself, and whom it believes. A clone is another handle to the same.
#[derive(Clone, Debug)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    names: Arc<[String]>,
    pem: Arc<Pem>,
}

/// The material as it was given, for a program that makes its own TLS with it, as QEMU does for the guest's memory.
#[expect(clippy::exhaustive_structs, reason = "these three and no more")]
pub struct Pem {
    /// The certificates of the authority.
    pub authority: Vec<u8>,
    /// The own chain, own certificate first.
    pub chain: Vec<u8>,
    /// The key.
    pub key: Vec<u8>,
}

/// The key is nobody's to read in a log.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pem").finish_non_exhaustive()
    }
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// Not the PEM that was expected.
    #[error("read {what} from PEM")]
    Pem {
        /// Of what.
        what: &'static str,
        /// What was found instead.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The material is of no use: no certificate, or a key that belongs to another one.
    #[error("use certificate, key and authority")]
    Material(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Not a name that a certificate could have.
    #[error("expect peer named {name:?}: that is no DNS name")]
    Name {
        /// What was given.
        name: String,
    },
    /// The other side showed no certificate.
    #[error("believe peer: it showed no certificate")]
    NoCertificate,
    /// The other side showed a certificate that is not of the authority, whoever it says has signed it.
    #[error("believe peer: its certificate is not of the authority")]
    OtherAuthority(#[source] rustls::Error),
    /// The other side showed the certificate of another one.
    #[error("believe peer: its certificate has another name")]
    OtherName(#[source] rustls::Error),
    /// The other side did not believe this one, and says so.
    #[error("be believed by peer")]
    NotBelieved(#[source] rustls::Error),
    /// They did not agree in another way.
    #[error("shake hands")]
    Handshake(#[source] std::io::Error),
}

impl TlsError {
    /// What a failure of a stream under TLS is, if TLS is what failed. Whether the other side believes this one is only
    /// told after the handshake, in place of the first answer.
    pub(super) fn of(error: &std::io::Error) -> Option<Self> {
        use rustls::{AlertDescription as Alert, CertificateError as Is, Error};
        let error = error.get_ref()?.downcast_ref::<Error>()?;
        Some(match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            // A signature fails where the other authority bears the name of ours.
            Error::InvalidCertificate(Is::UnknownIssuer | Is::BadSignature) => {
                Self::OtherAuthority(error.clone())
            }
            Error::InvalidCertificate(Is::NotValidForName | Is::NotValidForNameContext { .. }) => {
                Self::OtherName(error.clone())
            }
            Error::AlertReceived(
                Alert::CertificateRequired
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::DecryptError,
            ) => Self::NotBelieved(error.clone()),
            _ => return None,
        })
    }
}

impl Tls {
    /// With the certificates of the authority, the own chain (own certificate first) and its key, all as PEM.
    ///
    /// # Errors
    ///
    /// [`TlsError::Pem`], [`TlsError::Material`].
    pub fn from_pem(authority: &[u8], chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let given = Pem {
            authority: authority.to_vec(),
            chain: chain.to_vec(),
            key: key.to_vec(),
        };
        let pem = |what| move |source| TlsError::Pem { what, source };
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(authority) {
            let root = root.map_err(pem("authority"))?;
            roots.add(root).map_err(material)?;
        }
        let roots = Arc::new(roots);
        let chain = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<Vec<_>, _>>()
            .map_err(pem("certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(pem("key"))?;
        let names = names(&chain)?.into();

        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(material)?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(material)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(material)?;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(material)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(material)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        client.resumption = Resumption::disabled();
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            names,
            pem: Arc::new(given),
        })
    }

    /// The DNS names in the own certificate.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// What it was made from.
    #[must_use]
    pub fn pem(&self) -> &Pem {
        &self.pem
    }

    /// Shakes hands on an accepted stream, and says whose certificate the other side showed.
    ///
    /// # Errors
    ///
    /// [`WireError::Tls`]: no certificate ([`TlsError::NoCertificate`]), or not one of the authority
    /// ([`TlsError::OtherAuthority`]). [`WireError::Late`]: `deadline` came first.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the stream.
    pub async fn accept<S>(
        &self,
        stream: S,
        deadline: Instant,
    ) -> Result<(server::TlsStream<S>, PeerIdentity), WireError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin,
    {
        let shaking = TlsAcceptor::from(Arc::clone(&self.server)).accept(stream);
        let stream = on_time(deadline, shaking).await?;
        let identity = identity(stream.get_ref().1.peer_certificates())?;
        Ok((stream, identity))
    }

    /// Shakes hands on a dialled stream with a peer that must have the DNS name `name`.
    ///
    /// Whether the other side believes this one is only known when it answers: [`TlsError::NotBelieved`] comes in place of
    /// the greeting.
    ///
    /// # Errors
    ///
    /// [`WireError::Tls`]: it has another name ([`TlsError::OtherName`]), or no certificate of the authority
    /// ([`TlsError::OtherAuthority`]). [`WireError::Late`]: `deadline` came first.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the stream.
    pub async fn connect<S>(
        &self,
        stream: S,
        name: &str,
        deadline: Instant,
    ) -> Result<(client::TlsStream<S>, PeerIdentity), WireError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin,
    {
        let dns = match ServerName::try_from(name.to_owned()) {
            Ok(dns @ ServerName::DnsName(_)) => dns,
            _ => {
                let name = name.to_owned();
                return Err(WireError::Tls(TlsError::Name { name }));
            }
        };
        let shaking = TlsConnector::from(Arc::clone(&self.client)).connect(dns, stream);
        let stream = on_time(deadline, shaking).await?;
        let identity = identity(stream.get_ref().1.peer_certificates())?;
        Ok((stream, identity))
    }
}

async fn on_time<T>(
    deadline: Instant,
    shaking: impl Future<Output = std::io::Result<T>>,
) -> Result<T, WireError> {
    let began = Instant::now();
    match timeout_at(deadline, shaking).await {
        Ok(done) => done.map_err(|error| {
            let told = TlsError::of(&error);
            WireError::Tls(told.unwrap_or(TlsError::Handshake(error)))
        }),
        Err(_) => Err(WireError::Late {
            after: began.elapsed(),
        }),
    }
}

/// The names in a certificate that was verified already.
fn identity(chain: Option<&[CertificateDer<'_>]>) -> Result<PeerIdentity, WireError> {
    let names = names(chain.unwrap_or_default()).map_err(WireError::Tls)?;
    Ok(PeerIdentity::Tls { names })
}

/// The DNS names in the first certificate of a chain.
fn names(chain: &[CertificateDer<'_>]) -> Result<Vec<String>, TlsError> {
    let Some(certificate) = chain.first() else {
        return Ok(Vec::new());
    };
    let certificate = webpki::EndEntityCert::try_from(certificate).map_err(material)?;
    Ok(certificate.valid_dns_names().map(str::to_owned).collect())
}

fn material(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> TlsError {
    TlsError::Material(error.into())
}
