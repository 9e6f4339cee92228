//! Taking a domain out of the driver, for ever.

use job_core::JobKind;

use crate::domain::Domain;
use crate::error::Cause;
use crate::events::What;
use crate::ops::Call;

impl Domain {
    /// Forgets the domain. It is not found any more; whoever waits for it, or holds a handle, is told
    /// [`Closed`](crate::ErrorKind::Closed). Refused while a guest runs in it.
    pub fn remove(&self) -> Call<()> {
        self.normal("remove", JobKind::Destroy, |op| async move {
            let domain = op.domain();
            if domain.0.live().is_some() {
                return Err(Cause::State("a guest runs in it".into()).into());
            }
            domain.0.context.registry.remove(&domain.0);
            domain.0.scheduler.close();
            domain.0.tell(What::Removed);
            Ok(())
        })
    }
}
