//! What a guest is: its name, machine, memory, disks and channels, as a value that can be stored and sent.
//!
//! Owns the description and what makes one senseless. Does not know how QEMU is told ([`command_line`](crate::command_line)).

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
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

/// A disk image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "plain data; checked before use")]
pub struct Disk {
    /// The image file or block device.
    pub path: PathBuf,
    /// What is in it. Never guessed: a guest that writes a header into a raw disk must not change what it is.
    pub format: DiskFormat,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
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
            serial: Serial::default(),
            agent: AgentChannel::default(),
            balloon: default_balloon(),
            extra_arguments: Vec::new(),
        }
    }

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
        for (index, disk) in self.disks.iter().enumerate() {
            if self.disks[..index]
                .iter()
                .any(|other| other.path == disk.path)
            {
                return refuse("disks", format!("{} is there twice", disk.path.display()));
            }
        }
        Ok(())
    }
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
        let disk = Disk {
            path: "/d".into(),
            format: DiskFormat::Raw,
            read_only: false,
        };
        let twice = Guest {
            disks: vec![disk.clone(), disk],
            ..good
        };
        assert_eq!(twice.check().expect_err("twice").member, "disks");
    }

    #[test]
    fn a_description_survives_being_stored() {
        let guest = Guest {
            kernel: Some(Kernel {
                arguments: "console=ttyS0".into(),
                ..Kernel::new("/k")
            }),
            disks: vec![Disk {
                path: "/a,b".into(),
                format: DiskFormat::Qcow2,
                read_only: true,
            }],
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
