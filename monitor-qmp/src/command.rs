//! What a command is, and the typed commands a VM daemon uses, by area.
//!
//! A command is a small struct that serialises to its arguments and names the type of its
//! reply. Anyone can add one:
//!
//! ```
//! use monitor_qmp::Command;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize)]
//! #[serde(rename_all = "kebab-case")]
//! struct QomList {
//!     path: String,
//! }
//!
//! #[derive(Deserialize)]
//! struct Property {
//!     name: String,
//! }
//!
//! impl Command for QomList {
//!     const NAME: &'static str = "qom-list";
//!     type Reply = Vec<Property>;
//! }
//! ```
//!
//! Replies keep what a newer QEMU may say: members that are not known are passed over, names
//! that are not known become `Other`. What is here was checked against the schema that a
//! running QEMU 7.2 reports; members that came later name their version.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

mod block;
mod device;
mod dump;
mod fd;
mod job;
mod machine;
mod migration;
mod run_state;
mod session;
mod yank;

pub use self::{block::*, device::*, dump::*, fd::*, job::*, machine::*, migration::*};
pub use self::{run_state::*, session::*, yank::*};

/// A command of QMP: its arguments are the value itself.
pub trait Command: Serialize + Send + Sync {
    /// Its name on the wire.
    const NAME: &'static str;
    /// Whether QEMU runs it past its main loop if asked to.
    const OOB: bool = false;
    /// What QEMU returns.
    type Reply: DeserializeOwned;
}

/// A reply that says nothing but "done".
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Empty {}

/// Ties a struct to its name and reply.
macro_rules! command {
    ($type:ty, $name:literal) => {
        command!($type, $name, crate::command::Empty);
    };
    ($type:ty, $name:literal, $reply:ty $(, $constant:ident)?) => {
        impl crate::command::Command for $type {
            const NAME: &'static str = $name;
            $(const $constant: bool = true;)?
            type Reply = $reply;
        }
    };
}
use command;

/// An enum of names that keeps those it does not know.
macro_rules! open_enum {
    ($(#[$meta:meta])* pub enum $type:ident { $($variant:ident = $name:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $type {
            $(#[doc = concat!("`", $name, "`.")] $variant,)+
            /// A name that this crate does not know.
            Other(String),
        }

        impl $type {
            /// The name on the wire.
            #[must_use]
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $name,)+
                    Self::Other(name) => name,
                }
            }
        }

        impl From<&str> for $type {
            fn from(name: &str) -> Self {
                match name {
                    $($name => Self::$variant,)+
                    other => Self::Other(other.to_owned()),
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
                out.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
                struct Name;
                impl serde::de::Visitor<'_> for Name {
                    type Value = $type;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("a name")
                    }

                    fn visit_str<E>(self, name: &str) -> Result<$type, E> {
                        Ok(name.into())
                    }
                }
                input.deserialize_str(Name)
            }
        }
    };
}
pub(crate) use open_enum;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn unknown_names_and_members_are_kept_or_passed_over() {
        let reply = json!({"running": true, "status": "daydreaming", "mood": "fine"});
        let status: Status = serde_json::from_value(reply).unwrap();
        assert_eq!(status.status, RunState::Other("daydreaming".to_owned()));
        assert_eq!(
            serde_json::to_value(&status.status).unwrap(),
            json!("daydreaming")
        );
        let _: Empty = serde_json::from_value(json!({"later": 1})).unwrap();
    }

    #[test]
    fn absent_options_are_not_sent() {
        let text = |command: &dyn erased::Text| command.text();
        assert_eq!(text(&QueryBlockstats::default()), "{}");
        assert_eq!(text(&AddFd::default()), "{}");
        assert_eq!(text(&DeviceDel::new("d0")), r#"{"id":"d0"}"#);
        assert_eq!(text(&Migrate::new("fd:out")), r#"{"uri":"fd:out"}"#);
        assert_eq!(text(&QmpCapabilities::new(false)), "{}");
        assert_eq!(text(&QmpCapabilities::new(true)), r#"{"enable":["oob"]}"#);
        assert_eq!(
            text(&Yank {
                instances: vec![YankInstance::BlockNode {
                    node_name: "n".into()
                }]
            }),
            r#"{"instances":[{"type":"block-node","node-name":"n"}]}"#
        );
    }

    #[test]
    fn free_form_arguments_are_sent_as_given() {
        let add = DeviceAdd::new("virtio-net-pci")
            .with("id", "n0")
            .with("netdev", "h0");
        assert_eq!(
            serde_json::to_value(&add).unwrap(),
            json!({"driver": "virtio-net-pci", "id": "n0", "netdev": "h0"})
        );
    }

    mod erased {
        pub(super) trait Text {
            fn text(&self) -> String;
        }

        impl<C: super::Command> Text for C {
            fn text(&self) -> String {
                serde_json::to_string(self).unwrap()
            }
        }
    }
}
