//! What the drivers of both sides tell each other in the cookies of `remote-migrate`, and in which version of it.
//!
//! The version goes up when a driver that does not know of a change would do the wrong thing, as with a device that it
//! would leave out. What a driver may skip is a member with a default instead. Each reads its own version and all before it.

use std::num::NonZero;

use remote_migrate::{Cookie, CookieError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::guest::Guest;
use crate::landing::{Landing, Way};

/// The version spoken here; also that of cookies which name none.
const VERSION: u16 = 1;

/// What the destination's driver must know of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Moving {
    #[serde(default = "first")]
    version: u16,
    pub(crate) guest: Guest,
    pub(crate) channels: Option<NonZero<u8>>,
    pub(crate) post_copy: bool,
}

impl Moving {
    pub(super) fn new(guest: Guest, channels: Option<NonZero<u8>>, post_copy: bool) -> Self {
        Self {
            version: VERSION,
            guest,
            channels,
            post_copy,
        }
    }
}

/// What the source's driver must know to bring the memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bring {
    #[serde(default = "first")]
    version: u16,
    pub(crate) way: Way,
    /// The DNS name that is proved there, if it is to be brought under TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<String>,
}

impl Bring {
    /// That way, and under TLS if that is how `landing` takes it in.
    pub(crate) fn to(landing: &Landing, way: Way) -> Self {
        let tls = landing.shown().map(|(_, name)| name.to_owned());
        Self {
            version: VERSION,
            way,
            tls,
        }
    }
}

/// A cookie that was not understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotUnderstood {
    #[error(
        "read what the other driver says: it says it in version {theirs}, and this one knows {VERSION} at most"
    )]
    TooNew { theirs: u16 },
    #[error("read what the other driver says")]
    Unreadable(#[from] CookieError),
}

/// What the other side's driver has put in.
pub(crate) fn read<T: DeserializeOwned>(cookie: &Cookie) -> Result<T, NotUnderstood> {
    // Alone, and first: all else may look otherwise in a newer one.
    #[derive(Deserialize)]
    struct Stamp {
        #[serde(default = "first")]
        version: u16,
    }
    let Stamp { version: theirs } = cookie.decode()?;
    if theirs > VERSION {
        return Err(NotUnderstood::TooNew { theirs });
    }
    Ok(cookie.decode()?)
}

fn first() -> u16 {
    1
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// As the first release wrote them.
    const MOVING: &str = r#"{"guest":{"name":"web","uuid":"00000000-0000-0000-0000-000000000007"},"channels":null,"post_copy":false}"#;
    const BRING: &str = r#"{"way":"bare"}"#;

    #[test]
    fn what_an_older_driver_says_is_understood() {
        let moving: Moving = read(&Cookie::new(MOVING).unwrap()).unwrap();
        assert_eq!((moving.version, moving.guest.name.as_str()), (1, "web"));
        let bring: Bring = read(&Cookie::new(BRING).unwrap()).unwrap();
        assert_eq!((bring.version, bring.tls), (1, None));
    }

    #[test]
    fn what_this_driver_says_names_its_version() {
        let moving = Moving::new(Guest::new("web"), None, true);
        let cookie = Cookie::encode(&moving).unwrap();
        assert_eq!(cookie.decode::<Value>().unwrap()["version"], VERSION);
        assert!(read::<Moving>(&cookie).unwrap().post_copy);
    }

    #[test]
    fn what_a_newer_driver_says_is_refused_for_that_however_it_looks() {
        let newer = Cookie::encode(&json!({"version": 2, "way": {"by": "post"}})).unwrap();
        let refused = read::<Bring>(&newer).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "read what the other driver says: it says it in version 2, and this one knows 1 at most"
        );
        let nonsense = Cookie::new(r#"{"version":"two"}"#).unwrap();
        let refused = read::<Moving>(&nonsense).unwrap_err();
        assert!(matches!(refused, NotUnderstood::Unreadable(_)));
    }
}
