//! What makes a description senseless, member by member.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use super::{Guest, MOST_SLOTS, NetworkBackend, Serial};

/// The longest name of a disk or a card. QEMU's names of nodes have at most 31 bytes, and what is added to a name, as
/// [`devices`](crate::devices) does, takes up to 11.
const LONGEST_PART: usize = 20;
/// The longest name of a network device that Linux has (`IFNAMSIZ`), without its final zero.
const LONGEST_INTERFACE: usize = 15;
/// Why a description makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidGuest {
    /// The member that is wrong.
    pub member: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for InvalidGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "guest description refused: {}: {}",
            self.member, self.reason
        )
    }
}

impl std::error::Error for InvalidGuest {}

impl Guest {
    /// Whether the description makes sense by itself. Whether its files exist is looked at when it starts.
    ///
    /// # Errors
    ///
    /// [`InvalidGuest`], which names the first member that is wrong, and why.
    pub fn check(&self) -> Result<(), InvalidGuest> {
        let refuse = |member, reason: String| Err(InvalidGuest { member, reason });
        if let Some(reason) = word_fault(&self.name, 64, "-_.") {
            return refuse("name", reason);
        }
        if self.name.starts_with('.') {
            return refuse("name", format!("\"{}\" starts with a dot", self.name));
        }
        if self.uuid.is_nil() {
            return refuse("uuid", "the nil uuid names nothing".into());
        }
        if let Some(reason) = word_fault(&self.machine, 64, "-_.") {
            return refuse("machine", reason);
        }
        if !(1..=16 << 20).contains(&self.memory_mib) {
            return refuse(
                "memory_mib",
                format!("{} MiB is not between 1 MiB and 16 TiB", self.memory_mib),
            );
        }
        if !(1..=1024).contains(&self.vcpus) {
            return refuse("vcpus", format!("{} is not between 1 and 1024", self.vcpus));
        }
        let kernel = self.kernel.iter().flat_map(|kernel| {
            [
                ("kernel.image", Some(&kernel.image)),
                ("kernel.initrd", kernel.initrd.as_ref()),
            ]
        });
        let disks = self
            .disks
            .iter()
            .map(|disk| ("disks.path", Some(&disk.path)));
        let serial = match &self.serial {
            Serial::File(path) | Serial::Log(path) => Some(("serial", Some(path))),
            Serial::None => None,
        };
        for (member, path) in kernel.chain(disks).chain(serial) {
            if let Some(reason) = path.and_then(|path| path_fault(path)) {
                return refuse(member, reason);
            }
        }
        if self
            .kernel
            .as_ref()
            .is_some_and(|kernel| kernel.arguments.contains('\0'))
        {
            return refuse("kernel.arguments", "contains a zero byte".into());
        }
        if let Some(argument) = self
            .extra_arguments
            .iter()
            .find(|argument| argument.contains('\0'))
        {
            return refuse(
                "extra_arguments",
                format!("{argument:?} contains a zero byte"),
            );
        }
        if self.slots > MOST_SLOTS {
            let reason = format!("{} are more than {MOST_SLOTS}", self.slots);
            return refuse("slots", reason);
        }
        self.check_disks()?;
        self.check_networks()?;
        self.check_slots()
    }

    fn check_disks(&self) -> Result<(), InvalidGuest> {
        let refuse = |member, reason: String| Err(InvalidGuest { member, reason });
        let (mut names, mut paths) = (HashSet::new(), HashSet::new());
        for disk in &self.disks {
            if let Some(reason) = part_fault(&disk.name) {
                return refuse("disks.name", reason);
            }
            if !names.insert(&disk.name) {
                return refuse("disks.name", format!("\"{}\" is there twice", disk.name));
            }
            if !paths.insert(&disk.path) {
                return refuse("disks", format!("{} is there twice", disk.path.display()));
            }
        }
        Ok(())
    }

    fn check_networks(&self) -> Result<(), InvalidGuest> {
        let refuse = |member, reason: String| Err(InvalidGuest { member, reason });
        let (mut names, mut macs) = (HashSet::new(), HashSet::new());
        for network in &self.networks {
            if let Some(reason) = part_fault(&network.name) {
                return refuse("networks.name", reason);
            }
            if !names.insert(&network.name) {
                let reason = format!("\"{}\" is there twice", network.name);
                return refuse("networks.name", reason);
            }
            if let Some(fault) = network.mac.fault() {
                return refuse("networks.mac", format!("{} {fault}", network.mac));
            }
            if !macs.insert(network.mac) {
                return refuse("networks.mac", format!("{} is there twice", network.mac));
            }
            if let NetworkBackend::Tap(interface) = &network.backend
                && let Some(reason) = word_fault(interface, LONGEST_INTERFACE, "-_.")
            {
                return refuse("networks.backend", reason);
            }
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<(), InvalidGuest> {
        let refuse = |reason: String| {
            let member = "slots";
            Err(InvalidGuest { member, reason })
        };
        let (there, mut taken) = (self.places(), HashSet::new());
        for slot in self.taken_slots() {
            if slot >= there {
                return refuse(format!("there is no slot {slot}: it has {there}"));
            }
            if !taken.insert(slot) {
                return refuse(format!("slot {slot} is taken twice"));
            }
        }
        Ok(())
    }
}

/// What is wrong with the name of a disk or a card, of which QEMU's names are made.
fn part_fault(name: &str) -> Option<String> {
    let reason = word_fault(name, LONGEST_PART, "-_");
    let is_led = name.starts_with(|first: char| first.is_ascii_alphabetic());
    reason.or_else(|| (!is_led).then(|| format!("{name:?} does not begin with a letter")))
}

/// What is wrong with a name that goes into options, file names and messages.
fn word_fault(word: &str, longest: usize, extra: &str) -> Option<String> {
    if word.is_empty() {
        return Some("is empty".into());
    }
    if word.len() > longest {
        return Some(format!(
            "is {} bytes long, at most {longest} are allowed",
            word.len()
        ));
    }
    let bad = word
        .chars()
        .find(|c| !c.is_ascii_alphanumeric() && !extra.contains(*c))?;
    Some(format!(
        "{word:?} contains {bad:?}, allowed are letters, digits and \"{extra}\""
    ))
}

fn path_fault(path: &Path) -> Option<String> {
    if !path.is_absolute() {
        return Some(format!("{path:?} is not an absolute path"));
    }
    let Some(text) = path.to_str() else {
        return Some(format!(
            "{path:?} is not valid UTF-8, which QEMU's options need"
        ));
    };
    text.contains('\0')
        .then(|| format!("{path:?} contains a zero byte"))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::guest::{Disk, DiskFormat, Mac, Network};

    #[test]
    fn nonsense_is_refused_by_member() {
        let good = Guest::new("web-1.example");
        assert_eq!(good.check(), Ok(()));
        let bad: [(&str, Guest); 9] = [
            (
                "name",
                Guest {
                    name: String::new(),
                    ..good.clone()
                },
            ),
            (
                "name",
                Guest {
                    name: "a,b".into(),
                    ..good.clone()
                },
            ),
            (
                "name",
                Guest {
                    name: "../x".into(),
                    ..good.clone()
                },
            ),
            (
                "name",
                Guest {
                    name: ".".into(),
                    ..good.clone()
                },
            ),
            (
                "uuid",
                Guest {
                    uuid: Uuid::nil(),
                    ..good.clone()
                },
            ),
            (
                "machine",
                Guest {
                    machine: "q35,accel=kvm".into(),
                    ..good.clone()
                },
            ),
            (
                "memory_mib",
                Guest {
                    memory_mib: 0,
                    ..good.clone()
                },
            ),
            (
                "vcpus",
                Guest {
                    vcpus: 0,
                    ..good.clone()
                },
            ),
            (
                "serial",
                Guest {
                    serial: Serial::File("relative".into()),
                    ..good.clone()
                },
            ),
        ];
        for (member, guest) in bad {
            let error = guest.check().expect_err(member);
            assert_eq!(error.member, member, "{error}");
        }
    }

    #[test]
    fn parts_that_could_be_taken_for_one_another_are_refused() {
        let disk = |name: &str, path: &str| Disk::new(name, path, DiskFormat::Raw);
        let card = |name: &str| Network::new(name, NetworkBackend::User);
        let with = |disks: &[Disk], networks: &[Network]| Guest {
            disks: disks.to_vec(),
            networks: networks.to_vec(),
            ..Guest::new("web")
        };
        let (a, b) = (disk("a", "/a"), disk("b", "/b"));
        let in_slot = |disk: &Disk, slot| Disk {
            slot: Some(slot),
            ..disk.clone()
        };
        let (lan, wan) = (card("lan"), card("wan"));
        let all = with(
            &[in_slot(&a, 0), in_slot(&b, 3)],
            &[lan.clone(), wan.clone()],
        );
        assert_eq!(all.check(), Ok(()));
        assert_eq!(all.free_slot(), Some(1));

        let long = "a".repeat(LONGEST_PART + 1);
        let tap = |name: &str| NetworkBackend::Tap(name.into());
        let bad = [
            ("disks", with(&[a.clone(), disk("b", "/a")], &[])),
            ("disks.name", with(&[a.clone(), disk("a", "/b")], &[])),
            ("disks.name", with(&[disk("", "/a")], &[])),
            ("disks.name", with(&[disk("0a", "/a")], &[])),
            ("disks.name", with(&[disk("a.1", "/a")], &[])),
            ("disks.name", with(&[disk(&long, "/a")], &[])),
            ("networks.name", with(&[], &[lan.clone(), card("lan")])),
            ("networks.name", with(&[], &[card("a,b")])),
            (
                "networks.mac",
                with(
                    &[],
                    &[
                        lan.clone(),
                        Network {
                            mac: lan.mac,
                            ..wan.clone()
                        },
                    ],
                ),
            ),
            (
                "networks.mac",
                with(
                    &[],
                    &[Network {
                        mac: Mac::new([0; 6]),
                        ..lan.clone()
                    }],
                ),
            ),
            (
                "networks.backend",
                with(&[], &[Network::new("lan", tap("a/b"))]),
            ),
            (
                "networks.backend",
                with(&[], &[Network::new("lan", tap("sixteen-letters-"))]),
            ),
            ("slots", with(&[in_slot(&a, 1), in_slot(&b, 1)], &[])),
            (
                "slots",
                with(
                    &[in_slot(&a, 1)],
                    &[Network {
                        slot: Some(1),
                        ..lan.clone()
                    }],
                ),
            ),
            ("slots", with(&[in_slot(&a, 4)], &[])),
            (
                "slots",
                Guest {
                    slots: 17,
                    ..Guest::new("web")
                },
            ),
        ];
        for (member, guest) in bad {
            let error = guest.check().expect_err(member);
            assert_eq!(error.member, member, "{error}");
        }
    }
}
