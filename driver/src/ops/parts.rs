//! What is left to do with parts that came or went: the domain's own worker, which takes a job like any caller and tries
//! again until it is done.
//!
//! It is woken by `DEVICE_DELETED`, by a plug whose outcome is not known, and when a guest was reached again; each time it
//! compares what was written down with what QEMU has. So an event that came while no daemon was there, or after its caller
//! left, is only one reason to look.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use job_core::JobKind;
use monitor_qmp::command;
use tokio::time::{Instant, sleep};
use tracing::warn;

use crate::access::Monitor;
use crate::block;
use crate::devices;
use crate::domain::{Domain, Inner};
use crate::error::{Cause, Error, ErrorKind};
use crate::events::What;
use crate::guest::Guest;
use crate::ops::block_jobs::refuse_beside;
use crate::ops::plug::{label, on_its_way};
use crate::ops::visit::{Visits, describe};
use crate::ops::{Op, start::as_it_runs};
use crate::parts::{Fate, Moving, Part, PartKind, Scope, Way, fate};

/// Where the devices with an id are.
const PERIPHERAL: &str = "/machine/peripheral";
/// Between two tries, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Whether the worker runs, and whether it is to look once more.
#[derive(Debug, Default)]
pub(crate) struct Worker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    is_running: bool,
    is_wanted: bool,
    /// Whether the guest is to be asked once more for what it was to let go of.
    is_to_ask: bool,
}

impl Worker {
    fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether somebody has to begin it now.
    fn wake(&self, is_to_ask: bool) -> bool {
        self.with(|state| {
            state.is_wanted = true;
            state.is_to_ask |= is_to_ask;
            !std::mem::replace(&mut state.is_running, true)
        })
    }

    /// Whether it is to look once more, and then whether the guest is to be asked; else it is over.
    fn goes_on(&self) -> Option<bool> {
        self.with(|state| {
            state.is_running = std::mem::take(&mut state.is_wanted);
            let is_to_ask = std::mem::take(&mut state.is_to_ask);
            state.is_running.then_some(is_to_ask)
        })
    }
}

impl Inner {
    /// Has the worker look at the parts of the guest. Never waits.
    pub(crate) fn settle_parts(self: &Arc<Self>) {
        self.wake_worker(false);
    }

    /// The same for a guest that was reached again. Whoever asked it to let go of something may have died before that was
    /// sent, so it is asked once more.
    pub(crate) fn settle_parts_again(self: &Arc<Self>) {
        self.wake_worker(true);
    }

    fn wake_worker(self: &Arc<Self>, is_to_ask: bool) {
        if !self.worker.wake(is_to_ask) {
            return;
        }
        let (domain, parting) = (Domain(self.clone()), self.context.parting.clone());
        self.context.watchers.spawn(async move {
            parting.run_until_cancelled(work(domain)).await;
        });
    }

    /// The parts that are on their way.
    pub(crate) async fn moving(&self) -> Vec<Moving> {
        self.noted()
            .await
            .map_or_else(Vec::new, |record| record.moving)
    }

    /// Writes down that a part is on its way.
    pub(crate) async fn note_moving(&self, moving: Moving) -> Result<(), Cause> {
        self.note(move |record| {
            if let Some(record) = record {
                let (kind, name) = (moving.part.kind(), moving.part.name());
                record.moving.retain(|other| !other.part.is(kind, name));
                record.moving.push(moving);
            }
        })
        .await
    }

    /// Writes down that a part is on its way no more.
    pub(crate) async fn forget_moving(&self, kind: PartKind, name: String) -> Result<(), Cause> {
        self.note(move |record| {
            if let Some(record) = record {
                record.moving.retain(|other| !other.part.is(kind, &name));
            }
        })
        .await
    }
}

async fn work(domain: Domain) {
    let mut pause = FIRST_PAUSE;
    while let Some(is_to_ask) = domain.0.worker.goes_on() {
        let deadline = Instant::now() + domain.0.context.defaults.call;
        let look = move |mut op: Op| async move {
            if is_to_ask {
                ask_again(&mut op).await?;
            }
            settle(&mut op).await
        };
        let settled = domain.run("settle-parts", JobKind::Modify, deadline, look);
        let Err(error) = settled.await else {
            pause = FIRST_PAUSE;
            continue;
        };
        match error.kind() {
            // Who is gone has no parts, and one that is reached again wakes the worker.
            ErrorKind::Gone | ErrorKind::Closed | ErrorKind::State | ErrorKind::ShuttingDown => {}
            _ => {
                let error = format!("{error:#}");
                warn!(
                    domain = domain.name(),
                    error, "parts that came or went are not settled"
                );
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                domain.0.worker.wake(is_to_ask);
            }
        }
    }
}

/// Asks the guest once more to let go of what it was to.
async fn ask_again(op: &mut Op) -> Result<(), Error> {
    let moving = op.domain().0.moving().await;
    for moving in moving.iter().filter(|moving| moving.way == Way::Out) {
        let device = moving.part.device();
        let asked = op.monitor()?.execute(command::DeviceDel::new(device)).await;
        match asked {
            // It was asked before, or it is gone.
            Err(error) if error.kind() == ErrorKind::Refused => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// Compares what was written down of the guest's parts with what QEMU has, and does what is left to do. Fails with the first
/// failure, once it has looked at all.
pub(crate) async fn settle(op: &mut Op) -> Result<(), Error> {
    let guest = as_it_runs(op.domain()).await?;
    let moving = op.domain().0.moving().await;
    let there = peripherals(&op.monitor()?).await?;
    let at_rest = Part::all(&guest).filter(|part| {
        let is_it = |other: &&Moving| other.part.is(part.kind(), part.name());
        !moving.iter().any(|other| is_it(&other))
    });
    let at_rest = at_rest.map(|part| (part, None, Scope::Live));
    let on_their_way = moving.iter().map(|moving| {
        let part = moving.part.clone();
        (part, Some(moving.way), moving.scope)
    });
    let all: Vec<_> = on_their_way.chain(at_rest).collect();
    let mut failure = None;
    for (part, way, scope) in all {
        let is_there = there.contains(&part.device());
        let settled = settle_one(op, part, fate(way, is_there), scope).await;
        // One that something else still uses is tried again, and keeps no other.
        if let Err(error) = settled {
            failure.get_or_insert(error);
        }
    }
    failure.map_or(Ok(()), Err)
}

async fn settle_one(op: &mut Op, part: Part, fate: Fate, scope: Scope) -> Result<(), Error> {
    if matches!(fate, Fate::Undone | Fate::Went) {
        remove_behind(op, &part).await?;
    }
    let (kind, name) = (part.kind(), label(&part));
    let it = part.clone();
    let news = match fate {
        Fate::Stays => return Ok(()),
        Fate::Undone => None,
        Fate::Came => {
            describe(op, scope, move |guest| it.put_into(guest)).await?;
            Some(What::Plugged { kind, name })
        }
        Fate::Went => {
            describe(op, scope, move |guest| it.take_from(guest)).await?;
            Some(What::Unplugged { kind, name })
        }
    };
    let domain = &op.domain().0;
    domain.forget_moving(kind, part.name().to_owned()).await?;
    if let Some(news) = news {
        domain.tell(news);
    }
    Ok(())
}

/// Takes out of QEMU what lies behind a device that is not there.
async fn remove_behind(op: &mut Op, part: &Part) -> Result<(), Error> {
    let monitor = op.monitor()?;
    match part {
        Part::Network(network) => {
            let removed = monitor
                .execute(command::NetdevDel::new(devices::backend(&network.name)))
                .await;
            match removed {
                // There is no list of backends to ask first.
                Err(error) if error.kind() == ErrorKind::Refused => Ok(()),
                other => other.map(drop),
            }
        }
        Part::Disk(disk) => block::remove_nodes_of(&monitor, &disk.name).await,
    }
}

/// Refuses to take the guest elsewhere while something is being done to its parts: a block job is at a disk, or it is not
/// settled whether something was plugged in.
pub(crate) async fn refuse_unsettled(domain: &Domain) -> Result<(), Error> {
    refuse_beside(domain, None).await?;
    let moving = domain.0.moving().await;
    match moving.iter().find(|moving| moving.way == Way::In) {
        Some(moving) => Err(on_its_way(moving).into()),
        None => Ok(()),
    }
}

/// Refuses to work on a part that is on its way.
pub(crate) async fn refuse_unsettled_part(
    domain: &Domain,
    kind: PartKind,
    name: &str,
) -> Result<(), Error> {
    let moving = domain.0.moving().await;
    match moving.iter().find(|moving| moving.part.is(kind, name)) {
        Some(moving) => Err(on_its_way(moving).into()),
        None => Ok(()),
    }
}

/// Fails if a part is not there any more: a guest may let go of what it has at any moment, and its state fits no other
/// QEMU then than one without.
pub(crate) async fn check_there<V: Visits>(op: &mut V, guest: &Guest) -> Result<(), Error> {
    let there = peripherals(&op.visit().await?).await?;
    match Part::all(guest).find(|part| !there.contains(&part.device())) {
        Some(part) => {
            let (kind, name) = (part.kind().name(), part.name());
            let text = format!("the guest let go of {kind} \"{name}\" meanwhile");
            Err(Cause::State(text).into())
        }
        None => Ok(()),
    }
}

/// Whether QEMU has a device of that id.
pub(crate) async fn is_there(monitor: &Monitor<'_>, device: &str) -> Result<bool, Error> {
    let there = peripherals(monitor).await?;
    Ok(there.iter().any(|found| found == device))
}

/// The ids of all devices that have one.
async fn peripherals(monitor: &Monitor<'_>) -> Result<Vec<String>, Error> {
    let listed = monitor.execute(command::QomList::new(PERIPHERAL)).await?;
    Ok(listed.into_iter().map(|device| device.name).collect())
}
