//! Disks and network cards that come and go while the guest runs.
//!
//! ```text
//!  plug    written down ─► node, backend ─► device ─► description           one job
//!  unplug  written down ─► device_del                                        one job, which ends here
//!                            ⋮ the guest lets go, now, later or never        no job
//!          DEVICE_DELETED ─► node, backend ─► description ─► Unplugged       the domain's worker, under a job of its own
//! ```
//!
//! Decides nothing: [`parts`](crate::parts) does, from the record and QEMU's list of devices, whether right after a step, in
//! the worker, or in a daemon that comes back.

use std::os::fd::OwnedFd;

use job_core::{JobKind, Label};
use monitor_qmp::command;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::access::Monitor;
use crate::block;
use crate::devices;
use crate::domain::Domain;
use crate::error::{Cause, Error, ErrorKind};
use crate::events::{Notice, Subscription, What};
use crate::guest::{Disk, Guest, Network, NetworkBackend};
use crate::ops::block_jobs::refuse_beside;
use crate::ops::parts::{is_there, settle};
use crate::ops::save::blocking;
use crate::ops::start::as_it_runs;
use crate::ops::{Call, Deadline, Op};
use crate::parts::{Moving, Part, PartKind, Scope, Way};
use crate::tap;

/// The name under which QEMU is given a tap device.
const TAP: &str = "vmwright-tap";

impl Domain {
    /// Plugs a disk in, into the slot that it names or else a free one, and yields it with that. The guest finds it in its
    /// own time.
    ///
    /// Refused as [`Invalid`](crate::ErrorKind::Invalid) if the guest with it would make no sense, in either description,
    /// and as [`State`](crate::ErrorKind::State) if no slot is free. One that QEMU refuses, as a file that is not
    /// there, leaves nothing behind.
    pub fn plug_disk(&self, disk: Disk, scope: Scope) -> Call<Disk> {
        self.plug("plug-disk", Part::Disk(disk), scope, |part| match part {
            Part::Disk(disk) => Some(disk),
            Part::Network(_) => None,
        })
    }

    /// Plugs a network card in, as [`plug_disk`](Self::plug_disk).
    pub fn plug_network(&self, network: Network, scope: Scope) -> Call<Network> {
        let part = Part::Network(network);
        self.plug("plug-network", part, scope, |part| match part {
            Part::Network(network) => Some(network),
            Part::Disk(_) => None,
        })
    }

    /// Asks the guest to let go of the disk of that name, and waits until it did and all of it is cleaned up. Only one in a
    /// slot can go.
    ///
    /// A guest need not answer, and one that is paused or still boots does not: then it ends as
    /// [`TimedOut`](crate::ErrorKind::TimedOut), and the disk may still go later. Whenever it does, it is cleaned up
    /// and told as [`What::Unplugged`], also if nobody waits any more; no job is held meanwhile.
    pub fn unplug_disk(&self, name: impl Into<String>, scope: Scope) -> Call<()> {
        self.unplug("unplug-disk", PartKind::Disk, name.into(), scope)
    }

    /// Asks the guest to let go of the network card of that name, as [`unplug_disk`](Self::unplug_disk).
    pub fn unplug_network(&self, name: impl Into<String>, scope: Scope) -> Call<()> {
        self.unplug("unplug-network", PartKind::Network, name.into(), scope)
    }

    fn plug<T: Send + 'static>(
        &self,
        owner: &'static str,
        part: Part,
        scope: Scope,
        back: fn(Part) -> Option<T>,
    ) -> Call<T> {
        self.normal(owner, JobKind::Modify, move |mut op| async move {
            let plugged = plug(&mut op, part, scope).await;
            if plugged.is_err() {
                // Where QEMU did not answer there may be something left to undo.
                op.domain().0.settle_parts();
            }
            Ok(back(plugged?).expect("a part comes back as what it was"))
        })
    }

    fn unplug(&self, owner: &'static str, kind: PartKind, name: String, scope: Scope) -> Call<()> {
        let domain = self.clone();
        let limit = self.0.context.defaults.call;
        Call::new(limit, move |deadline| async move {
            // Before it is asked for: the guest may be faster than the answer.
            let events = domain.subscribe();
            let part = name.clone();
            let work = move |mut op: Op| async move { ask(&mut op, kind, &part, scope).await };
            domain.run(owner, JobKind::Modify, deadline, work).await?;
            let gone = wait_until_gone(&domain, events, kind, &name, deadline).await;
            gone.map_err(|error| error.told_of(&owner.into(), &domain.0.name))
        })
    }
}

async fn plug(op: &mut Op, mut part: Part, scope: Scope) -> Result<Part, Error> {
    let guest = as_it_runs(op.domain()).await?;
    let moving = op.domain().0.moving().await;
    let mut crowded = guest.clone();
    for other in &moving {
        if other.part.is(part.kind(), part.name()) {
            return Err(on_its_way(other).into());
        }
        other.part.put_into(&mut crowded);
    }
    refuse_second(&crowded, &part)?;
    if part.slot().is_none() {
        let free = crowded.free_slot();
        let none = || Cause::State("it has no free slot to plug anything into".into());
        part.set_slot(free.ok_or_else(none)?);
    }
    refuse_clash(&crowded, &part)?;
    let records = op.domain().records();
    if let (Scope::LiveAndDefinition, Some(definition)) = (scope, &records.definition) {
        refuse_clash(definition, &part)?;
    }
    op.domain()
        .0
        .note_moving(Moving {
            part: part.clone(),
            way: Way::In,
            scope,
        })
        .await?;
    let begun = begin(op, &guest, &part).await;
    // What QEMU has decides, not its answer: that may have been lost, or come after a command that was refused.
    let settled = settle(op).await;
    let is_in = as_it_runs(op.domain()).await?;
    match (Part::of(&is_in, part.kind(), part.name()), settled, begun) {
        // Another part may be what is not settled.
        (Some(part), _, _) => Ok(part),
        (None, Ok(()), Err(error)) => Err(error),
        (None, Err(error), begun) => {
            // The first failure is the one to tell.
            let first = begun.err().unwrap_or(error);
            Err(Cause::Unsettled(Box::new(first)).into())
        }
        (None, Ok(()), Ok(())) => {
            Err(Cause::State("the guest let go of it as soon as it was there".into()).into())
        }
    }
}

/// Refuses a part with which a description would make no sense.
fn refuse_clash(guest: &Guest, part: &Part) -> Result<(), Error> {
    refuse_second(guest, part)?;
    let mut with = guest.clone();
    part.put_into(&mut with);
    Ok(with.check()?)
}

fn refuse_second(guest: &Guest, part: &Part) -> Result<(), Error> {
    let (kind, name) = (part.kind(), part.name());
    if Part::of(guest, kind, name).is_some() {
        let text = format!("it has a {} \"{name}\" already", kind.name());
        return Err(Cause::Exists(text).into());
    }
    Ok(())
}

pub(crate) fn on_its_way(moving: &Moving) -> Cause {
    let (kind, name) = (moving.part.kind().name(), moving.part.name());
    Cause::State(match moving.way {
        Way::In => format!("whether {kind} \"{name}\" is plugged in is not settled yet"),
        Way::Out => format!("{kind} \"{name}\" is being unplugged, and the guest has it still"),
    })
}

/// Has QEMU make what lies behind the part, and its device.
async fn begin(op: &mut Op, guest: &Guest, part: &Part) -> Result<(), Error> {
    match part {
        Part::Disk(disk) => {
            let monitor = op.monitor()?;
            let node = devices::first_node(&disk.name);
            block::add_node(&monitor, devices::image_node(disk, node, None)).await?;
            add_device(&monitor, devices::disk_at(guest, disk, node, None)).await
        }
        Part::Network(network) => {
            let tap = match &network.backend {
                NetworkBackend::User => None,
                NetworkBackend::Tap(interface) => {
                    let interface = interface.clone();
                    Some(blocking(move || tap::open(&interface)).await?)
                }
            };
            let monitor = op.monitor()?;
            add_backend(&monitor, network, tap).await?;
            add_device(&monitor, devices::card(guest, network)).await
        }
    }
}

async fn add_backend(
    monitor: &Monitor<'_>,
    network: &Network,
    tap: Option<OwnedFd>,
) -> Result<(), Error> {
    let is_tap = tap.is_some();
    if let Some(tap) = tap {
        let fdname = TAP.to_owned();
        monitor
            .execute_with_fds(command::Getfd { fdname }, vec![tap])
            .await?;
    }
    let arguments = devices::network_backend(network, is_tap.then_some(TAP));
    let add: command::NetdevAdd = typed(arguments)?;
    let added = monitor.execute(add).await;
    if added.is_err() && is_tap {
        // QEMU keeps a descriptor that nothing took; one that was taken is not under the name any more.
        let fdname = TAP.to_owned();
        let _closed = monitor.execute(command::Closefd { fdname }).await;
    }
    added.map(drop)
}

async fn add_device(monitor: &Monitor<'_>, arguments: Value) -> Result<(), Error> {
    let add: command::DeviceAdd = typed(arguments)?;
    monitor.execute(add).await.map(drop)
}

fn typed<T: serde::de::DeserializeOwned>(arguments: Value) -> Result<T, Error> {
    serde_json::from_value(arguments).map_err(|error| Cause::BadRequest(error.to_string()).into())
}

/// Asks the guest to let go of a part. What follows is up to the guest.
async fn ask(op: &mut Op, kind: PartKind, name: &str, scope: Scope) -> Result<(), Error> {
    let guest = as_it_runs(op.domain()).await?;
    let Some(part) = Part::of(&guest, kind, name) else {
        let text = format!("it has no {} \"{name}\"", kind.name());
        return Err(Cause::State(text).into());
    };
    if part.slot().is_none() {
        let (kind, text) = (kind.name(), "is in no slot, and stays where it is");
        return Err(Cause::State(format!("{kind} \"{name}\" {text}")).into());
    }
    if kind == PartKind::Disk {
        refuse_beside(op.domain(), Some(name)).await?;
    }
    let device = part.device();
    let before = op.domain().0.moving().await;
    let was_asked = before.iter().any(|moving| moving.part.is(kind, name));
    let moving = Moving {
        part,
        way: Way::Out,
        scope,
    };
    op.domain().0.note_moving(moving).await?;
    let asked = op
        .monitor()?
        .execute(command::DeviceDel::new(device.clone()))
        .await;
    let Err(error) = asked else {
        return Ok(());
    };
    if error.kind() != ErrorKind::Refused {
        // It may have reached the guest, and then the worker sees it go.
        return Err(error);
    }
    if !is_there(&op.monitor()?, &device).await? {
        // It had gone before, and nobody has cleaned up yet.
        return settle(op).await;
    }
    // QEMU refuses to ask again as long as the guest was asked already.
    if was_asked {
        return Ok(());
    }
    op.domain().0.forget_moving(kind, name.to_owned()).await?;
    Err(error)
}

/// Waits until the part is in the description no more: then all of it is gone.
async fn wait_until_gone(
    domain: &Domain,
    mut events: Subscription,
    kind: PartKind,
    name: &str,
    deadline: Deadline,
) -> Result<(), Error> {
    let began = Instant::now();
    let has_it = || {
        let guest = domain.description();
        guest.is_some_and(|guest| Part::of(&guest, kind, name).is_some())
    };
    loop {
        if !has_it() {
            return Ok(());
        }
        match timeout_at(deadline, events.next()).await {
            Ok(Notice::News { news, .. }) => {
                if let What::Gone { why, .. } = &news.what {
                    let text = format!("the guest ended first: {why}");
                    return Err(Cause::State(text).into());
                }
            }
            Ok(Notice::Gap { .. }) => {}
            Err(_) => {
                let what = "the guest to let go of it, which it may still do";
                let waited = began.elapsed();
                return Err(Cause::TimedOut { what, waited }.into());
            }
        }
    }
}

/// What a part is called in news.
pub(crate) fn label(part: &Part) -> Label {
    Label::from(part.name().to_owned())
}
