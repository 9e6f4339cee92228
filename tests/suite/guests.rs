//! What most tests do with a guest and expect to work: start it, boot it, have its shell say
//! something, signal its QEMU, see it off.
//!
//! A test of one of these does it by itself.

use std::time::Duration;

use agent_qga::Limits;
use driver::{Domain, Guest, Observed, Run, StartOptions};
use tokio::time::Instant;

use crate::rig::{Rig, Signal, kill};

const SECOND: Duration = Duration::from_secs(1);

impl Rig {
    /// Starts a guest.
    pub(crate) async fn started(&self, guest: Guest) -> Domain {
        let started = self.driver.start(guest, StartOptions::default()).await;
        started.expect("it starts")
    }

    /// Starts a guest and waits for its agent.
    pub(crate) async fn booted(&self, guest: Guest) -> Domain {
        let domain = self.started(guest).await;
        answers(&domain).await;
        domain
    }
}

/// Starts a guest that is defined, and waits for its agent.
pub(crate) async fn up(domain: &Domain) {
    domain.start().await.expect("it starts");
    answers(domain).await;
}

async fn answers(domain: &Domain) {
    let ready = domain.wait_agent().deadline(90 * SECOND).await;
    ready.expect("it boots");
}

/// What a command of the guest's shell says.
pub(crate) async fn shell(domain: &Domain, script: &str) -> String {
    let arguments = vec!["-c".to_owned(), script.to_owned()];
    let ran = domain.exec("/bin/sh", arguments, Limits::default());
    let output = ran.deadline(30 * SECOND).await.expect("the agent answers");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Sends a signal to the QEMU of a guest that runs.
pub(crate) fn signal(domain: &Domain, signal: Signal) {
    kill(domain.observed().pid.expect("it runs"), signal);
}

/// Waits until it is noticed that the QEMU of a guest has ended.
pub(crate) async fn is_off(domain: &Domain) -> Observed {
    let is_off = |observed: &Observed| observed.run == Run::Off;
    let off = domain.wait_for(is_off, Instant::now() + 5 * SECOND).await;
    off.expect("it is off")
}
