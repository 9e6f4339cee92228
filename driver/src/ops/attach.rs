//! Taking in a guest that somebody else started, by the address of its QMP socket.

use std::sync::Arc;

use job_core::{AsyncKind, Guard};
use monitor_qmp::{Monitor, command};
use tokio::time::Instant;
use transport_host::Peer;
use uuid::Uuid;

use crate::context::Context;
use crate::domain::state::Observation;
use crate::domain::{Domain, Inner, Live, Records, reap};
use crate::error::{Cause, Error};
use crate::events::What;
use crate::ops::start::connect_monitor;
use crate::ops::{AsyncOp, Call, Deadline};
use crate::process::Process;
use crate::registry::Taken;
use crate::wire::MonitorWire;

/// What a first look at a monitor tells.
struct Found {
    name: String,
    uuid: Uuid,
    pid: Option<u32>,
}

pub(crate) fn attach(context: &Arc<Context>, target: String) -> Call<Domain> {
    let context = context.clone();
    Call::new(context.defaults.connect, move |deadline| async move {
        let operation = format!("attach to {target}");
        let failed = |error: Error| error.retold(operation.clone());
        // A first, short connection tells who it is; the second one is the domain's own, whose events reach it.
        let found = look(&context, &target, deadline).await.map_err(failed)?;
        let Found { name, uuid, pid } = found;
        let records = Records {
            attached: Some(target.clone()),
            ..Records::default()
        };
        let make = |id| Inner::new(id, &name, uuid, &context, records);
        let inner = context
            .registry
            .insert(&name, uuid, make)
            .map_err(|taken| {
                let what = if taken == Taken::Name {
                    format!("name \"{name}\"")
                } else {
                    format!("uuid {uuid}")
                };
                Error::new(
                    operation.clone(),
                    None,
                    Cause::Exists(format!("a domain of the {what} is known already")),
                )
            })?;
        let domain = Domain(inner);
        domain.0.tell(What::Defined);
        let mask = AsyncKind::Start.default_mask();
        let work = move |op: AsyncOp| take_in(op, target, pid);
        let attached = domain
            .run_async("attach", AsyncKind::Start, mask, deadline, work)
            .await;
        if let Err(error) = attached {
            domain.0.close();
            return Err(error);
        }
        Ok(domain)
    })
}

async fn look(context: &Context, target: &str, deadline: Deadline) -> Result<Found, Error> {
    let stream = context.transports.dial(target, deadline).await?;
    let pid = match stream.peer() {
        Peer::Unix { pid, .. } => *pid,
        _ => None,
    };
    let monitor = Monitor::connect(
        MonitorWire(stream),
        monitor_qmp::Options::default(),
        (),
        deadline,
    )
    .await?;
    let name = monitor.execute(command::QueryName, deadline).await?.name;
    let uuid = monitor.execute(command::QueryUuid, deadline).await?.uuid;
    monitor.close();
    // A QEMU started without an identity gets one for as long as we know it.
    let uuid = Uuid::try_parse(&uuid)
        .ok()
        .filter(|uuid| !uuid.is_nil())
        .unwrap_or_else(Uuid::new_v4);
    let name = name
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| format!("qemu-{uuid}"));
    Ok(Found { name, uuid, pid })
}

async fn take_in(mut op: AsyncOp, target: String, pid: Option<u32>) -> Result<(), Error> {
    op.set_phase("connecting");
    // The peer of a socket that somebody else bound and passed to QEMU is that somebody. Only a QEMU is one we may end.
    let process = pid.and_then(|pid| Process::adopt(pid, is_qemu).ok());
    let process = process.map(Arc::new);
    let generation = op.job().generation();
    let domain = op.domain().clone();
    let pid = process.as_ref().map(|process| process.pid());
    let live = Arc::new(Live::new(generation, process, false));
    domain.0.set_live(&live)?;
    domain.0.observe(Observation::Launched { generation, pid });
    let deadline = op
        .deadline()
        .min(Instant::now() + domain.0.context.defaults.connect);
    if let Err(error) = connect_monitor(&domain, &live, &target, deadline).await {
        domain.0.clear_live(&live);
        return Err(error);
    }
    domain
        .0
        .context
        .watchers
        .spawn(reap(domain.0.clone(), live));
    domain.0.tell(What::Started { generation });
    Ok(())
}

/// Whether that process is a QEMU, by the program it runs.
fn is_qemu(pid: u32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    program
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("qemu"))
}
