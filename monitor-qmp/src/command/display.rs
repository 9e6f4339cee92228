//! Screens, keys, and the clients that look at them.

use serde::Deserialize;

use super::{arguments, commands, plain};

commands! {
    Screendump => "screendump",
    SendKey => "send-key",
    SetPassword => "set_password",
    ExpirePassword => "expire_password",
    AddClient => "add_client",
    DisplayReload => "display-reload",
    ClientMigrateInfo => "client_migrate_info",
    QueryVnc => "query-vnc" -> Vnc,
}

arguments! {
    /// Saves what is on a screen.
    Screendump {
        /// The file, as QEMU sees it.
        filename: String,
    } optional {
        /// The graphics card; the first if none is given.
        device: String,
        /// Its screen.
        head: u32,
        /// `ppm` or `png` (QEMU 7.1 and later).
        format: String,
    }
}

arguments! {
    /// Presses keys together.
    SendKey {
        /// Which.
        keys: Vec<Key>,
    } optional {
        /// Milliseconds until they are let go.
        hold_time: u32,
    }
}

/// A key.
#[derive(Clone, Debug, Deserialize, serde::Serialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum Key {
    /// By its scan code.
    Number(u32),
    /// By the name that QEMU has for it, as `ret`.
    Qcode(String),
}

arguments! {
    /// Sets the password of a display.
    SetPassword {
        /// `vnc` or `spice`.
        protocol: String,
        /// The password.
        password: String,
    } optional {
        /// What becomes of clients: `keep`, `fail` or `disconnect`.
        connected: String,
        /// The display.
        display: String,
    }
}

arguments! {
    /// Lets the password of a display expire.
    ExpirePassword {
        /// `vnc` or `spice`.
        protocol: String,
        /// `now`, `never`, `+SECONDS`, or a Unix time.
        time: String,
    } optional {
        /// The display.
        display: String,
    }
}

arguments! {
    /// Hands a connected client to a display.
    AddClient {
        /// `vnc`, `spice` or a character device.
        protocol: String,
        /// The descriptor, named by `getfd`.
        fdname: String,
    } optional {
        /// Whether it needs no password.
        skipauth: bool,
        /// Whether it speaks TLS.
        tls: bool,
    }
}

arguments! {
    /// Reads a display's certificates again.
    DisplayReload {
        /// The kind of display, as `vnc`.
        #[serde(rename = "type")]
        kind: String,
    } optional {
        /// Whether its certificates are.
        tls_certs: bool,
    }
}

arguments! {
    /// Tells clients where the guest will be after its migration.
    ClientMigrateInfo {
        /// `spice`.
        protocol: String,
        /// The host.
        hostname: String,
    } optional {
        /// The port.
        port: u16,
        /// The port with TLS.
        tls_port: u16,
        /// What its certificate says.
        cert_subject: String,
    }
}

plain! {
    /// The VNC server and who looks.
    QueryVnc,
}

/// Reply of [`QueryVnc`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct Vnc {
    /// Whether there is one.
    pub enabled: bool,
    /// Where it listens.
    pub host: Option<String>,
    /// The kind of address, as `ipv4`.
    pub family: Option<String>,
    /// Its port.
    pub service: Option<String>,
    /// How clients prove who they are.
    pub auth: Option<String>,
    /// Who looks.
    #[serde(default)]
    pub clients: Vec<VncClient>,
}

/// One who looks, of [`Vnc`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct VncClient {
    /// The client's host.
    pub host: String,
    /// Its port.
    pub service: String,
    /// The kind of address.
    pub family: String,
    /// Whether it came by websocket.
    pub websocket: bool,
    /// What its certificate says.
    pub x509_dname: Option<String>,
    /// Its name, if it gave one.
    pub sasl_username: Option<String>,
}
