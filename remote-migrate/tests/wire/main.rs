//! Migrations over a wire, with the hosts of the rig: whole, cut anywhere, lied to, and with strangers.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod cuts;
mod drops;
mod ends;
mod moves;
mod older;
mod refusals;
#[expect(dead_code, reason = "each suite uses a part of it")]
#[path = "../rig/mod.rs"]
mod rig;
mod strangers;
