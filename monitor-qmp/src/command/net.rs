//! Network cards.

use serde::Deserialize;

use super::{arguments, commands};

commands! {
    QueryRxFilter => "query-rx-filter" -> Vec<RxFilter>,
    AnnounceSelf => "announce-self",
}

arguments! {
    /// What the guest's cards listen to.
    QueryRxFilter optional {
        /// Only this one.
        name: String,
    }
}

/// One of [`QueryRxFilter`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct RxFilter {
    /// The card.
    pub name: String,
    /// Whether it takes everything.
    pub promiscuous: bool,
    /// Whether it takes broadcasts.
    pub broadcast_allowed: bool,
    /// Which multicasts it takes: `normal`, `none` or `all`.
    pub multicast: String,
    /// Which unicasts it takes.
    pub unicast: String,
    /// Which VLANs it takes.
    pub vlan: String,
    /// Whether there are more multicast addresses than it can hold.
    pub multicast_overflow: bool,
    /// Whether there are more unicast addresses than it can hold.
    pub unicast_overflow: bool,
    /// Its address.
    pub main_mac: String,
    /// Its VLANs.
    pub vlan_table: Vec<u32>,
    /// Its other unicast addresses.
    pub unicast_table: Vec<String>,
    /// Its multicast addresses.
    pub multicast_table: Vec<String>,
}

arguments! {
    /// Tells the network where the guest is, as after a migration.
    AnnounceSelf {
        /// Milliseconds before the second time.
        initial: u32,
        /// Milliseconds between two times at most.
        max: u32,
        /// How many times.
        rounds: u32,
        /// By how many milliseconds the time between grows.
        step: u32,
    } optional {
        /// Only on these cards.
        interfaces: Vec<String>,
        /// A name, to change or end it later.
        id: String,
    }
}
