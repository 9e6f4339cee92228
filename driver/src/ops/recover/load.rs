//! Reading the records: what makes sense becomes a domain that is known, what does not is set aside and costs nobody else.

use std::path::Path;
use std::sync::Arc;

use remote_migrate::Record;
use tracing::{info, warn};
use uuid::Uuid;

use super::{Became, Recovered, attached, begin};
use crate::context::Context;
use crate::domain::{Domain, Inner, Records};
use crate::error::{Cause, io as failed_to};
use crate::events::What;
use crate::journal::{Unreadable, unreadable};
use crate::ops::StartOptions;
use crate::ops::attach::records as of_attached;
use crate::records::{self, Attached, Defined, Running};
use crate::registry::Taken;
use crate::store::{Found, Shelf};

/// Says for which start of the host guests were started by themselves, below the run directory.
const STARTED: &str = "autostarted";

/// Makes all guests known that have a record, and begins to find those that ran.
pub(crate) fn recover_all(context: &Arc<Context>) -> Result<(), Cause> {
    let list = |shelf: Shelf| {
        let found = context.store.list(shelf);
        found.map_err(failed_to(
            "read the records of",
            format!("{shelf:?}").to_lowercase(),
        ))
    };
    let shelf = Shelf::Definitions;
    let mut defined = readable(context, shelf, list(shelf)?, |defined: &Defined| {
        defined.guest.uuid
    });
    let shelf = Shelf::Running;
    let running = readable(context, shelf, list(shelf)?, |record: &Running| {
        record.guest.uuid
    });
    for record in running {
        let uuid = record.guest.uuid;
        let kept = defined
            .iter()
            .position(|defined| defined.guest.uuid == uuid);
        let kept = kept.map(|place| defined.swap_remove(place));
        // One that is not kept has no other description than that of the guest as it runs.
        let definition = kept.as_ref().map_or(&record.guest, |kept| &kept.guest);
        let records = Records {
            definition: Some(definition.clone()),
            persistent: kept.is_some(),
            autostart: kept.as_ref().is_some_and(|kept| kept.autostart),
            moved_away: kept.is_some_and(|kept| kept.moved_away),
            ..Records::default()
        };
        if let Some(domain) = make_known(context, Shelf::Running, &record.guest.name, uuid, records)
        {
            begin(context, domain, record);
        }
    }
    let shelf = Shelf::Attached;
    let attached = readable(context, shelf, list(shelf)?, |record: &Attached| {
        record.uuid
    });
    for record in attached {
        let known = make_known(
            context,
            shelf,
            &record.name,
            record.uuid,
            of_attached(&record),
        );
        if let Some(domain) = known {
            attached::begin(context, domain, record);
        }
    }
    let is_first = is_first_since_boot(&context.run_dir);
    for defined in defined {
        let guest = defined.guest;
        let is_started = is_first && defined.autostart && !defined.moved_away;
        let records = Records {
            definition: Some(guest.clone()),
            persistent: true,
            autostart: defined.autostart,
            moved_away: defined.moved_away,
            ..Records::default()
        };
        let domain = make_known(
            context,
            Shelf::Definitions,
            &guest.name,
            guest.uuid,
            records,
        );
        if let Some(domain) = domain.filter(|_| is_started) {
            context.tracker.spawn(start_by_itself(domain));
        }
    }
    let shelf = Shelf::Migrations;
    let bad = unreadable(&*context.store).map_err(failed_to(
        "read the records of",
        format!("{shelf:?}").to_lowercase(),
    ))?;
    for bad in bad {
        tell_unreadable(context, bad);
    }
    context.recoveries.tasks.close();
    Ok(())
}

/// Starts it with its host, once no migration has it. One that is this host's already is looked at first, so that it is not
/// taken for the guest that arrived.
async fn start_by_itself(domain: Domain) {
    let context = domain.0.context.clone();
    let mut waits = false;
    loop {
        let turn = context.settling.turn();
        let has_it = |record: &Record| {
            let is_looked_at = context.settling.has_tried(record);
            record.domain() == domain.uuid() && (record.refuses_start() || !is_looked_at)
        };
        let open = context.migrations().await;
        if !open.is_ok_and(|records| records.iter().any(has_it)) {
            break;
        }
        if !std::mem::replace(&mut waits, true) {
            let domain = domain.name();
            info!(domain, "it is started once its migration is settled");
        }
        if context.parting.run_until_cancelled(turn).await.is_none() {
            return;
        }
    }
    if let Err(error) = domain.start_with(StartOptions::default()).await {
        let error = format!("{error:#}");
        warn!(domain = domain.name(), error, "autostart failed");
    }
}

/// A record of a migration stays: as long as it stands its guest is not started.
fn tell_unreadable(context: &Context, bad: Unreadable) {
    let Unreadable {
        key,
        reason,
        domain,
        ..
    } = bad;
    warn!(key, reason, ?domain, "a migration's record cannot be read");
    let place = format!("where it was, as {key}");
    context.recoveries.add(Recovered {
        uuid: domain,
        name: key.into(),
        job: None,
        became: Became::SetAside { place, reason },
    });
}

/// The records that make sense. The others are set aside, and cost nobody else.
fn readable<T: serde::de::DeserializeOwned>(
    context: &Context,
    shelf: Shelf,
    found: Vec<Found>,
    uuid: impl Fn(&T) -> Uuid,
) -> Vec<T> {
    let mut all = Vec::new();
    for (key, bytes) in found {
        let read = match bytes {
            Ok(bytes) => records::decode(&bytes).map_err(|error| error.to_string()),
            Err(error) => Err(format!("cannot be read: {error}")),
        };
        match read {
            Ok(record) if uuid(&record).to_string() == key => all.push(record),
            Ok(record) => {
                let reason = format!("is a copy: it says that it is of {}", uuid(&record));
                set_aside(context, shelf, key, reason);
            }
            Err(reason) => set_aside(context, shelf, key, reason),
        }
    }
    all
}

fn set_aside(context: &Context, shelf: Shelf, key: String, reason: String) {
    let place = match context.store.set_aside(shelf, &key) {
        Ok(place) => place,
        Err(error) => format!("where it was, since it cannot be moved: {error}"),
    };
    warn!(key, place, reason, "a record was set aside");
    context.recoveries.add(Recovered {
        uuid: Uuid::try_parse(&key).ok(),
        name: key.into(),
        job: None,
        became: Became::SetAside { place, reason },
    });
}

fn make_known(
    context: &Arc<Context>,
    shelf: Shelf,
    name: &str,
    uuid: Uuid,
    records: Records,
) -> Option<Domain> {
    let make = |id| Inner::new(id, name, uuid, context, records);
    match context.registry.insert(name, uuid, make) {
        Ok(inner) => {
            inner.tell(What::Defined);
            Some(Domain(inner))
        }
        // Uuids are file names, which are different.
        Err(Taken::Name | Taken::Uuid) => {
            let reason = format!("is of a second guest that is called \"{name}\"");
            set_aside(context, shelf, uuid.to_string(), reason);
            None
        }
    }
}

/// Whether no driver has started guests by itself since the host was started. Says so for the next one.
fn is_first_since_boot(run_dir: &Path) -> bool {
    let path = run_dir.join(STARTED);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if std::fs::read_to_string(&path).is_ok_and(|known| known == boot) {
        return false;
    }
    if let Err(error) = std::fs::write(&path, boot) {
        // Better not started than started again by each driver: who shut a guest down meant it.
        warn!(path = %path.display(), %error, "guests are not started by themselves");
        return false;
    }
    true
}
