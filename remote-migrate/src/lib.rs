//! The migration peer: two daemons, five phases, one owner.
