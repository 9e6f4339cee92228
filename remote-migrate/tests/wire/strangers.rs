//! Who is let in, and who is not: identities of sockets, and certificates.

use std::{error::Error as _, net::SocketAddr, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use remote_migrate::{
    Effect, Owner, Peer as _, PeerError, Reason,
    wire::{
        AllowList, Dialled, Link, Options, PeerIdentity, Tls, TlsDial, TlsError, WireError,
        WirePeer, message::FaultKind, serve_connection,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::Instant,
};

use crate::{
    ends::{Served, options},
    rig::{self, Rig, Where},
};

/// An authority of certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// A certificate and its key, both as PEM.
    fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// The material of a daemon with this name.
    pub(crate) fn tls(&self, name: &str) -> Tls {
        self.tls_with(|params| params.subject_alt_names = names(&[name]))
    }

    fn tls_with(&self, change: impl FnOnce(&mut CertificateParams)) -> Tls {
        let (certificate, key) = self.issue(change);
        Tls::from_pem(self.pem.as_bytes(), certificate.as_bytes(), key.as_bytes()).unwrap()
    }

    /// Believes this authority, and shows a certificate of another one.
    fn tls_of_other(&self, name: &str) -> Tls {
        let (certificate, key) =
            Self::new().issue(|params| params.subject_alt_names = names(&[name]));
        Tls::from_pem(self.pem.as_bytes(), certificate.as_bytes(), key.as_bytes()).unwrap()
    }
}

fn names(names: &[&str]) -> Vec<rcgen::SanType> {
    let name = |name: &&str| rcgen::SanType::DnsName((*name).try_into().unwrap());
    names.iter().map(name).collect()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// A destination behind TLS, that takes one connection.
async fn serve_tls(rig: &Rig, tls: Tls, allow: AllowList) -> (SocketAddr, Served) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let destination = rig.destination();
    let served = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let (stream, identity) = tls.accept(stream, soon()).await?;
        let options = Options::new(allow);
        serve_connection(stream, &identity, &destination, &options, &Link::new()).await
    });
    (address, served)
}

fn dial(address: SocketAddr, name: &str, tls: Tls) -> WirePeer {
    let options = Options::new(AllowList::nobody().name(name));
    WirePeer::new(TlsDial::new(address, name, tls), options)
}

async fn ask(peer: &WirePeer, rig: &Rig) -> PeerError {
    let asked = peer.ask(rig.request(rig::Link::prepare()), soon());
    asked.await.unwrap_err()
}

fn wire_error(error: &PeerError) -> &WireError {
    error.source().unwrap().downcast_ref().unwrap()
}

async fn refuses(rig: &Rig, served: JoinHandle<Result<(), WireError>>) -> WireError {
    let error = served.await.unwrap().unwrap_err();
    assert_eq!(rig.calls(), 0, "a host was called");
    assert!(rig.forgotten().await && rig.runs() == Where::Source);
    error
}

fn tls_error(error: &WireError) -> &TlsError {
    let WireError::Tls(error) = error else {
        panic!("{error:?}");
    };
    error
}

/// What it says, with its causes.
fn words(error: &WireError) -> String {
    Reason::of(error).as_str().to_owned()
}

/// The other side's word, which comes after the handshake of this one.
fn is_not_believed(error: &PeerError) -> bool {
    let not_believed = matches!(tls_error(wire_error(error)), TlsError::NotBelieved(_));
    not_believed && error.effect() == Effect::None
}

#[tokio::test]
async fn a_guest_moves_between_two_that_know_each_others_names() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("b.example"), allow).await;
    let peer = dial(address, "b.example", authority.tls("a.example"));
    let report = rig.migrate_over(&peer).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(rig.runs(), Where::Destination);
    let names = vec!["b.example".to_owned()];
    let state = peer.link().watch().borrow().clone();
    assert_eq!(state.peer, Some(PeerIdentity::Tls { names }));
    drop(peer);
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_by_either_side() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("b.example"), allow.clone()).await;
    let error = ask(
        &dial(address, "b.example", authority.tls_of_other("a.example")),
        &rig,
    )
    .await;
    assert!(is_not_believed(&error), "{error:?}");
    let why = refuses(&rig, served).await;
    assert!(
        matches!(tls_error(&why), TlsError::OtherAuthority(_)),
        "{why:?}"
    );

    let (address, served) = serve_tls(&rig, authority.tls_of_other("b.example"), allow).await;
    let error = ask(
        &dial(address, "b.example", authority.tls("a.example")),
        &rig,
    )
    .await;
    let other = matches!(tls_error(wire_error(&error)), TlsError::OtherAuthority(_));
    assert!(other && error.effect() == Effect::None, "{error:?}");
    let why = refuses(&rig, served).await;
    assert!(
        matches!(tls_error(&why), TlsError::NotBelieved(_)),
        "{why:?}"
    );
}

#[tokio::test]
async fn a_certificate_out_of_date_is_refused() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("b.example"), allow).await;
    let old = authority.tls_with(|params| {
        params.subject_alt_names = names(&["a.example"]);
        params.not_after = date_time_ymd(2001, 1, 1);
        params.not_before = date_time_ymd(2000, 1, 1);
    });
    let error = ask(&dial(address, "b.example", old), &rig).await;
    assert!(is_not_believed(&error), "{error:?}");
    let why = words(&refuses(&rig, served).await);
    assert!(why.contains("expired"), "{why}");
}

#[tokio::test]
async fn a_certificate_for_servers_alone_is_none_for_a_client() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("b.example"), allow).await;
    let server = authority.tls_with(|params| {
        params.subject_alt_names = names(&["a.example"]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let error = ask(&dial(address, "b.example", server), &rig).await;
    assert!(is_not_believed(&error), "{error:?}");
    refuses(&rig, served).await;
}

#[tokio::test]
async fn a_peer_without_a_certificate_is_refused() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("b.example"), allow).await;
    let mut roots = rustls::RootCertStore::empty();
    let pem = authority.pem.as_bytes();
    let root = rustls::pki_types::pem::PemObject::from_pem_slice(pem).unwrap();
    roots.add(root).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"vmwright-migrate".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let stream = TcpStream::connect(address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("b.example").unwrap();
    let mut stream = connector.connect(name, stream).await.unwrap();
    let mut heard = Vec::new();
    let alert = stream.read_to_end(&mut heard).await.unwrap_err();
    assert!(alert.to_string().contains("CertificateRequired"), "{alert}");
    let why = refuses(&rig, served).await;
    assert!(
        matches!(tls_error(&why), TlsError::NoCertificate),
        "{why:?}"
    );
}

#[tokio::test]
async fn a_server_with_another_name_is_not_believed() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("c.example"), allow).await;
    let error = ask(
        &dial(address, "b.example", authority.tls("a.example")),
        &rig,
    )
    .await;
    let other = matches!(tls_error(wire_error(&error)), TlsError::OtherName(_));
    assert!(other && error.effect() == Effect::None, "{error:?}");
    refuses(&rig, served).await;
}

#[tokio::test]
async fn a_client_with_another_name_is_told_who_it_is_and_why_not() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("b.example"), allow).await;
    let error = ask(
        &dial(address, "b.example", authority.tls("c.example")),
        &rig,
    )
    .await;
    assert_eq!(error.effect(), Effect::None);
    let fault = wire_error(&error).remote().unwrap();
    assert_eq!(fault.kind, FaultKind::Forbidden);
    let told = "admit certificate of c.example: none of the names is on the allow-list";
    assert_eq!(fault.text.as_str(), told);
    assert_eq!(words(&refuses(&rig, served).await), told);
}

#[tokio::test]
async fn plaintext_at_a_tls_port_is_refused() {
    let (rig, authority) = (Rig::new(), Authority::new());
    let allow = AllowList::nobody().name("a.example");
    let (address, served) = serve_tls(&rig, authority.tls("b.example"), allow).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"\0\0\0\x0f{\"ping\":{\"id\":1}}")
        .await
        .unwrap();
    let why = refuses(&rig, served).await;
    assert!(matches!(tls_error(&why), TlsError::Handshake(_)), "{why:?}");
}

#[test]
fn material_that_is_none_is_refused() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue(|_| {});
    let (_, other_key) = authority.issue(|_| {});
    let [pem, certificate, key, other_key] =
        [&authority.pem, &certificate, &key, &other_key].map(|text| text.as_bytes());
    for (authority, certificate, key) in [
        (&b""[..], certificate, key),
        (pem, b"", key),
        (pem, certificate, b""),
        (pem, certificate, other_key),
        (b"-----BEGIN CERTIFICATE-----\n7", certificate, key),
    ] {
        assert!(Tls::from_pem(authority, certificate, key).is_err());
    }
    assert!(Tls::from_pem(pem, certificate, key).is_ok());
}

/// A destination on plain tcp, and a peer that dials it, each allowing what it is told to.
async fn plaintext(rig: &Rig, serves: AllowList, asks: AllowList) -> (WirePeer, Served) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let destination = rig.destination();
    let served = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let identity = PeerIdentity::of_tcp(&stream).unwrap();
        let options = Options::new(serves);
        serve_connection(stream, &identity, &destination, &options, &Link::new()).await
    });
    let dial = move || async move {
        let stream = TcpStream::connect(address).await?;
        let identity = PeerIdentity::of_tcp(&stream)?;
        Ok(Dialled::new(stream, identity))
    };
    (WirePeer::new(dial, Options::new(asks)), served)
}

#[tokio::test]
async fn plaintext_tcp_moves_a_guest_only_if_both_sides_allow_it() {
    let localhost = || AllowList::nobody().allow_plaintext("127.0.0.1".parse().unwrap());
    let rig = Rig::new();
    let (peer, served) = plaintext(&rig, AllowList::nobody(), localhost()).await;
    let error = ask(&peer, &rig).await;
    let fault = wire_error(&error).remote().unwrap();
    assert_eq!(fault.kind, FaultKind::Forbidden);
    let why = words(&refuses(&rig, served).await);
    assert!(
        why.ends_with("without TLS: plaintext is not allowed from there"),
        "{why}"
    );

    let (peer, served) = plaintext(&rig, localhost(), AllowList::nobody()).await;
    let error = ask(&peer, &rig).await;
    assert!(
        matches!(wire_error(&error), WireError::Refused(_)),
        "{error:?}"
    );
    served.await.unwrap().unwrap();
    assert_eq!(rig.calls(), 0);

    let (peer, _served) = plaintext(&rig, localhost(), localhost()).await;
    assert_eq!(
        rig.migrate_over(&peer).await.unwrap().owner,
        Owner::Destination
    );
    assert_eq!(rig.runs(), Where::Destination);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_is_not_listened_to() {
    let rig = Rig::new();
    for identity in [
        PeerIdentity::Unix {
            uid: 1000,
            pid: Some(42),
        },
        PeerIdentity::Vsock { cid: 3 },
    ] {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let destination = rig.destination();
        let who = identity.clone();
        let served = tokio::spawn(async move {
            serve_connection(far, &who, &destination, &options(), &Link::new()).await
        });
        let mut stranger = crate::ends::Played::new(near);
        // All it has to say is said before it can be refused.
        stranger
            .say(&remote_migrate::wire::message::Message::Hello(
                remote_migrate::wire::message::Hello::ours(),
            ))
            .await;
        stranger.ask(1, rig.request(rig::Link::prepare())).await;
        let fault = stranger.fault().await;
        assert_eq!(fault.kind, FaultKind::Forbidden);
        assert!(fault.text.as_str().contains(&identity.to_string()));
        drop(stranger);
        refuses(&rig, served).await;
    }
}
