//! Guests arrive from another host: the driver's steps for the destination side of `remote-migrate`.
//!
//! The async job is held from Prepare to Finish by a task of its own, which is told what to do; so a request that is
//! dropped, or a connection that breaks, tears nothing in the middle. Decides nothing: the phases do.

mod earlier;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use job_core::{AsyncKind, Guard as _};
use monitor_qmp::command::{self, MigrationStatus};
use remote_migrate::{
    CopyState, DestinationHost, Guest as Arriving, HostError, Load, MigrationId, Prepared, Ran,
    RunState, StartError, Step,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use crate::context::Context;
use crate::domain::{Domain, Inner, Live, Records};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::guest::Guest;
use crate::landing::Gate;
use crate::ops::AsyncOp;
use crate::ops::destroy::cleaned_up;
use crate::ops::migrate::{Bring, Moving};
use crate::ops::start::{bring_up, give_up, run};
use crate::records::Work;
use crate::registry::Taken;

/// How often QEMU is asked whether all was loaded.
const POLL: Duration = Duration::from_millis(20);
/// The name under which QEMU keeps the connection.
const FD_NAME: &str = "vmwright-incoming";

/// The local steps of guests that arrive at a driver. [`Driver::arrivals`](crate::Driver::arrivals) makes one, to be put
/// behind `remote_migrate::Destination`.
pub struct Arrivals {
    context: Arc<Context>,
    here: Mutex<HashMap<MigrationId, Arc<Arrival>>>,
}

/// One guest on its way, or arrived. Holds its QEMU weakly: this must not outlive the guest.
struct Arrival {
    domain: Domain,
    is_new: bool,
    orders: mpsc::Sender<Order>,
    live: OnceLock<Weak<Live>>,
}

/// What the task that holds the job is told.
enum Order {
    Look(oneshot::Sender<Result<CopyState, Error>>),
    Start(RunState, oneshot::Sender<Result<(), Error>>),
    Discard,
}

impl Arrivals {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            here: Mutex::default(),
        }
    }

    fn find(&self, migration: MigrationId) -> Option<Arc<Arrival>> {
        self.here
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&migration)
            .cloned()
    }

    fn forget(&self, migration: MigrationId) {
        self.here
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&migration);
    }

    /// The domain it will be: one that is known and off, or a new one.
    fn domain(&self, guest: Guest) -> Result<(Domain, bool), Error> {
        guest.check()?;
        if let Some(known) = self.context.registry.by_uuid(guest.uuid) {
            return Ok((Domain(known), false));
        }
        let (name, uuid) = (guest.name.clone(), guest.uuid);
        let records = Records {
            definition: Some(guest),
            ..Records::default()
        };
        let make = |id| Inner::new(id, &name, uuid, &self.context, records);
        let inner = self
            .context
            .registry
            .insert(&name, uuid, make)
            .map_err(|taken| {
                Cause::Exists(match taken {
                    Taken::Name => format!("another guest is called \"{name}\""),
                    Taken::Uuid => format!("the uuid {uuid} is taken"),
                })
            })?;
        inner.tell(What::Defined);
        Ok((Domain(inner), true))
    }

    async fn receive(&self, step: Step, guest: Guest) -> Result<Prepared, Error> {
        let began = Instant::now();
        let (domain, is_new) = self.domain(guest.clone())?;
        let (orders, told) = mpsc::channel(4);
        let (ready, prepared) = oneshot::channel();
        let held = domain.clone();
        // Known before anything is begun, so that a discard finds what a failure leaves behind.
        let arrival = Arc::new(Arrival {
            domain,
            is_new,
            orders,
            live: OnceLock::new(),
        });
        {
            let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
            here.retain(|_, arrival| !arrival.is_over());
            here.insert(step.migration, arrival.clone());
        }
        let (limit, mask) = (
            self.context.defaults.long,
            AsyncKind::MigrationIn.default_mask(),
        );
        self.context.tracker.spawn(async move {
            let work = move |op: AsyncOp| hold(op, guest, told, ready);
            // Its end is told to those who follow the domain, and seen by the next look.
            let _end = held
                .run_async(
                    "arrive",
                    AsyncKind::MigrationIn,
                    mask,
                    Instant::now() + limit,
                    work,
                )
                .await;
        });
        let late = |_| Cause::TimedOut {
            what: "a QEMU to take the guest",
            waited: began.elapsed(),
        };
        let gone = |_| Cause::State("it is held, or the driver is shutting down".into());
        let prepared = timeout_at(step.deadline, prepared).await.map_err(late)?;
        let (live, prepared) = prepared.map_err(gone)??;
        // The only place that sets it.
        let _first = arrival.live.set(Arc::downgrade(&live));
        self.context.settling.arriving();
        Ok(prepared)
    }

    /// What is there, by the word of the task that holds the job, or by what it left behind.
    async fn look(&self, step: Step) -> Result<CopyState, Error> {
        let Some(arrival) = self.find(step.migration) else {
            return earlier::look(&self.context, step).await;
        };
        let (answer, looked) = oneshot::channel();
        if arrival.orders.send(Order::Look(answer)).await.is_ok()
            && let Ok(looked) = looked.await
        {
            return looked;
        }
        // The job has ended: it was started, or it is gone.
        let Some(live) = arrival.live.get() else {
            return Ok(CopyState::Gone(Ran::Never));
        };
        let live = live.upgrade();
        let here = arrival.domain.0.live();
        let is_here = live
            .as_ref()
            .is_some_and(|live| here.is_some_and(|here| Arc::ptr_eq(live, &here)));
        Ok(match (is_here, live.is_some_and(|live| live.has_run())) {
            (true, true) => CopyState::Started,
            (true, false) => CopyState::Incoming,
            (false, _) => CopyState::Gone(Ran::Maybe),
        })
    }
}

impl Arrival {
    /// Whether its QEMU was there and is not any more.
    fn is_over(&self) -> bool {
        self.orders.is_closed() && self.live.get().is_none_or(|live| live.strong_count() == 0)
    }
}

#[async_trait]
impl DestinationHost for Arrivals {
    async fn prepare(&self, step: Step, guest: &Arriving) -> Result<Prepared, HostError> {
        let moving: Moving = guest.cookie.decode().map_err(HostError::new)?;
        if moving.guest.uuid != step.domain {
            return Err(HostError::new("the description is one of another guest"));
        }
        self.receive(step, moving.guest)
            .await
            .map_err(HostError::new)
    }

    async fn load(&self, step: Step) -> Result<Load, HostError> {
        let arrival = self.find(step.migration);
        loop {
            let changes = arrival.as_ref().map(|arrival| arrival.domain.changes());
            match self.look(step).await.map_err(HostError::new)? {
                CopyState::Complete
                | CopyState::Switched
                | CopyState::Started
                | CopyState::Partial => return Ok(Load::Complete),
                CopyState::Gone(_) => {
                    return Ok(Load::Failed(
                        "the QEMU that took the guest is gone".to_owned().into(),
                    ));
                }
                CopyState::Incoming if Instant::now() + POLL >= step.deadline => {
                    return Ok(Load::Loading);
                }
                CopyState::Incoming => match changes {
                    Some(mut changes) => changes.wait(POLL).await,
                    None => sleep(POLL).await,
                },
            }
        }
    }

    async fn start(&self, step: Step, run: RunState) -> Result<(), StartError> {
        let Some(arrival) = self.find(step.migration) else {
            let started = earlier::start(&self.context, step, run).await;
            return started.map_err(StartError::may_have_run);
        };
        let (answer, started) = oneshot::channel();
        let told = arrival.orders.send(Order::Start(run, answer)).await;
        told.map_err(|_| StartError::never_ran("its QEMU is gone"))?;
        match started.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(StartError::may_have_run(error)),
            Err(_) => Err(StartError::may_have_run("its task ended")),
        }
    }

    async fn discard(&self, step: Step) -> Result<(), HostError> {
        let Some(arrival) = self.find(step.migration) else {
            let discarded = earlier::discard(&self.context, step).await;
            return discarded.map_err(HostError::new);
        };
        // A task that has ended took its QEMU with it, or never had one.
        let _told = arrival.orders.send(Order::Discard).await;
        if let Some(live) = arrival.live.get().and_then(Weak::upgrade) {
            cleaned_up(&arrival.domain, &live, step.deadline)
                .await
                .map_err(HostError::new)?;
        }
        if arrival.is_new {
            // Off, and held by nobody once the arrival's own job has ended.
            arrival
                .domain
                .remove_after_job(step.deadline)
                .await
                .map_err(HostError::new)?;
        }
        self.forget(step.migration);
        Ok(())
    }

    async fn inspect(&self, step: Step) -> Result<CopyState, HostError> {
        self.look(step).await.map_err(HostError::new)
    }
}

/// Holds the job of a guest that arrives, and does what it is told until it runs or is discarded.
async fn hold(
    mut op: AsyncOp,
    guest: Guest,
    mut told: mpsc::Receiver<Order>,
    ready: oneshot::Sender<Result<(Arc<Live>, Prepared), Error>>,
) -> Result<(), Error> {
    let definition = guest.clone();
    op.with_state(|records| {
        records.definition = Some(definition);
        records.moved_away = false;
    })?;
    op.domain().0.store_definition().await?;
    let (live, gate) = match open(&mut op, &guest).await {
        Ok((live, gate, prepared)) => {
            // Nobody waits for it any more: the orders, or their end, say what becomes of it.
            let _late = ready.send(Ok((live.clone(), prepared)));
            (live, gate)
        }
        Err(error) => {
            let text = format!("{error:#}");
            let _late = ready.send(Err(error));
            return Err(Cause::State(text).into());
        }
    };
    let end = obey(&mut op, &live, gate, &mut told).await;
    // Once it may have run it is the guest, whatever went wrong then: it is not ended for that.
    if end.is_err() && !live.has_run() {
        give_up(&live);
    }
    end
}

/// A QEMU that waits for its state, and a gate of ours where that is to be brought.
async fn open(op: &mut AsyncOp, guest: &Guest) -> Result<(Arc<Live>, Gate, Prepared), Error> {
    let live = bring_up(op, guest, Work::MigrationIn).await?;
    let directory = op.domain().0.run_dir();
    let context = op.domain().0.context.clone();
    let opened = async {
        let silence = context.defaults.silence;
        let gate = context.landing.open(&directory, silence).await?;
        let ticket = gate.ticket;
        let cookie = remote_migrate::Cookie::encode(&Bring { ticket })
            .map_err(|error| Cause::State(error.to_string()))?;
        let capabilities = vec![
            command::MigrationCapability::on("return-path"),
            command::MigrationCapability::on("events"),
        ];
        op.monitor()
            .await?
            .execute(command::MigrateSetCapabilities { capabilities })
            .await?;
        let connect = gate.connect.as_str().into();
        Ok((gate, Prepared { connect, cookie }))
    };
    match opened.await {
        Ok((gate, prepared)) => Ok((live, gate, prepared)),
        Err(error) => {
            give_up(&live);
            Err(error)
        }
    }
}

async fn obey(
    op: &mut AsyncOp,
    live: &Arc<Live>,
    gate: Gate,
    told: &mut mpsc::Receiver<Order>,
) -> Result<(), Error> {
    op.set_phase("prepare");
    let token = op.job().token();
    // Closed behind the one that was let in.
    let mut gate = Some(gate);
    loop {
        let order = tokio::select! {
            order = told.recv() => order,
            _ = token.stop() => None,
            Some(connection) = admit(&mut gate), if gate.is_some() => {
                gate = None;
                op.set_phase("perform");
                let monitor = op.monitor().await?;
                let named = command::Getfd { fdname: FD_NAME.into() };
                monitor.execute_with_fds(named, vec![connection]).await?;
                monitor.execute(command::MigrateIncoming::new(format!("fd:{FD_NAME}"))).await?;
                continue;
            }
        };
        // A slow stream does not take from the time that an order has.
        let patience = op.domain().0.context.defaults.command;
        op.extend(patience);
        match order {
            Some(Order::Look(answer)) => {
                let looked = look(op, live).await;
                // Who asked may have left.
                let _late = answer.send(looked);
            }
            Some(Order::Start(state, answer)) => {
                op.set_phase("finish");
                op.job().pass_point_of_return();
                live.mark_run();
                // Its journal says that it is ours. A daemon that comes back must not take it for one that never ran.
                op.domain().0.work_is_over().await?;
                let started = run(op, live, state == RunState::Running).await;
                let end = match &started {
                    Ok(()) => Ok(()),
                    Err(error) => {
                        Err(Cause::State(format!("it may not have been started: {error:#}")).into())
                    }
                };
                let _late = answer.send(started);
                return end;
            }
            Some(Order::Discard) | None => {
                give_up(live);
                return Err(Cause::Cancelled("the guest stays where it was".into()).into());
            }
        }
    }
}

async fn admit(gate: &mut Option<Gate>) -> Option<std::os::fd::OwnedFd> {
    Some(gate.as_mut()?.admit().await)
}

async fn look(op: &mut AsyncOp, live: &Arc<Live>) -> Result<CopyState, Error> {
    if op
        .domain()
        .0
        .live()
        .is_none_or(|found| !Arc::ptr_eq(&found, live))
        || op.check_cancelled().is_err()
    {
        return Ok(CopyState::Gone(Ran::Never));
    }
    let info = op.monitor().await?.execute(command::QueryMigrate).await?;
    Ok(match info.status {
        Some(MigrationStatus::Completed) => CopyState::Complete,
        Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => CopyState::Gone(Ran::Never),
        _ => CopyState::Incoming,
    })
}

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrivals").finish_non_exhaustive()
    }
}
