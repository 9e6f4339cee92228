//! A guard on loan to an operation, so that it can be ended with the outcome the operation had.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use job_core::{AgentJob, AsyncJob, Guard, Job, Outcome};

/// A guard on loan: it comes home when the operation lets go of it, whatever the operation does.
#[derive(Debug)]
pub(crate) struct Lent<J> {
    job: Option<J>,
    home: Arc<Mutex<Option<J>>>,
}

impl<J> Lent<J> {
    pub(crate) fn new(job: J) -> (Self, Arc<Mutex<Option<J>>>) {
        let home = Arc::new(Mutex::new(None));
        (
            Self {
                job: Some(job),
                home: home.clone(),
            },
            home,
        )
    }
}

impl<J> Deref for Lent<J> {
    type Target = J;

    fn deref(&self) -> &J {
        self.job
            .as_ref()
            .expect("it is at home only after the drop")
    }
}

impl<J> DerefMut for Lent<J> {
    fn deref_mut(&mut self) -> &mut J {
        self.job
            .as_mut()
            .expect("it is at home only after the drop")
    }
}

impl<J> Drop for Lent<J> {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.job.take();
    }
}

/// A guard that can be ended with an outcome.
pub(crate) trait Ends: Guard {
    fn end(self, outcome: Outcome);
}

impl Ends for Job {
    fn end(self, outcome: Outcome) {
        Self::end(self, outcome);
    }
}

impl Ends for AgentJob {
    fn end(self, outcome: Outcome) {
        Self::end(self, outcome);
    }
}

impl Ends for AsyncJob {
    fn end(self, outcome: Outcome) {
        Self::end(self, outcome);
    }
}
