//! Migration: its capabilities, parameters, start, progress and rescue.

use serde::{Deserialize, Serialize};

use super::{commands, open_enum};

commands! {
    Migrate => "migrate",
    MigrateCancel => "migrate_cancel",
    MigrateContinue => "migrate-continue",
    MigrateIncoming => "migrate-incoming",
    MigrateSetCapabilities => "migrate-set-capabilities",
    QueryMigrateCapabilities => "query-migrate-capabilities" -> Vec<MigrationCapability>,
    MigrateSetParameters => "migrate-set-parameters",
    QueryMigrateParameters => "query-migrate-parameters" -> MigrateSetParameters,
    QueryMigrate => "query-migrate" -> MigrationInfo,
    MigratePause => "migrate-pause" [OOB],
    MigrateRecover => "migrate-recover" [OOB],
    MigrateStartPostcopy => "migrate-start-postcopy",
}

/// Starts a migration; the reply only says that it began.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub struct Migrate {
    /// Where to, as `fd:NAME` or `tcp:HOST:PORT`.
    pub uri: String,
    /// Whether it goes on after a paused post-copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume: Option<bool>,
}

impl Migrate {
    /// To `uri`.
    #[must_use]
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            resume: None,
        }
    }
}

/// Cancels the migration. Never once post-copy began: QEMU 7.2 accepts it then, and the guest
/// is lost.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct MigrateCancel;

/// Lets a migration go on that waits before its switchover.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MigrateContinue {
    /// The status it waits in.
    pub state: MigrationStatus,
}

/// Tells a QEMU started with `-incoming defer` where to listen or read from.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MigrateIncoming {
    /// Where.
    pub uri: String,
    /// Whether QEMU ends if it fails (QEMU 9.1 and later; without it, it does).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_on_error: Option<bool>,
}

impl MigrateIncoming {
    /// From `uri`.
    #[must_use]
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            exit_on_error: None,
        }
    }
}

/// Turns capabilities on and off.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct MigrateSetCapabilities {
    /// Those to change.
    pub capabilities: Vec<MigrationCapability>,
}

/// A capability and whether it is on.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct MigrationCapability {
    /// Its name, as `events`.
    pub capability: String,
    /// Whether it is on.
    pub state: bool,
}

impl MigrationCapability {
    /// A capability that is on.
    #[must_use]
    pub fn on(capability: impl Into<String>) -> Self {
        Self {
            capability: capability.into(),
            state: true,
        }
    }
}

/// The capabilities.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryMigrateCapabilities;

/// Changes parameters; what is `None` stays as it is. Also the reply of
/// [`QueryMigrateParameters`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MigrateSetParameters {
    /// Bytes a second; 0 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// Milliseconds the guest may stand still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<u64>,
    /// Bytes a second in post-copy; 0 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_postcopy_bandwidth: Option<u64>,
    /// Channels of multifd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<u8>,
    /// Compression of multifd, as `zstd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_compression: Option<String>,
    /// Per cent of time taken from the CPUs at first, with `auto-converge`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_initial: Option<u8>,
    /// And so many more each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_increment: Option<u8>,
    /// But no more than these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpu_throttle: Option<u8>,
    /// The id of the TLS credentials; empty is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_creds: Option<String>,
    /// The name that the other side's certificate must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_hostname: Option<String>,
    /// The id of the object that says who may connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_authz: Option<String>,
}

impl MigrateSetParameters {
    /// Whether all that is given here is so in `now`.
    pub(crate) fn holds_in(&self, now: &Self) -> bool {
        /// Takes both apart, so that no member is forgotten.
        macro_rules! each {
            ($($member:ident)+) => {{
                let Self { $($member),+ } = self;
                $(($member.is_none() || *$member == now.$member))&&+
            }};
        }
        each!(max_bandwidth downtime_limit max_postcopy_bandwidth multifd_channels multifd_compression
            cpu_throttle_initial cpu_throttle_increment max_cpu_throttle tls_creds tls_hostname tls_authz)
    }
}

/// The parameters as they are.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryMigrateParameters;

/// How the migration does.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct QueryMigrate;

/// Reply of [`QueryMigrate`]. Empty if there never was a migration.
#[derive(Clone, Debug, Default, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where it is.
    pub status: Option<MigrationStatus>,
    /// What was sent. Absent after a failure or cancel.
    pub ram: Option<MigrationRam>,
    /// Milliseconds since it began. QEMU 7.2 may say 0 for a moment after the end.
    pub total_time: Option<u64>,
    /// Milliseconds that the guest would stand still.
    pub expected_downtime: Option<u64>,
    /// Milliseconds that the guest stood still.
    pub downtime: Option<u64>,
    /// Milliseconds of preparation.
    pub setup_time: Option<u64>,
    /// Per cent of time taken from the CPUs.
    pub cpu_throttle_percentage: Option<u8>,
    /// What went wrong.
    pub error_desc: Option<String>,
    /// Why a migration would be refused.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
    /// Where it listens for the guest, if it listens itself.
    #[serde(default)]
    pub socket_address: Vec<Listening>,
}

/// Where a QEMU listens that waits for a guest: on a host and port, or on a path.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listening {
    /// The host, as QEMU was told it.
    pub host: Option<String>,
    /// The port, also where the system chose it.
    pub port: Option<String>,
    /// The path.
    pub path: Option<String>,
}

/// What was sent of the guest's memory.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MigrationRam {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes left; grows as the guest writes.
    pub remaining: u64,
    /// Bytes in all.
    pub total: u64,
    /// Megabits a second.
    pub mbps: f64,
    /// Pages that the guest dirties a second.
    pub dirty_pages_rate: u64,
    /// Passes over the memory.
    pub dirty_sync_count: u64,
    /// Bytes in a page.
    pub page_size: u64,
    /// Requests for single pages in post-copy.
    pub postcopy_requests: u64,
}

open_enum! {
    /// Where a migration is.
    pub enum MigrationStatus {
        None = "none",
        Setup = "setup",
        Cancelling = "cancelling",
        Cancelled = "cancelled",
        Active = "active",
        PostcopyActive = "postcopy-active",
        PostcopyPaused = "postcopy-paused",
        PostcopyRecoverSetup = "postcopy-recover-setup",
        PostcopyRecover = "postcopy-recover",
        Completed = "completed",
        Failed = "failed",
        Colo = "colo",
        PreSwitchover = "pre-switchover",
        Device = "device",
        WaitUnplug = "wait-unplug",
    }
}

/// Pauses a post-copy whose link is down. Out of band.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct MigratePause;

/// Tells the destination of a paused post-copy where to listen anew. Out of band.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MigrateRecover {
    /// Where.
    pub uri: String,
}

/// Switches to post-copy.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct MigrateStartPostcopy;
