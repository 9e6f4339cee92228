//! Devices, objects and network backends that come and go while the guest runs.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::commands;

commands! {
    DeviceAdd => "device_add",
    DeviceDel => "device_del",
    ObjectAdd => "object-add",
    ObjectDel => "object-del",
    NetdevAdd => "netdev_add",
    NetdevDel => "netdev_del",
    SetLink => "set_link",
}

/// A struct of fixed arguments and whatever the named thing wants besides.
macro_rules! free_form {
    ($(#[$meta:meta])* $type:ident, $(#[$kind_meta:meta])* $kind:ident) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Deserialize, Serialize)]
        #[non_exhaustive]
        #[serde(rename_all = "kebab-case")]
        pub struct $type {
            $(#[$kind_meta])*
            pub $kind: String,
            /// The other arguments, `id` among them.
            #[serde(flatten)]
            pub options: Map<String, Value>,
        }

        impl $type {
            /// Of the given kind, without other arguments.
            #[must_use]
            pub fn new(kind: impl Into<String>) -> Self {
                Self { $kind: kind.into(), options: Map::new() }
            }

            /// Adds an argument.
            #[must_use]
            pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
                self.options.insert(name.into(), value.into());
                self
            }
        }
    };
}

macro_rules! by_id {
    ($(#[$meta:meta])* $type:ident) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Deserialize, Serialize)]
        #[non_exhaustive]
        pub struct $type {
            /// Its id.
            pub id: String,
        }

        impl $type {
            /// The one with this id.
            #[must_use]
            pub fn new(id: impl Into<String>) -> Self {
                Self { id: id.into() }
            }
        }
    };
}

free_form! {
    /// Plugs a device in.
    DeviceAdd,
    /// Its driver.
    driver
}
by_id! {
    /// Asks the guest to give a device up. `DEVICE_DELETED` tells when it is gone.
    DeviceDel
}
free_form! {
    /// Makes an object, as a memory backend.
    ObjectAdd,
    /// Its type.
    qom_type
}
by_id! {
    /// Removes an object.
    ObjectDel
}
free_form! {
    /// Makes a network backend.
    NetdevAdd,
    /// Its type, called `type` on the wire.
    #[serde(rename = "type")]
    netdev_type
}
by_id! {
    /// Removes a network backend.
    NetdevDel
}

/// Plugs a network cable in or out.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SetLink {
    /// The device or backend.
    pub name: String,
    /// Whether there is a link.
    pub up: bool,
}
