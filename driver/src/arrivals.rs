//! Guests arrive from another host: the driver's steps for the destination side of `remote-migrate`.
//!
//! The async job is held from Prepare to Finish by a task of its own, which is told what to do; so a request that is
//! dropped, or a connection that breaks, tears nothing in the middle. Decides nothing: the phases do.

mod disks;
mod earlier;
mod hold;
mod recover;
mod taken;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use job_core::AsyncKind;
use monitor_qmp::command;
use remote_migrate::{
    CopyState, DestinationHost, Downtime, Echo, Estimate, Guest as Arriving, HostError, Load,
    MigrationId, Prepared, Ran, Reason, RunState, Side, StartError, Step, Transfer,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use crate::context::Context;
use crate::domain::state::Run;
use crate::domain::{Domain, Inner, Live, Records, Sight, resync_migration};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::guest::Guest;
use crate::ops::AsyncOp;
use crate::ops::destroy::cleaned_up;
use crate::ops::migrate::{self, Moving};
use crate::registry::Taken;
use hold::{Order, hold, hold_again};

/// How often QEMU is asked whether all was loaded.
const POLL: Duration = Duration::from_millis(20);

/// The local steps of guests that arrive at a driver. [`Driver::arrivals`](crate::Driver::arrivals) makes one, to be put
/// behind `remote_migrate::Destination`.
pub struct Arrivals {
    context: Arc<Context>,
    here: Mutex<HashMap<MigrationId, Arc<Arrival>>>,
}

/// One guest on its way, or arrived.
struct Arrival {
    domain: Domain,
    is_new: bool,
    orders: mpsc::Sender<Order>,
    trace: Arc<Trace>,
    /// How its memory moves.
    moves: Echo,
}

/// What the task that holds the job leaves for those who ask when it has ended.
#[derive(Default)]
struct Trace {
    /// Its QEMU, weakly: this must not outlive the guest.
    live: OnceLock<Weak<Live>>,
    /// Whether it ended since all of the guest is here, and was let run if it should.
    is_done: AtomicBool,
}

/// What became of the QEMU of a guest once the task that held its job has ended.
enum Fate {
    /// There was none.
    Unmade,
    Dead,
    /// All of the guest is in it.
    Arrived,
    /// It was left to itself, or is out of sight: as by an earlier daemon.
    Left,
}

/// What a copy is that nobody let run while its memory comes by post-copy.
fn in_halves(status: &command::RunState) -> CopyState {
    match status {
        command::RunState::InMigrate => CopyState::Incoming,
        // All is there that is needed to start it.
        _ => CopyState::Switched,
    }
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

    async fn receive(&self, step: Step, moving: Moving) -> Result<Prepared, Error> {
        let began = Instant::now();
        let (domain, is_new) = self.domain(moving.guest.clone())?;
        let (orders, told) = mpsc::channel(4);
        let (ready, prepared) = oneshot::channel();
        let held = domain.clone();
        // Known before anything is begun, so that a discard finds what a failure leaves behind.
        let arrival = Arc::new(Arrival {
            domain,
            is_new,
            orders,
            trace: Arc::default(),
            moves: Echo::new(),
        });
        let (progress, trace) = (arrival.moves.progress(), arrival.trace.clone());
        self.insert(step.migration, &arrival);
        self.hold(held, move |op| {
            hold(op, moving, told, progress, trace, ready)
        });
        let late = |_| Cause::TimedOut {
            what: "a QEMU to take the guest",
            waited: began.elapsed(),
        };
        let gone = |_| Cause::State("it is held, or the driver is shutting down".into());
        let prepared = timeout_at(step.deadline, prepared).await.map_err(late)?;
        let prepared = prepared.map_err(gone)??;
        self.context.settling.arriving();
        Ok(prepared)
    }

    fn insert(&self, migration: MigrationId, arrival: &Arc<Arrival>) {
        let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
        here.retain(|_, arrival| !arrival.is_over());
        here.insert(migration, arrival.clone());
    }

    /// Has a task hold the job of a guest that arrives.
    fn hold<F>(&self, domain: Domain, work: impl FnOnce(AsyncOp) -> F + Send + 'static)
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let limit = self.context.defaults.long;
        self.context.tracker.spawn(async move {
            let (kind, mask) = (
                AsyncKind::MigrationIn,
                AsyncKind::MigrationIn.default_mask(),
            );
            let until = Instant::now() + limit;
            let end = domain.run_async("arrive", kind, mask, until, work).await;
            if end.is_err() {
                // It is told to those who follow the domain, and what is left is cleared away soon, whether the other side
                // asks or not.
                domain.0.context.settling.left(domain.uuid());
            }
        });
    }

    /// Takes over from an earlier daemon a guest that waits for memory.
    async fn adopt(&self, step: Step) -> Result<Arc<Arrival>, Error> {
        if earlier::look(&self.context, step).await? != CopyState::Partial {
            return Err(Cause::State("it waits for no memory".into()).into());
        }
        let domain = self.context.registry.by_uuid(step.domain).map(Domain);
        let gone = || Cause::State("it is gone".into());
        let domain = domain.ok_or_else(gone)?;
        let live = domain.0.live().ok_or_else(gone)?;
        resync_migration(&domain.0, &live).await?;
        let (orders, told) = mpsc::channel(4);
        let arrival = Arc::new(Arrival {
            is_new: !domain.records().persistent,
            domain: domain.clone(),
            orders,
            trace: Arc::default(),
            moves: Echo::new(),
        });
        // Known before it is held, so that nobody takes it for one that never was.
        let _first = arrival.trace.live.set(Arc::downgrade(&live));
        self.insert(step.migration, &arrival);
        let (progress, trace) = (arrival.moves.progress(), arrival.trace.clone());
        self.hold(domain, move |op| {
            hold_again(op, live, told, progress, trace)
        });
        Ok(arrival)
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
        match arrival.fate() {
            Fate::Unmade => Ok(CopyState::Gone(Ran::Never)),
            Fate::Dead => Ok(CopyState::Gone(Ran::Maybe)),
            Fate::Arrived => Ok(CopyState::Started),
            Fate::Left => earlier::look(&self.context, step).await,
        }
    }
}

impl Arrival {
    /// Whether its QEMU was there and is not any more.
    fn is_over(&self) -> bool {
        let live = self.trace.live.get();
        self.orders.is_closed() && live.is_none_or(|live| live.strong_count() == 0)
    }

    /// Its QEMU, if that is still there under the generation it had.
    fn live(&self) -> Option<Arc<Live>> {
        self.trace.live.get()?.upgrade()
    }

    /// To be asked once its task has ended.
    fn fate(&self) -> Fate {
        if self.trace.live.get().is_none() {
            return Fate::Unmade;
        }
        let live = self.live();
        let seen = match &live {
            Some(live) => self
                .domain
                .0
                .sight(live.process.as_deref(), live.generation),
            None => self.domain.0.sight(None, 0),
        };
        match seen {
            Ok(Sight::Dead) => Fate::Dead,
            Ok(Sight::Here) if self.trace.is_done.load(Ordering::SeqCst) => Fate::Arrived,
            Ok(Sight::Here) | Err(_) => Fate::Left,
        }
    }
}

#[async_trait]
impl DestinationHost for Arrivals {
    async fn prepare(&self, step: Step, guest: &Arriving) -> Result<Prepared, HostError> {
        let moving: Moving = migrate::read(&guest.cookie).map_err(HostError::new)?;
        if moving.guest.uuid != step.domain {
            return Err(HostError::new("the description is one of another guest"));
        }
        let refused = self.context.refuse_unreadable(step.domain).await;
        refused.map_err(|cause| HostError::new(Error::from(cause)))?;
        self.receive(step, moving).await.map_err(HostError::new)
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
        if arrival.orders.send(Order::Start(run, answer)).await.is_ok() {
            let started = started.await;
            return started.unwrap_or_else(|_| Err(StartError::may_have_run("its task ended")));
        }
        match arrival.fate() {
            Fate::Unmade | Fate::Dead => Err(StartError::never_ran("its QEMU is gone")),
            Fate::Arrived | Fate::Left => {
                let started = earlier::start(&self.context, step, run).await;
                started.map_err(StartError::may_have_run)
            }
        }
    }

    fn resumed_at(&self, step: Step) -> Option<i64> {
        let arrival = self.find(step.migration)?;
        arrival.live()?.resumed_at()
    }

    fn moved(&self, step: Step, downtime: Option<Downtime>) {
        if let Some(domain) = self.context.registry.by_uuid(step.domain) {
            let side = Side::Destination;
            domain.tell(What::Moved { side, downtime });
        }
    }

    fn transferred(&self, migration: MigrationId, transfer: Transfer, estimate: Estimate) {
        if let Some(arrival) = self.find(migration) {
            arrival.moves.tell(transfer, estimate);
        }
    }

    async fn resume(&self, step: Step) -> Result<Prepared, HostError> {
        let held = self.find(step.migration);
        let arrival = match held.filter(|arrival| !arrival.orders.is_closed()) {
            Some(arrival) => arrival,
            None => self.adopt(step).await.map_err(HostError::new)?,
        };
        let (answer, resumed) = oneshot::channel();
        let told = arrival.orders.send(Order::Resume(answer)).await;
        told.map_err(|_| HostError::new("it waits for no memory"))?;
        let resumed = resumed.await.map_err(HostError::new)?;
        resumed.map_err(HostError::new)
    }

    async fn trouble(&self, step: Step) -> Option<Reason> {
        let observed = self.find(step.migration)?.domain.observed();
        let why = observed.ended.filter(|_| observed.run == Run::Off)?;
        Some(Reason::new(&why.to_string()))
    }

    async fn discard(&self, step: Step) -> Result<(), HostError> {
        let Some(arrival) = self.find(step.migration) else {
            let discarded = earlier::discard(&self.context, step).await;
            return discarded.map_err(HostError::new);
        };
        let _told = arrival.orders.send(Order::Discard).await;
        arrival.orders.closed().await;
        // It took its QEMU with it, or never had one, or has lost sight of it.
        if let Some(live) = arrival.live()
            && (live.doomed().is_some() || matches!(arrival.fate(), Fate::Dead))
        {
            cleaned_up(&arrival.domain, &live, step.deadline)
                .await
                .map_err(HostError::new)?;
        }
        if let Fate::Left | Fate::Arrived = arrival.fate() {
            let discarded = earlier::discard(&self.context, step).await;
            discarded.map_err(HostError::new)?;
        } else if arrival.is_new {
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

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrivals").finish_non_exhaustive()
    }
}
