//! Starting a guest: QEMU is launched with its sockets, the monitor greets, the agent's channel is connected, the guest
//! runs. An async job that lets nothing but `Destroy` pass.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use job_core::{AsyncKind, GoneWhy, Guard};
use monitor_qmp::{Monitor, Qmp, command};
use remote_migrate::Record;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{Instrument, Span, debug, debug_span};

use crate::command_line::{Channels, arguments};
use crate::domain::state::Observation;
use crate::domain::{Domain, EXIT_AFTER_EOF, Live, SERIAL, STDERR, last_words, reap, resync};
use crate::error::{Cause, Error, io};
use crate::events::{Pump, What};
use crate::guest::{AgentChannel, Guest, Network, NetworkBackend, Serial};
use crate::logs;
use crate::ops::freeze::thaw_if_due;
use crate::ops::{AsyncOp, Call, Deadline};
use crate::process::{Exit, Launch, Process, number};
use crate::records::{Identity, Work};
use crate::tap;
use crate::wire::MonitorWire;

/// What QEMU locks for as long as it lives, in the domain's directory.
pub(crate) const LOCK: &str = "lock";

/// How a guest is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "any value is valid; built with `..StartOptions::default()`"
)]
pub struct StartOptions {
    /// Whether it stays paused until somebody resumes it.
    pub paused: bool,
}

impl Domain {
    /// Starts the guest and lets it run. It is started when its monitor answers; its system boots after that.
    pub fn start(&self) -> Call<()> {
        self.start_with(StartOptions::default())
    }

    /// Starts the guest.
    pub fn start_with(&self, options: StartOptions) -> Call<()> {
        let domain = self.clone();
        Call::new(
            self.0.context.defaults.connect,
            move |deadline| async move {
                let mask = AsyncKind::Start.default_mask();
                let work = move |mut op: AsyncOp| async move {
                    let guest = definition(&op)?;
                    refuse_if_moved(op.domain()).await?;
                    let paused = options.paused;
                    let live = bring_up(&mut op, &guest, Work::Start { paused }).await?;
                    finish(&mut op, &live, !paused).await
                };
                domain
                    .run_async("start", AsyncKind::Start, mask, deadline, work)
                    .await
            },
        )
    }
}

pub(crate) fn definition(op: &AsyncOp) -> Result<Guest, Error> {
    let definition = op.domain().records().definition.clone();
    Ok(definition.ok_or_else(|| {
        Cause::State("it was attached and has no definition to start from".into())
    })?)
}

/// The guest as it runs now. What is to become of it elsewhere, or from a file, is this, whatever the definition says.
pub(crate) async fn as_it_runs(domain: &Domain) -> Result<Guest, Error> {
    let noted = domain.0.noted().await.map(|record| record.guest);
    Ok(noted
        .ok_or_else(|| Cause::State("it was attached, and what it is was never said".into()))?)
}

/// Refuses a guest that lives elsewhere, or may: one that moved away, or whose migration is in doubt.
pub(crate) async fn refuse_if_moved(domain: &Domain) -> Result<(), Error> {
    if domain.records().moved_away {
        return Err(
            Cause::State("it moved to another host; it comes back by a migration".into()).into(),
        );
    }
    domain.0.context.refuse_unreadable(domain.uuid()).await?;
    let records = domain.0.context.migrations().await?;
    let mine = |record: &&Record| record.domain() == domain.uuid() && record.refuses_start();
    match records.iter().find(mine) {
        Some(record) => {
            let (migration, owner) = (record.migration(), record.owner());
            Err(Cause::State(format!(
                "migration {migration} has it, its owner is {owner}"
            ))
            .into())
        }
        None => Ok(()),
    }
}

/// Launches QEMU and connects to it. Whatever fails after the launch ends the process again. `work` is what the guest is
/// brought up for: a daemon that comes back finishes or undoes that.
pub(crate) async fn bring_up(
    op: &mut AsyncOp,
    guest: &Guest,
    work: Work,
) -> Result<Arc<Live>, Error> {
    op.set_phase("preparing");
    if op.domain().0.live().is_some() {
        return Err(Cause::State("a guest runs in it already".into()).into());
    }
    if guest.name != op.domain().name() {
        // A driver that comes back would know it by a name that may be another's.
        let (name, known) = (&guest.name, op.domain().name());
        let text = format!("its description calls it \"{name}\", and it is known as \"{known}\"");
        return Err(Cause::State(text).into());
    }
    let sockets = Sockets::of(op.domain(), guest);
    refuse_if_running(&sockets.monitor).await?;
    let incoming = !matches!(work, Work::Start { .. });
    let domain = op.domain().clone();
    // Before anything is made, so that nothing is left that nobody knows of.
    op.note_guest(guest, work).await?;
    let live = match launch(op, guest, incoming).await {
        Ok(live) => live,
        Err(error) => {
            domain.0.forget_guest().await;
            return Err(error);
        }
    };

    op.set_phase("connecting");
    let connected = tokio::select! {
        connected = connect(&domain, &live, &sockets, op.deadline()) => connected,
        exit = ended(&live) => Err(exited(&domain, exit)),
    };
    let Err(error) = connected else {
        return Ok(live);
    };
    // A QEMU that exits closes its sockets first, and says why only on its standard error.
    if let Ok(exit) = timeout(EXIT_AFTER_EOF, ended(&live)).await {
        return Err(exited(&domain, exit));
    }
    give_up(&live);
    Err(error)
}

/// Makes the domain's directory and starts QEMU in it.
async fn launch(op: &mut AsyncOp, guest: &Guest, incoming: bool) -> Result<Arc<Live>, Error> {
    let domain = op.domain().clone();
    let sockets = Sockets::of(&domain, guest);
    let (launch, said) = prepare(&domain, guest, sockets, incoming).await?;
    op.check_cancelled()?;
    op.set_phase("launching");
    let program = launch.program.clone();
    let launched = domain.0.context.launcher.launch(launch).await;
    let (pid, pidfd) = launched.map_err(io("launch", program))?;
    let process =
        Process::watch_or_kill(pid, pidfd).map_err(io("watch process", pid.to_string()))?;
    let generation = op.job().generation();
    let live = Arc::new(Live::new(generation, Some(Arc::new(process)), true));
    domain.0.set_live(&live)?;
    live.keep_logs(&domain.0, guest, said);
    domain.0.observe(Observation::Launched {
        generation,
        pid: Some(pid),
    });
    domain
        .0
        .context
        .watchers
        .spawn(reap(domain.0.clone(), live.clone()));
    let identity = Identity::of(pid).map_err(io("look at process", pid.to_string()));
    let noted = match identity {
        Ok(identity) => {
            let known = domain.0.note(|record| {
                if let Some(record) = record {
                    record.process = Some(identity);
                }
            });
            known.await
        }
        Err(cause) => Err(cause),
    };
    if let Err(cause) = noted {
        // It may have ended already, which says more than that it cannot be looked at.
        if timeout(EXIT_AFTER_EOF, ended(&live)).await.is_err() {
            give_up(&live);
            return Err(cause.into());
        }
    }
    Ok(live)
}

async fn ended(live: &Live) -> Exit {
    match &live.process {
        Some(process) => {
            let exit = process.exited().await;
            live.wait_said().await;
            exit
        }
        None => std::future::pending().await,
    }
}

fn exited(domain: &Domain, exit: Exit) -> Error {
    Cause::Exited {
        exit,
        stderr: last_words(&domain.0.run_dir()),
    }
    .into()
}

/// Ends a guest that could not be brought up. Who waits for it learns how it ended from the reaper.
pub(crate) fn give_up(live: &Live) {
    live.doom(GoneWhy::Died(
        "QEMU was ended since its start failed".into(),
    ));
    if let Some(process) = &live.process {
        // One that cannot be signalled has ended, and the reaper is about to notice.
        let _ended = process.kill();
    }
}

/// Lets a guest that was just started run if it should, and tells the world. Ends it again if that fails.
pub(crate) async fn finish(op: &mut AsyncOp, live: &Arc<Live>, is_run: bool) -> Result<(), Error> {
    let finished = match op.check_cancelled() {
        Ok(()) => run(op, live, is_run).await,
        Err(error) => Err(error),
    };
    if finished.is_err() {
        give_up(live);
    }
    finished
}

/// Lets the guest run if it should, and tells the world.
pub(crate) async fn run(op: &mut AsyncOp, live: &Arc<Live>, is_run: bool) -> Result<(), Error> {
    op.set_phase("running");
    if is_run {
        op.monitor().await?.execute(command::Cont).await?;
    }
    resync(&op.domain().0, live).await;
    op.domain().0.tell(What::Started {
        generation: live.generation,
    });
    Ok(())
}

/// Lets a guest run whose memory is not all here. What QEMU is asked once it runs it may answer only when the memory has come.
pub(crate) async fn run_in_halves(
    op: &mut AsyncOp,
    live: &Arc<Live>,
    is_run: bool,
) -> Result<(), Error> {
    if is_run {
        op.monitor().await?.execute(command::Cont).await?;
    }
    op.domain().0.tell(What::Started {
        generation: live.generation,
    });
    Ok(())
}

/// Where the sockets of a domain's QEMU are.
pub(crate) struct Sockets {
    pub(crate) monitor: PathBuf,
    agent: Option<PathBuf>,
}

impl Sockets {
    pub(crate) fn of(domain: &Domain, guest: &Guest) -> Self {
        let directory = domain.0.run_dir();
        Self {
            monitor: directory.join("monitor.sock"),
            agent: (guest.agent == AgentChannel::Virtio).then(|| directory.join("agent.sock")),
        }
    }
}

/// Never run a guest twice: the QEMU of a daemon that was killed may still be there.
pub(crate) async fn refuse_if_running(socket: &Path) -> Result<(), Cause> {
    // A QEMU that hangs, or has another client, accepts nobody and its backlog is short: only these two errors say that
    // there is none.
    match UnixStream::connect(socket).await {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(())
        }
        Ok(_) => {
            let path = socket.display();
            Err(Cause::State(format!(
                "a QEMU of an earlier daemon runs it; attach to unix:{path}"
            )))
        }
        Err(error) => Err(io("see whether a QEMU runs at", socket)(error)),
    }
}

/// Opens and binds all that QEMU is given, in the domain's own directory.
async fn prepare(
    domain: &Domain,
    guest: &Guest,
    sockets: Sockets,
    incoming: bool,
) -> Result<(Launch, OwnedFd), Error> {
    let (program, directory, guest) = (
        domain.0.context.qemu.clone(),
        domain.0.run_dir(),
        guest.clone(),
    );
    let work = move || open(program, &directory, &sockets, &guest, incoming);
    let prepared = tokio::task::spawn_blocking(work).await;
    Ok(prepared.map_err(|error| Cause::Panicked(error.to_string()))??)
}

fn open(
    program: PathBuf,
    directory: &Path,
    sockets: &Sockets,
    guest: &Guest,
    incoming: bool,
) -> Result<(Launch, OwnedFd), Cause> {
    let kernel = guest
        .kernel
        .iter()
        .flat_map(|kernel| std::iter::once(&kernel.image).chain(&kernel.initrd));
    for path in kernel.chain(guest.disks.iter().map(|disk| &disk.path)) {
        File::open(path).map_err(io("open", path))?;
    }
    if directory.exists() {
        std::fs::remove_dir_all(directory)
            .map_err(io("remove what an earlier guest left in", directory))?;
    }
    DirBuilder::new()
        .mode(0o700)
        .create(directory)
        .map_err(io("make", directory))?;

    let monitor = listen(&sockets.monitor)?;
    let agent = sockets.agent.as_deref().map(listen).transpose()?;
    let serial = match &guest.serial {
        Serial::File(path) => {
            let opened = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(path);
            Some(OwnedFd::from(opened.map_err(io("open", path))?))
        }
        Serial::Log(_) => Some(listen(&directory.join(SERIAL))?),
        Serial::None => None,
    };
    let path = directory.join(LOCK);
    let lock = File::create_new(&path).map_err(io("make", &path))?;
    let path = directory.join(STDERR);
    let (said, stderr) = logs::fifo(&path).map_err(io("make", &path))?;

    let tap = |network: &Network| match &network.backend {
        NetworkBackend::Tap(interface) => tap::open(interface).map(Some),
        NetworkBackend::User => Ok(None),
    };
    let taps = guest.networks.iter().map(tap);
    let taps = taps.collect::<Result<Vec<_>, _>>()?;
    let channels = Channels {
        monitor: number(&monitor),
        agent: agent.as_ref().map(number),
        serial: serial.as_ref().map(number),
        taps: taps.iter().map(|tap| tap.as_ref().map(number)).collect(),
    };
    let arguments = arguments(guest, &channels, incoming);
    let fixed = [Some(monitor), agent, serial];
    let descriptors = fixed.into_iter().chain(taps).flatten().collect();
    let launch = Launch {
        program,
        arguments,
        descriptors,
        stderr,
        lock,
    };
    Ok((launch, said))
}

/// A listening socket that QEMU is given: so a connect never races with QEMU's start.
fn listen(path: &Path) -> Result<OwnedFd, Cause> {
    let listener = UnixListener::bind(path).map_err(io("listen on", path))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(io("protect", path))?;
    Ok(listener.into())
}

pub(crate) async fn connect(
    domain: &Domain,
    live: &Arc<Live>,
    sockets: &Sockets,
    deadline: Deadline,
) -> Result<(), Error> {
    let target = format!("unix:{}", sockets.monitor.display());
    connect_monitor(domain, live, &target, deadline).await?;
    if let Some(agent) = &sockets.agent {
        let target = format!("unix:{}", agent.display());
        connect_agent(domain, live, &target, deadline).await?;
    }
    Ok(())
}

/// Connects to the monitor there, negotiates, and follows its events from the first on.
pub(crate) async fn connect_monitor(
    domain: &Domain,
    live: &Arc<Live>,
    target: &str,
    deadline: Deadline,
) -> Result<(), Error> {
    let context = &domain.0.context;
    let connecting = async {
        let stream = context.transports.dial(target, deadline).await?;
        let (pump, options) = (Pump::new(&domain.0, live), monitor_qmp::Options::default());
        let monitor = Monitor::connect(MonitorWire(stream), options, pump, deadline).await?;
        Ok::<_, Error>(monitor)
    };
    let span = connect_span(domain, target);
    let monitor = connecting.instrument(span).await?;
    domain
        .0
        .observe(Observation::Greeted(monitor.greeting().version.qemu));
    let monitor: Arc<dyn Qmp> = Arc::new(monitor);
    live.set_monitor((context.wrap_monitor)(domain.name(), monitor));
    // Without it a migration's or save's status would have to be asked for instead of being told. One of R11's exceptions:
    // it belongs to the greeting. Not of one that is only observed: it is a setting of its QEMU.
    if let Some(monitor) = live.monitor().filter(|_| !domain.0.is_observed) {
        let capabilities = vec![command::MigrationCapability::on("events")];
        let set = monitor.execute(command::MigrateSetCapabilities { capabilities }, deadline);
        match set.await {
            // A migration that an earlier daemon began is under way: it began with them.
            Err(error) if error.kind() == monitor_qmp::ErrorKind::Refused => {
                debug!(domain = domain.name(), %error, "migration events are left as they are");
            }
            other => other.map(drop)?,
        }
    }
    // Its answers are worth no more time than the connect as a whole.
    let _late = timeout_at(deadline, resync(&domain.0, live)).await;
    Ok(())
}

fn connect_span(domain: &Domain, target: &str) -> Span {
    let transport = target.split(':').next();
    debug_span!("connect", domain = domain.name(), transport, target)
}

/// Connects to the agent's channel there. Does not wait for the agent: its guest has yet to boot.
pub(crate) async fn connect_agent(
    domain: &Domain,
    live: &Arc<Live>,
    target: &str,
    deadline: Deadline,
) -> Result<(), Error> {
    let context = &domain.0.context;
    let deadline = deadline.min(Instant::now() + context.defaults.connect);
    let dialling = context.transports.dial(target, deadline);
    let stream = dialling.instrument(connect_span(domain, target)).await?;
    let options = agent_qga::Options::default().with_sync_limit(context.defaults.agent_sync);
    live.set_agent(Arc::new(agent_qga::Agent::new(stream, options)));
    thaw_if_due(domain).await;
    Ok(())
}
