//! Bitmaps of what the guest wrote since, and several changes of the block layer as one.

use serde::{Deserialize, Serialize};

use super::{BlockdevBackup, BlockdevSnapshot, arguments, commands};

commands! {
    BlockDirtyBitmapAdd => "block-dirty-bitmap-add",
    BlockDirtyBitmapRemove => "block-dirty-bitmap-remove",
    BlockDirtyBitmapClear => "block-dirty-bitmap-clear",
    BlockDirtyBitmapEnable => "block-dirty-bitmap-enable",
    BlockDirtyBitmapDisable => "block-dirty-bitmap-disable",
    BlockDirtyBitmapMerge => "block-dirty-bitmap-merge",
    Transaction => "transaction",
}

macro_rules! of_bitmap {
    ($($(#[$meta:meta])* $type:ident)+) => {
        $(arguments! {
            $(#[$meta])*
            $type {
                /// The node.
                node: String,
                /// The bitmap's name.
                name: String,
            }
        })+
    };
}

arguments! {
    /// Makes a bitmap.
    BlockDirtyBitmapAdd {
        /// The node.
        node: String,
        /// The bitmap's name.
        name: String,
    } optional {
        /// Bytes that one bit stands for.
        granularity: u32,
        /// Whether it is kept in the image.
        persistent: bool,
        /// Whether it is off at first.
        disabled: bool,
    }
}

of_bitmap! {
    /// Removes a bitmap.
    BlockDirtyBitmapRemove
    /// Clears a bitmap.
    BlockDirtyBitmapClear
    /// Turns a bitmap on.
    BlockDirtyBitmapEnable
    /// Turns a bitmap off.
    BlockDirtyBitmapDisable
}

arguments! {
    /// Adds bitmaps to another.
    BlockDirtyBitmapMerge {
        /// The node.
        node: String,
        /// The bitmap that is added to.
        target: String,
        /// Those that are added, all of the same node.
        bitmaps: Vec<String>,
    }
}

/// Does all of several things, or none.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Transaction {
    /// What.
    pub actions: Vec<TransactionAction>,
    /// How jobs that it begins belong together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub properties: Option<TransactionProperties>,
}

impl Transaction {
    /// These; each job that it begins ends by itself.
    #[must_use]
    pub fn of(actions: Vec<TransactionAction>) -> Self {
        Self {
            actions,
            properties: None,
        }
    }

    /// These, where one job that fails or is cancelled fails all.
    #[must_use]
    pub fn grouped(actions: Vec<TransactionAction>) -> Self {
        let completion_mode = "grouped".into();
        Self {
            actions,
            properties: Some(TransactionProperties { completion_mode }),
        }
    }
}

/// How the jobs of a [`Transaction`] belong together.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct TransactionProperties {
    /// `individual` or `grouped`.
    pub completion_mode: String,
}

/// Something that a [`Transaction`] can do.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "each is the command of its name")]
pub enum TransactionAction {
    BlockDirtyBitmapAdd(BlockDirtyBitmapAdd),
    BlockDirtyBitmapRemove(BlockDirtyBitmapRemove),
    BlockDirtyBitmapClear(BlockDirtyBitmapClear),
    BlockDirtyBitmapEnable(BlockDirtyBitmapEnable),
    BlockDirtyBitmapDisable(BlockDirtyBitmapDisable),
    BlockDirtyBitmapMerge(BlockDirtyBitmapMerge),
    BlockdevBackup(BlockdevBackup),
    BlockdevSnapshot(BlockdevSnapshot),
}
