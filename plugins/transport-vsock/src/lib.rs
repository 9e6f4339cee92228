//! The vsock: transport plugin.
