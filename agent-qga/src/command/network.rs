//! The guest's network.

use serde::Deserialize;

use super::Command;

plain! {
    /// The guest's network interfaces and their addresses.
    NetworkGetInterfaces = "guest-network-get-interfaces" -> Vec<NetworkInterface>;
    /// The guest's routes (9.1).
    NetworkGetRoute = "guest-network-get-route" -> Vec<Route>;
}

answers! {
    /// A network interface of the guest.
    NetworkInterface {
        /// Such as `eth0`.
        name: String,
        /// Its hardware address.
        hardware_address: Option<String>,
        /// Its addresses.
        #[serde(default)]
        ip_addresses: Vec<IpAddress>,
        /// Its counters (2.11).
        statistics: Option<NetworkStatistics>,
    }

    /// An address of an interface.
    IpAddress {
        /// The address as text.
        ip_address: String,
        /// Which kind.
        ip_address_type: IpKind,
        /// The length of its network prefix.
        prefix: u32,
    }

    /// Counters of an interface.
    NetworkStatistics {
        /// Bytes received.
        rx_bytes: u64,
        /// Packets received.
        rx_packets: u64,
        /// Packets received with errors.
        rx_errs: u64,
        /// Packets dropped on receipt.
        rx_dropped: u64,
        /// Bytes sent.
        tx_bytes: u64,
        /// Packets sent.
        tx_packets: u64,
        /// Packets sent with errors.
        tx_errs: u64,
        /// Packets dropped on sending.
        tx_dropped: u64,
    }

    /// A route of the guest.
    Route {
        /// The interface it goes by.
        iface: String,
        /// Where to.
        destination: String,
        /// Its cost.
        #[serde(default)]
        metric: i64,
        /// By which neighbour.
        gateway: Option<String>,
        /// The network's mask (version 4).
        mask: Option<String>,
        /// The round trip to begin with.
        irtt: Option<i64>,
        /// The kernel's flags.
        flags: Option<u64>,
        /// How often it is referred to.
        refcnt: Option<i64>,
        /// How often it was looked up.
        #[serde(rename = "use")]
        uses: Option<i64>,
        /// The window to begin with.
        window: Option<i64>,
        /// The largest packet.
        mtu: Option<i64>,
        /// The length of the destination's prefix (version 6).
        desprefixlen: Option<String>,
        /// Where from (version 6).
        source: Option<String>,
        /// The length of the source's prefix (version 6).
        srcprefixlen: Option<String>,
        /// By which neighbour (version 6).
        nexthop: Option<String>,
        /// 4 or 6.
        version: Option<i64>,
    }
}

/// Which kind of address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum IpKind {
    /// Version 4.
    Ipv4,
    /// Version 6.
    Ipv6,
    /// A kind that we do not know.
    #[serde(untagged)]
    Other(String),
}
