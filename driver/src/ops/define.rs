//! What is kept of a domain while its guest is off: whether its definition is, and whether it starts with the host.

use job_core::JobKind;

use crate::domain::Domain;
use crate::error::Cause;
use crate::ops::Call;

impl Domain {
    /// Does not keep the definition any longer. A guest that runs goes on, and is forgotten by the next driver once it is
    /// off; to forget one that is off, [`remove`](Self::remove) it.
    pub fn undefine(&self) -> Call<()> {
        self.normal("undefine", JobKind::Modify, |op| async move {
            let was = op.domain().records();
            if !was.persistent {
                return Err(Cause::State("its definition is not kept".into()).into());
            }
            op.domain().0.put_definition(None).await?;
            op.with_state(|records| {
                records.persistent = false;
                records.autostart = false;
            })
        })
    }

    /// Whether the guest is started by the first driver after the host was started. Only of one whose definition is kept.
    ///
    /// One that moved away is not, nor is one with a migration that was left open, and it is not tried again when that is
    /// settled: a guest that is lost with it could be started anew on either host, and which one is for whoever knows both
    /// to say.
    pub fn set_autostart(&self, autostart: bool) -> Call<()> {
        self.normal("set-autostart", JobKind::Modify, move |op| async move {
            if !op.domain().records().persistent {
                return Err(Cause::State("its definition is not kept".into()).into());
            }
            let before =
                op.with_state(|records| std::mem::replace(&mut records.autostart, autostart))?;
            let stored = op.domain().0.store_definition().await;
            if stored.is_err() {
                op.with_state(|records| records.autostart = before)?;
            }
            Ok(stored?)
        })
    }
}
