//! Finds, checks, loads and uses transport plugins.
