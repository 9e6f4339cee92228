//! What every agent can do, whoever stands behind [`Qga`]: typed calls and helpers.
//!
//! It is built on [`Qga::call`] alone and knows no stream and no sync.

use std::borrow::Cow;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use serde_json::value::to_raw_value;
use tokio::time::{Instant, sleep_until};

use crate::agent::{Deadline, Qga, Request};
use crate::command::{
    Command, Exec, ExecState, ExecStatus, FreezeState, FsfreezeStatus, Info, Ping,
};
use crate::error::{Error, ErrorKind};
use crate::protocol::COMMAND_NOT_FOUND;

/// The first and the longest round of [`QgaExt::wait_ready`]: an agent answers 0.1 s after it
/// started, and a guest that takes minutes needs no more than one question a second or two.
const ROUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The first and the longest pause of [`QgaExt::run`] between two questions.
const POLLS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// How much of a program's output [`QgaExt::run`] hands over, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a program has two outputs")]
pub struct Limits {
    /// Of its standard output.
    pub stdout: usize,
    /// Of its standard error.
    pub stderr: usize,
}

impl Default for Limits {
    /// 1 MiB each.
    fn default() -> Self {
        Self {
            stdout: 1 << 20,
            stderr: 1 << 20,
        }
    }
}

/// How a program in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Output {
    /// What it exited with, unless a signal ended it.
    pub exit_code: Option<i64>,
    /// The signal that ended it; on Windows the exception.
    pub signal: Option<i64>,
    /// The beginning of its standard output.
    pub stdout: Vec<u8>,
    /// The beginning of its standard error.
    pub stderr: Vec<u8>,
    /// Whether there was more output, cut off here or by the agent.
    pub stdout_truncated: bool,
    /// Whether there were more errors, cut off here or by the agent.
    pub stderr_truncated: bool,
}

impl Output {
    /// Whether it exited with 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.exit_code == Some(0)
    }
}

/// Typed calls and helpers for every [`Qga`].
pub trait QgaExt: Qga {
    /// Has a typed command done.
    ///
    /// When the agent says that it does not have the command, it is asked whether it is frozen:
    /// then it says so of nearly all commands. If it lists the command all the same, the error is
    /// of kind `Frozen`.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`]; `InvalidArguments` and `UnexpectedReply`.
    ///
    /// # Cancel safety
    ///
    /// As [`Qga::call`].
    fn execute<C: Command>(
        &self,
        command: C,
        deadline: Deadline,
    ) -> impl Future<Output = Result<C::Reply, Error>> + Send {
        async move {
            let request = Request::of(&command, deadline)?;
            match self.call(request).await {
                Ok(reply) => reply.decode(C::NAME),
                Err(error) => Err(tell_frozen(self, error, deadline).await),
            }
        }
    }

    /// Has any command done, by name. `Value::Null` stands for no arguments.
    ///
    /// Not for commands whose success is silence: their answer never comes. Give those a
    /// [`Command`] with `SILENT`, or [`Qga::call`] a silent request.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    ///
    /// # Cancel safety
    ///
    /// As [`Qga::call`].
    fn execute_raw(
        &self,
        name: impl Into<Cow<'static, str>> + Send,
        arguments: Value,
        deadline: Deadline,
    ) -> impl Future<Output = Result<Value, Error>> + Send {
        let mut request = Request::new(name, deadline);
        async move {
            let name = request.name.clone();
            if !arguments.is_null() {
                let arguments = to_raw_value(&arguments)
                    .map_err(|error| Error::invalid_arguments(&name, error))?;
                request.arguments = Some(arguments);
            }
            match self.call(request).await {
                Ok(reply) => reply.decode(&name),
                Err(error) => Err(tell_frozen(self, error, deadline).await),
            }
        }
    }

    /// Waits until the agent answers, however long its guest boots.
    ///
    /// Asks in rounds that grow from 0.1 s to 2 s, since what is sent before the agent listens may
    /// be lost. An agent that refuses to answer `guest-ping` is there all the same.
    ///
    /// # Errors
    ///
    /// `Closed`, `Denied` at once; at the deadline what the last round met, mostly `Unresponsive`
    /// or `NotListening`.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the guest is changed in nothing.
    fn wait_ready(&self, deadline: Deadline) -> impl Future<Output = Result<(), Error>> + Send {
        async move {
            let (mut round, longest) = ROUNDS;
            loop {
                let end = deadline.min(Instant::now() + round);
                let error = match self.call(Request::of(&Ping, end)?).await {
                    Ok(_) => return Ok(()),
                    Err(error) => error,
                };
                match error.kind() {
                    ErrorKind::Refused => return Ok(()),
                    ErrorKind::Closed | ErrorKind::Denied => return Err(error),
                    // Out of patience or put off: the round is over when its time is.
                    _ => sleep_until(end).await,
                }
                if end == deadline {
                    return Err(error);
                }
                round = longest.min(round * 2);
            }
        }
    }

    /// Runs a program in the guest and waits for its end.
    ///
    /// An empty `input` gives it no standard input. What goes beyond `limits` is cut off and
    /// flagged. The agent itself keeps 16 MiB of each output, more than one answer may hold by
    /// default: a program that talks that much ends in `TooLarge` and its result is lost, so send
    /// its output elsewhere or raise [`Options::max_message`](crate::Options::max_message).
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute); `StillRunning` if the program had not ended by `deadline`.
    /// Once the program was started, every error's effect is `Unknown`.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe towards later calls. The program is not stopped, and its result is lost; to
    /// keep hold of it, use [`Exec`] and [`ExecStatus`].
    fn run(
        &self,
        program: &str,
        args: &[&str],
        input: &[u8],
        limits: Limits,
        deadline: Deadline,
    ) -> impl Future<Output = Result<Output, Error>> + Send {
        let exec = Exec {
            path: program.to_owned(),
            arg: args.iter().map(|&arg| arg.to_owned()).collect(),
            input_data: (!input.is_empty()).then(|| BASE64.encode(input)),
            capture_output: true,
            ..Exec::default()
        };
        async move {
            let since = Instant::now();
            let pid = self.execute(exec, deadline).await?.pid;
            let (mut pause, longest) = POLLS;
            loop {
                match self.execute(ExecStatus { pid }, deadline).await {
                    Ok(state) if state.exited => return output(state, limits),
                    Ok(_) => {}
                    // A guest that is paused for a while runs on afterwards, and so does the program.
                    Err(error) if error.is_not_ready() && Instant::now() < deadline => {}
                    Err(error) => return Err(error.into_unknown()),
                }
                if deadline <= Instant::now() + pause {
                    sleep_until(deadline).await;
                    return Err(Error::still_running(Exec::NAME, pid, since.elapsed()));
                }
                sleep_until(Instant::now() + pause).await;
                pause = longest.min(pause * 2);
            }
        }
    }
}

impl<Q: Qga + ?Sized> QgaExt for Q {}

/// `error`, or what it really means: a frozen agent claims not to have its commands.
async fn tell_frozen<Q: Qga + ?Sized>(qga: &Q, error: Error, deadline: Deadline) -> Error {
    if error.class() != Some(COMMAND_NOT_FOUND) || error.command() == FsfreezeStatus::NAME {
        return error;
    }
    if !matches!(
        ask(qga, FsfreezeStatus, deadline).await,
        Ok(FreezeState::Frozen)
    ) {
        return error;
    }
    match ask(qga, Info, deadline).await {
        Ok(info) if !info.knows(error.command()) => error,
        // An agent that will not list its commands is frozen for certain, and that says more.
        _ => error.into_frozen(),
    }
}

/// A question about an error: its own error asks no further.
async fn ask<Q: Qga + ?Sized, C: Command>(
    qga: &Q,
    command: C,
    deadline: Deadline,
) -> Result<C::Reply, Error> {
    let reply = qga.call(Request::of(&command, deadline)?).await?;
    reply.decode(C::NAME)
}

fn output(state: ExecState, limits: Limits) -> Result<Output, Error> {
    let (stdout, stdout_cut) = decode(state.out_data, limits.stdout)?;
    let (stderr, stderr_cut) = decode(state.err_data, limits.stderr)?;
    Ok(Output {
        exit_code: state.exitcode,
        signal: state.signal,
        stdout,
        stderr,
        stdout_truncated: stdout_cut || state.out_truncated,
        stderr_truncated: stderr_cut || state.err_truncated,
    })
}

/// At most `limit` bytes of what `text` stands for, and whether that is not all.
fn decode(text: Option<String>, limit: usize) -> Result<(Vec<u8>, bool), Error> {
    let mut text = text.unwrap_or_default().into_bytes();
    // Four characters carry three bytes, and one byte over the limit shows that there is more.
    text.truncate((limit / 3 + 1).saturating_mul(4));
    let mut bytes = BASE64
        .decode(text)
        .map_err(|error| Error::unexpected_reply(ExecStatus::NAME, &error))?;
    let cut = bytes.len() > limit;
    bytes.truncate(limit);
    Ok((bytes, cut))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_cut_at_its_limit_and_only_flagged_when_it_was() {
        for length in 0..20_usize {
            let whole: Vec<u8> = (0..20).take(length).collect();
            for limit in 0..25 {
                let (bytes, cut) = decode(Some(BASE64.encode(&whole)), limit).unwrap();
                assert_eq!(bytes, whole[..length.min(limit)]);
                assert_eq!(cut, length > limit);
            }
        }
        assert_eq!(decode(None, 1).unwrap(), (Vec::new(), false));
    }

    #[test]
    fn output_that_is_no_base64_is_an_unexpected_reply() {
        let error = decode(Some("not\u{7}base64".to_owned()), 100).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedReply);
    }
}
