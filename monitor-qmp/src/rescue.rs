//! What ails a QEMU that does not answer, as data.
//!
//! In band and out of band are asked side by side: who answers tells where it is stuck. The
//! cure is left to the caller, who knows what may be cut: [`Yank`](crate::command::Yank),
//! [`MigratePause`](crate::command::MigratePause) and
//! [`MigrateRecover`](crate::command::MigrateRecover) go by
//! [`execute_oob`](crate::Monitor::execute_oob), for which a place is always kept free.

use crate::{
    command::{QueryVersion, QueryYank, YankInstance},
    error::{Closed, Error, ErrorKind},
    monitor::Monitor,
    qmp::Deadline,
};

/// What ails a QEMU.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Diagnosis {
    /// Nothing: it answers in band.
    Fine,
    /// Its main loop is taken, and it has no connection that could be cut: wait.
    Busy,
    /// Its main loop is taken, and it has connections that this may be about: those of network
    /// disks and of a migration. Cutting them by `yank` may free it.
    LinkDown(Vec<YankInstance>),
    /// It is silent in band and out of band: stopped or dead. Whoever owns its process knows.
    Silent,
    /// It is silent in band, and there is no lane past its main loop that could tell more.
    Unknown,
    /// The connection to it ended.
    Closed(Closed),
}

impl Monitor {
    /// Finds out what ails QEMU. Takes until `deadline` unless it answers in band.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only asks.
    pub async fn diagnose(&self, deadline: Deadline) -> Diagnosis {
        let in_band = async {
            match self.execute(QueryVersion, deadline).await {
                // The other question's answer tells nothing any more.
                Ok(_) => Err(Diagnosis::Fine),
                Err(error) => Ok(error),
            }
        };
        let past_it = async { Ok(self.execute_oob(QueryYank, deadline).await) };
        match tokio::try_join!(in_band, past_it) {
            Err(fine) => fine,
            Ok((in_band, past_it)) => diagnosis(&in_band, past_it),
        }
    }
}

/// What it means that QEMU did not answer in band, and what it said past its main loop.
fn diagnosis(in_band: &Error, past_it: Result<Vec<YankInstance>, Error>) -> Diagnosis {
    if let Some(why) = in_band.why_closed() {
        return Diagnosis::Closed(why.clone());
    }
    match past_it {
        Ok(mut instances) => {
            // Character devices are cut on purpose only: this monitor is one of them.
            instances.retain(|instance| !matches!(instance, YankInstance::Chardev { .. }));
            if instances.is_empty() {
                Diagnosis::Busy
            } else {
                Diagnosis::LinkDown(instances)
            }
        }
        Err(error) if error.kind() == ErrorKind::Unsupported => Diagnosis::Unknown,
        Err(_) => Diagnosis::Silent,
    }
}
