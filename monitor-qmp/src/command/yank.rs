//! Cutting a connection of QEMU that keeps its main loop waiting. Both run out of band.

use serde::{Deserialize, Serialize};

use super::commands;

commands! {
    Yank => "yank" [OOB],
    QueryYank => "query-yank" -> Vec<YankInstance> [OOB],
}

/// Cuts connections.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Yank {
    /// Which.
    pub instances: Vec<YankInstance>,
}

/// What could be cut.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryYank;

/// A connection that can be cut.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum YankInstance {
    /// That of a network disk.
    BlockNode {
        /// The node.
        node_name: String,
    },
    /// That of a character device.
    Chardev {
        /// The device.
        id: String,
    },
    /// Those of the migration.
    Migration,
    /// Something that this crate does not know; it is not sent.
    #[serde(other, skip_serializing)]
    Other,
}
