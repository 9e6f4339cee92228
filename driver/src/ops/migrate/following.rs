//! A migration under way, as its source's QEMU tells of it: followed until the guest stands still, let go on for the last of
//! its memory, or turned to post-copy.
//!
//! ```text
//!  begin ─► follow ─► the guest stands still ─► complete ─► completed
//!             │ post-copy wanted
//!             ▼
//!           switch ─► follow_rest ─► completed
//!                         ▲  │ the stream broke
//!                         └──┴─ resume
//! ```
//!
//! QEMU waits before the switchover for the last of the memory to be let go (`pause-before-switchover`), so that the journal
//! is written first. The guest was stopped from here before, if it could be: QEMU lets a guest run again by itself only if it
//! has stopped it itself (7.2, `vm_was_running`; later `vm_old_state`).
//!
//! Once post-copy began, neither a cancel nor a `cont` is sent: QEMU 7.2 obeys both, and the guest would run twice.

use std::time::Duration;

use monitor_qmp::command::{self, MigrationInfo, MigrationStatus};
use remote_migrate::{Meter, Prepared, Stopped, Transfer};
use tokio::time::Instant;
use tracing::info;

use super::MigrateOptions;
use super::asking::{ask, seen, transfer};
use super::sending::{THROTTLE, begin, bring};
use super::stopping::{OnTrial, stands_still, stop_for_the_last};
use super::switchover::{Next, POLL, Switchover};
use super::tune::Lead;
use crate::access::Rescue;
use crate::error::{Cause, Error};
use crate::ops::AsyncOp;
use crate::policy::{Advice, Remedy, Watch};

/// What is waited for once the guest stands still.
const LAST: &str = "the last of the memory to move";

/// Whether the migration moved the guest (`true`), or left it where it was (`false`); nothing while it is under way.
pub(super) fn is_over(status: Option<&MigrationStatus>) -> Option<bool> {
    match status {
        Some(MigrationStatus::Completed) => Some(true),
        None
        | Some(MigrationStatus::None | MigrationStatus::Failed | MigrationStatus::Cancelled) => {
            Some(false)
        }
        Some(_) => None,
    }
}

/// Whether the memory is in two halves.
pub(crate) fn is_post_copy(status: Option<&MigrationStatus>) -> bool {
    use MigrationStatus as Is;
    matches!(
        status,
        Some(
            Is::PostcopyActive
                | Is::PostcopyPaused
                | Is::PostcopyRecover
                | Is::PostcopyRecoverSetup
        )
    )
}

/// Follows QEMU until the guest stands still and the last of its memory waits to be let go, and says who has stopped it.
pub(super) async fn follow(
    op: &mut AsyncOp,
    rescue: &Rescue,
    to: &Prepared,
    meter: &Meter,
    mut watch: Watch,
    lead: &Lead,
) -> Result<Stopped, Error> {
    let (silence, patience) = {
        let defaults = &op.domain().0.context.defaults;
        (defaults.silence, defaults.connect)
    };
    let began = Instant::now();
    let mut transfer = Transfer::default();
    let (mut switchover, mut by_host) = (Switchover::default(), false);
    // While it stands still for the last of its memory.
    let mut stream: Option<Stream> = None;
    loop {
        let mut changes = op.domain().changes();
        let asked = Instant::now();
        let info = ask(op, rescue, silence).await?;
        let took = asked.elapsed();
        transfer = report(op, meter, &info).unwrap_or(transfer);
        let stands = stream.as_mut().map(|stream| stream.stands(&info));
        if let Some(waited) = stands.filter(|waited| *waited > silence) {
            return Err(Cause::TimedOut { what: LAST, waited }.into());
        }
        match watch.look(began.elapsed(), transfer) {
            Advice::GoOn => {}
            Advice::Try(remedy) => apply(op, lead, remedy).await?,
            Advice::GiveUp(why) if is_over(info.status.as_ref()).is_none() => {
                return Err(Cause::Failed(why.to_owned()).into());
            }
            Advice::GiveUp(_) => {}
        }
        match info.status {
            // Where QEMU connects by itself, nobody may answer, which it takes for waiting for two minutes.
            Some(MigrationStatus::Setup) if began.elapsed() > patience => {
                let what = "QEMU to connect to the other side";
                let waited = began.elapsed();
                return Err(Cause::TimedOut { what, waited }.into());
            }
            Some(MigrationStatus::PreSwitchover | MigrationStatus::Completed) => {
                return Ok(match by_host {
                    true => Stopped::ByHost,
                    false => Stopped::ByHypervisor,
                });
            }
            Some(MigrationStatus::Active) if !op.domain().observed().run.is_running() => {
                // For the last of it, or by its user, which is as good. Nobody but this driver can take that back.
                if !by_host {
                    let seen = op.monitor().await?.execute(command::QueryStatus).await?;
                    by_host = stands_still(&seen.status);
                }
                changes.wait(POLL).await;
            }
            Some(MigrationStatus::Active) => {
                (by_host, stream) = (false, None);
                let bounds = *lead.bounds.borrow();
                match switchover.look(began.elapsed(), seen(&info, transfer, took), bounds) {
                    Next::Ask(after) => changes.wait(after).await,
                    Next::Stop(after) | Next::Try(after, _)
                        if !after.is_zero() && changes.come_within(after).await => {}
                    Next::Stop(_) => {
                        by_host = stop_for_the_last(op).await?;
                        stream = Some(Stream::new(transfer.sent));
                    }
                    Next::Try(_, bandwidth) => {
                        let trial = OnTrial {
                            switchover: &mut switchover,
                            began,
                            lead,
                        };
                        by_host = trial.stop(op, rescue, bandwidth).await?;
                        stream = Some(Stream::new(transfer.sent));
                    }
                }
            }
            status => match is_over(status.as_ref()) {
                Some(_) => return Err(given_up_on(to, info.error_desc)),
                None => changes.wait(POLL).await,
            },
        }
    }
}

/// Lets the last of the memory go, and follows QEMU until it says that all was acknowledged.
pub(super) async fn complete(
    op: &mut AsyncOp,
    rescue: &Rescue,
    meter: &Meter,
) -> Result<(), Error> {
    let defaults = op.domain().0.context.defaults;
    // As in post-copy.
    let standing = defaults.silence * 2;
    let mut stream = Stream::new(0);
    let mut switchover = Gate::default();
    loop {
        op.extend(defaults.command);
        let mut changes = op.domain().changes();
        // By its events, which say the same sooner.
        let told = op.domain().observed().migration.clone();
        switchover.open(op, told.as_ref()).await?;
        if told == Some(MigrationStatus::Completed) {
            return Ok(());
        }
        let info = ask(op, rescue, defaults.silence).await?;
        report(op, meter, &info);
        let waited = stream.stands(&info);
        switchover.open(op, info.status.as_ref()).await?;
        if is_post_copy(info.status.as_ref()) {
            return Err(Cause::State("its memory is in two halves".into()).into());
        }
        match is_over(info.status.as_ref()) {
            Some(true) => return Ok(()),
            Some(false) => return Err(given_up(info.error_desc)),
            None if waited > standing => {
                return Err(Cause::TimedOut { what: LAST, waited }.into());
            }
            None => changes.wait(POLL).await,
        }
    }
}

/// Before the switchover QEMU waits to be let go on, which it takes once: a moment passes until it says that it has.
#[derive(Default)]
struct Gate {
    is_open: bool,
}

impl Gate {
    async fn open(
        &mut self,
        op: &mut AsyncOp,
        status: Option<&MigrationStatus>,
    ) -> Result<(), Error> {
        if status == Some(&MigrationStatus::PreSwitchover) && !self.is_open {
            let state = MigrationStatus::PreSwitchover;
            let monitor = op.monitor().await?;
            monitor.execute(command::MigrateContinue { state }).await?;
            self.is_open = true;
        }
        Ok(())
    }
}

/// Does what may help it to its end. Whoever waits for post-copy hears of it.
async fn apply(op: &mut AsyncOp, lead: &Lead, remedy: Remedy) -> Result<(), Error> {
    info!(
        domain = op.domain().name(),
        ?remedy,
        "a migration does not come to its end by itself"
    );
    let mut parameters = command::MigrateSetParameters::default();
    match remedy {
        Remedy::Throttle => {
            let (initial, increment, most) = THROTTLE;
            parameters.cpu_throttle_initial = Some(initial);
            parameters.cpu_throttle_increment = Some(increment);
            parameters.max_cpu_throttle = Some(most);
        }
        Remedy::Downtime(limit) => {
            lead.bounds.send_modify(|bounds| bounds.downtime = limit);
            return Ok(());
        }
        Remedy::PostCopy => {
            lead.control.post_copy();
            return Ok(());
        }
        Remedy::GiveUp => return Ok(()),
    }
    op.monitor().await?.execute(parameters).await?;
    Ok(())
}

/// Turns to post-copy. Done when the guest is stopped for good and the destination has what it needs to start it, or when
/// all of it has moved meanwhile.
pub(super) async fn switch(
    op: &mut AsyncOp,
    to: &Prepared,
    options: &MigrateOptions,
) -> Result<(), Error> {
    let info = op.monitor().await?.execute(command::QueryMigrate).await?;
    if is_over(info.status.as_ref()) == Some(false) {
        begin(op, to, options).await?;
    }
    if is_over(info.status.as_ref()) != Some(true) {
        let monitor = op.monitor().await?;
        monitor.execute(command::MigrateStartPostcopy).await?;
    }
    let mut switchover = Gate::default();
    loop {
        let mut changes = op.domain().changes();
        let monitor = op.monitor().await?;
        let info = monitor.execute(command::QueryMigrate).await?;
        let is_running = monitor.execute(command::QueryStatus).await?.running;
        drop(monitor);
        switchover.open(op, info.status.as_ref()).await?;
        match is_over(info.status.as_ref()) {
            Some(true) => return Ok(()),
            Some(false) => return Err(given_up(info.error_desc)),
            None if is_post_copy(info.status.as_ref()) && !is_running => return Ok(()),
            None => changes.wait(POLL).await,
        }
    }
}

/// Follows QEMU while it sends the rest of the memory to a guest that runs there already. What has no deadline: nothing can
/// be taken back any more.
pub(super) async fn follow_rest(op: &mut AsyncOp, meter: &Meter) -> Result<(), Error> {
    let defaults = op.domain().0.context.defaults;
    // The kernel ends a stream that is dead before that. One that lives and moves nothing has nothing more to move, or
    // QEMU has missed the other side's last word.
    let standing = defaults.silence * 2;
    let mut stream = Stream::new(0);
    loop {
        op.extend(defaults.command);
        let mut changes = op.domain().changes();
        let info = op.monitor().await?.execute(command::QueryMigrate).await?;
        report(op, meter, &info);
        let waited = stream.stands(&info);
        match info.status {
            Some(MigrationStatus::PostcopyActive) if waited > standing => {
                let what = "the rest of the memory to move";
                return Err(Cause::TimedOut { what, waited }.into());
            }
            Some(MigrationStatus::PostcopyPaused) => {
                let reason = info.error_desc.unwrap_or_default();
                return Err(
                    Cause::Failed(format!("its stream broke in post-copy {reason}")).into(),
                );
            }
            status => match is_over(status.as_ref()) {
                Some(true) => return Ok(()),
                Some(false) => return Err(given_up(info.error_desc)),
                None => changes.wait(POLL).await,
            },
        }
    }
}

/// How much a stream has moved, and since when no more than that.
struct Stream {
    moved: u64,
    since: Instant,
}

impl Stream {
    fn new(moved: u64) -> Self {
        let since = Instant::now();
        Self { moved, since }
    }

    /// For how long nothing has moved. A QEMU that does not say how much has moved counts for one of which nothing has.
    fn stands(&mut self, info: &MigrationInfo) -> Duration {
        let said = info.ram.as_ref().map(|ram| ram.transferred);
        if let Some(moved) = said.filter(|moved| *moved != self.moved) {
            *self = Self::new(moved);
        }
        self.since.elapsed()
    }
}

fn report(op: &AsyncOp, meter: &Meter, info: &MigrationInfo) -> Option<Transfer> {
    let is_still = !op.domain().observed().run.is_running() || is_post_copy(info.status.as_ref());
    let transfer = transfer(info, is_still)?;
    let estimate = meter.report(transfer);
    op.report_transfer(transfer, estimate);
    Some(transfer)
}

fn given_up(reason: Option<String>) -> Error {
    let reason = reason.unwrap_or_else(|| "QEMU gave it up without a reason".into());
    Cause::Failed(reason).into()
}

/// Names the other side where QEMU says that TLS was at fault, which knows it by its words alone.
fn given_up_on(to: &Prepared, reason: Option<String>) -> Error {
    let peer = bring(to).ok().and_then(|bring| bring.tls);
    match (peer, reason) {
        (Some(peer), Some(reason)) if reason.contains("TLS") || reason.contains("ertificate") => {
            Cause::Tls { peer, reason }.into()
        }
        (_, reason) => given_up(reason),
    }
}
