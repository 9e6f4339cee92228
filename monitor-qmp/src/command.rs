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
//! that are not known become `Other`. What is here is checked against the schema that a live QEMU
//! reports (`cargo xtask qmp-check`; 7.2 so far); what came later than 7.2 or depends on the
//! build is listed in `schema/later.rs`.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::schema::Typed;

mod bitmap;
mod block;
mod block_change;
mod block_job;
mod chardev;
mod cpu;
mod device;
mod dirty_rate;
mod display;
mod dump;
mod export;
mod fd;
mod job;
mod machine;
mod media;
mod memory;
mod migration;
mod net;
mod qom;
mod run_state;
mod session;
mod snapshot;
mod stats;
mod yank;

pub use self::{
    bitmap::*, block::*, block_change::*, block_job::*, chardev::*, cpu::*, device::*,
    dirty_rate::*, display::*, dump::*, export::*, fd::*, job::*, machine::*, media::*, memory::*,
    migration::*, net::*, qom::*, run_state::*, session::*, snapshot::*, stats::*, yank::*,
};

/// Every typed command. An area that is forgotten here has a table that nobody reads, and the
/// compiler says so.
pub(crate) const ALL: &[&[Typed]] = &[
    bitmap::ALL,
    block::ALL,
    block_change::ALL,
    block_job::ALL,
    chardev::ALL,
    cpu::ALL,
    device::ALL,
    dirty_rate::ALL,
    display::ALL,
    dump::ALL,
    export::ALL,
    fd::ALL,
    job::ALL,
    machine::ALL,
    media::ALL,
    memory::ALL,
    migration::ALL,
    net::ALL,
    qom::ALL,
    run_state::ALL,
    session::ALL,
    snapshot::ALL,
    stats::ALL,
    yank::ALL,
];

/// A command of QMP: its arguments are the value itself.
pub trait Command: Serialize + Send + Sync {
    /// Its name on the wire.
    const NAME: &'static str;
    /// Whether QEMU runs it past its main loop if asked to.
    const OOB: bool = false;
    /// What QEMU returns.
    type Reply: DeserializeOwned;
}

/// A command is sent by reference where it is needed again, to find out what became of it.
impl<C: Command> Command for &C {
    const NAME: &'static str = C::NAME;
    const OOB: bool = C::OOB;
    type Reply = C::Reply;
}

/// A reply that says nothing but "done".
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Empty {}

/// The table of an area: ties each command to its name and reply. What is not in a table is no
/// command, so whatever walks the tables, as the check against a live schema does, misses none.
macro_rules! commands {
    ($($type:ty => $name:literal $(-> $reply:ty)? $([$constant:ident])?,)+) => {
        $(
            impl crate::command::Command for $type {
                const NAME: &'static str = $name;
                $(const $constant: bool = true;)?
                type Reply = crate::command::commands!(@reply $($reply)?);
            }
        )+

        pub(super) const ALL: &[crate::schema::Typed] = &[
            $(crate::schema::Typed::command::<$type>(),)+
        ];
    };
    (@reply) => { crate::command::Empty };
    (@reply $reply:ty) => { $reply };
}
use commands;

/// Commands without arguments.
macro_rules! plain {
    ($($(#[$meta:meta])* $type:ident,)+) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, Default, serde::Deserialize, serde::Serialize)]
            pub struct $type;
        )+
    };
}
use plain;

/// A struct of members that must be given and, behind `optional`, of those that may: the former
/// are what `new` takes, each of the latter is set by a method of its name. `optional` alone: all may.
macro_rules! arguments {
    ($(#[$meta:meta])* $type:ident {
        $($(#[$must_meta:meta])* $must:ident: $must_type:ty,)+
    } $(optional { $($(#[$may_meta:meta])* $may:ident: $may_type:ty,)+ })?) => {
        $(#[$meta])*
        #[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
        #[non_exhaustive]
        #[serde(rename_all = "kebab-case")]
        pub struct $type {
            $($(#[$must_meta])* pub $must: $must_type,)+
            $($($(#[$may_meta])*
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $may: Option<$may_type>,)+)?
        }

        impl $type {
            /// With what must be given.
            #[must_use]
            pub fn new($($must: impl Into<$must_type>),+) -> Self {
                Self {
                    $($must: $must.into(),)+
                    $($($may: None,)+)?
                }
            }

            $($(
                #[doc = concat!("Sets `", stringify!($may), "`.")]
                #[must_use]
                pub fn $may(mut self, $may: impl Into<$may_type>) -> Self {
                    self.$may = Some($may.into());
                    self
                }
            )+)?
        }
    };
    ($(#[$meta:meta])* $type:ident optional {
        $($(#[$may_meta:meta])* $may:ident: $may_type:ty,)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, serde::Deserialize, serde::Serialize)]
        #[non_exhaustive]
        #[serde(rename_all = "kebab-case")]
        pub struct $type {
            $($(#[$may_meta])*
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $may: Option<$may_type>,)+
        }

        impl $type {
            $(
                #[doc = concat!("Sets `", stringify!($may), "`.")]
                #[must_use]
                pub fn $may(mut self, $may: impl Into<$may_type>) -> Self {
                    self.$may = Some($may.into());
                    self
                }
            )+
        }
    };
}
use arguments;

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
                impl<'de> serde::de::Visitor<'de> for Name {
                    type Value = $type;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("a name")
                    }

                    fn visit_str<E>(self, name: &str) -> Result<$type, E> {
                        Ok(name.into())
                    }

                    fn visit_enum<A: serde::de::EnumAccess<'de>>(
                        self,
                        input: A,
                    ) -> Result<$type, A::Error> {
                        let (name, rest) = input.variant_seed(self)?;
                        serde::de::VariantAccess::unit_variant(rest)?;
                        Ok(name)
                    }
                }
                impl<'de> serde::de::DeserializeSeed<'de> for Name {
                    type Value = $type;

                    fn deserialize<D: serde::Deserializer<'de>>(
                        self,
                        input: D,
                    ) -> Result<$type, D::Error> {
                        input.deserialize_str(self)
                    }
                }
                // As an enum, so that whoever reads a type's shape learns the names it knows.
                input.deserialize_enum(stringify!($type), &[$($name),+], Name)
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
