//! What a guest is: its name, machine, memory, disks and channels, as a value that can be stored and sent.
//!
//! Owns the description. Does not know how QEMU is told ([`command_line`](crate::command_line)).

mod check;
mod disk;
mod network;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use check::InvalidGuest;
pub use disk::{Disk, DiskFormat};
pub use network::{Mac, Network, NetworkBackend, NetworkModel};

/// As many slots as have a fixed place on every machine's bus.
pub(crate) const MOST_SLOTS: u8 = 16;
/// A new guest takes so many devices while it runs; on `q35` each costs a port that its firmware and its system look at.
const SLOTS: u8 = 4;

/// A guest as its owner describes it.
///
/// ```
/// use driver::{Accelerator, Guest};
///
/// let guest = Guest {
///     kernel: Some(driver::Kernel::new("/boot/vmlinuz")),
///     memory_mib: 256,
///     accelerator: Accelerator::Tcg,
///     ..Guest::new("web")
/// };
/// guest.check().unwrap();
/// assert!(Guest { memory_mib: 0, ..guest }.check().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::exhaustive_structs,
    reason = "written with `..Guest::new(name)`; any value is checked before use"
)]
pub struct Guest {
    /// What people call it; unique in a driver. At most 64 of letters, digits, `-`, `_` and `.`, not starting with a dot.
    pub name: String,
    /// Its identity for life; unique in a driver.
    pub uuid: Uuid,
    /// QEMU's machine type, such as `q35` or a versioned one, `pc-q35-7.2`.
    #[serde(default = "default_machine")]
    pub machine: String,
    /// How its instructions are run.
    #[serde(default)]
    pub accelerator: Accelerator,
    /// Memory in MiB.
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    /// Virtual processors.
    #[serde(default = "default_vcpus")]
    pub vcpus: u16,
    /// A kernel to boot directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Kernel>,
    /// Disks, in the order in which the firmware tries them.
    #[serde(
        default,
        deserialize_with = "disk::named",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub disks: Vec<Disk>,
    /// Network cards, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Network>,
    /// How many places there are for disks and cards that come and go while the guest runs; at most 16. A machine with PCI
    /// Express, as `q35`, has a port for each from its start. One of `pc` has all 16 without, and other machines have none.
    /// None, if nothing is said.
    #[serde(default)]
    pub slots: u8,
    /// Where its first serial port goes.
    #[serde(default)]
    pub serial: Serial,
    /// Whether it has a channel for the guest agent.
    #[serde(default)]
    pub agent: AgentChannel,
    /// Whether it has a balloon, by which memory is taken back. Needs a machine with PCI.
    #[serde(default = "default_balloon")]
    pub balloon: bool,
    /// Arguments for QEMU that the description has no word for, as they are. Unchecked: who may set them may do
    /// whatever QEMU may.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_arguments: Vec<String>,
}

/// How the guest's instructions are run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Accelerator {
    /// Translated by QEMU. Slow, and works everywhere: a `/dev/kvm` that opens may still not run a guest.
    #[default]
    Tcg,
    /// By the processor itself.
    Kvm,
}

impl Accelerator {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

/// A kernel that QEMU loads itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "plain data; checked before use")]
pub struct Kernel {
    /// The kernel image.
    pub image: PathBuf,
    /// The initial file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Its command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub arguments: String,
}

impl Kernel {
    /// That image, without an initial file system or arguments.
    pub fn new(image: impl Into<PathBuf>) -> Self {
        Self {
            image: image.into(),
            initrd: None,
            arguments: String::new(),
        }
    }
}

/// Where the first serial port goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Serial {
    /// Nowhere: the guest has no serial port.
    #[default]
    None,
    /// Appended to a file, by QEMU itself: nothing is lost while no driver runs, and nothing keeps the guest from filling
    /// the disk.
    File(PathBuf),
    /// Appended to a file by the driver. At a length of 1 MiB it becomes the older one, with `.1` behind its name; a guest
    /// that writes more than 1 MiB a second is slowed down. What it writes while no driver runs is dropped.
    Log(PathBuf),
}

/// The channel of the guest agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum AgentChannel {
    /// The guest has none.
    None,
    /// A virtio serial port named `org.qemu.guest_agent.0`, as `qemu-ga` expects it.
    #[default]
    Virtio,
}

impl Guest {
    /// A guest of that name with a random uuid, `q35`, 512 MiB, one vCPU, no disks, an agent channel, under emulation.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            uuid: Uuid::new_v4(),
            machine: default_machine(),
            accelerator: Accelerator::default(),
            memory_mib: default_memory(),
            vcpus: default_vcpus(),
            kernel: None,
            disks: Vec::new(),
            networks: Vec::new(),
            slots: SLOTS,
            serial: Serial::default(),
            agent: AgentChannel::default(),
            balloon: default_balloon(),
            extra_arguments: Vec::new(),
        }
    }

    /// How its devices are plugged in.
    pub(crate) fn bus(&self) -> Bus {
        let machine = self.machine.as_str();
        let is = |name: &str| machine == name || machine.starts_with(&format!("{name}-"));
        if machine.contains("q35") || is("virt") {
            Bus::Ports
        } else if is("pc") {
            Bus::Slots
        } else {
            Bus::None
        }
    }

    /// How many slots it has.
    pub(crate) fn places(&self) -> u8 {
        match self.bus() {
            Bus::Ports => self.slots,
            Bus::Slots => MOST_SLOTS,
            Bus::None => 0,
        }
    }

    /// The first slot that nothing is plugged into.
    pub(crate) fn free_slot(&self) -> Option<u8> {
        (0..self.places()).find(|slot| self.taken_slots().all(|taken| taken != *slot))
    }

    fn taken_slots(&self) -> impl Iterator<Item = u8> {
        let disks = self.disks.iter().map(|disk| disk.slot);
        let networks = self.networks.iter().map(|network| network.slot);
        disks.chain(networks).flatten()
    }
}

/// Where a machine has room for devices that come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bus {
    /// Behind ports that are there from the start: PCI Express takes nothing else.
    Ports,
    /// On the PCI bus itself.
    Slots,
    /// Nowhere.
    None,
}

fn default_machine() -> String {
    "q35".into()
}

fn default_memory() -> u64 {
    512
}

fn default_balloon() -> bool {
    true
}

fn default_vcpus() -> u16 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_slots_where_its_bus_has() {
        let places = |machine: &str| {
            let machine = machine.into();
            Guest {
                machine,
                ..Guest::new("web")
            }
            .places()
        };
        assert_eq!(["q35", "pc-q35-7.2", "virt-7.2"].map(places), [4; 3]);
        assert_eq!(["pc", "pc-i440fx-7.2"].map(places), [16; 2]);
        assert_eq!(["none", "microvm", "isapc"].map(places), [0; 3]);
    }

    #[test]
    fn disks_that_were_written_down_without_a_name_have_that_of_their_place() {
        let text = r#"{"name": "web", "uuid": "5f0e0a4e-6a2c-4d8e-8f5e-000000000001", "disks": [
            {"path": "/a", "format": "raw"}, {"path": "/b", "format": "qcow2"}]}"#;
        let guest: Guest = serde_json::from_str(text).unwrap();
        let names: Vec<_> = guest.disks.iter().map(|disk| &*disk.name).collect();
        assert_eq!(names, ["disk0", "disk1"]);
        assert_eq!(
            guest.slots, 0,
            "a machine that was started without ports has none"
        );
        assert_eq!(guest.check(), Ok(()));
    }

    #[test]
    fn a_description_survives_being_stored() {
        let guest = Guest {
            kernel: Some(Kernel {
                arguments: "console=ttyS0".into(),
                ..Kernel::new("/k")
            }),
            disks: vec![Disk {
                read_only: true,
                slot: Some(2),
                ..Disk::new("root", "/a,b", DiskFormat::Qcow2)
            }],
            networks: vec![Network::new("lan", NetworkBackend::Tap("tap0".into()))],
            serial: Serial::File("/log".into()),
            ..Guest::new("web")
        };
        let text = serde_json::to_string(&guest).unwrap();
        assert_eq!(serde_json::from_str::<Guest>(&text).unwrap(), guest);
    }

    #[test]
    fn a_member_nobody_knows_is_refused() {
        let text = r#"{"name":"web","uuid":"5f0e0a4e-6a2c-4d8e-8f5e-000000000001","memroy_mib":5}"#;
        let error = serde_json::from_str::<Guest>(text).expect_err("misspelt");
        assert!(error.to_string().contains("memroy_mib"), "{error}");
    }
}
