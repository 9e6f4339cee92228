//! The per-domain job scheduler: who may change a guest, who waits, and why.
