//! What is changed of a migration while it is under way: how fast, how long the guest may stand still, and the turn to
//! post-copy. Beside the migration's own job, whose mask lets these pass.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use job_core::JobKind;
use monitor_qmp::command;
use remote_migrate::{Control, Progress};
use tokio::sync::watch;
use uuid::Uuid;

use super::sending::millis;
use crate::context::Context;
use crate::domain::Domain;
use crate::error::Cause;
use crate::ops::Call;

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

/// The migrations that leave from here, by their guests.
#[derive(Debug, Default)]
pub(crate) struct Moves(Mutex<HashMap<Uuid, Move>>);

#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) control: Control,
    post_copy: bool,
}

impl Moves {
    fn with<R>(&self, change: impl FnOnce(&mut HashMap<Uuid, Move>) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One of them, for as long as it is under way.
pub(super) struct Underway {
    context: Arc<Context>,
    uuid: Uuid,
}

impl Underway {
    pub(super) fn begin(domain: &Domain, control: &Control, post_copy: bool) -> Self {
        let (context, uuid) = (domain.0.context.clone(), domain.uuid());
        let known = Move {
            control: control.clone(),
            post_copy,
        };
        context.moves.with(|all| all.insert(uuid, known));
        Self { context, uuid }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.context.moves.with(|all| all.remove(&self.uuid));
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
                underway(op.domain())?;
                let mut parameters = command::MigrateSetParameters::default();
                parameters.max_bandwidth = tuning.bandwidth;
                parameters.max_postcopy_bandwidth = tuning.post_copy_bandwidth;
                parameters.downtime_limit = tuning.downtime.map(millis);
                op.monitor()?.execute(parameters).await?;
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

    /// How the migration that is under way from here stands, and every change from here on; nothing if none is.
    #[must_use]
    pub fn migration_progress(&self) -> Option<watch::Receiver<Progress>> {
        let found = underway(self).ok()?;
        Some(found.control.progress())
    }
}

pub(super) fn underway(domain: &Domain) -> Result<Move, Cause> {
    let found = domain
        .0
        .context
        .moves
        .with(|all| all.get(&domain.uuid()).cloned());
    found.ok_or_else(|| Cause::State("no migration of it is under way".into()))
}
