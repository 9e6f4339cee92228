//! Fake QEMU, fake guest agent and fault stream for the tests of VM daemons.
