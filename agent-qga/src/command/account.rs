//! The guest's users, their passwords and keys.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use super::{Command, Empty};

plain! {
    /// Who is logged in (2.10).
    GetUsers = "guest-get-users" -> Vec<User>;
}

asked! {
    /// Which keys a user logs in with (5.2).
    SshGetAuthorizedKeys = "guest-ssh-get-authorized-keys" -> AuthorizedKeys {
        /// Who.
        username: String,
    }

    /// Adds keys that a user may log in with (5.2).
    SshAddAuthorizedKeys = "guest-ssh-add-authorized-keys" -> Empty {
        /// Who.
        username: String,
        /// Lines as in `authorized_keys`.
        keys: Vec<String>,
        /// Whether these replace all others.
        reset: bool,
    }

    /// Removes keys that a user may log in with (5.2). One that is not there is no error.
    SshRemoveAuthorizedKeys = "guest-ssh-remove-authorized-keys" -> Empty {
        /// Who.
        username: String,
        /// Lines as in `authorized_keys`.
        keys: Vec<String>,
    }
}

/// Sets a user's password (2.3). It is left out of `Debug`; on the wire it is plain.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SetUserPassword {
    /// Who.
    pub username: String,
    password: String,
    /// Whether it is what the guest's own password file holds, not the password itself.
    pub crypted: bool,
}

impl SetUserPassword {
    /// A password as the user types it, or, if `crypted`, as the guest keeps it.
    pub fn new(username: impl Into<String>, password: impl AsRef<[u8]>, crypted: bool) -> Self {
        Self {
            username: username.into(),
            password: BASE64.encode(password),
            crypted,
        }
    }
}

impl Command for SetUserPassword {
    const NAME: &'static str = "guest-set-user-password";
    type Reply = Empty;
}

impl fmt::Debug for SetUserPassword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SetUserPassword")
            .field("username", &self.username)
            .field("crypted", &self.crypted)
            .finish_non_exhaustive()
    }
}

/// Somebody who is logged in.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct User {
    /// Who.
    pub user: String,
    /// Since when, in seconds since 1970, with fractions.
    pub login_time: f64,
    /// On Windows, whose user.
    pub domain: Option<String>,
}

answers! {
    /// The keys of a user.
    AuthorizedKeys {
        /// Lines as in `authorized_keys`.
        keys: Vec<String>,
    }
}
