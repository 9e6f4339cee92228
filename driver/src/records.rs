//! What a daemon must not forget of its guests, as plain data: what runs, who runs it, and which async job was at it.
//!
//! A record is written *before* what it announces is done, so that whatever a killed daemon may have begun is in it. No
//! file, no clock and no QEMU here: [`store`](crate::store) keeps the bytes, [`recovery`](crate::recovery) reads them.

mod work;

use std::fmt;

use agent_qga::LeaseRecord;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::block_job::Noted;
use crate::guest::Guest;
use crate::parts::Moving;

pub(crate) use work::{Copied, Copies, Inside, Layer, Layers, Memory, Work};

/// The version of all records. One more whenever an older daemon could misread what a newer one wrote; each version reads
/// what earlier ones wrote, by what the members say when they are left out.
///
/// 2: disks have names and slots, guests have cards and slots; what runs may differ from its definition.
const FORMAT: u32 = 2;

/// A guest that runs, or is being started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Running {
    /// What it is now: what it was started from, and what was plugged in and out since.
    pub(crate) guest: Guest,
    /// Another for each process: what was lent to an earlier one is void.
    pub(crate) life: Uuid,
    /// QEMU's process, once it is known.
    pub(crate) process: Option<Identity>,
    /// The async job that works on it.
    pub(crate) job: Option<Interrupted>,
    /// Freezes of its file systems that may be in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) freezes: Vec<LeaseRecord>,
    /// Whether they are an earlier driver's, which will not thaw them any more.
    #[serde(skip)]
    pub(crate) is_thaw_due: bool,
    /// The parts that are being plugged in or out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) moving: Vec<Moving>,
    /// The block jobs that were begun.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) block_jobs: Vec<Noted>,
}

/// A guest that another tool started, and that was taken in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attached {
    /// What it is called.
    pub(crate) name: String,
    /// Its identity: QEMU's, or one that we gave it.
    pub(crate) uuid: Uuid,
    /// The address of its monitor.
    pub(crate) monitor: String,
    /// The address of its agent's channel, where that is known.
    pub(crate) agent: Option<String>,
    /// Whether nothing may be done that changes it.
    pub(crate) is_observed: bool,
    /// QEMU's process, where that is known.
    pub(crate) process: Option<Identity>,
}

/// Which process it is, so that no other is taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Its number.
    pub(crate) pid: u32,
    /// When it was started, in ticks since the host was (`/proc/PID/stat`).
    pub(crate) started: u64,
    /// Which start of the host that counts from.
    pub(crate) boot: String,
}

/// An async job that was running when the record was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Interrupted {
    /// Its id, which it keeps.
    pub(crate) id: u64,
    /// Who opened it.
    pub(crate) owner: String,
    /// What is needed to finish or undo it.
    pub(crate) work: Work,
    /// Whether it was cut short, by the end of an earlier driver or of the connection: only settling it ends it then,
    /// whatever else is done under its id, and no other async job begins before.
    #[serde(skip)]
    pub(crate) is_cut_short: bool,
    /// Whether the guest was paused while the job was at it, so that it is not let run again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_paused: bool,
}

/// What a guest is, whether it runs or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Defined {
    /// The description.
    pub(crate) guest: Guest,
    /// Whether it is started with the driver.
    #[serde(default)]
    pub(crate) autostart: bool,
    /// Whether it lives on another host now.
    #[serde(default)]
    pub(crate) moved_away: bool,
}

/// Why a record says nothing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// A newer version wrote it.
    Newer(u32),
    /// It is no record, or a damaged one.
    Damaged(String),
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newer(format) => {
                write!(
                    f,
                    "is of format {format}, and this version knows up to {FORMAT}"
                )
            }
            Self::Damaged(reason) => write!(f, "is damaged: {reason}"),
        }
    }
}

/// What every record says first.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    format: u32,
    record: T,
}

/// A record as bytes.
pub(crate) fn encode<T: Serialize>(record: &T) -> serde_json::Result<Vec<u8>> {
    let format = FORMAT;
    serde_json::to_vec_pretty(&Versioned { format, record })
}

/// A record from its bytes.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    let damaged = |error: serde_json::Error| Unreadable::Damaged(error.to_string());
    // Asked first: what else a newer version says is not ours to judge.
    let head: Head = serde_json::from_slice(bytes).map_err(damaged)?;
    if head.format > FORMAT {
        return Err(Unreadable::Newer(head.format));
    }
    let whole: Versioned<T> = serde_json::from_slice(bytes).map_err(damaged)?;
    Ok(whole.record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_job::{Job, Stage};
    use crate::guest::{DiskFormat, Network, NetworkBackend};
    use crate::parts::{Part, Scope, Way};

    fn running() -> Running {
        Running {
            guest: Guest::new("web"),
            life: Uuid::new_v4(),
            process: Some(Identity {
                pid: 7,
                started: 8,
                boot: "b".into(),
            }),
            job: Some(Interrupted {
                id: 3,
                owner: "nightly".into(),
                work: Work::Save {
                    path: "/s".into(),
                    save: Uuid::new_v4(),
                    was_running: true,
                },
                is_cut_short: false,
                is_paused: true,
            }),
            freezes: Vec::new(),
            is_thaw_due: false,
            moving: vec![Moving {
                part: Part::Network(Network::new("lan", NetworkBackend::User)),
                way: Way::Out,
                scope: Scope::LiveAndDefinition,
            }],
            block_jobs: vec![Noted {
                id: "commit-root-1".into(),
                disk: "root".into(),
                work: Job::Commit {
                    pivot_to: Some(("/base".into(), DiskFormat::Raw)),
                },
                stage: Stage::Pivoting { was_running: true },
            }],
        }
    }

    #[test]
    fn a_record_survives_being_stored() {
        let record = running();
        let bytes = encode(&record).unwrap();
        assert_eq!(decode(&bytes), Ok(record));
    }

    #[test]
    fn a_record_that_was_cut_or_zeroed_anywhere_is_damaged_and_nothing_else() {
        let bytes = encode(&running()).unwrap();
        for cut in 0..bytes.len() {
            let error = decode::<Running>(&bytes[..cut]).expect_err("cut");
            assert!(matches!(error, Unreadable::Damaged(_)), "{cut}: {error}");
            let mut zeroed = bytes.clone();
            zeroed[cut..].fill(0);
            let error = decode::<Running>(&zeroed).expect_err("zeroed");
            assert!(matches!(error, Unreadable::Damaged(_)), "{cut}: {error}");
        }
    }

    #[test]
    fn a_newer_record_is_named_as_such_whatever_else_is_in_it() {
        let error = decode::<Running>(br#"{"format": 3, "record": [], "more": 1}"#);
        assert_eq!(error, Err(Unreadable::Newer(3)));
    }

    #[test]
    fn a_record_of_the_first_format_tells_what_its_qemu_was_started_with() {
        let text = r#"{"format": 1, "record": {
            "guest": {"name": "web", "uuid": "5f0e0a4e-6a2c-4d8e-8f5e-000000000001", "machine": "q35",
                "accelerator": "tcg", "memory_mib": 256, "vcpus": 1,
                "disks": [{"path": "/a", "format": "raw", "read_only": false}],
                "serial": "none", "agent": "virtio", "balloon": true},
            "life": "5f0e0a4e-6a2c-4d8e-8f5e-000000000002", "process": null, "job": null}}"#;
        let record: Running = decode(text.as_bytes()).unwrap();
        // That QEMU knows the node disk0 and the device disk0-device, and has no port to plug anything into.
        assert_eq!(record.guest.disks[0].name, "disk0");
        assert_eq!((record.guest.slots, record.guest.networks.len()), (0, 0));
    }
}
