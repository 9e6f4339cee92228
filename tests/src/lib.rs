//! Fake QEMU, fake guest agent, fault stream and hostile bytes for the tests of VM daemons.
//!
//! A fake proves the odd cases that QEMU will not show on demand; QEMU proves that the fake is right. These fakes speak the
//! protocols as badly as real peers do: late, torn, glued, silent, lying, gone.
//!
//! ```text
//!   your client ◄── bytes ──► Faulty ◄── bytes ──► FakeQemu    scripted (`expect`, `reply`, `hang`), or by a table
//!                (splits, delays, cuts)            FakeGuest   the same for the guest agent, 0xFF and all
//! ```
//!
//! ```
//! use serde_json::json;
//! use tests::fake_qemu::{Answers, FakeQemu};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let (stream, qemu) = FakeQemu::over_memory();
//! let answers = Answers::new().returns("query-status", json!({"status": "running", "running": true}));
//! let served = tokio::spawn(qemu.serve(answers));
//! drop(stream); // here your client would have talked to it
//! served.await.unwrap();
//! # });
//! ```
//!
//! # Limits
//!
//! The fakes answer what they are told to; they run no guest. The suite on real QEMU is in `suite/`.
//!
//! # What this crate does not know
//!
//! Any client: it speaks bytes, so that the tests of any daemon can use it.

pub mod fake_guest;
pub mod fake_qemu;
pub mod fault;
pub mod hostile;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
