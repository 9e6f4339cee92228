//! The typed commands of an agent, each a small struct; anyone can add one outside.
//!
//! They are the 44 of the protocol, in files by subject: what the guest is, its accounts, its
//! processors and memory, its network, its storage, freezing, files, programs, power.
//!
//! Names and members are those of the QEMU Guest Agent protocol reference; the version in which
//! a command appeared is given where it is later than 2.0. Members that a guest may leave out are
//! optional, members that it adds are ignored, values that we do not know are kept as text.
//! Everything in a reply was written by the guest: a host name may hold an escape sequence.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};

/// A command that knows its name and its answer.
///
/// It serialises to its arguments: a struct with members, or a unit struct if it takes none.
///
/// ```
/// # use agent_qga::Command;
/// #[derive(serde::Serialize)]
/// struct GetBattery;
///
/// #[derive(serde::Deserialize)]
/// struct Battery {
///     percent: u8,
///     charging: Option<bool>,
/// }
///
/// impl Command for GetBattery {
///     const NAME: &'static str = "guest-get-battery";
///     type Reply = Battery;
/// }
/// ```
pub trait Command: Serialize + Send + Sync {
    /// The agent's name for it.
    const NAME: &'static str;

    /// Whether the agent answers with silence when all went well. Then `Reply` is
    /// [`Proof`](crate::Proof).
    const SILENT: bool = false;

    /// What it answers.
    type Reply: DeserializeOwned;
}

/// An answer that says no more than that it is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Empty;

impl<'de> Deserialize<'de> for Empty {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(from).map(|_| Self)
    }
}

/// Declares commands that take no arguments.
macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident = $wire:literal -> $reply:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        #[expect(clippy::exhaustive_structs, reason = "a command without arguments")]
        pub struct $name;

        impl Command for $name {
            const NAME: &'static str = $wire;
            type Reply = $reply;
        }
    )*};
}

/// Declares commands without arguments whose success is silence.
macro_rules! silent {
    ($($(#[$doc:meta])* $name:ident = $wire:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        #[expect(clippy::exhaustive_structs, reason = "a command without arguments")]
        pub struct $name;

        impl Command for $name {
            const NAME: &'static str = $wire;
            const SILENT: bool = true;
            type Reply = Proof;
        }
    )*};
}

/// Declares commands with arguments. A member that is an `Option` is left out when it is `None`.
macro_rules! asked {
    ($($(#[$doc:meta])* $name:ident = $wire:literal -> $reply:ty {
        $($(#[$member_doc:meta])* $member:ident: $type:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
        #[serde(rename_all = "kebab-case")]
        #[expect(clippy::exhaustive_structs, reason = "the arguments of the command")]
        pub struct $name { $($(#[$member_doc])* pub $member: $type,)* }

        impl Command for $name {
            const NAME: &'static str = $wire;
            type Reply = $reply;
        }
    )*};
}

/// Declares answers: read from kebab-case, more members may be added.
macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident { $($(#[$member_doc:meta])* $member:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[non_exhaustive]
        pub struct $name { $($(#[$member_doc])* pub $member: $type,)* }
    )*};
}

mod account;
mod exec;
mod file;
mod freeze;
mod guest;
mod network;
mod power;
mod processor;
mod storage;

pub use self::account::*;
pub use self::exec::*;
pub use self::file::*;
pub use self::freeze::*;
pub use self::guest::*;
pub use self::network::*;
pub use self::power::*;
pub use self::processor::*;
pub use self::storage::*;
