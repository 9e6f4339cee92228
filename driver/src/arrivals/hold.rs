//! The task that holds the job of a guest that arrives: brings its QEMU up, lets the memory in, and does what it is told,
//! until all of the guest is there or none of it is to be.
//!
//! Whoever cancels the job cuts the stream, and no more: a copy that is complete by then stays, since it may be the last. One
//! whose memory nobody comes to bring is given up after a while, and nothing is lost by that: the other host may be down, or
//! what would have connected from there is dead.

use std::error::Error as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use job_core::{AsyncKind, Guard as _, JobKind, Stop};
use monitor_qmp::command::{self, MigrationStatus, YankInstance};
use remote_migrate::{Cookie, CopyState, Prepared, Progress, Ran, RunState, StartError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use super::recover::Recovery;
use super::taken::{Before, taken};
use super::{Trace, disks, in_halves};
use crate::domain::state::Observed;
use crate::domain::{Live, Sight};
use crate::error::{Cause, Effect, Error};
use crate::landing::{Gate, Way};
use crate::ops::AsyncOp;
use crate::ops::migrate::{Bring, Moving, Underway, is_post_copy, only_capabilities};
use crate::ops::start::{bring_up, give_up, run, run_in_halves};
use crate::records::Work;
use crate::stream_tls::{self, End};

/// The name under which QEMU keeps the connection, or the listener.
const FD_NAME: &str = "vmwright-incoming";

/// From that release on QEMU takes no listener for several connections (10.0.2 takes it for the name of a host), and listens
/// by itself.
const LISTENS_ALONE: (u32, u32) = (8, 2);

/// What the task that holds the job is told.
pub(super) enum Order {
    Look(oneshot::Sender<Result<CopyState, Error>>),
    Start(RunState, oneshot::Sender<Result<(), StartError>>),
    Resume(oneshot::Sender<Result<Prepared, Error>>),
    Discard,
}

/// Who waits to hear where the memory is to be brought.
type Ready = oneshot::Sender<Result<Prepared, Error>>;

/// Holds the job of a guest that arrives.
pub(super) async fn hold(
    mut op: AsyncOp,
    moving: Moving,
    mut told: mpsc::Receiver<Order>,
    progress: watch::Receiver<Progress>,
    trace: Arc<Trace>,
    ready: Ready,
) -> Result<(), Error> {
    let underway = Underway::arriving(op.domain(), progress.clone());
    let (live, gate) = match open(&mut op, &moving).await {
        Ok((live, gate, prepared)) => {
            // The only place that sets it.
            let _first = trace.live.set(Arc::downgrade(&live));
            // Nobody waits for it any more: the orders, or their end, say what becomes of it.
            let _late = ready.send(Ok(prepared));
            (live, gate)
        }
        Err(error) => {
            let text = format!("{error:#}");
            let _late = ready.send(Err(error));
            return Err(Cause::State(text).into());
        }
    };
    op.set_phase("prepare");
    let mut held = Held {
        _underway: underway,
        op,
        live,
        gate,
        recovery: Recovery::default(),
        is_in_halves: false,
        is_in_doubt: false,
        is_left: false,
    };
    let end = held.obey(&mut told, progress).await;
    // Once it may have run it is the guest, whatever went wrong then: it is not ended for that.
    if end.is_err() && !held.live.has_run() && !held.is_left {
        give_up(&held.live);
    }
    // Whoever finds the task ended finds this.
    trace.is_done.store(end.is_ok(), Ordering::SeqCst);
    drop(told);
    end
}

/// Holds the job again of a guest that was let run before all of its memory was there, and that an earlier daemon took in.
pub(super) async fn hold_again(
    mut op: AsyncOp,
    live: Arc<Live>,
    mut told: mpsc::Receiver<Order>,
    progress: watch::Receiver<Progress>,
    trace: Arc<Trace>,
) -> Result<(), Error> {
    live.mark_run();
    op.job().pass_point_of_return();
    let mask = AsyncKind::MigrationIn.default_mask();
    op.job().set_mask(mask.with(JobKind::Query));
    op.set_phase("post-copy");
    let recovery = Recovery::left_in(&op.domain().0.run_dir());
    let mut held = Held {
        _underway: Underway::arriving(op.domain(), progress.clone()),
        op,
        live,
        gate: None,
        recovery,
        is_in_halves: true,
        is_in_doubt: false,
        is_left: false,
    };
    let end = held.obey(&mut told, progress).await;
    trace.is_done.store(end.is_ok(), Ordering::SeqCst);
    drop(told);
    end
}

/// A QEMU that waits for its state, and where that is to be brought.
async fn open(
    op: &mut AsyncOp,
    moving: &Moving,
) -> Result<(Arc<Live>, Option<Gate>, Prepared), Error> {
    let live = bring_up(op, &moving.guest, Work::MigrationIn).await?;
    match listen(op, moving).await {
        Ok((gate, prepared)) => Ok((live, gate, prepared)),
        Err(error) => {
            give_up(&live);
            Err(error)
        }
    }
}

async fn listen(op: &mut AsyncOp, moving: &Moving) -> Result<(Option<Gate>, Prepared), Error> {
    let (context, directory) = (op.domain().0.context.clone(), op.domain().0.run_dir());
    let silence = context.defaults.silence;
    let mut on = vec!["return-path", disks::LATE];
    on.extend(moving.post_copy.then_some("postcopy-ram"));
    on.extend(moving.channels.map(|_| "multifd"));
    let monitor = op.monitor().await?;
    monitor.execute(only_capabilities(&on)).await?;
    if let Some((tls, _)) = context.landing.shown() {
        stream_tls::put_on(&monitor, &directory, tls, End::Arrives).await?;
    }
    let (gate, connect, way) = match moving.channels {
        None => {
            let gate = context.landing.open(&directory, silence).await?;
            let (connect, way) = (gate.connect.clone(), Way::Ticket(gate.ticket));
            (Some(gate), connect, way)
        }
        Some(channels) => {
            let mut parameters = command::MigrateSetParameters::default();
            parameters.multifd_channels = Some(channels.get());
            monitor.execute(parameters).await?;
            let release = monitor.execute(command::QueryVersion).await?.qemu;
            let connect = if (release.major, release.minor) < LISTENS_ALONE {
                let (listener, connect) = context.landing.lend(&directory, silence).await?;
                let named = command::Getfd {
                    fdname: FD_NAME.into(),
                };
                monitor.execute_with_fds(named, vec![listener]).await?;
                // It takes what follows `tcp:` for any address, a descriptor among them, and accepts on one that listens.
                let uri = format!("tcp:fd:{FD_NAME}");
                monitor.execute(command::MigrateIncoming::new(uri)).await?;
                connect
            } else {
                let uri = context.landing.leave(&directory)?;
                monitor.execute(command::MigrateIncoming::new(uri)).await?;
                let at = monitor.execute(command::QueryMigrate).await?.socket_address;
                let at = at.first().ok_or_else(|| {
                    Cause::State("QEMU does not say where it listens for the guest".into())
                })?;
                context.landing.found(at)?
            };
            (None, connect, Way::Bare)
        }
    };
    let bring = Bring::to(&context.landing, way);
    let cookie = Cookie::encode(&bring).map_err(|error| Cause::State(error.to_string()))?;
    let connect = connect.into();
    Ok((gate, Prepared { connect, cookie }))
}

/// The job, and what it is about.
struct Held {
    /// Gone before the job ends.
    _underway: Underway,
    op: AsyncOp,
    live: Arc<Live>,
    /// Closed behind the one that was let in.
    gate: Option<Gate>,
    recovery: Recovery,
    /// Whether it was started before all of its memory was there.
    is_in_halves: bool,
    /// Whether QEMU has not answered that it lets it run, and may have.
    is_in_doubt: bool,
    /// Whether what becomes of it is left to the driver that comes next, or to this one when it can see it again.
    is_left: bool,
}

impl Held {
    async fn obey(
        &mut self,
        told: &mut mpsc::Receiver<Order>,
        mut progress: watch::Receiver<Progress>,
    ) -> Result<(), Error> {
        let token = self.op.job().token();
        let (began, patience) = (Instant::now(), self.op.domain().0.context.defaults.arrival);
        let mut is_cut = false;
        let mut has_come = self.is_in_halves;
        loop {
            let order = tokio::select! {
                order = told.recv() => order,
                stop = token.stop(), if !is_cut => {
                    is_cut = true;
                    self.stop(&stop).await?;
                    continue;
                }
                Some(connection) = admit(&mut self.gate), if self.gate.is_some() => {
                    has_come = true;
                    self.let_in(connection).await?;
                    continue;
                }
                () = sleep_until(began + patience), if !has_come => {
                    has_come = self.gate.is_none() && has_begun(&self.op.domain().observed());
                    if !has_come {
                        let what = "anybody to bring its memory";
                        let waited = began.elapsed();
                        return Err(Cause::TimedOut { what, waited }.into());
                    }
                    continue;
                }
                Ok(()) = progress.changed() => {
                    let Progress { transfer, estimate, .. } = *progress.borrow_and_update();
                    self.op.report_transfer(transfer, estimate);
                    continue;
                }
                () = all_there(&self.op), if self.is_in_halves && !self.is_in_doubt => {
                    self.take_tls_off().await;
                    return Ok(());
                }
            };
            // A slow stream does not take from the time that an order has.
            let patience = self.op.domain().0.context.defaults.command;
            self.op.extend(patience);
            match order {
                Some(Order::Look(mut answer)) => {
                    // A QEMU that is silent is not waited for any longer than by who asked: a discard needs none of its words.
                    let looked = tokio::select! {
                        looked = self.look() => looked,
                        () = answer.closed() => continue,
                    };
                    let _late = answer.send(looked);
                }
                Some(Order::Start(state, answer)) => {
                    let started = self.start(state).await;
                    let end = started.as_ref().err().map(|error| {
                        let why = error.source().map(ToString::to_string);
                        let why = why.unwrap_or_default();
                        Cause::State(format!("it may not have been started: {why}"))
                    });
                    let _late = answer.send(started);
                    match end {
                        // It is a copy like before, and may be the last one if the source's dies now.
                        Some(_) if !self.live.has_run() => {}
                        // Nobody else knows that memory is missing, and lets the rest of it in over another stream.
                        _ if self.is_in_halves => {}
                        Some(cause) => return Err(cause.into()),
                        None => return Ok(()),
                    }
                }
                Some(Order::Resume(answer)) => {
                    let resumed = self.recovery.begin(&self.op).await;
                    let _late = answer.send(resumed);
                }
                Some(Order::Discard) => {
                    give_up(&self.live);
                    return Err(Cause::Cancelled("the guest stays where it was".into()).into());
                }
                None => {
                    // The driver goes. A copy may be the last one: what becomes of it is the next one's to learn.
                    self.is_left = true;
                    let id = self.op.job().id();
                    self.op.domain().0.job_is_cut_short(id).await;
                    return Err(Cause::ShuttingDown.into());
                }
            }
        }
    }

    /// Somebody cancelled the job, or QEMU is gone.
    async fn stop(&mut self, stop: &Stop) -> Result<(), Error> {
        if let Stop::Gone { .. } = stop {
            // What is out of sight may be complete, and the last. Where nobody has brought any memory it is neither.
            self.is_left = self.gate.is_none() && self.sight().is_err();
            self.op.job.check()?;
        }
        if self.gate.take().is_some() {
            give_up(&self.live);
            return Err(Cause::Cancelled(stop.to_string()).into());
        }
        // Whether it is complete is decided inside QEMU: what is not ends by this, and what is stays.
        let instances = vec![YankInstance::Migration];
        let rescue = self.op.rescue()?;
        let _is_complete = rescue.execute(command::Yank { instances }).await;
        Ok(())
    }

    async fn let_in(&mut self, connection: OwnedFd) -> Result<(), Error> {
        self.gate = None;
        self.op.set_phase("perform");
        let monitor = self.op.monitor().await?;
        let named = command::Getfd {
            fdname: FD_NAME.into(),
        };
        monitor.execute_with_fds(named, vec![connection]).await?;
        let uri = format!("fd:{FD_NAME}");
        monitor.execute(command::MigrateIncoming::new(uri)).await?;
        Ok(())
    }

    /// Makes it the guest. One that QEMU will not let run is what it was before, and its source is told so.
    async fn start(&mut self, state: RunState) -> Result<(), StartError> {
        self.op.set_phase("finish");
        self.op.job().pass_point_of_return();
        let before = Before::of(&self.op);
        let taken = self.take(state).await;
        self.is_in_doubt = taken.is_err();
        let Err(error) = taken else {
            return Ok(());
        };
        if self.live.has_run() && !self.is_refused(&error).await {
            return Err(StartError::may_have_run(error));
        }
        self.is_in_doubt = false;
        self.live.mark_not_run();
        self.is_in_halves = false;
        match before.again(&self.op).await {
            Ok(()) => Err(StartError::never_ran(error)),
            // It must not be given back while it is written here that it is ours: it is tried again.
            Err(unwritten) => Err(StartError::may_have_run(unwritten)),
        }
    }

    /// Whether QEMU did not let it run, by its own words.
    async fn is_refused(&mut self, error: &Error) -> bool {
        error.effect() != Effect::Unknown && self.is_running().await.is_ok_and(|is| !is)
    }

    async fn take(&mut self, state: RunState) -> Result<(), Error> {
        taken(&self.op).await?;
        self.live.mark_run();
        let is_run = state == RunState::Running;
        if !is_post_copy(self.op.domain().observed().migration.as_ref()) {
            if !is_run {
                disks::take(&mut self.op).await?;
            }
            run(&mut self.op, &self.live, is_run).await?;
            self.take_tls_off().await;
            return Ok(());
        }
        self.is_in_halves = true;
        let mask = AsyncKind::MigrationIn.default_mask();
        self.op.job().set_mask(mask.with(JobKind::Query));
        self.op.set_phase("post-copy");
        run_in_halves(&mut self.op, &self.live, is_run).await
    }

    /// The guest is here, whatever comes of this: what streams it next takes it off first.
    async fn take_tls_off(&mut self) {
        let taken = async { stream_tls::take_off(&self.op.monitor().await?).await };
        if let Err(error) = taken.await {
            let (domain, error) = (self.op.domain().name(), format!("{error:#}"));
            warn!(
                domain,
                error, "QEMU keeps the certificates it had for the way here"
            );
        }
    }

    async fn is_running(&mut self) -> Result<bool, Error> {
        let monitor = self.op.monitor().await?;
        Ok(monitor.execute(command::QueryStatus).await?.running)
    }

    fn sight(&self) -> Result<Sight, Cause> {
        let domain = &self.op.domain().0;
        domain.sight(self.live.process.as_deref(), self.live.generation)
    }

    async fn look(&mut self) -> Result<CopyState, Error> {
        if self.sight()? == Sight::Dead {
            let ran = if self.live.has_run() {
                Ran::Maybe
            } else {
                Ran::Never
            };
            return Ok(CopyState::Gone(ran));
        }
        // A guest that waits for memory may hold QEMU's main loop: not asked, but told by its events.
        let observed = self.op.domain().observed();
        if self.is_in_doubt && (observed.run.is_running() || self.is_running().await?) {
            self.is_in_doubt = false;
        }
        if self.live.has_run() && !self.is_in_doubt {
            return Ok(if is_all_there(&observed) {
                CopyState::Started
            } else {
                CopyState::Partial
            });
        }
        let monitor = self.op.monitor().await?;
        let info = monitor.execute(command::QueryMigrate).await?;
        Ok(match info.status {
            Some(MigrationStatus::Completed) => CopyState::Complete,
            Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                CopyState::Gone(Ran::Never)
            }
            status if is_post_copy(status.as_ref()) => {
                let status = monitor.execute(command::QueryStatus).await?.status;
                in_halves(&status)
            }
            _ => CopyState::Incoming,
        })
    }
}

async fn admit(gate: &mut Option<Gate>) -> Option<OwnedFd> {
    Some(gate.as_mut()?.admit().await)
}

/// Whether memory has begun to come where QEMU listens by itself, which says `setup` until somebody connects.
fn has_begun(observed: &Observed) -> bool {
    let status = observed.migration.as_ref();
    status.is_some_and(|status| !matches!(status, MigrationStatus::None | MigrationStatus::Setup))
}

/// Whether no memory is missing. One that waits for another stream says `setup`, so only one word will do.
fn is_all_there(observed: &Observed) -> bool {
    observed.migration == Some(MigrationStatus::Completed)
}

/// Waits until no memory is missing.
async fn all_there(op: &AsyncOp) {
    let far = || Instant::now() + FAR;
    while op.domain().wait_for(is_all_there, far()).await.is_err() {}
}

/// Between two looks at a post-copy that does not end.
const FAR: Duration = Duration::from_secs(3600);
