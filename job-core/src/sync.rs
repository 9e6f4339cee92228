//! The lock and counter types: those of std, or loom's when its models run.
//!
//! A private cfg instead of `cfg(loom)`, since that one also takes `tokio::net` away from whoever shares the build.

#[cfg(job_core_loom)]
pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};
#[cfg(not(job_core_loom))]
pub(crate) use std::sync::{Arc, Mutex, MutexGuard};

/// Locks, also after a panic elsewhere: nothing but this crate's own code, which leaves whole values, runs under a lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
