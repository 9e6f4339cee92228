//! Fake QEMU, fake guest agent and fault stream for the tests of VM daemons.

pub mod fake_guest;
pub mod fake_qemu;
pub mod fault;
