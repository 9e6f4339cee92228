//! What an event is about, so that whoever has no room for all can keep the newest of each.

use serde::Deserialize;

use crate::event::Event;

/// What an event is about: its name, the device, job or node that it names, and whether it tells of an end.
///
/// Of two events with an equal subject the later one says all that matters still.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject<'a> {
    event: &'a str,
    named: Named,
    ends: bool,
}

/// Whatever an event may name its subject by, and what tells an end.
#[derive(Clone, Debug, Deserialize, Default, PartialEq, Eq, Hash)]
#[serde(default, rename_all = "kebab-case")]
struct Named {
    device: Option<String>,
    id: Option<String>,
    path: Option<String>,
    qom_path: Option<String>,
    node_name: Option<String>,
    status: Option<String>,
}

impl Subject<'_> {
    /// Whether it tells of an end: a shutdown, a deleted device, a finished job or migration.
    #[must_use]
    pub fn ends(&self) -> bool {
        self.ends
    }
}

impl Event {
    /// What it is about.
    #[must_use]
    pub fn subject(&self) -> Subject<'_> {
        let mut named: Named = self.decode().unwrap_or_default();
        let ends = ends_something(&self.name, named.status.as_deref());
        // A later status of the same subject takes the place of an earlier one, save of an end.
        named.status = None;
        Subject {
            event: &self.name,
            named,
            ends,
        }
    }
}

fn ends_something(name: &str, status: Option<&str>) -> bool {
    match name {
        "SHUTDOWN"
        | "GUEST_PANICKED"
        | "DEVICE_DELETED"
        | "DEVICE_UNPLUG_GUEST_ERROR"
        | "BLOCK_JOB_COMPLETED"
        | "BLOCK_JOB_CANCELLED"
        | "DUMP_COMPLETED" => true,
        "JOB_STATUS_CHANGE" => matches!(status, Some("concluded" | "null")),
        "MIGRATION" => matches!(status, Some("completed" | "failed" | "cancelled")),
        _ => false,
    }
}
