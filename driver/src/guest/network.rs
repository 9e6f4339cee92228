//! What a network card is: a name, an address, a model, and what it is connected to.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A network card.
///
/// ```
/// use driver::{Guest, Network, NetworkBackend};
///
/// let lan = Network::new("lan", NetworkBackend::Tap("tap-web".into()));
/// let web = Guest { networks: vec![lan], ..Guest::new("web") };
/// web.check().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "plain data; checked before use")]
pub struct Network {
    /// What operations call it; unique among the guest's cards. At most 20 of letters, digits, `-` and `_`, a letter first.
    pub name: String,
    /// Its address; unique among the guest's cards.
    pub mac: Mac,
    /// What the guest sees.
    #[serde(default)]
    pub model: NetworkModel,
    /// What it is connected to.
    pub backend: NetworkBackend,
    /// Which of the guest's [slots](super::Guest::slots) it is plugged into, counted from 0. Without one it sits on the
    /// machine's own bus, and cannot be unplugged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

impl Network {
    /// A card of that name with a random address, on the machine's own bus.
    pub fn new(name: impl Into<String>, backend: NetworkBackend) -> Self {
        Self {
            name: name.into(),
            mac: Mac::random(),
            model: NetworkModel::default(),
            backend,
            slot: None,
        }
    }
}

/// What a guest sees of a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NetworkModel {
    /// A virtio card.
    #[default]
    Virtio,
}

/// What a card is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NetworkBackend {
    /// QEMU's own network: the guest reaches what QEMU's user may reach, through QEMU's sockets, and is reached by nobody.
    User,
    /// A tap device of this name, which exists already and which the driver may open.
    Tap(String),
}

/// An Ethernet address, written as `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// An address below QEMU's own prefix, `52:54:00`.
    #[must_use]
    pub fn random() -> Self {
        let [a, b, c, ..] = Uuid::new_v4().into_bytes();
        Self([0x52, 0x54, 0, a, b, c])
    }

    /// The address of these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// What makes it useless as the address of a card.
    pub(super) fn fault(self) -> Option<&'static str> {
        if self.0 == [0; 6] {
            return Some("is all zero");
        }
        // IEEE 802: the lowest bit of the first byte is that of a group of stations.
        (self.0[0] & 1 != 0).then_some("is that of a group")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is no Ethernet address, as 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let digits = part.filter(|part| part.bytes().all(|digit| digit.is_ascii_hexdigit()));
            let digits = digits.ok_or_else(fault)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| fault())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(fault()),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written_and_nothing_else_is_one() {
        let mac = Mac::new([0x52, 0x54, 0, 0xab, 0, 1]);
        assert_eq!(mac.to_string(), "52:54:00:ab:00:01");
        assert_eq!("52:54:00:AB:00:01".parse(), Ok(mac));
        for bad in [
            "",
            "52:54:00:ab:00",
            "52:54:00:ab:00:01:02",
            "52:54:00:ab:00:1",
            "52:54:00:ab:00:+1",
            "52-54-00-ab-00-01",
            "52:54:00:ab:00:01,id=x",
        ] {
            bad.parse::<Mac>().expect_err(bad);
        }
    }

    #[test]
    fn a_random_address_is_that_of_one_card() {
        assert_eq!(Mac::random().fault(), None);
        assert!(Mac::new([0; 6]).fault().is_some());
        assert!(Mac::new([1, 0, 0, 0, 0, 1]).fault().is_some());
    }
}
