//! A QMP client that survives peers that hang, flood and lie.
