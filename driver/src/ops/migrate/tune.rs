//! What is changed of a migration while it is under way: how fast, how long the guest may stand still, and the turn to
//! post-copy. Beside the migration's own job, whose mask lets these pass.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use job_core::JobKind;
use monitor_qmp::command;
use remote_migrate::{Control, Estimate, MigrationId, Progress, Transfer};
use tokio::sync::watch;
use uuid::Uuid;

use super::MigrateOptions;
use super::switchover::Bounds;
use crate::context::Context;
use crate::domain::Domain;
use crate::error::Cause;
use crate::ops::{AsyncOp, Call};

/// What is changed; what is none stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..Tuning::default()`"
)]
pub struct Tuning {
    /// At most so many bytes a second; 0 is no limit.
    pub bandwidth: Option<u64>,
    /// The same in post-copy, for what the guest does not wait for.
    pub post_copy_bandwidth: Option<u64>,
    /// The longest the guest may stand still at the end.
    pub downtime: Option<Duration>,
}

/// The migrations that are under way here, by their guests.
#[derive(Debug, Default)]
pub(crate) struct Moves(Mutex<HashMap<Uuid, Move>>);

#[derive(Debug)]
struct Move {
    progress: watch::Receiver<Progress>,
    /// Of one that leaves. One that arrives is led from the other side.
    lead: Option<Lead>,
}

/// What a migration that leaves can be told.
#[derive(Clone, Debug)]
pub(super) struct Lead {
    pub(super) migration: MigrationId,
    pub(super) control: Control,
    pub(super) bounds: Arc<watch::Sender<Bounds>>,
    post_copy: bool,
}

impl Lead {
    pub(super) fn new(migration: MigrationId, options: &MigrateOptions) -> Self {
        Self {
            migration,
            control: Control::new(),
            bounds: Arc::new(watch::Sender::new(options.bounds())),
            post_copy: options.post_copy,
        }
    }
}

impl Moves {
    fn with<R>(&self, change: impl FnOnce(&mut HashMap<Uuid, Move>) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One of them, for as long as it is under way.
pub(crate) struct Underway {
    context: Arc<Context>,
    uuid: Uuid,
    progress: watch::Receiver<Progress>,
}

impl Underway {
    pub(super) fn begin(domain: &Domain, lead: Lead) -> Self {
        Self::of(domain, lead.control.progress(), Some(lead))
    }

    pub(crate) fn arriving(domain: &Domain, progress: watch::Receiver<Progress>) -> Self {
        Self::of(domain, progress, None)
    }

    fn of(domain: &Domain, progress: watch::Receiver<Progress>, lead: Option<Lead>) -> Self {
        let (context, uuid) = (domain.0.context.clone(), domain.uuid());
        let known = Move {
            progress: progress.clone(),
            lead,
        };
        context.moves.with(|all| all.insert(uuid, known));
        Self {
            context,
            uuid,
            progress,
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.context.moves.with(|all| {
            // The job has ended by now, and another migration of the guest may have begun.
            let known = all.get(&self.uuid);
            if known.is_some_and(|known| known.progress.same_channel(&self.progress)) {
                all.remove(&self.uuid);
            }
        });
    }
}

impl Domain {
    /// Changes the limits of the migration that is under way. Passes beside its job.
    ///
    /// Refused as [`State`](crate::ErrorKind::State) if none is.
    pub fn tune_migration(&self, tuning: Tuning) -> Call<()> {
        self.normal(
            "tune-migration",
            JobKind::MigrationOp,
            move |mut op| async move {
                let lead = underway(op.domain())?;
                let mut parameters = command::MigrateSetParameters::default();
                parameters.max_bandwidth = tuning.bandwidth;
                parameters.max_postcopy_bandwidth = tuning.post_copy_bandwidth;
                op.monitor()?.execute(parameters).await?;
                lead.bounds.send_modify(|bounds| {
                    bounds.bandwidth = tuning.bandwidth.unwrap_or(bounds.bandwidth);
                    bounds.downtime = tuning.downtime.unwrap_or(bounds.downtime);
                });
                Ok(())
            },
        )
    }

    /// Turns the migration that is under way to post-copy: the guest goes on at the destination at once, and its memory
    /// follows. There is no way back then; a host that dies takes the guest along, and a link that breaks is waited for.
    ///
    /// Done means that it was asked for; how it went is told by the migration itself. Refused as
    /// [`State`](crate::ErrorKind::State) if none is under way, or one that was not begun with
    /// [`post_copy`](crate::MigrateOptions::post_copy).
    pub fn post_copy(&self) -> Call<()> {
        self.normal("post-copy", JobKind::MigrationOp, |op| async move {
            let found = underway(op.domain())?;
            if !found.post_copy {
                return Err(
                    Cause::State("its migration was begun without post-copy".into()).into(),
                );
            }
            found.control.post_copy();
            Ok(())
        })
    }

    /// How the migration that is under way stands, from here or to here, and every change from here on; nothing if none is.
    ///
    /// [`Estimate::eta`] is the figure to lean on: when it will be there, or that it does not converge.
    /// [`Transfer::percent`] is how much of the memory need not be sent any more; it falls back as a pass begins, so the
    /// pass belongs beside it. Its job reports the same figures: [`What::Progress`](crate::What::Progress).
    ///
    /// Of a guest that arrives the other driver tells it in passing, each time it asks whether this one is there; one that
    /// does not know how to tells nothing.
    #[must_use]
    pub fn migration_progress(&self) -> Option<watch::Receiver<Progress>> {
        let moves = &self.0.context.moves;
        moves.with(|all| Some(all.get(&self.uuid())?.progress.clone()))
    }
}

impl AsyncOp {
    /// Tells how far the memory of a guest is that leaves or arrives: to those who follow the domain the same as to those who
    /// follow the migration.
    pub(crate) fn report_transfer(&self, transfer: Transfer, estimate: Estimate) {
        let estimate = job_core::Estimate {
            rate: estimate.rate as f64,
            eta: estimate.eta.left(),
        };
        self.report_estimated(transfer.moved(), transfer.total, estimate);
    }
}

pub(super) fn underway(domain: &Domain) -> Result<Lead, Cause> {
    let moves = &domain.0.context.moves;
    let found = moves.with(|all| all.get(&domain.uuid())?.lead.clone());
    found.ok_or_else(|| Cause::State("no migration of it from here is under way".into()))
}
