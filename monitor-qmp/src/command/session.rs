//! The session itself: capabilities, versions, names, the schema, and the human monitor.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::{arguments, commands, plain};
use crate::qmp::Version;

commands! {
    QmpCapabilities => "qmp_capabilities",
    QueryVersion => "query-version" -> Version,
    QueryName => "query-name" -> Name,
    QueryUuid => "query-uuid" -> Uuid,
    QueryCommands => "query-commands" -> Vec<CommandName>,
    QueryQmpSchema => "query-qmp-schema" -> Vec<SchemaEntry>,
    HumanMonitorCommand => "human-monitor-command" -> String,
    QueryCommandLineOptions => "query-command-line-options" -> Vec<CommandLineOption>,
    QueryTarget => "query-target" -> Target,
}

/// Ends the negotiation. [`Monitor::connect`](crate::Monitor::connect) sends it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub struct QmpCapabilities {
    /// What to turn on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub enable: Vec<Cow<'static, str>>,
}

impl QmpCapabilities {
    /// With or without the out-of-band lane.
    #[must_use]
    pub fn new(oob: bool) -> Self {
        Self {
            enable: if oob {
                vec![Cow::Borrowed("oob")]
            } else {
                Vec::new()
            },
        }
    }
}

/// QEMU's version.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryVersion;

/// The guest's name.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryName;

/// Reply of [`QueryName`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Name {
    /// As given by `-name`.
    pub name: Option<String>,
}

/// The guest's UUID.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryUuid;

/// Reply of [`QueryUuid`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Uuid {
    /// As text; all zeros if none was given.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// The commands this QEMU has.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryCommands;

/// One of [`QueryCommands`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandName {
    /// The name.
    pub name: String,
}

/// The schema of this QEMU: about 200 kB.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryQmpSchema;

/// One of [`QueryQmpSchema`]. What matters depends on `meta_type`; the rest is absent.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct SchemaEntry {
    /// A command's or event's name, or a number that stands for a type.
    pub name: String,
    /// `command`, `event`, `object`, `enum`, `array`, `alternate` or `builtin`.
    pub meta_type: String,
    /// The type of a command's or event's arguments.
    pub arg_type: Option<String>,
    /// The type of a command's reply.
    pub ret_type: Option<String>,
    /// Whether a command may go out of band.
    #[serde(default)]
    pub allow_oob: bool,
    /// An object's members, an enum's names, an alternate's types.
    #[serde(default)]
    pub members: Vec<SchemaMember>,
    /// The member that tells an object's variants apart.
    pub tag: Option<String>,
    /// An object's variants.
    #[serde(default)]
    pub variants: Vec<SchemaVariant>,
    /// The type of an array's elements.
    pub element_type: Option<String>,
    /// A builtin's kind.
    pub json_type: Option<String>,
}

/// A member of a [`SchemaEntry`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct SchemaMember {
    /// Its name; an alternate's members have none.
    #[serde(default)]
    pub name: String,
    /// Its type; an enum's members have none.
    #[serde(rename = "type")]
    pub member_type: Option<String>,
    /// Present, mostly as null, if the member is optional.
    #[serde(default, deserialize_with = "present")]
    pub default: Option<Value>,
}

/// Keeps `null` apart from an absent member.
fn present<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(input).map(Some)
}

/// A variant of a [`SchemaEntry`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct SchemaVariant {
    /// The tag's value.
    pub case: String,
    /// The type whose members it adds.
    #[serde(rename = "type")]
    pub variant_type: String,
}

/// Runs a line of the human monitor. Its output is for people and changes between versions.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct HumanMonitorCommand {
    /// The line.
    pub command_line: String,
    /// The CPU it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_index: Option<u32>,
}

impl HumanMonitorCommand {
    /// The given line.
    #[must_use]
    pub fn new(command_line: impl Into<String>) -> Self {
        Self {
            command_line: command_line.into(),
            cpu_index: None,
        }
    }
}

plain! {
    /// What QEMU emulates.
    QueryTarget,
}

/// Reply of [`QueryTarget`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Target {
    /// The architecture, as `x86_64`.
    pub arch: String,
}

arguments! {
    /// The options of QEMU's command line.
    QueryCommandLineOptions optional {
        /// Only this one, without its dash.
        option: String,
    }
}

/// One of [`QueryCommandLineOptions`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct CommandLineOption {
    /// Its name, without its dash.
    pub option: String,
    /// What it takes.
    pub parameters: Vec<CommandLineParameter>,
}

/// A parameter of a [`CommandLineOption`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct CommandLineParameter {
    /// Its name.
    pub name: String,
    /// `string`, `boolean`, `number` or `size`.
    #[serde(rename = "type")]
    pub parameter_type: String,
    /// For people.
    pub help: Option<String>,
    /// What it is if not given.
    pub default: Option<String>,
}
