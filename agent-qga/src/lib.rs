//! A guest agent client that trusts the guest with nothing.
