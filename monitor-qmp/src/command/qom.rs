//! QEMU's tree of objects: what there is, of which type, with which properties.

use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{arguments, commands};

commands! {
    QomGet => "qom-get" -> Box<RawValue>,
    QomSet => "qom-set",
    QomList => "qom-list" -> Vec<Property>,
    QomListTypes => "qom-list-types" -> Vec<ObjectType>,
    QomListProperties => "qom-list-properties" -> Vec<Property>,
    DeviceListProperties => "device-list-properties" -> Vec<Property>,
}

/// Reads a property of an object.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct QomGet {
    /// The object's path.
    pub path: String,
    /// The property.
    pub property: String,
}

/// Sets a property of an object.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct QomSet {
    /// The object's path.
    pub path: String,
    /// The property.
    pub property: String,
    /// Its new value.
    pub value: Value,
}

arguments! {
    /// What lies under a path: the objects, and the properties of the object there.
    QomList {
        /// The path, as `/machine/peripheral`.
        path: String,
    }
}

/// One of [`QomList`], [`QomListProperties`] and [`DeviceListProperties`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Property {
    /// Its name.
    pub name: String,
    /// Its type; `child<TYPE>` is an object.
    #[serde(rename = "type")]
    pub property_type: String,
    /// For people.
    pub description: Option<String>,
    /// What it is if not set.
    pub default_value: Option<Value>,
}

arguments! {
    /// The types of objects.
    QomListTypes optional {
        /// Only those that implement this one.
        implements: String,
        /// Whether abstract ones are listed as well.
        #[serde(rename = "abstract")]
        is_abstract: bool,
    }
}

/// One of [`QomListTypes`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectType {
    /// Its name.
    pub name: String,
    /// Whether none of it can be made.
    #[serde(default, rename = "abstract")]
    pub is_abstract: bool,
    /// What it derives from.
    pub parent: Option<String>,
}

arguments! {
    /// The properties of a type of objects.
    QomListProperties {
        /// The type.
        typename: String,
    }
}

arguments! {
    /// The properties of a type of devices.
    DeviceListProperties {
        /// The type.
        typename: String,
    }
}
