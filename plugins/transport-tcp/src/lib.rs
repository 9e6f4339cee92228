//! The tcp: transport plugin.
