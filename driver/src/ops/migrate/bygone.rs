//! The local steps of a guest that left, where nothing is known of it any more but its migration: the host was started
//! anew, or the guest was one that is not kept.

use async_trait::async_trait;
use remote_migrate::source::Outcome;
use remote_migrate::verdict::GuestState;
use remote_migrate::{Begun, HostError, Meter, Prepared, SourceHost, Step, Stopped};

use crate::context::Context;
use crate::error::Error;
use crate::ops::start::refuse_if_running;

pub(crate) struct Bygone<'a>(pub(crate) &'a Context);

#[async_trait]
impl SourceHost for Bygone<'_> {
    async fn begin(&self, _step: Step) -> Result<Begun, HostError> {
        Err(HostError::new("it is not known here"))
    }

    async fn perform(&self, _: Step, _: &Prepared, _: &Meter) -> Result<Stopped, HostError> {
        Err(HostError::new("it is not known here"))
    }

    async fn complete(&self, _step: Step, _: &Meter) -> Result<(), HostError> {
        Err(HostError::new("it is not known here"))
    }

    async fn confirm(&self, _step: Step, _outcome: Outcome) -> Result<(), HostError> {
        Ok(())
    }

    async fn inspect(&self, step: Step) -> Result<GuestState, HostError> {
        // Nobody wrote of a QEMU. One that is there all the same is not to be taken for gone.
        let directory = self.0.run_dir.join(step.domain.to_string());
        let socket = directory.join("monitor.sock");
        let running = refuse_if_running(&socket).await.map_err(Error::from);
        running.map_err(HostError::new)?;
        Ok(GuestState::Gone)
    }
}
