//! The C ABI between a vmwright daemon and its transport plugins.
