//! The doors to the monitor and the agent. Nothing else holds the connections, and each door asks for the guard that
//! gives the right to pass it (R11 to R13).
//!
//! Before each command: the guard's generation lives, its guest is there, QEMU answers, and no command of a caller that
//! left is still inside. After it: the same guest still lives. The exceptions are in [`live`](crate::domain): greeting
//! and resync, which write only what is observed.

mod queued;

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use agent_qga::{Qga, QgaExt};
use job_core::{AgentRight, Guard, JobKind, Label, Step, Stop, Token};
use monitor_qmp::{Command, Health, Qmp};
use serde_json::Value;
use tokio::time::{Instant, timeout};
use tracing::{Instrument, debug_span};

use crate::domain::{Domain, Inner, Live};
use crate::error::{Cause, Error};
use crate::ops::{Deadline, observed_only};

pub(crate) use queued::Queued;

/// A command whose connection ended waits this long for the reaper to say how the guest ended.
const VERDICT: Duration = Duration::from_secs(3);

/// One visit to the monitor, for as long as the guard it borrows.
#[must_use = "it is a right to send commands, and sends none by itself"]
pub struct Monitor<'a> {
    domain: &'a Domain,
    right: Step<'a>,
    live: Arc<Live>,
    deadline: Deadline,
    /// `Destroy` goes on when QEMU is silent: it has other means.
    is_destroy: bool,
}

impl<'a> Monitor<'a> {
    pub(crate) fn enter(
        domain: &'a Domain,
        right: Step<'a>,
        kind: Option<JobKind>,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let live = admit(domain, &right)?;
        Ok(Self {
            domain,
            right,
            live,
            deadline,
            is_destroy: kind == Some(JobKind::Destroy),
        })
    }

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    ///
    /// [`Gone`](crate::ErrorKind::Gone) if the guest ended before or meanwhile,
    /// [`Unresponsive`](crate::ErrorKind::Unresponsive) if QEMU is silent, else what the monitor or QEMU said.
    ///
    /// # Cancel safety
    ///
    /// Dropping it leaves the command inside QEMU; the next job waits for its answer. An operation's task is never
    /// dropped half way.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Reply, Error> {
        let monitor = self.ready(C::NAME).await?;
        self.sending(C::NAME.into(), monitor.execute(command, self.deadline))
            .await
    }

    /// Sends a command with descriptors riding on it.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute); `Monitor` if the transport passes no descriptors.
    ///
    /// # Cancel safety
    ///
    /// As [`execute`](Self::execute).
    pub async fn execute_with_fds<C: Command>(
        &self,
        command: C,
        fds: Vec<OwnedFd>,
    ) -> Result<C::Reply, Error> {
        let monitor = self.ready(C::NAME).await?;
        self.sending(
            C::NAME.into(),
            monitor.execute_with_fds(command, fds, self.deadline),
        )
        .await
    }

    /// Sends a command by name. `arguments` is an object, or null for none.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    ///
    /// # Cancel safety
    ///
    /// As [`execute`](Self::execute).
    pub async fn execute_raw(
        &self,
        name: impl Into<Cow<'static, str>> + Send,
        arguments: Value,
    ) -> Result<Value, Error> {
        let name = name.into();
        let label = match &name {
            Cow::Borrowed(name) => Label::from(*name),
            Cow::Owned(name) => Label::from(name.clone()),
        };
        let monitor = self.ready(&name).await?;
        self.sending(label, monitor.execute_raw(name, arguments, self.deadline))
            .await
    }

    async fn ready(&self, command: &str) -> Result<&Arc<dyn Qmp>, Error> {
        check(self.domain, &self.right)?;
        permit(&self.domain.0, command)?;
        let monitor = self.live.monitor().ok_or_else(|| {
            Cause::State(
                "its monitor is not connected; that is tried again as long as QEMU runs".into(),
            )
        })?;
        if monitor.health() == Health::Unresponsive && !self.is_destroy {
            return Err(Cause::Unresponsive.into());
        }
        if !self.is_destroy
            && let Err(error) = monitor.settled(self.deadline).await
        {
            return Err(self.verdict(error).await);
        }
        Ok(monitor)
    }

    async fn sending<T>(
        &self,
        command: Label,
        sent: impl Future<Output = Result<T, monitor_qmp::Error>>,
    ) -> Result<T, Error> {
        let span = debug_span!("command", domain = %self.domain.0.name, command = %command);
        self.right.tell_command(Some(command));
        let began = Instant::now();
        let answer = sent.instrument(span).await;
        self.right.tell_command(None);
        let failed = answer.as_ref().err().map(|error| error.effect().into());
        let meter = &self.domain.0.context.meter;
        meter.monitor.ended(began.elapsed(), failed);
        match answer {
            Ok(reply) => check(self.domain, &self.right).map(|()| reply),
            Err(error) => Err(self.verdict(error).await),
        }
    }

    /// A lost connection is how the guest's end looks from here; how it ended, the reaper knows.
    async fn verdict(&self, error: monitor_qmp::Error) -> Error {
        verdict(
            self.domain,
            &self.right,
            error.kind() == monitor_qmp::ErrorKind::Closed,
            error,
        )
        .await
    }
}

/// The lane past QEMU's main loop (R11's exception): it waits for no command that is stuck there, and for no other job.
pub(crate) struct Rescue {
    live: Arc<Live>,
    token: Token,
}

/// What answers out of band answers at once: it has nothing to wait for.
const OUT_OF_BAND: Duration = Duration::from_secs(5);

impl Rescue {
    pub(crate) fn enter(domain: &Domain, right: &impl Guard) -> Result<Self, Error> {
        let (live, token) = (admit(domain, right)?, right.token());
        Ok(Self { live, token })
    }

    /// Sends a command out of band.
    pub(crate) async fn execute<C: Command>(&self, command: C) -> Result<C::Reply, Error> {
        if let Some(stop @ Stop::Gone { .. }) = self.token.stopped() {
            return Err(Cause::State(stop.to_string()).into());
        }
        let monitor = self.live.monitor();
        let monitor = monitor.ok_or_else(|| Cause::State("its monitor is not connected".into()))?;
        let deadline = Deadline::now() + OUT_OF_BAND;
        Ok(monitor.execute_oob(command, deadline).await?)
    }
}

/// One visit to the guest agent, for as long as the guard it borrows.
#[must_use = "it is a right to send commands, and sends none by itself"]
pub struct Agent<'a, R: AgentRight> {
    domain: &'a Domain,
    right: &'a R,
    live: Arc<Live>,
    deadline: Deadline,
}

impl<'a, R: AgentRight> Agent<'a, R> {
    pub(crate) fn enter(
        domain: &'a Domain,
        right: &'a R,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let live = admit(domain, right)?;
        Ok(Self {
            domain,
            right,
            live,
            deadline,
        })
    }

    /// Has a typed command done by the agent.
    ///
    /// # Errors
    ///
    /// [`Gone`](crate::ErrorKind::Gone) if the guest ended before or meanwhile, else what the agent said or did not say.
    ///
    /// # Cancel safety
    ///
    /// The command takes its course in the guest; no later call sees its answer.
    pub async fn execute<C: agent_qga::Command>(&self, command: C) -> Result<C::Reply, Error> {
        let agent = self.ready(C::NAME)?;
        self.talking(C::NAME.into(), agent.execute(command, self.deadline))
            .await
    }

    /// Has any command done by the agent, by name. `arguments` is an object, or null for none.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    ///
    /// # Cancel safety
    ///
    /// As [`execute`](Self::execute).
    pub async fn execute_raw(&self, name: String, arguments: Value) -> Result<Value, Error> {
        let agent = self.ready(&name)?;
        self.talking(
            name.clone().into(),
            agent.execute_raw(name, arguments, self.deadline),
        )
        .await
    }

    /// Runs a program in the guest and waits for its end.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    ///
    /// # Cancel safety
    ///
    /// The program goes on in the guest, and its result is lost.
    pub async fn run(
        &self,
        program: &str,
        arguments: &[&str],
        input: &[u8],
        limits: agent_qga::Limits,
    ) -> Result<agent_qga::Output, Error> {
        let agent = self.ready("guest-exec")?;
        let running = agent.run(program, arguments, input, limits, self.deadline);
        self.talking("guest-exec".into(), running).await
    }

    /// Waits until the agent answers, however long its guest boots.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn wait_ready(&self) -> Result<(), Error> {
        let agent = self.ready("guest-ping")?;
        self.talking("guest-ping".into(), agent.wait_ready(self.deadline))
            .await
    }

    fn ready(&self, command: &str) -> Result<&Arc<dyn Qga>, Error> {
        check(self.domain, self.right)?;
        permit(&self.domain.0, command)?;
        Ok(self
            .live
            .agent()
            .ok_or_else(|| Cause::State("it has no channel to a guest agent".into()))?)
    }

    async fn talking<T>(
        &self,
        command: Label,
        sent: impl Future<Output = Result<T, agent_qga::Error>>,
    ) -> Result<T, Error> {
        let span = debug_span!("command", domain = %self.domain.0.name, command = %command);
        self.right.tell_command(Some(command));
        let began = Instant::now();
        let answer = sent.instrument(span).await;
        self.right.tell_command(None);
        let failed = answer.as_ref().err().map(|error| error.effect().into());
        let meter = &self.domain.0.context.meter;
        meter.agent.ended(began.elapsed(), failed);
        match answer {
            // Not checked again: the success of a shutdown is that the guest is gone.
            Ok(reply) => Ok(reply),
            Err(error) => {
                let is_closed = error.kind() == agent_qga::ErrorKind::Closed;
                Err(verdict(self.domain, self.right, is_closed, error).await)
            }
        }
    }
}

/// An observer's domain lets only those commands pass that ask.
pub(crate) fn permit(domain: &Inner, command: &str) -> Result<(), Error> {
    if domain.is_observed && !asks_only(command) {
        return Err(observed_only(&format!("the command '{command}'")));
    }
    Ok(())
}

/// Whether a command of QEMU or of an agent changes nothing, by its name. What is not known might.
fn asks_only(command: &str) -> bool {
    let by_prefix = ["query-", "qom-list", "guest-get-"];
    let by_name = [
        "qom-get",
        "device-list-properties",
        "guest-ping",
        "guest-info",
        "guest-network-get-interfaces",
        "guest-fsfreeze-status",
    ];
    by_prefix.iter().any(|prefix| command.starts_with(prefix)) || by_name.contains(&command)
}

/// The guard is one of this domain, its generation lives, and its guest is there.
fn admit(domain: &Domain, right: &impl Guard) -> Result<Arc<Live>, Error> {
    check(domain, right)?;
    let live = domain
        .0
        .live()
        .filter(|live| live.generation == right.generation());
    Ok(live.ok_or_else(|| Cause::State("no guest runs in it".into()))?)
}

fn check(domain: &Domain, right: &impl Guard) -> Result<(), Error> {
    if !right.is_of(&domain.0.scheduler) {
        return Err(Cause::BadRequest("the job held is one of another domain".into()).into());
    }
    Ok(right.check()?)
}

async fn verdict(
    domain: &Domain,
    right: &impl Guard,
    is_closed: bool,
    error: impl Into<Cause>,
) -> Error {
    if is_closed {
        let _late = timeout(VERDICT, right.token().gone()).await;
    }
    match check(domain, right) {
        Ok(()) => error.into().into(),
        Err(gone) => gone,
    }
}
