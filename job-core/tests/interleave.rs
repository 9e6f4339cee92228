//! Locking and waking under loom: each model runs in every interleaving of its threads that takes at most three
//! preemptions (`LOOM_MAX_PREEMPTIONS` says otherwise). A lost wake-up shows as a deadlock.
//!
//! Empty unless built with `--cfg job_core_loom`, as `cargo xtask verify` does.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[cfg(job_core_loom)]
#[path = "spec/interleavings.rs"]
mod interleavings;
