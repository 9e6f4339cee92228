//! A daemon in a process of its own, as this program's main process sees it: orders in, answers out, a line each. What else it
//! says is shown as it comes.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

use crate::Result;

/// A daemon in a process of its own. It ends, and its guests with it, when its orders do.
pub(crate) struct Process {
    pub(crate) name: &'static str,
    pub(crate) dir: PathBuf,
    child: Child,
    orders: ChildStdin,
    answers: mpsc::Receiver<std::result::Result<String, String>>,
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
        let (answered, answers) = mpsc::channel(1);
        tokio::spawn(show(name, BufReader::new(said).lines(), answered));
        Ok(Self {
            name,
            dir,
            child,
            orders,
            answers,
        })
    }

    /// Gives an order, and yields the answer.
    pub(crate) async fn ask(&mut self, order: &str) -> Result<String> {
        self.orders
            .write_all(format!("{order}\n").as_bytes())
            .await?;
        match self.answers.recv().await {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(why)) => Err(format!("{}: {why}", self.name).into()),
            None => Err(format!("{} has ended", self.name).into()),
        }
    }

    pub(crate) async fn end(mut self) -> Result<()> {
        drop(self.orders);
        // Until all is shown that it says.
        while self.answers.recv().await.is_some() {}
        let status = self.child.wait().await?;
        status
            .success()
            .then_some(())
            .ok_or_else(|| format!("{}: {status}", self.name).into())
    }
}

/// Tells answers from what is only to be shown, until it has nothing more to say.
async fn show(
    name: &'static str,
    mut said: Lines<BufReader<ChildStdout>>,
    answered: mpsc::Sender<std::result::Result<String, String>>,
) {
    while let Ok(Some(line)) = said.next_line().await {
        let answer = match line.split_once(' ') {
            Some(("done", answer)) => Ok(answer.to_owned()),
            Some(("failed", why)) => Err(why.to_owned()),
            _ => {
                println!("{name:>5}: {line}");
                continue;
            }
        };
        // Nobody asked if nobody listens.
        let _unheard = answered.send(answer).await;
    }
}
