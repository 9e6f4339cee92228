//! Disks served to others: QEMU's NBD server and exports of any kind.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{arguments, commands, plain};

commands! {
    NbdServerStart => "nbd-server-start",
    NbdServerStop => "nbd-server-stop",
    BlockExportAdd => "block-export-add",
    BlockExportDel => "block-export-del",
    QueryBlockExports => "query-block-exports" -> Vec<BlockExport>,
}

arguments! {
    /// Starts the NBD server.
    NbdServerStart {
        /// Where it listens.
        addr: SocketAddress,
    } optional {
        /// The id of the TLS credentials.
        tls_creds: String,
        /// The id of the object that says who may connect.
        tls_authz: String,
        /// Clients at once at most; 0 is no limit.
        max_connections: u32,
    }
}

/// Where a socket is.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum SocketAddress {
    /// An address of the internet.
    Inet {
        /// The host.
        host: String,
        /// The port, or its name.
        port: String,
    },
    /// A path.
    Unix {
        /// The path.
        path: String,
    },
    /// A guest.
    Vsock {
        /// Its context id.
        cid: String,
        /// The port.
        port: String,
    },
    /// A descriptor that QEMU was given.
    Fd {
        /// Its name.
        str: String,
    },
}

plain! {
    /// Stops the NBD server and all it exports.
    NbdServerStop,
    /// The exports.
    QueryBlockExports,
}

/// Exports a node.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportAdd {
    /// The kind of export, as `nbd`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The export's id.
    pub id: String,
    /// The node.
    pub node_name: String,
    /// What the kind wants besides.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

impl BlockExportAdd {
    /// An export without options.
    #[must_use]
    pub fn new(
        kind: impl Into<String>,
        id: impl Into<String>,
        node_name: impl Into<String>,
    ) -> Self {
        Self {
            kind: kind.into(),
            id: id.into(),
            node_name: node_name.into(),
            options: Map::new(),
        }
    }

    /// Adds an option.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.options.insert(name.into(), value.into());
        self
    }
}

arguments! {
    /// Ends an export.
    BlockExportDel {
        /// Its id.
        id: String,
    } optional {
        /// `safe` if only while nobody uses it, else `hard`.
        mode: String,
    }
}

/// One of [`QueryBlockExports`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct BlockExport {
    /// Its id.
    pub id: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: String,
    /// The node.
    pub node_name: String,
    /// Whether it ends.
    pub shutting_down: bool,
}
