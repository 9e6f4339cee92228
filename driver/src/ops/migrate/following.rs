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

use monitor_qmp::command::{self, MigrationInfo, MigrationStatus, RunState, YankInstance};
use remote_migrate::{Meter, Prepared, Stopped, Transfer};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::MigrateOptions;
use super::sending::{THROTTLE, begin, bring};
use super::stopping::{UNBOUND, let_run, limit, stands_still, stop};
use super::switchover::{Next, POLL, Seen, Switchover, Trial};
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
    let mut is_on_trial = false;
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
            Some(MigrationStatus::Active) if is_on_trial => {
                let (at, bounds) = (began.elapsed(), *lead.bounds.borrow());
                let next = switchover.on_trial(at, seen(&info, transfer, took), bounds);
                is_on_trial = matches!(next, Trial::Ask(_));
                match next {
                    Trial::Ask(after) => changes.wait(after).await,
                    Trial::Keep => limit(op, UNBOUND).await?,
                    Trial::LetRun => {
                        limit(op, bounds.bandwidth).await?;
                        by_host = !let_run(op).await?;
                    }
                }
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
                        by_host = stands_still(&stop(op).await?);
                        stream = Some(Stream::new(transfer.sent));
                        if by_host {
                            limit(op, UNBOUND).await?;
                        }
                    }
                    Next::Try(_, bandwidth) => {
                        limit(op, bandwidth).await?;
                        let status = stop(op).await?;
                        by_host = stands_still(&status);
                        // By something else it stands still for good, or not at all.
                        is_on_trial = status == RunState::Paused;
                        if !is_on_trial {
                            limit(op, bounds.bandwidth).await?;
                        }
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

/// Asks QEMU how far it is. If it is silent for so long, its main loop is stuck at the last of the memory, behind a link
/// that is down: that is cut, past the main loop, and the guest goes on here (test bed, section 6).
async fn ask(op: &mut AsyncOp, rescue: &Rescue, silence: Duration) -> Result<MigrationInfo, Error> {
    let asking = async { op.monitor().await?.execute(command::QueryMigrate).await };
    tokio::pin!(asking);
    let mut silences = 0_u32;
    loop {
        tokio::select! {
            info = &mut asking => return info,
            () = sleep(silence), if silences == 0 => {
                silences += 1;
                cut(rescue).await;
            }
        }
    }
}

/// Cuts the stream past QEMU's main loop. Only before the guest may be in two halves: then the copy that is not whole by then
/// never is.
pub(super) async fn cut(rescue: &Rescue) {
    let instances = vec![YankInstance::Migration];
    match rescue.execute(command::Yank { instances }).await {
        Ok(_) => warn!("the stream of a migration was cut since QEMU was stuck in it"),
        // There may be none any more.
        Err(error) => warn!(
            error = format!("{error:#}"),
            "a stuck QEMU could not be freed"
        ),
    }
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

/// How far it is, if QEMU says so. At first, after a failure, and in the instant in which it says `completed`, its counters
/// may be missing or read 0 (7.2): that is no progress, and none undone.
fn transfer(info: &MigrationInfo, is_still: bool) -> Option<Transfer> {
    let ram = info.ram.as_ref().filter(|ram| ram.total > 0)?;
    Some(Transfer {
        sent: ram.transferred,
        remaining: ram.remaining,
        total: ram.total,
        pass: ram.dirty_sync_count,
        // In post-copy it goes on to say what the guest wrote before.
        dirty_rate: if is_still {
            0
        } else {
            ram.dirty_pages_rate.saturating_mul(ram.page_size)
        },
        is_still,
    })
}

fn seen(info: &MigrationInfo, transfer: Transfer, took: Duration) -> Seen {
    let rate = info.ram.as_ref().map_or(0.0, |ram| ram.mbps * 1e6 / 8.0);
    Seen {
        pass: transfer.pass,
        sent: transfer.sent,
        remaining: transfer.remaining,
        dirty_rate: transfer.dirty_rate,
        rate: rate as u64,
        took,
    }
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

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn told(ram: &serde_json::Value, is_still: bool) -> Option<Transfer> {
        let mut info = json!({"status": "completed"});
        if !ram.is_null() {
            info["ram"] = ram.clone();
        }
        transfer(&from_value(info).expect("as QEMU says it"), is_still)
    }

    #[test]
    fn counters_that_read_0_are_no_progress() {
        let ram = |total: u64, sent: u64| {
            json!({
                "transferred": sent, "remaining": 0, "total": total, "dirty-sync-count": 0, "dirty-pages-rate": 3,
                "page-size": 4096, "duplicate": 0, "skipped": 0, "normal": 0, "normal-bytes": 0, "mbps": 0.0,
                "postcopy-requests": 0, "multifd-bytes": 0, "pages-per-second": 0, "subpage-count": 0,
                "precopy-bytes": 0, "downtime-bytes": 0, "postcopy-bytes": 0, "dirty-sync-missed-zero-copy": 0,
            })
        };
        assert_eq!(told(&json!(null), false), None);
        assert_eq!(told(&ram(0, 0), false), None);
        let told =
            |is_still| told(&ram(1 << 28, 1 << 20), is_still).expect("it says how far it is");
        let (moved, still) = (told(false), told(true));
        assert_eq!((moved.sent, moved.dirty_rate), (1 << 20, 3 * 4096));
        assert_eq!((still.is_still, still.dirty_rate), (true, 0));
    }
}
