//! The part of a domain that only a job's holder may change.
//!
//! Reached through closures only, so nothing awaits under the lock. A change is made on a copy and put in place
//! whole: a closure that panics leaves the last whole value.

use std::fmt;

use crate::error::Gone;
use crate::guard::Guard;
use crate::scheduler::Scheduler;
use crate::sync::{Arc, Mutex, lock};

/// State that is read without a job and written with a borrow of a guard (R6).
///
/// ```
/// # futures::executor::block_on(async {
/// use job_core::{Guarded, JobKind, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let memory = Guarded::new(&domain, 512);
/// let job = domain.caller("resize").begin(JobKind::Modify, std::future::pending()).await?;
/// memory.change(&job, |memory| *memory = 1024).unwrap();
/// assert_eq!(*memory.get(), 1024);
/// # Ok::<_, job_core::BeginError>(()) }).unwrap();
/// ```
///
/// Without a guard there is no way to write:
///
/// ```compile_fail,E0061
/// use job_core::{Guarded, Scheduler};
///
/// let domain = Scheduler::new("web");
/// let memory = Guarded::new(&domain, 512);
/// memory.change(|memory: &mut i32| *memory = 1024);
/// ```
///
/// A task may change it and wait, one after the other:
///
/// ```
/// use job_core::{ChangeError, Guarded, Job};
/// # async fn elsewhere() {}
/// # fn spawn(_task: impl Future<Output = Result<(), ChangeError>> + Send + 'static) {}
///
/// fn resize(memory: Guarded<u64>, job: Job) {
///     spawn(async move {
///         memory.change(&job, |memory| *memory = 1024)?;
///         elsewhere().await;
///         Ok(())
///     });
/// }
/// ```
///
/// It cannot wait while it has it, since a plain closure cannot:
///
/// ```compile_fail,E0728
/// use job_core::{ChangeError, Guarded, Job};
/// # async fn elsewhere() {}
/// # fn spawn(_task: impl Future<Output = Result<(), ChangeError>> + Send + 'static) {}
///
/// fn resize(memory: Guarded<u64>, job: Job) {
///     spawn(async move {
///         memory.change(&job, |memory| { elsewhere().await; *memory = 1024 })?;
///         Ok(())
///     });
/// }
/// ```
///
/// Nor can it carry the borrow out of the closure:
///
/// ```compile_fail
/// fn resize(memory: job_core::Guarded<u64>, job: job_core::Job) {
///     let kept = memory.change(&job, |memory| memory).unwrap();
///     *kept = 1024;
/// }
/// ```
pub struct Guarded<T> {
    scheduler: Scheduler,
    value: Mutex<Arc<T>>,
}

/// Why a change was not made. The value is as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChangeError {
    /// The guest the guard belongs to is gone.
    Gone(Gone),
    /// The guard is one of another domain.
    OtherDomain,
}

impl fmt::Display for ChangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone(gone) => write!(f, "cannot change the domain: {gone}"),
            Self::OtherDomain => {
                f.write_str("cannot change the domain: the job held is one of another domain")
            }
        }
    }
}

impl std::error::Error for ChangeError {}

impl<T: Clone> Guarded<T> {
    /// State of that domain.
    #[must_use]
    pub fn new(scheduler: &Scheduler, value: T) -> Self {
        Self {
            scheduler: scheduler.clone(),
            value: Mutex::new(Arc::new(value)),
        }
    }

    /// The value now. Later changes do not reach what was handed out.
    #[must_use]
    pub fn get(&self) -> Arc<T> {
        lock(&self.value).clone()
    }

    /// Changes the value under a guard of this domain.
    ///
    /// # Errors
    ///
    /// - [`ChangeError::Gone`]: the guard's generation has ended.
    /// - [`ChangeError::OtherDomain`]: the guard is one of another domain.
    pub fn change<R>(
        &self,
        guard: &impl Guard,
        change: impl FnOnce(&mut T) -> R,
    ) -> Result<R, ChangeError> {
        if !guard.is_of(&self.scheduler) {
            return Err(ChangeError::OtherDomain);
        }
        guard.check().map_err(ChangeError::Gone)?;
        let mut value = lock(&self.value);
        let mut copy = (**value).clone();
        let result = change(&mut copy);
        let old = std::mem::replace(&mut *value, Arc::new(copy));
        drop(value);
        drop(old);
        Ok(result)
    }
}

impl<T: fmt::Debug + Clone> fmt::Debug for Guarded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Guarded").field(&self.get()).finish()
    }
}
