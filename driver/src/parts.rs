//! The parts of a guest that come and go while it runs, and what is to be done with one that is on its way. Pure.
//!
//! A part is what the description says, and up to three things in QEMU: a device, which goes only when the guest lets go of
//! it, and what lies behind it, a network backend or the nodes of a disk. Whoever plugs writes down before that it
//! will; from then on the record and QEMU's list of devices decide, whoever looks and however long after.
//!
//! | on its way | the device is there | it is not |
//! |---|---|---|
//! | in | it came: into the description | what lies behind it goes, and nothing else happened |
//! | out | the guest has it still: nothing to do until `DEVICE_DELETED` | it went |
//! | nothing | it stays | it went: a guest may let go of what nobody asked it for |
//!
//! One that went is taken out of the description, and what lay behind it out of QEMU.

use serde::{Deserialize, Serialize};

use crate::devices;
use crate::guest::{Disk, Guest, Network};

/// What kind of part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PartKind {
    /// A disk.
    Disk,
    /// A network card.
    Network,
}

impl PartKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Network => "network card",
        }
    }
}

/// Which description a change is written into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::exhaustive_enums,
    reason = "there are two descriptions, and one of them is of what runs"
)]
pub enum Scope {
    /// That of the guest as it runs: its next start knows nothing of it.
    Live,
    /// And its definition, too.
    LiveAndDefinition,
}

/// A disk or a card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Part {
    Disk(Disk),
    Network(Network),
}

impl Part {
    pub(crate) fn kind(&self) -> PartKind {
        match self {
            Self::Disk(_) => PartKind::Disk,
            Self::Network(_) => PartKind::Network,
        }
    }

    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.name,
            Self::Network(network) => &network.name,
        }
    }

    /// The id of its device.
    pub(crate) fn device(&self) -> String {
        match self {
            Self::Disk(disk) => devices::disk_device(&disk.name),
            Self::Network(network) => devices::card_device(&network.name),
        }
    }

    pub(crate) fn slot(&self) -> Option<u8> {
        match self {
            Self::Disk(disk) => disk.slot,
            Self::Network(network) => network.slot,
        }
    }

    pub(crate) fn set_slot(&mut self, slot: u8) {
        match self {
            Self::Disk(disk) => disk.slot = Some(slot),
            Self::Network(network) => network.slot = Some(slot),
        }
    }

    pub(crate) fn is(&self, kind: PartKind, name: &str) -> bool {
        self.kind() == kind && self.name() == name
    }

    /// The part of that kind and name.
    pub(crate) fn of(guest: &Guest, kind: PartKind, name: &str) -> Option<Self> {
        Self::all(guest).find(|part| part.is(kind, name))
    }

    /// All parts of a guest that can come and go.
    pub(crate) fn all(guest: &Guest) -> impl Iterator<Item = Self> {
        let disks = guest.disks.iter().cloned().map(Self::Disk);
        disks.chain(guest.networks.iter().cloned().map(Self::Network))
    }

    /// Puts it into a description that does not have it.
    pub(crate) fn put_into(&self, guest: &mut Guest) {
        if Self::of(guest, self.kind(), self.name()).is_some() {
            return;
        }
        match self {
            Self::Disk(disk) => guest.disks.push(disk.clone()),
            Self::Network(network) => guest.networks.push(network.clone()),
        }
    }

    /// Takes it out of a description.
    pub(crate) fn take_from(&self, guest: &mut Guest) {
        match self {
            Self::Disk(mine) => guest.disks.retain(|disk| disk.name != mine.name),
            Self::Network(mine) => guest.networks.retain(|network| network.name != mine.name),
        }
    }
}

/// A part on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Moving {
    pub(crate) part: Part,
    pub(crate) way: Way,
    /// Which description is changed once it came or went.
    pub(crate) scope: Scope,
}

/// Which way it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    In,
    Out,
}

/// What is to be done with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Nothing.
    Stays,
    /// It is there: the description says so from now on.
    Came,
    /// It never was there: what lies behind it goes.
    Undone,
    /// It is gone: what lay behind it goes, and the description says so.
    Went,
}

/// Decides what becomes of a part that is on that way, or on none, by whether its device is there.
pub(crate) fn fate(way: Option<Way>, is_there: bool) -> Fate {
    match (way, is_there) {
        (Some(Way::In), true) => Fate::Came,
        (Some(Way::In), false) => Fate::Undone,
        (Some(Way::Out) | None, true) => Fate::Stays,
        (Some(Way::Out) | None, false) => Fate::Went,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{DiskFormat, NetworkBackend};

    #[test]
    fn what_is_there_is_never_taken_away_and_what_is_not_leaves_nothing() {
        let ways = [None, Some(Way::In), Some(Way::Out)];
        for way in ways {
            assert!(
                matches!(fate(way, true), Fate::Stays | Fate::Came),
                "{way:?}"
            );
            assert!(
                matches!(fate(way, false), Fate::Undone | Fate::Went),
                "{way:?}"
            );
        }
        assert_eq!(fate(Some(Way::In), true), Fate::Came);
        assert_eq!(fate(Some(Way::In), false), Fate::Undone);
        assert_eq!(fate(Some(Way::Out), true), Fate::Stays);
    }

    #[test]
    fn a_part_goes_in_once_and_out_with_its_name() {
        let mut guest = Guest::new("web");
        let disk = Part::Disk(Disk::new("data", "/d", DiskFormat::Raw));
        let card = Part::Network(Network::new("data", NetworkBackend::User));
        for part in [&disk, &card, &disk] {
            part.put_into(&mut guest);
        }
        assert_eq!((guest.disks.len(), guest.networks.len()), (1, 1));
        assert_eq!(Part::of(&guest, PartKind::Network, "data"), Some(card));
        disk.take_from(&mut guest);
        assert_eq!((guest.disks.len(), guest.networks.len()), (0, 1));
    }
}
