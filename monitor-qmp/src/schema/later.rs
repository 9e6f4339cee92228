//! What not every QEMU has: brought by a later release than 7.2, or built into some only.
//!
//! Facts of the QMP reference and of the schemas that QEMU 7.2 and 10.0 report. Nothing here
//! changes what is sent; it tells a lack that is no surprise from a mistake of ours.

/// `(subject or * for any, what, the first release with it)`. An empty `what` is all of it.
const SINCE: &[(&str, &str, (u32, u32))] = &[
    ("migrate-incoming", "MigrateIncoming.exit-on-error", (9, 1)),
    ("*", "MigrationStatus.postcopy-recover-setup", (9, 1)),
    ("*", "BlockIoError.qom-path", (9, 2)),
];

/// Commands and events that some builds or machines lack.
const BUILD: &[&str] = &[
    "add_client",
    "client_migrate_info",
    "display-reload",
    "query-cpu-definitions",
    "query-cpu-model-expansion",
    "query-sev",
    "query-sev-capabilities",
    "query-tpm-models",
    "query-tpm-types",
    "query-vnc",
    "rtc-reset-reinjection",
    "RDMA_GID_STATUS_CHANGED",
    "SPICE_CONNECTED",
    "SPICE_DISCONNECTED",
    "SPICE_INITIALIZED",
    "SPICE_MIGRATE_COMPLETED",
    "VNC_CONNECTED",
    "VNC_DISCONNECTED",
    "VNC_INITIALIZED",
];

pub(super) fn since(subject: &str, what: &str) -> Option<(u32, u32)> {
    SINCE
        .iter()
        .find(|(of, known, _)| (*of == subject || *of == "*") && *known == what)
        .map(|(_, _, release)| *release)
}

pub(super) fn depends_on_build(subject: &str) -> bool {
    BUILD.contains(&subject)
}
