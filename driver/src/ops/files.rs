//! Files into the guest and out of it, and programs that are heard while they run, through its agent.
//!
//! Each piece takes an agent job of its own, so that a long copy keeps nobody from the agent for longer than a piece takes.

use agent_qga::{Digest, Limits, ProgramStream, Transferred};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::access::Queued;
use crate::domain::Domain;
use crate::error::Error;
use crate::ops::Call;

impl Domain {
    /// Copies a file out of the guest, no more than `limit` bytes, and compares it with the digest it should have.
    ///
    /// Failed or dropped, `to` has got an unknown part of it. What a guest says of its own files is not to be trusted.
    pub fn download<W>(
        &self,
        path: impl Into<String>,
        mut to: W,
        limit: u64,
        expected: Option<Digest>,
    ) -> Call<Transferred>
    where
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let (domain, path) = (self.clone(), path.into());
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let copy = async {
                let agent = Queued::of(&domain, "download")?;
                let copied = agent_qga::download(agent, &path, &mut to, limit, expected, deadline);
                Ok::<_, Error>(copied.await?)
            };
            copy.await
                .map_err(|error| error.told_of(&"download from".into(), &domain.0.name))
        })
    }

    /// Copies into a file of the guest, reads it back and compares.
    ///
    /// Failed or dropped, the guest holds an unknown part of it.
    pub fn upload<R>(&self, path: impl Into<String>, mut from: R) -> Call<Transferred>
    where
        R: AsyncRead + Unpin + Send + 'static,
    {
        let (domain, path) = (self.clone(), path.into());
        Call::new(self.0.context.defaults.long, move |deadline| async move {
            let copy = async {
                let agent = Queued::of(&domain, "upload")?;
                let copied = agent_qga::upload(agent, &path, &mut from, deadline);
                Ok::<_, Error>(copied.await?)
            };
            copy.await
                .map_err(|error| error.told_of(&"upload to".into(), &domain.0.name))
        })
    }

    /// Starts a program in the guest whose output is heard while it runs. `limits` is how much of each output is handed
    /// over in all. The stream holds no job; each of its questions takes one.
    pub fn stream(
        &self,
        program: impl Into<String>,
        arguments: Vec<String>,
        input: Vec<u8>,
        limits: Limits,
    ) -> Call<ProgramStream> {
        let (domain, program) = (self.clone(), program.into());
        Call::new(self.0.context.defaults.call, move |deadline| async move {
            let start = async {
                let agent = Queued::of(&domain, "stream")?;
                let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
                let started =
                    ProgramStream::start(agent, &program, &arguments, &input, limits, deadline);
                Ok::<_, Error>(started.await?)
            };
            start
                .await
                .map_err(|error| error.told_of(&"run a program in".into(), &domain.0.name))
        })
    }
}
