//! Media that are changed, as discs in a drive.

use super::{arguments, commands};

commands! {
    BlockdevOpenTray => "blockdev-open-tray",
    BlockdevCloseTray => "blockdev-close-tray",
    BlockdevInsertMedium => "blockdev-insert-medium",
    BlockdevRemoveMedium => "blockdev-remove-medium",
    Eject => "eject",
}

arguments! {
    /// Opens a tray. The guest may have to be asked; `DEVICE_TRAY_MOVED` tells.
    BlockdevOpenTray optional {
        /// The device.
        id: String,
        /// Whether a tray that the guest locked is opened as well.
        force: bool,
    }
}

arguments! {
    /// Closes a tray.
    BlockdevCloseTray optional {
        /// The device.
        id: String,
    }
}

arguments! {
    /// Puts a medium into an open tray.
    BlockdevInsertMedium {
        /// The device.
        id: String,
        /// The node.
        node_name: String,
    }
}

arguments! {
    /// Takes the medium out of an open tray.
    BlockdevRemoveMedium {
        /// The device.
        id: String,
    }
}

arguments! {
    /// Opens the tray and takes the medium out.
    Eject optional {
        /// The device.
        id: String,
        /// Whether a tray that the guest locked is opened as well.
        force: bool,
    }
}
