//! A daemon in a process of its own, as this program's main process sees it: orders in, answers out, a line each.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::Result;

/// A daemon in a process of its own. It ends, and its guests with it, when its orders do.
pub(crate) struct Process {
    pub(crate) name: &'static str,
    pub(crate) dir: PathBuf,
    child: Child,
    orders: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub(crate) fn launch(name: &'static str, folder: &Path, transports: &str) -> Result<Self> {
        let dir = folder.join(name);
        std::fs::create_dir(&dir)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--daemon", transports]).arg(&dir);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = child.stdin.take().ok_or("it takes no orders")?;
        let said = child.stdout.take().ok_or("its words are lost")?;
        let said = BufReader::new(said).lines();
        Ok(Self {
            name,
            dir,
            child,
            orders,
            said,
        })
    }

    /// Gives an order, shows how it goes, and yields the numbers of the answer.
    pub(crate) async fn ask(&mut self, order: &str) -> Result<Vec<i64>> {
        self.orders
            .write_all(format!("{order}\n").as_bytes())
            .await?;
        while let Some(line) = self.said.next_line().await? {
            match line.split_once(' ') {
                Some(("done", answer)) => {
                    let numbers = answer.split_whitespace().map(str::parse);
                    return Ok(numbers.collect::<std::result::Result<_, _>>()?);
                }
                Some(("failed", why)) => return Err(format!("{}: {why}", self.name).into()),
                _ => println!("{}: {line}", self.name),
            }
        }
        Err(format!("{} has ended", self.name).into())
    }

    pub(crate) async fn end(mut self) -> Result<()> {
        drop(self.orders);
        let status = self.child.wait().await?;
        status
            .success()
            .then_some(())
            .ok_or_else(|| format!("{}: {status}", self.name).into())
    }
}
