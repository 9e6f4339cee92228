//! Certificates for daemons that move guests under TLS, for the suite and the benches.
//!
//! Knows the public faces of the driver and of the wire only. Every key is made anew and lives in memory.

#![allow(dead_code, reason = "each of its users needs a part of it")]

use std::net::Ipv4Addr;

use driver::Landing;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use remote_migrate::wire::Tls;

/// An authority of certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key can be made");
        let mut params = CertificateParams::new(Vec::new()).expect("no names are names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).expect("it can be signed");
        Self {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// What a daemon of this name shows, which believes those.
    pub(crate) fn tls_believing(&self, name: &str, believed: &[&Self]) -> Tls {
        let key = KeyPair::generate().expect("a key can be made");
        let mut params = CertificateParams::new(Vec::new()).expect("no names are names");
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().expect("a name"))];
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("it can be signed");
        let (chain, key) = (certificate.pem(), key.serialize_pem());
        let believed: String = believed.iter().map(|one| one.pem.as_str()).collect();
        Tls::from_pem(believed.as_bytes(), chain.as_bytes(), key.as_bytes()).expect("it is of use")
    }

    pub(crate) fn tls(&self, name: &str) -> Tls {
        self.tls_believing(name, &[self])
    }

    pub(crate) fn landing(&self, name: &str) -> Landing {
        under(self.tls(name))
    }
}

pub(crate) fn under(tls: Tls) -> Landing {
    Landing::tls(Ipv4Addr::LOCALHOST.into(), tls)
}
