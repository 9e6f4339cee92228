//! The lock: that of std, or loom's when its models run. It is the only thing threads meet at here.
//!
//! A private cfg instead of `cfg(loom)`, since that one also takes `tokio::net` away from whoever shares the build.
//! `Arc` is std's in both: loom's cannot be a `self` type, and nothing here depends on the order of its counts.

pub(crate) use std::sync::Arc;

#[cfg(job_core_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(not(job_core_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};

/// Locks, also after a panic elsewhere: nothing but this crate's own code, which leaves whole values, runs under a lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
