//! What the guest does for us, through its agent. A silent guest costs these callers only.

use agent_qga::{Limits, Output, Proof, ShutdownMode};
use job_core::AgentKind;
use serde_json::Value;

use crate::domain::Domain;
use crate::error::Error;
use crate::ops::{AgentOp, Call, Deadline};

impl Domain {
    /// Waits until the guest's agent answers, however long the guest boots.
    pub fn wait_agent(&self) -> Call<()> {
        self.agent("wait-agent", AgentKind::Query, |mut op| async move {
            op.agent()?.wait_ready().await
        })
    }

    /// Asks the agent whether it is there.
    pub fn ping(&self) -> Call<()> {
        self.agent("ping", AgentKind::Query, |mut op| async move {
            op.agent()?.execute(agent_qga::Ping).await?;
            Ok(())
        })
    }

    /// Asks which system runs in the guest. What a guest says of itself is not to be trusted.
    pub fn os_info(&self) -> Call<agent_qga::Osinfo> {
        self.agent("os-info", AgentKind::Query, |mut op| async move {
            op.agent()?.execute(agent_qga::GetOsinfo).await
        })
    }

    /// Runs a program in the guest and waits for its end. Of its output no more than `limits` is kept.
    pub fn exec(
        &self,
        program: impl Into<String>,
        arguments: Vec<String>,
        limits: Limits,
    ) -> Call<Output> {
        let program = program.into();
        self.agent("exec", AgentKind::Modify, move |mut op| async move {
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            op.agent()?.run(&program, &arguments, &[], limits).await
        })
    }

    /// Has the guest shut itself down, and waits for the proof that it does.
    pub fn shutdown(&self, mode: ShutdownMode) -> Call<Proof> {
        self.agent("shutdown", AgentKind::Modify, move |mut op| async move {
            op.agent()?.execute(agent_qga::Shutdown { mode }).await
        })
    }

    /// Any command of the agent, by name. Counted as one that changes the guest.
    pub fn agent_command(&self, name: impl Into<String>, arguments: Value) -> Call<Value> {
        let name = name.into();
        self.agent(
            "agent-command",
            AgentKind::Modify,
            move |mut op| async move { op.agent()?.execute_raw(name, arguments).await },
        )
    }

    /// A call that runs `body` under an agent job, within the default of a call.
    pub(super) fn agent<T, F, B>(&self, owner: &'static str, kind: AgentKind, body: B) -> Call<T>
    where
        B: FnOnce(AgentOp) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        let domain = self.clone();
        let limit = self.0.context.defaults.call;
        Call::new(limit, move |deadline: Deadline| async move {
            domain.run_agent(owner, kind, deadline, body).await
        })
    }
}
