//! Taking a domain out of the driver, for ever.

use job_core::{Ask, AsyncKind, BeginError, JobKind, KindSet};
use tokio::time::sleep_until;

use crate::domain::Domain;
use crate::domain::state::Run;
use crate::error::{Cause, Error, ErrorKind};
use crate::events::What;
use crate::ops::{Call, Deadline};

impl Domain {
    /// Forgets the domain. It is not found any more; whoever waits for it, or holds a handle, is told
    /// [`Closed`](crate::ErrorKind::Closed). Refused while a guest runs in it.
    pub fn remove(&self) -> Call<()> {
        self.normal("remove", JobKind::Destroy, |op| async move {
            let domain = op.domain();
            if domain.0.live().is_some() {
                return Err(Cause::State("a guest runs in it".into()).into());
            }
            if domain.jobs().asynchronous.is_some() {
                // A start or an arrival that has no process yet.
                return Err(
                    Cause::State("an operation is bringing a guest up in it".into()).into(),
                );
            }
            if domain.records().persistent {
                domain.0.put_definition(None).await?;
            }
            domain.0.close();
            domain.0.tell(What::Removed);
            Ok(())
        })
    }

    /// Forgets a domain whose bring-up has failed: once that has let go of it, and its remains are cleaned up.
    pub(crate) async fn remove_after_job(&self, deadline: Deadline) -> Result<(), Error> {
        loop {
            self.wait_for(|observed| observed.run == Run::Off, deadline)
                .await?;
            if Deadline::now() >= deadline {
                return Err(self.error("remove", Cause::State("it is not cleaned up yet".into())));
            }
            match self.remove().until(deadline).await {
                // Its generation ended while we stood in line: stand in that of the next.
                Err(error) if matches!(error.kind(), ErrorKind::Gone | ErrorKind::State) => {}
                Err(error) if error.kind() == ErrorKind::Closed => return Ok(()),
                other => return other,
            }
            let ask = Ask::new("remove", sleep_until(deadline));
            // Granted once no async job holds the domain; what cleans up goes first either way.
            match self
                .0
                .jobs
                .begin_async(ask, AsyncKind::Start, KindSet::DESTROY_ONLY)
                .await
            {
                Ok(job) => job.finish(),
                Err(BeginError::Gone { .. }) => {}
                Err(error) => return Err(self.error("remove", error)),
            }
            tokio::task::yield_now().await;
        }
    }
}
