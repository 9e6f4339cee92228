//! What a disk is: a name, an image, how it is read, where it sits.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

/// A disk image.
///
/// ```
/// use driver::{Disk, DiskFormat, Guest};
///
/// let root = Disk::new("root", "/images/web.qcow2", DiskFormat::Qcow2);
/// // In a slot of its own, so that it can be unplugged while the guest runs.
/// let data = Disk { slot: Some(0), ..Disk::new("data", "/images/data.raw", DiskFormat::Raw) };
/// let web = Guest { disks: vec![root, data], ..Guest::new("web") };
/// web.check().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "plain data; checked before use")]
pub struct Disk {
    /// What operations call it; unique among the guest's disks, for as long as the guest knows the disk. At most 20 of
    /// letters, digits, `-` and `_`, a letter first. One that was written down without a name has that of its place:
    /// `disk0` and so on.
    #[serde(default)]
    pub name: String,
    /// The image file or block device. Of several layers, the one that is written to.
    pub path: PathBuf,
    /// What is in it. Never guessed: a guest that writes a header into a raw disk must not change what it is.
    pub format: DiskFormat,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// Which of the guest's [slots](super::Guest::slots) it is plugged into, counted from 0. Without one it sits on the
    /// machine's own bus, and cannot be unplugged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

impl Disk {
    /// A disk of that name, which the guest may write to, on the machine's own bus.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>, format: DiskFormat) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            format,
            read_only: false,
            slot: None,
        }
    }
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DiskFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl DiskFormat {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Disks as they were written down. Before they had names QEMU knew them by their places, and a QEMU that was started
/// then still does: those are their names.
pub(super) fn named<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Disk>, D::Error> {
    let mut disks = Vec::<Disk>::deserialize(from)?;
    for (place, disk) in disks.iter_mut().enumerate() {
        if disk.name.is_empty() {
            disk.name = format!("disk{place}");
        }
    }
    Ok(disks)
}
