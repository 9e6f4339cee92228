//! What a QEMU is told that is to send its guest's memory: over which connection, with what on. How it does is
//! [followed](super::following).

use std::time::Duration;

use monitor_qmp::command::{self, MigrationCapability, MigrationStatus};
use remote_migrate::{Prepared, Reason};
use tokio::time::Instant;

use super::{Bring, MigrateOptions, switchover};
use crate::error::{Cause, Error, io};
use crate::landing::Way;
use crate::ops::AsyncOp;
use crate::policy::Remedy;
use crate::stream_tls::{self, End};

/// The name under which QEMU keeps the connection.
const FD_NAME: &str = "vmwright-migrate";

/// Per cent of a guest's time that QEMU takes at first, more each time, and at most: its own defaults.
pub(super) const THROTTLE: (u8, u8, u8) = (20, 10, 99);

/// All capabilities that this driver ever turns on, beside `events`, which stays on. What one migration left on would be in
/// the way of the next, or of a save.
const CAPABILITIES: [&str; 6] = [
    "return-path",
    "pause-before-switchover",
    "auto-converge",
    "multifd",
    "postcopy-ram",
    "late-block-activate",
];

/// Turns these on, and the others off.
pub(crate) fn only(on: &[&str]) -> command::MigrateSetCapabilities {
    let mut capabilities = vec![MigrationCapability::on("events")];
    capabilities.extend(CAPABILITIES.map(|name| MigrationCapability {
        state: on.contains(&name),
        ..MigrationCapability::on(name)
    }));
    command::MigrateSetCapabilities { capabilities }
}

/// Has QEMU begin to send the guest's memory.
pub(super) async fn begin(
    op: &mut AsyncOp,
    to: &Prepared,
    options: &MigrateOptions,
) -> Result<(), Error> {
    let bring = bring(to)?;
    let (context, directory) = (op.domain().0.context.clone(), op.domain().0.run_dir());
    let tls = context.landing.towards(&to.connect, bring.tls.as_deref())?;
    let connection = connect(op, to, &bring).await?;
    let monitor = op.monitor().await?;
    match (tls, &bring.tls) {
        (Some(tls), Some(name)) => {
            stream_tls::put_on(&monitor, &directory, tls, End::Leaves(name)).await?;
        }
        _ => stream_tls::take_off(&monitor).await?,
    }
    // Without the return path QEMU says `completed` while the destination exits (test bed, QEMU 7.2 and 10.0).
    let mut on = vec!["return-path", "pause-before-switchover"];
    let throttles = options.policy.then.contains(&Remedy::Throttle);
    on.extend((options.auto_converge || throttles).then_some("auto-converge"));
    on.extend(options.post_copy.then_some("postcopy-ram"));
    on.extend(options.channels.map(|_| "multifd"));
    monitor.execute(only(&on)).await?;
    let mut parameters = command::MigrateSetParameters::default();
    parameters.max_bandwidth = Some(options.bounds().bandwidth);
    parameters.downtime_limit = Some(millis(switchover::LEAST));
    parameters.max_postcopy_bandwidth = Some(0);
    // On from the start, since it cannot be turned on later, and as good as off until it is wanted.
    let (initial, increment, most) = if options.auto_converge {
        THROTTLE
    } else {
        (1, 1, 1)
    };
    parameters.cpu_throttle_initial = Some(initial);
    parameters.cpu_throttle_increment = Some(increment);
    parameters.max_cpu_throttle = Some(most);
    parameters.multifd_channels = options.channels.map(std::num::NonZero::get);
    monitor.execute(parameters).await?;
    let uri = match connection {
        Some(connection) => {
            let named = command::Getfd {
                fdname: FD_NAME.into(),
            };
            monitor.execute_with_fds(named, vec![connection]).await?;
            format!("fd:{FD_NAME}")
        }
        None => to.connect.to_string(),
    };
    monitor.execute(command::Migrate::new(uri)).await?;
    Ok(())
}

/// Goes on with post-copy over a new connection.
pub(super) async fn resume(op: &mut AsyncOp, to: &Prepared) -> Result<(), Error> {
    op.extend(op.domain().0.context.defaults.connect);
    let info = op.monitor().await?.execute(command::QueryMigrate).await?;
    if info.status == Some(MigrationStatus::PostcopyActive) {
        // The other side has noticed first that the stream is broken.
        let monitor = op.monitor().await?;
        monitor.execute(command::MigratePause).await?;
    }
    let bring = bring(to)?;
    // QEMU has what it shows there, if anything, from the first stream.
    let context = op.domain().0.context.clone();
    context.landing.towards(&to.connect, bring.tls.as_deref())?;
    let connection = connect(op, to, &bring).await?;
    let connection = connection.into_iter().collect();
    let monitor = op.monitor().await?;
    let named = command::Getfd {
        fdname: FD_NAME.into(),
    };
    monitor.execute_with_fds(named, connection).await?;
    let mut again = command::Migrate::new(format!("fd:{FD_NAME}"));
    again.resume = Some(true);
    // Refused until the old stream is known to be broken; then it is tried again.
    monitor.execute(again).await?;
    Ok(())
}

pub(super) fn bring(to: &Prepared) -> Result<Bring, Error> {
    let bring = super::read(&to.cookie);
    Ok(bring.map_err(|error| Cause::State(Reason::of(&error).as_str().to_owned()))?)
}

/// A connection of ours to where the memory is taken in, unless QEMU makes its own.
async fn connect(
    op: &AsyncOp,
    to: &Prepared,
    bring: &Bring,
) -> Result<Option<std::os::fd::OwnedFd>, Error> {
    let Way::Ticket(ticket) = bring.way else {
        return Ok(None);
    };
    let context = op.domain().0.context.clone();
    let deadline = op.deadline().min(Instant::now() + context.defaults.connect);
    let stream = context.transports.dial(&to.connect, deadline).await?;
    let shown = ticket.show(stream, context.defaults.silence).await;
    Ok(Some(shown.map_err(io("show the ticket at", &*to.connect))?))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
