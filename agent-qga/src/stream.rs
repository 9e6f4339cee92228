//! A program in the guest whose output is read while it runs.
//!
//! The protocol has no such thing: `guest-exec` keeps a program's output, 16 MiB of each, and hands
//! it over when the program has ended. So the program is started by the guest's shell with its
//! output in two files, and the files are read as they grow. That has its price:
//!
//! - the guest needs `/bin/sh`, `mktemp` and `rm`; on Windows there is no streaming, only
//!   [`run`](crate::QgaExt::run);
//! - what the program writes takes room in the guest's temporary folder until it ends. The files
//!   have no name any more by the time it runs, so they go with it whatever becomes of us;
//! - a program that asks whether it writes to a terminal or a pipe is told: to a file. What it holds
//!   back in its own buffers is not seen before it lets go of it;
//! - the order between its two outputs is lost, as it is with pipes.
//!
//! Nothing of this is needed on this side: one piece is held at a time, and a reader that is slow
//! slows nothing down.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::agent::{Deadline, Qga};
use crate::command::{Command, Exec, ExecState, ExecStatus};
use crate::error::Error;
use crate::ext::{Limits, QgaExt as _};
use crate::file::{CHUNK, GuestFile, stopped};

/// Makes the two files, in a folder that only the agent's user can look into.
const PREPARE: &str =
    r#"umask 077; d=$(mktemp -d) && : >"$d/out" && : >"$d/err" && printf %s "$d""#;

/// Opens them, takes their names away, and becomes the program.
const START: &str = r#"exec >>"$0/out" 2>>"$0/err"; rm -r "$0"; exec "$@""#;

/// The first and the longest pause between two looks at a program that says nothing.
const POLLS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// A program that runs in the guest, and what it says.
///
/// Drop stops neither the program nor anything else in the guest; what it says from then on
/// nobody hears.
#[must_use = "what the program says is heard by asking `next`"]
pub struct ProgramStream {
    qga: Arc<dyn Qga>,
    pid: i64,
    stdout: Tail,
    stderr: Tail,
    /// The question under way. Its answer is given once only, so it outlives the call that asked.
    asked: Option<JoinHandle<Result<ExecState, Error>>>,
    ended: Option<ExecState>,
    pause: Duration,
    since: Instant,
}

/// A part of what a program said.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a program has two outputs")]
pub enum Piece {
    /// Of its standard output.
    Stdout(Vec<u8>),
    /// Of its standard error.
    Stderr(Vec<u8>),
}

/// How a program ended whose output was streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProgramEnd {
    /// What it exited with, unless a signal ended it. 126 or 127 may be the shell's: the program
    /// could not be started, and standard error says why.
    pub exit_code: Option<i64>,
    /// The signal that ended it.
    pub signal: Option<i64>,
    /// Whether its output went beyond the limit, and the rest was left in the guest.
    pub stdout_truncated: bool,
    /// Whether its errors did.
    pub stderr_truncated: bool,
}

/// What one output has said and may still say.
struct Tail {
    file: GuestFile,
    left: usize,
    truncated: bool,
}

impl ProgramStream {
    /// Starts a program. `limits` is how much of each output is handed over in all.
    ///
    /// # Errors
    ///
    /// As [`QgaExt::run`](crate::QgaExt::run); `Refused` with class `sh` if the guest has no place
    /// for the output.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe towards later calls. The program may be started all the same; then it runs to
    /// its end unheard.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn start(
        qga: Arc<dyn Qga>,
        program: &str,
        arguments: &[&str],
        input: &[u8],
        limits: Limits,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let input = (!input.is_empty()).then(|| BASE64.encode(input));
        let command: Vec<String> = [program]
            .iter()
            .chain(arguments)
            .map(|&word| word.to_owned())
            .collect();
        // On a task of its own, so that a folder that was made is also used or removed.
        let starting = tokio::spawn(async move {
            let folder = prepare(&*qga, deadline).await?;
            match launch(qga.clone(), &folder, command, input, limits, deadline).await {
                Ok(stream) => Ok(stream),
                Err(error) => {
                    clean_up(&*qga, &folder, deadline).await;
                    Err(error)
                }
            }
        });
        starting.await.unwrap_or_else(|_| Err(stopped(Exec::NAME)))
    }

    /// Its number in the guest.
    #[must_use]
    pub fn pid(&self) -> i64 {
        self.pid
    }

    /// Waits for the next part of what it says; `None` once it has ended and all was said.
    ///
    /// # Errors
    ///
    /// As [`Qga::call`]; `StillRunning` if it said nothing more by `deadline`. After either the next
    /// call goes on where this one left off.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing it said is lost.
    pub async fn next(&mut self, deadline: Deadline) -> Result<Option<Piece>, Error> {
        loop {
            // What it said before it ended is in the files: so the end comes before the last read.
            let ended = self.ended.is_some();
            if let Some(bytes) = self.stdout.read(deadline).await? {
                self.pause = POLLS.0;
                return Ok(Some(Piece::Stdout(bytes)));
            }
            if let Some(bytes) = self.stderr.read(deadline).await? {
                self.pause = POLLS.0;
                return Ok(Some(Piece::Stderr(bytes)));
            }
            if ended {
                return Ok(None);
            }
            let state = self.ask(deadline).await?;
            if state.exited {
                self.ended = Some(state);
                continue;
            }
            if deadline <= Instant::now() + self.pause {
                sleep_until(deadline).await;
                let ran = self.since.elapsed();
                return Err(Error::still_running(Exec::NAME, self.pid, ran));
            }
            sleep_until(Instant::now() + self.pause).await;
            self.pause = POLLS.1.min(self.pause * 2);
        }
    }

    /// How it ended, once [`next`](Self::next) has seen that.
    #[must_use]
    pub fn end(&self) -> Option<ProgramEnd> {
        self.ended.as_ref().map(|state| ProgramEnd {
            exit_code: state.exitcode,
            signal: state.signal,
            stdout_truncated: self.stdout.truncated,
            stderr_truncated: self.stderr.truncated,
        })
    }

    async fn ask(&mut self, deadline: Deadline) -> Result<ExecState, Error> {
        let (qga, pid) = (self.qga.clone(), self.pid);
        let asked = self.asked.get_or_insert_with(|| {
            tokio::spawn(async move { qga.execute(ExecStatus { pid }, deadline).await })
        });
        let answer = asked.await;
        self.asked = None;
        answer.unwrap_or_else(|_| Err(stopped(ExecStatus::NAME)))
    }
}

impl fmt::Debug for ProgramStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProgramStream")
            .field("pid", &self.pid)
            .field("end", &self.end())
            .finish_non_exhaustive()
    }
}

impl Tail {
    /// What is there now and was not read yet.
    async fn read(&mut self, deadline: Deadline) -> Result<Option<Vec<u8>>, Error> {
        if self.truncated {
            return Ok(None);
        }
        // One byte over the limit shows that there is more.
        let wanted = self.left.saturating_add(1).min(CHUNK);
        let mut bytes = self.file.read(wanted, deadline).await?;
        self.truncated = bytes.len() > self.left;
        bytes.truncate(self.left);
        self.left -= bytes.len();
        Ok((!bytes.is_empty()).then_some(bytes))
    }
}

async fn prepare(qga: &dyn Qga, deadline: Deadline) -> Result<String, Error> {
    let limits = Limits {
        stdout: 4096,
        stderr: 256,
    };
    let output = qga
        .run("/bin/sh", &["-c", PREPARE], b"", limits, deadline)
        .await?;
    if !output.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(Error::refused(Exec::NAME, "sh", why.trim()));
    }
    match String::from_utf8(output.stdout) {
        Ok(folder) if folder.starts_with('/') => Ok(folder),
        _ => Err(Error::unexpected_reply(Exec::NAME, &"no folder was made")),
    }
}

async fn launch(
    qga: Arc<dyn Qga>,
    folder: &str,
    command: Vec<String>,
    input: Option<String>,
    limits: Limits,
    deadline: Deadline,
) -> Result<ProgramStream, Error> {
    let open = async |name: &str, left: usize| {
        let path = format!("{folder}/{name}");
        let file = GuestFile::open(qga.clone(), &path, "r", deadline).await?;
        Ok::<_, Error>(Tail {
            file,
            left,
            truncated: false,
        })
    };
    let stdout = open("out", limits.stdout).await?;
    let stderr = open("err", limits.stderr).await?;
    let mut arg = vec!["-c".to_owned(), START.to_owned(), folder.to_owned()];
    arg.extend(command);
    let exec = Exec {
        path: "/bin/sh".to_owned(),
        arg,
        input_data: input,
        capture_output: false,
        ..Exec::default()
    };
    let since = Instant::now();
    let pid = qga.execute(exec, deadline).await?.pid;
    Ok(ProgramStream {
        qga,
        pid,
        stdout,
        stderr,
        asked: None,
        ended: None,
        pause: POLLS.0,
        since,
    })
}

/// Removes what would be left behind. Whether that goes well, the error before it does not depend on.
async fn clean_up(qga: &dyn Qga, folder: &str, deadline: Deadline) {
    let exec = Exec {
        path: "rm".to_owned(),
        arg: vec!["-rf".to_owned(), folder.to_owned()],
        ..Exec::default()
    };
    if let Err(error) = qga.execute(exec, deadline).await {
        tracing::debug!(%error, "a temporary folder stays in the guest");
    }
}
