//! Guests arrive from another host: the driver's steps for the destination side of `remote-migrate`.
//!
//! The async job is held from Prepare to Finish by a task of its own, which is told what to do; so a request that is
//! dropped, or a connection that breaks, tears nothing in the middle. Decides nothing: the phases do.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use job_core::AsyncKind;
use monitor_qmp::command::{self, MigrationStatus};
use remote_migrate::{
    CopyState, DestinationHost, Guest as Arriving, HostError, Load, MigrationId, Prepared, Ran,
    RunState, StartError, Step,
};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use crate::context::Context;
use crate::domain::{Domain, Inner, Live, Records};
use crate::error::{Cause, Error, io};
use crate::events::What;
use crate::guest::Guest;
use crate::ops::AsyncOp;
use crate::ops::migrate::Moving;
use crate::ops::start::{bring_up, finish, give_up};
use crate::registry::Taken;

/// How often QEMU is asked whether all was loaded.
const POLL: Duration = Duration::from_millis(20);
/// The name under which QEMU keeps the connection.
const FD_NAME: &str = "vmwright-incoming";

/// The local steps of guests that arrive at a driver. [`Driver::arrivals`](crate::Driver::arrivals) makes one, to be put
/// behind `remote_migrate::Destination`.
pub struct Arrivals {
    context: Arc<Context>,
    here: Mutex<HashMap<MigrationId, Arrival>>,
}

/// One guest on its way, or arrived.
#[derive(Clone)]
struct Arrival {
    domain: Domain,
    is_new: bool,
    orders: mpsc::Sender<Order>,
    live: Arc<Live>,
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

    fn find(&self, migration: MigrationId) -> Option<Arrival> {
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
            attached: None,
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
        let (domain, is_new) = self.domain(guest.clone())?;
        let (orders, told) = mpsc::channel(4);
        let (ready, prepared) = oneshot::channel();
        let held = domain.clone();
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
        let gone = |_| Cause::State("it could not be held, or its QEMU did not start".into());
        let ready = timeout_at(step.deadline, prepared).await;
        let (live, prepared) = ready
            .map_err(|_| Cause::TimedOut {
                what: "a QEMU to take the guest",
                waited: Duration::ZERO,
            })?
            .map_err(gone)??;
        let arrival = Arrival {
            domain,
            is_new,
            orders,
            live,
        };
        self.here
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(step.migration, arrival);
        Ok(prepared)
    }

    /// What is there, by the word of the task that holds the job, or by what it left behind.
    async fn look(&self, migration: MigrationId) -> Result<CopyState, Error> {
        let Some(arrival) = self.find(migration) else {
            return Ok(CopyState::Gone(Ran::Never));
        };
        let (answer, looked) = oneshot::channel();
        if arrival.orders.send(Order::Look(answer)).await.is_ok()
            && let Ok(looked) = looked.await
        {
            return looked;
        }
        // The job has ended: it was started, or it is gone.
        let is_here = arrival
            .domain
            .0
            .live()
            .is_some_and(|live| Arc::ptr_eq(&live, &arrival.live));
        let has_run = arrival.live.has_run();
        Ok(match (is_here, has_run) {
            (true, true) => CopyState::Started,
            (true, false) => CopyState::Incoming,
            (false, true) => CopyState::Gone(Ran::Maybe),
            (false, false) => CopyState::Gone(Ran::Never),
        })
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
        loop {
            match self.look(step.migration).await.map_err(HostError::new)? {
                CopyState::Complete | CopyState::Started => return Ok(Load::Complete),
                CopyState::Gone(_) => {
                    return Ok(Load::Failed(
                        "the QEMU that took the guest is gone".to_owned().into(),
                    ));
                }
                CopyState::Incoming if Instant::now() + POLL >= step.deadline => {
                    return Ok(Load::Loading);
                }
                CopyState::Incoming => sleep(POLL).await,
            }
        }
    }

    async fn start(&self, step: Step, run: RunState) -> Result<(), StartError> {
        let arrival = self
            .find(step.migration)
            .ok_or_else(|| StartError::never_ran("it is not here"))?;
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
            return Ok(());
        };
        // A task that has ended took its QEMU with it, or never had one.
        let _told = arrival.orders.send(Order::Discard).await;
        let is_gone = |seen: &crate::Observed| seen.run == crate::Run::Off;
        arrival
            .domain
            .wait_for(is_gone, step.deadline)
            .await
            .map_err(HostError::new)?;
        if arrival.is_new {
            // Off and held by nobody: there is nothing that could keep it.
            arrival
                .domain
                .remove()
                .until(step.deadline)
                .await
                .map_err(HostError::new)?;
        }
        self.forget(step.migration);
        Ok(())
    }

    async fn inspect(&self, step: Step) -> Result<CopyState, HostError> {
        self.look(step.migration).await.map_err(HostError::new)
    }
}

/// Holds the job of a guest that arrives, and does what it is told until it runs or is discarded.
async fn hold(
    mut op: AsyncOp,
    guest: Guest,
    mut told: mpsc::Receiver<Order>,
    ready: oneshot::Sender<Result<(Arc<Live>, Prepared), Error>>,
) -> Result<(), Error> {
    let (live, listener) = match open(&mut op, &guest).await {
        Ok((live, listener, prepared)) => {
            // Nobody waits for it any more: the orders, or their end, say what becomes of it.
            let _late = ready.send(Ok((live.clone(), prepared)));
            (live, listener)
        }
        Err(error) => {
            let text = format!("{error:#}");
            let _late = ready.send(Err(error));
            return Err(Cause::State(text).into());
        }
    };
    let end = obey(&mut op, &live, &listener, &mut told).await;
    if end.is_err() {
        give_up(&live);
    }
    end
}

/// A QEMU that waits for its state, and a socket of ours where it is to be sent.
async fn open(
    op: &mut AsyncOp,
    guest: &Guest,
) -> Result<(Arc<Live>, UnixListener, Prepared), Error> {
    let live = bring_up(op, guest, true).await?;
    let path = op.domain().0.run_dir().join("migrate.sock");
    let opened = async {
        let listener = UnixListener::bind(&path).map_err(io("listen on", &path))?;
        let capabilities = vec![
            command::MigrationCapability::on("return-path"),
            command::MigrationCapability::on("events"),
        ];
        op.monitor()
            .await?
            .execute(command::MigrateSetCapabilities { capabilities })
            .await?;
        Ok(listener)
    };
    let listener = match opened.await {
        Ok(listener) => listener,
        Err(error) => {
            give_up(&live);
            return Err(error);
        }
    };
    let connect = format!("unix:{}", path.display()).into();
    Ok((
        live,
        listener,
        Prepared {
            connect,
            cookie: remote_migrate::Cookie::empty(),
        },
    ))
}

async fn obey(
    op: &mut AsyncOp,
    live: &Arc<Live>,
    listener: &UnixListener,
    told: &mut mpsc::Receiver<Order>,
) -> Result<(), Error> {
    op.set_phase("prepare");
    let mut is_connected = false;
    loop {
        let order = tokio::select! {
            order = told.recv() => order,
            accepted = listener.accept(), if !is_connected => {
                let (stream, _) = accepted.map_err(io("accept on", "migrate.sock"))?;
                let stream = stream.into_std().map_err(io("take over", "migrate.sock"))?;
                is_connected = true;
                op.set_phase("perform");
                let monitor = op.monitor().await?;
                let connection = vec![OwnedFd::from(stream)];
                monitor.execute_with_fds(command::Getfd { fdname: FD_NAME.into() }, connection).await?;
                monitor.execute(command::MigrateIncoming::new(format!("fd:{FD_NAME}"))).await?;
                continue;
            }
        };
        match order {
            Some(Order::Look(answer)) => {
                let looked = look(op, live).await;
                // Who asked may have left.
                let _late = answer.send(looked);
            }
            Some(Order::Start(run, answer)) => {
                op.set_phase("finish");
                op.job().pass_point_of_return();
                live.mark_run();
                let started = finish(op, live, run == RunState::Running).await;
                let is_started = started.is_ok();
                let _late = answer.send(started);
                return if is_started {
                    Ok(())
                } else {
                    Err(Cause::State("it was not started".into()).into())
                };
            }
            Some(Order::Discard) | None => {
                give_up(live);
                return Err(Cause::Cancelled("the guest stays where it was".into()).into());
            }
        }
    }
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
