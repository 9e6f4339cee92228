//! A guest whose file systems stand still for a moment, on a lease that cannot be forgotten.
//!
//! ```text
//!  freeze ─► written in the guest's record ─► frozen ─► FreezeLease ──┬─ thaw, drop, time over ─► thawed, record gone
//!                                                                     └─ kill -9 ─► the next driver thaws, and tells so
//! ```
//!
//! The lease itself is `agent-qga`'s. Here it gets an agent that takes a job for each command, and a place in the record.
//! A freeze without a record is somebody else's: it is reported, not thawed.

use std::sync::Arc;
use std::time::Duration;

use agent_qga::{
    ErrorKind, FreezeLease, FreezePlan, FreezeState, FsfreezeStatus, Qga, Recovered, Thawed,
};
use job_core::AgentKind;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};
use uuid::Uuid;

use crate::access::Queued;
use crate::domain::{Domain, Leases};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::ops::{Call, Deadline};

/// One try to thaw what an earlier driver froze; an agent answers within its sync or does not.
const TRY: Duration = Duration::from_secs(10);
/// Between two tries, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is frozen, and for how long at most.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..FreezeOptions::default()`"
)]
pub struct FreezeOptions {
    /// It is thawed after so long, whatever becomes of its holder. 60 s.
    pub hold: Duration,
    /// Only the file systems mounted there; all if none are named.
    pub mountpoints: Vec<String>,
}

impl Default for FreezeOptions {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(60),
            mountpoints: Vec::new(),
        }
    }
}

impl Domain {
    /// Freezes the guest's file systems through its agent, and has them thawed when the lease is dropped or its time is
    /// over; by the next driver if this one is killed.
    ///
    /// Each command takes an agent job of its own, the thaw before all others. Refused if the guest is frozen already:
    /// by somebody else, or by an earlier driver whose freeze is not thawed yet.
    pub fn freeze(&self, options: FreezeOptions) -> Call<FreezeLease> {
        let domain = self.clone();
        Call::new(self.0.context.defaults.call, move |deadline| async move {
            let lease = domain.take_freeze(options, deadline).await;
            lease.map_err(|error| error.told_of(&"freeze".into(), &domain.0.name))
        })
    }

    /// Asks the agent whether the guest's file systems are frozen.
    pub fn freeze_state(&self) -> Call<FreezeState> {
        self.agent("freeze-state", AgentKind::Query, |mut op| async move {
            op.agent()?.execute(FsfreezeStatus).await
        })
    }

    pub(crate) async fn take_freeze(
        &self,
        options: FreezeOptions,
        deadline: Deadline,
    ) -> Result<FreezeLease, Error> {
        if self.0.context.closing.is_cancelled() {
            return Err(Cause::ShuttingDown.into());
        }
        let agent = Queued::of(self, "freeze")?;
        let record = self.0.noted().await;
        let life = record.ok_or_else(|| Cause::State("no guest runs in it".into()))?;
        let leases = Leases::new(&self.0, life.life);
        let mut plan = FreezePlan::new(leases.key(), options.hold);
        if !options.mountpoints.is_empty() {
            plan = plan.mountpoints(options.mountpoints);
        }
        Ok(agent_qga::freeze(agent, Arc::new(leases), plan, deadline).await?)
    }
}

/// Thaws what an operation froze. What its agent does not say in time it is asked for again, and the operation does not wait.
pub(crate) async fn thaw_lease(domain: &Domain, lease: Option<FreezeLease>) -> Option<Thawed> {
    let thawed = lease?.thaw(Instant::now() + TRY).await;
    match thawed {
        Ok(thawed) => Some(thawed),
        Err(error) => {
            warn!(domain = domain.name(), %error, "the guest is not thawed yet");
            None
        }
    }
}

/// Sees to it that what an earlier driver froze is thawed, however long the guest's agent is silent. To be called once the
/// agent's channel is connected.
pub(crate) async fn thaw_if_due(domain: &Domain) {
    let Some(life) = domain.0.take_due_thaw().await else {
        return;
    };
    let agent = match Queued::of(domain, "thaw") {
        Ok(agent) => agent,
        Err(error) => {
            warn!(domain = domain.name(), ?error, "a freeze is not thawed");
            return;
        }
    };
    let parting = domain.0.context.parting.clone();
    let (watchers, domain) = (domain.0.context.watchers.clone(), domain.clone());
    watchers.spawn(async move {
        parting.run_until_cancelled(thaw(domain, agent, life)).await;
    });
}

async fn thaw(domain: Domain, agent: Arc<dyn Qga>, life: Uuid) {
    let leases = Arc::new(Leases::new(&domain.0, life));
    let (key, mut pause) = (leases.key(), FIRST_PAUSE);
    loop {
        let deadline = Instant::now() + TRY;
        let error = match agent_qga::recover(&*agent, leases.clone(), &key, deadline).await {
            Ok(Recovered::Thawed { file_systems, .. }) => {
                info!(
                    domain = domain.name(),
                    file_systems, "a freeze of an earlier driver is thawed"
                );
                return domain.0.tell(What::Thawed { file_systems });
            }
            Ok(_) => return,
            // The guest is gone, and the freeze with it.
            Err(error) if error.kind() == ErrorKind::Closed => return,
            Err(error) => error,
        };
        if pause == FIRST_PAUSE {
            let reason = error.to_string();
            warn!(
                domain = domain.name(),
                reason, "a freeze of an earlier driver is not thawed yet"
            );
            domain.0.tell(What::StillFrozen { reason });
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
