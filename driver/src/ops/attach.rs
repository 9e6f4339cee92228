//! Taking in a guest that somebody else started, and letting it go again.
//!
//! What may be done with it is decided here once, for as long as the driver knows it: it is managed like a guest of our own,
//! or observed only. The doors to monitor and agent, and the one through which operations pass, keep to that.

use std::sync::Arc;

use job_core::{AsyncKind, GoneWhy, Guard, JobKind};
use monitor_qmp::{Monitor, command};
use tokio::time::Instant;
use tracing::warn;
use transport_host::Peer;
use uuid::Uuid;

use crate::context::Context;
use crate::domain::state::Observation;
use crate::domain::{Domain, Inner, Live, Records, reap};
use crate::error::{Cause, Error, io};
use crate::events::What;
use crate::foreign::{self, is_qemu};
use crate::ops::start::{connect_agent, connect_monitor};
use crate::ops::{AsyncOp, Call, Deadline};
use crate::process::Process;
use crate::records::{Attached, Identity};
use crate::registry::Taken;
use crate::wire::MonitorWire;

/// Which QEMU of another tool is taken in, and what may be done with it.
///
/// ```
/// use driver::Attach;
///
/// let by_address = Attach::to("unix:/run/web/qmp.sock").agent("unix:/run/web/qga.sock");
/// let by_process = Attach::process(4711).observe_only();
/// # let _ = (by_address, by_process);
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is taken in by it alone"]
pub struct Attach {
    source: Source,
    agent: Option<String>,
    is_observed: bool,
}

#[derive(Clone, Debug)]
enum Source {
    Target(String),
    Process(u32),
}

impl Attach {
    /// The one whose monitor has that address, such as `unix:/run/web/qmp.sock`.
    pub fn to(target: impl Into<String>) -> Self {
        Self::of(Source::Target(target.into()))
    }

    /// The one that runs in that process: its monitor is the first QMP socket of its command line that is free. To be
    /// managed, it is asked by its agent's channel as well, if it has one.
    pub fn process(pid: u32) -> Self {
        Self::of(Source::Process(pid))
    }

    fn of(source: Source) -> Self {
        Self {
            source,
            agent: None,
            is_observed: false,
        }
    }

    /// Its agent's channel has that address.
    pub fn agent(self, target: impl Into<String>) -> Self {
        let agent = Some(target.into());
        Self { agent, ..self }
    }

    /// Nothing is done that would change the guest, and it is never ended. QEMU serves one client a monitor, so whoever
    /// manages it needs another one.
    pub fn observe_only(self) -> Self {
        let is_observed = true;
        Self {
            is_observed,
            ..self
        }
    }
}

impl From<String> for Attach {
    fn from(target: String) -> Self {
        Self::to(target)
    }
}

impl From<&str> for Attach {
    fn from(target: &str) -> Self {
        Self::to(target)
    }
}

/// What a first look at a monitor tells.
struct Found {
    name: String,
    uuid: Uuid,
    target: String,
    pid: Option<u32>,
    agent: Option<String>,
}

pub(crate) fn attach(context: &Arc<Context>, wanted: Attach) -> Call<Domain> {
    let context = context.clone();
    Call::new(context.defaults.connect, move |deadline| async move {
        let operation = match &wanted.source {
            Source::Target(target) => format!("attach to {target}"),
            Source::Process(pid) => format!("attach to process {pid}"),
        };
        let failed = |error: Error| error.retold(operation.clone());
        let found = find(&context, &wanted, deadline).await.map_err(failed)?;
        let (name, uuid) = (found.name.clone(), found.uuid);
        let record = Attached {
            name: name.clone(),
            uuid,
            monitor: found.target,
            agent: found.agent,
            is_observed: wanted.is_observed,
            process: None,
        };
        let make = |id| Inner::new(id, &name, uuid, &context, records(&record));
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
        // The peer of a socket that somebody else bound and passed to QEMU is that somebody. Only a QEMU is one we may end.
        let process = found.pid.and_then(|pid| Process::adopt(pid, is_qemu).ok());
        let work = move |op: AsyncOp| take_in(op, record, process);
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

/// What the domain of an attached guest knows from the beginning.
pub(crate) fn records(record: &Attached) -> Records {
    Records {
        attached: Some(record.monitor.clone()),
        observe_only: record.is_observed,
        ..Records::default()
    }
}

/// A first, short connection tells who it is; a second one is the domain's own, whose events reach it.
async fn find(context: &Context, wanted: &Attach, deadline: Deadline) -> Result<Found, Error> {
    let pid = match &wanted.source {
        Source::Target(target) => {
            let agent = wanted.agent.clone();
            let found = look(context, target, deadline).await?;
            return Ok(Found { agent, ..found });
        }
        Source::Process(pid) => *pid,
    };
    let looked = tokio::task::spawn_blocking(move || foreign::find(pid)).await;
    let places = looked.map_err(|error| Cause::Panicked(error.to_string()))??;
    // One that has a client already says nothing: each of them gets its part of the time.
    let mut left = u32::try_from(places.monitors.len()).unwrap_or(u32::MAX);
    let agent = places.agent.filter(|_| !wanted.is_observed);
    let agent = wanted.agent.clone().or(agent);
    let mut last = None;
    for target in &places.monitors {
        let until = Instant::now() + deadline.saturating_duration_since(Instant::now()) / left;
        left -= 1;
        match look(context, target, until).await {
            Ok(found) => {
                let pid = Some(pid);
                return Ok(Found {
                    pid,
                    agent,
                    ..found
                });
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("there is at least one"))
}

async fn look(context: &Context, target: &str, deadline: Deadline) -> Result<Found, Error> {
    let stream = context.transports.dial(target, deadline).await?;
    let pid = match stream.peer() {
        Peer::Unix { pid, .. } => *pid,
        _ => None,
    };
    let options = monitor_qmp::Options::default();
    let monitor = Monitor::connect(MonitorWire(stream), options, (), deadline).await?;
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
    Ok(Found {
        name,
        uuid,
        target: target.to_owned(),
        pid,
        agent: None,
    })
}

async fn take_in(
    mut op: AsyncOp,
    mut record: Attached,
    process: Option<Process>,
) -> Result<(), Error> {
    op.set_phase("connecting");
    let domain = op.domain().clone();
    if let Some(process) = &process {
        let pid = process.pid();
        let identity = Identity::of(pid).map_err(io("look at process", pid.to_string()))?;
        record.process = Some(identity);
    }
    let live = put_in(&domain, op.job().generation(), process)?;
    let limit = Instant::now() + domain.0.context.defaults.connect;
    let deadline = op.deadline().min(limit);
    let connected = async {
        connect(&domain, &live, &record, deadline).await?;
        // Last: what could not be taken in is nothing that a later driver should know.
        Ok::<_, Error>(domain.0.note_attached(Some(record.clone())).await?)
    };
    if let Err(error) = connected.await {
        domain.0.clear_live(&live);
        return Err(error);
    }
    follow(&domain, live);
    Ok(())
}

/// Puts the guest in, without a connection yet.
pub(crate) fn put_in(
    domain: &Domain,
    generation: u64,
    process: Option<Process>,
) -> Result<Arc<Live>, Error> {
    let process = process.map(|process| match domain.0.is_observed {
        true => process.watched_only(),
        false => process,
    });
    let pid = process.as_ref().map(Process::pid);
    let live = Arc::new(Live::new(generation, process.map(Arc::new), false));
    domain.0.set_live(&live)?;
    domain.0.observe(Observation::Launched { generation, pid });
    Ok(live)
}

/// Connects to the monitor, and to the agent's channel where that is known.
pub(crate) async fn connect(
    domain: &Domain,
    live: &Arc<Live>,
    record: &Attached,
    deadline: Deadline,
) -> Result<(), Error> {
    connect_monitor(domain, live, &record.monitor, deadline).await?;
    if let Some(agent) = &record.agent {
        connect_agent(domain, live, agent, deadline).await?;
    }
    Ok(())
}

/// Follows it to its end, and tells that it is there.
pub(crate) fn follow(domain: &Domain, live: Arc<Live>) {
    let generation = live.generation;
    let watchers = &domain.0.context.watchers;
    watchers.spawn(reap(domain.0.clone(), live));
    domain.0.tell(What::Started { generation });
}

impl Domain {
    /// Lets a guest that was attached go, and forgets it: its monitor is free for the next client, and it runs on.
    ///
    /// Refused for a guest of our own, and while an async job works on it.
    pub fn detach(&self) -> Call<()> {
        self.normal("detach", JobKind::Destroy, |op| async move {
            let domain = op.domain();
            if domain.records().attached.is_none() {
                return Err(Cause::State("it was not attached".into()).into());
            }
            if domain.jobs().asynchronous.is_some() {
                return Err(Cause::State("an async job works on it".into()).into());
            }
            domain.0.note_attached(None).await?;
            let why = GoneWhy::Left("it was let go".into());
            if let Some(live) = domain.0.live() {
                // In this order: the end of the connection is no loss then.
                live.release();
                domain.0.let_go();
                drop(domain.0.end_generation(live.generation, &why));
                domain.0.observe(Observation::Ended(why));
            }
            domain.0.close();
            domain.0.tell(What::Removed);
            Ok(())
        })
    }

    /// Nothing is left of an attached guest that a later driver should know.
    pub(crate) async fn forget_attached(&self) {
        if let Err(cause) = self.0.note_attached(None).await {
            let error = Error::from(cause);
            warn!(domain = self.name(), %error, "an attached guest stays in the records");
        }
    }
}

/// What an observer's domain answers whoever would change its guest.
pub(crate) fn observed_only(what: &str) -> Error {
    Cause::ObserveOnly(format!(
        "it was attached to observe only, and {what} could change the guest"
    ))
    .into()
}
