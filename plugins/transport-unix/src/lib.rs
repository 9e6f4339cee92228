//! The unix: transport plugin.
