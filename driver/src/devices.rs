//! What QEMU calls the parts of a guest, and how it is told of them: the same words on the command line and in a command
//! that plugs one in while the guest runs. Pure.
//!
//! Names come from the parts' own, so that they stay when other parts come and go. Each kind has an ending of its own,
//! which no name of a part can hold, so none is taken for another:
//!
//! ```text
//!  disk "root"    device root-device   node root, later ones root.1, root.2 …
//!  card "lan"     device lan-card      backend lan-net
//!  slot 3         port slot3
//! ```
//!
//! What is at a disk *now* is not to be concluded from its name: ask QEMU ([`block`](crate::block)).

use serde_json::{Value, json};

use crate::guest::{Bus, Disk, Guest, Network, NetworkBackend, NetworkModel};

/// Where the ports of PCI Express begin on the bus, eight to a place: out of the way of what QEMU places from 1 up, and of
/// q35's own devices at 31.
const FIRST_PORT: u8 = 0x1d;
/// Where the last slot of a plain PCI bus is; the others lie below it.
const LAST_PLACE: u8 = 0x1f;

/// The device of the disk of that name.
pub(crate) fn disk_device(disk: &str) -> String {
    format!("{disk}-device")
}

/// The node that a disk of that name starts with.
pub(crate) fn first_node(disk: &str) -> &str {
    disk
}

/// A node of the disk of that name which is none of `taken`. It begins with the disk's name, and has at most 31 bytes.
pub(crate) fn fresh_node(disk: &str, taken: impl Fn(&str) -> bool) -> String {
    (1_u32..)
        .map(|number| format!("{disk}.{number}"))
        .find(|node| !taken(node))
        .expect("numbers do not run out")
}

/// Whether the node is one of the disk of that name, at it or behind it.
pub(crate) fn is_node_of(node: &str, disk: &str) -> bool {
    node.strip_prefix(disk)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The device of the card of that name.
pub(crate) fn card_device(network: &str) -> String {
    format!("{network}-card")
}

/// The backend of the card of that name.
pub(crate) fn backend(network: &str) -> String {
    format!("{network}-net")
}

/// The arguments of `-blockdev` and `blockdev-add` for a disk's image. `backing`, if it is said, is what lies behind it: a
/// node, or null for nothing; else it is what the image says.
pub(crate) fn image_node(disk: &Disk, node: &str, backing: Option<Value>) -> Value {
    let mut arguments = json!({
        "driver": disk.format.name(), "node-name": node, "read-only": disk.read_only,
        "file": {"driver": "file", "filename": disk.path, "read-only": disk.read_only},
    });
    if let Some(backing) = backing {
        arguments["backing"] = backing;
    }
    arguments
}

/// The arguments of `-device` and `device_add` for a disk at that node. The firmware tries the lowest `boot` first.
pub(crate) fn disk_at(guest: &Guest, disk: &Disk, node: &str, boot: Option<usize>) -> Value {
    let mut arguments =
        json!({"driver": "virtio-blk-pci", "id": disk_device(&disk.name), "drive": node});
    if let Some(boot) = boot {
        arguments["bootindex"] = boot.into();
    }
    put(&mut arguments, guest, disk.slot);
    arguments
}

/// The arguments of `-device` and `device_add` for a card.
pub(crate) fn card(guest: &Guest, network: &Network) -> Value {
    let driver = match network.model {
        NetworkModel::Virtio => "virtio-net-pci",
    };
    let mut arguments = json!({
        "driver": driver, "id": card_device(&network.name), "netdev": backend(&network.name),
        "mac": network.mac.to_string(),
    });
    put(&mut arguments, guest, network.slot);
    arguments
}

/// The arguments of `-netdev` and `netdev_add` for what a card is connected to. `fd` is the open tap device, by number or
/// by the name that QEMU was given for it.
pub(crate) fn network_backend(network: &Network, fd: Option<&str>) -> Value {
    let id = backend(&network.name);
    match (&network.backend, fd) {
        (NetworkBackend::User, _) => json!({"type": "user", "id": id}),
        (NetworkBackend::Tap(_), fd) => json!({"type": "tap", "id": id, "fd": fd}),
    }
}

/// The arguments of `-device` for the ports of a machine whose slots need them. Their places are fixed, so that those
/// that QEMU chooses for other devices do not depend on them.
pub(crate) fn ports(guest: &Guest) -> Vec<Value> {
    if guest.bus() != Bus::Ports {
        return Vec::new();
    }
    let port = |slot: u8| {
        let (place, function) = (FIRST_PORT + slot / 8, slot % 8);
        let mut arguments = json!({
            "driver": "pcie-root-port", "id": port(slot), "chassis": slot + 1, "bus": "pcie.0",
            "addr": format!("{place:#x}.{function}"),
        });
        if function == 0 {
            arguments["multifunction"] = true.into();
        }
        arguments
    };
    (0..guest.slots).map(port).collect()
}

fn port(slot: u8) -> String {
    format!("slot{slot}")
}

/// Says into which slot a device is plugged.
fn put(device: &mut Value, guest: &Guest, slot: Option<u8>) {
    match (slot, guest.bus()) {
        (Some(slot), Bus::Ports) => device["bus"] = port(slot).into(),
        (Some(slot), Bus::Slots) => {
            device["bus"] = "pci.0".into();
            device["addr"] = format!("{:#x}", LAST_PLACE - slot).into();
        }
        // One without slots has none to be in: the description says so.
        (Some(_), Bus::None) | (None, _) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{DiskFormat, MOST_SLOTS};

    #[test]
    fn names_fit_qemu_however_long_the_parts_are() {
        let longest = "a".repeat(20);
        let node = fresh_node(&longest, |_| false);
        assert!(node.len() <= 31 && format!("{longest}.{}", u32::MAX).len() <= 31);
        assert_eq!(
            fresh_node("a", |node| ["a", "a.1", "a.2"].contains(&node)),
            "a.3"
        );
    }

    #[test]
    fn ports_and_places_do_not_overlap() {
        let q35 = Guest {
            slots: MOST_SLOTS,
            ..Guest::new("web")
        };
        let ports = ports(&q35);
        let mut places: Vec<_> = ports.iter().map(|port| port["addr"].clone()).collect();
        assert_eq!(places.len(), usize::from(MOST_SLOTS));
        assert_eq!(
            (&places[0], &places[15]),
            (&json!("0x1d.0"), &json!("0x1e.7"))
        );
        places.dedup();
        assert_eq!(places.len(), usize::from(MOST_SLOTS));
    }

    #[test]
    fn a_disk_in_a_slot_says_where() {
        let disk = Disk {
            slot: Some(2),
            ..Disk::new("data", "/d", DiskFormat::Raw)
        };
        let on = |machine: &str| Guest {
            machine: machine.into(),
            ..Guest::new("web")
        };
        assert_eq!(disk_at(&on("q35"), &disk, "data", None)["bus"], "slot2");
        let device = disk_at(&on("pc"), &disk, "data", Some(1));
        assert_eq!(
            (&device["bus"], &device["addr"]),
            (&json!("pci.0"), &json!("0x1d"))
        );
        assert_eq!(device["bootindex"], 1);
    }
}
