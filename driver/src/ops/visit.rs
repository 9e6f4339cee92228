//! What is the same for whoever visits the monitor time and again, under a normal job or an async one.

use crate::access::Monitor;
use crate::domain::{Domain, Records};
use crate::error::{Cause, Error};
use crate::guest::Guest;
use crate::ops::{AsyncOp, Deadline, Op};
use crate::parts::Scope;
use job_core::{BeginError, Guard, Stop, Token};

/// An operation of several visits to the monitor.
pub(crate) trait Visits: Send {
    fn domain(&self) -> &Domain;

    /// Visits the monitor once. Keep it no longer than the commands that belong together: an async job lets others pass
    /// between two visits.
    fn visit(&mut self) -> impl Future<Output = Result<Monitor<'_>, Error>> + Send;

    /// Fires when somebody asks the operation to stop, or its guest is gone.
    fn token(&self) -> Token;

    /// Whether somebody did, or it is.
    fn check_stopped(&self) -> Result<(), Error> {
        match self.token().stopped() {
            None => Ok(()),
            Some(stop @ Stop::Cancelled(_)) => Err(Cause::Cancelled(stop.to_string()).into()),
            Some(Stop::Gone { generation, why }) => {
                Err(BeginError::Gone { generation, why }.into())
            }
            Some(other) => Err(Cause::Cancelled(other.to_string()).into()),
        }
    }

    fn deadline(&self) -> Deadline;

    /// Gives what undoes an operation that is out of time a time of its own.
    fn extend_to(&mut self, deadline: Deadline);

    fn change_records<R>(&self, change: impl FnOnce(&mut Records) -> R) -> Result<R, Error>;
}

impl Visits for Op {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    async fn visit(&mut self) -> Result<Monitor<'_>, Error> {
        self.monitor()
    }

    fn token(&self) -> Token {
        self.job.token()
    }

    fn deadline(&self) -> Deadline {
        self.deadline
    }

    fn extend_to(&mut self, deadline: Deadline) {
        self.deadline = self.deadline.max(deadline);
    }

    fn change_records<R>(&self, change: impl FnOnce(&mut Records) -> R) -> Result<R, Error> {
        self.with_state(change)
    }
}

impl Visits for AsyncOp {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    async fn visit(&mut self) -> Result<Monitor<'_>, Error> {
        self.monitor().await
    }

    fn token(&self) -> Token {
        self.job.token()
    }

    fn deadline(&self) -> Deadline {
        self.deadline
    }

    fn extend_to(&mut self, deadline: Deadline) {
        self.deadline = self.deadline.max(deadline);
    }

    fn change_records<R>(&self, change: impl FnOnce(&mut Records) -> R) -> Result<R, Error> {
        self.with_state(change)
    }
}

/// Changes the description of the guest as it runs, and in that scope its definition. Both are on the disk when this
/// returns, the live one first. Each is whole at any instant; a daemon that dies between the two leaves the definition
/// as it was.
pub(crate) async fn describe<V: Visits>(
    op: &V,
    scope: Scope,
    change: impl Fn(&mut Guest) + Clone + Send + 'static,
) -> Result<(), Error> {
    let domain = op.domain().clone();
    let live = change.clone();
    let noted = domain.0.note(move |record| {
        if let Some(record) = record {
            live(&mut record.guest);
        }
    });
    noted.await?;
    if scope == Scope::Live {
        return Ok(());
    }
    let before = op.change_records(|records| {
        let before = records.definition.clone();
        if let Some(definition) = &mut records.definition {
            change(definition);
        }
        before
    })?;
    let stored = domain.0.store_definition().await;
    if stored.is_err() {
        op.change_records(|records| records.definition = before)?;
    }
    Ok(stored?)
}
