//! A post-copy whose stream broke goes on over another one.
//!
//! A guest that waits for memory may hold QEMU's main loop, which then takes no descriptor. What it does out of band is to
//! listen on a path: so the driver lets the memory in at its gate as before, and carries it on to there.
//!
//! Of what an earlier driver began there is what stands in the guest's directory: a path on which QEMU may listen still.
//!
//! ```text
//!  source's QEMU ══ connection, ticket ══► gate ══ this task ══► recover-N.sock ══► QEMU
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use monitor_qmp::command::{self, MigrationStatus};
use remote_migrate::{Cookie, Prepared};
use rustix::net::{AddressFamily, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

use crate::error::{Cause, Error};
use crate::landing::{Gate, Way};
use crate::ops::AsyncOp;
use crate::ops::migrate::Bring;

/// How long QEMU may take to notice that a stream was cut.
const NOTICING: Duration = Duration::from_secs(5);
/// What is carried at once.
const PIECE: usize = 256 * 1024;

/// What was begun to go on with a post-copy.
#[derive(Default)]
pub(super) struct Recovery {
    tries: u32,
    /// Where QEMU listens, and whoever carries the memory there. Ends with the stream, and not before: the last that QEMU
    /// says on it is that all is there, and a source that misses that waits for ever (QEMU 7.2).
    begun: Option<(PathBuf, Option<Carrier>)>,
}

/// Whoever carries the memory.
struct Carrier {
    task: AbortHandle,
    /// Once it is dropped nobody is let in any more. One who was is carried for to the end.
    _wait: DropGuard,
}

impl Recovery {
    /// What an earlier daemon has begun: QEMU may listen still where nobody came.
    pub(super) fn left_in(directory: &Path) -> Self {
        let names = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let number = |name: &str| -> Option<u32> {
            let number = name.strip_prefix("recover-")?.strip_suffix(".sock")?;
            number.parse().ok()
        };
        let tries = names
            .filter_map(|entry| number(entry.file_name().to_str()?))
            .max();
        Self {
            tries: tries.unwrap_or(0),
            begun: tries.map(|last| (place(directory, last), None)),
        }
    }

    /// Has QEMU listen again, and says where the rest of the memory is to be brought.
    pub(super) async fn begin(&mut self, op: &AsyncOp) -> Result<Prepared, Error> {
        let (domain, rescue) = (op.domain().clone(), op.rescue()?);
        let status = domain.observed().migration;
        if status == Some(MigrationStatus::PostcopyActive) {
            // The source has noticed first that the stream is broken, and only its word leads here.
            if let Err(error) = rescue.execute(command::MigratePause).await {
                warn!(
                    domain = domain.name(),
                    error = format!("{error:#}"),
                    "post-copy was not paused"
                );
            }
            let is_paused = |observed: &crate::Observed| {
                observed.migration == Some(MigrationStatus::PostcopyPaused)
            };
            domain
                .wait_for(is_paused, Instant::now() + NOTICING)
                .await?;
        }
        self.tries += 1;
        let path = place(&domain.0.run_dir(), self.tries);
        let uri = format!("unix:{}", path.display());
        let path = match (
            rescue.execute(command::MigrateRecover { uri }).await,
            self.begun.take(),
        ) {
            (Ok(_), earlier) => {
                stop(earlier.and_then(|(_, carrier)| carrier));
                path
            }
            // It listens still from the last time, when nobody came.
            (Err(_), Some((earlier, carrier))) => {
                stop(carrier);
                earlier
            }
            (Err(error), None) => return Err(error),
        };
        // Known also if there is no gate to it this time.
        self.begun = Some((path.clone(), None));
        let context = domain.0.context.clone();
        let gate = context
            .landing
            .open(&domain.0.run_dir(), context.defaults.silence)
            .await?;
        let way = Way::Ticket(gate.ticket);
        let cookie = Cookie::encode(&Bring::to(&context.landing, way))
            .map_err(|error| Cause::State(error.to_string()))?;
        let connect = gate.connect.as_str().into();
        let (parting, name) = (context.parting.clone(), domain.0.name.clone());
        let wait = CancellationToken::new();
        let carried = carry(gate, path.clone(), wait.clone());
        let carrier = tokio::spawn(context.watchers.track_future(async move {
            if let Some(Err(error)) = parting.run_until_cancelled(carried).await {
                warn!(domain = %name, %error, "the memory of a post-copy was not carried to its end");
            }
        }));
        let carrier = Carrier {
            task: carrier.abort_handle(),
            _wait: wait.drop_guard(),
        };
        self.begun = Some((path, Some(carrier)));
        Ok(Prepared { connect, cookie })
    }
}

/// Where QEMU listens for the rest of the memory.
fn place(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("recover-{number}.sock"))
}

fn stop(carrier: Option<Carrier>) {
    if let Some(carrier) = carrier {
        carrier.task.abort();
    }
}

async fn carry(mut gate: Gate, path: PathBuf, wait: CancellationToken) -> io::Result<()> {
    let Some(connection) = wait.run_until_cancelled(gate.admit()).await else {
        return Ok(());
    };
    drop(gate);
    let inside = UnixStream::connect(&path).await?;
    if sockopt::socket_domain(&connection)? == AddressFamily::UNIX {
        pump(UnixStream::from_std(connection.into())?, inside).await
    } else {
        pump(TcpStream::from_std(tcp(connection))?, inside).await
    }
}

fn tcp(connection: OwnedFd) -> std::net::TcpStream {
    connection.into()
}

async fn pump(mut from: impl AsyncRead + AsyncWrite + Unpin, mut to: UnixStream) -> io::Result<()> {
    copy_bidirectional_with_sizes(&mut from, &mut to, PIECE, PIECE).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;
    use crate::landing::Landing;

    async fn gate(directory: &Path) -> Gate {
        let opened = Landing::unix().open(directory, NOTICING).await;
        opened.unwrap()
    }

    #[tokio::test]
    async fn who_waits_at_a_gate_to_which_nobody_comes_leaves_when_there_is_no_more_need() {
        let dir = tempfile::tempdir().unwrap();
        let gate = gate(dir.path()).await;
        let wait = CancellationToken::new();
        let need = wait.clone().drop_guard();
        let carried = tokio::spawn(carry(gate, dir.path().join("qemu.sock"), wait));
        assert!(!carried.is_finished());
        drop(need);
        carried.await.unwrap().unwrap();
        let at = dir.path().join("migrate.sock");
        let closed = UnixStream::connect(at).await.unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn who_was_let_in_is_carried_for_to_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let gate = gate(dir.path()).await;
        let qemu = UnixListener::bind(dir.path().join("qemu.sock")).unwrap();
        let wait = CancellationToken::new();
        let need = wait.clone().drop_guard();
        let ticket = gate.ticket;
        let carried = tokio::spawn(carry(gate, dir.path().join("qemu.sock"), wait));
        let mut source = UnixStream::connect(dir.path().join("migrate.sock"))
            .await
            .unwrap();
        source.write_all(&ticket.bytes()).await.unwrap();
        let (mut inside, _) = qemu.accept().await.unwrap();
        drop(need);
        source.write_all(b"memory").await.unwrap();
        drop(source);
        let mut read = Vec::new();
        inside.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"memory");
        drop(inside);
        carried.await.unwrap().unwrap();
    }
}
