//! Character devices: consoles, serial ports, the agent's channel.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{arguments, commands};

commands! {
    QueryChardev => "query-chardev" -> Vec<Chardev>,
    ChardevAdd => "chardev-add" -> AddedChardev,
    ChardevRemove => "chardev-remove",
    ChardevSendBreak => "chardev-send-break",
}

/// The character devices.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryChardev;

/// One of [`QueryChardev`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Chardev {
    /// Its id.
    pub label: String,
    /// Where it leads, as `unix:/run/agent.sock,server=on`.
    pub filename: String,
    /// Whether the guest's side is open.
    pub frontend_open: bool,
}

arguments! {
    /// Makes a character device.
    ChardevAdd {
        /// Its id.
        id: String,
        /// What is behind it.
        backend: ChardevBackend,
    }
}

arguments! {
    /// What is behind a character device.
    ChardevBackend {
        /// Its kind, as `socket`.
        #[serde(rename = "type")]
        kind: String,
        /// What that wants, an object.
        data: Value,
    }
}

/// Reply of [`ChardevAdd`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct AddedChardev {
    /// The terminal, if it is one.
    pub pty: Option<String>,
}

arguments! {
    /// Removes a character device.
    ChardevRemove {
        /// Its id.
        id: String,
    }
}

arguments! {
    /// Sends a break, as on a serial line.
    ChardevSendBreak {
        /// The device's id.
        id: String,
    }
}
