//! One of the two hosts, as the campaign sees it: its daemon in a process of its own, its directories, its disk.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use driver::{FileStore, Shelf, StateStore as _};
use rustix::process::Signal;
use uuid::Uuid;

use crate::lab::Lab;
use crate::rig::kill;
use crate::witness::now;

/// The longest a daemon may take over an order that does not wait for a migration.
const ANSWERS: Duration = Duration::from_secs(20);

pub(crate) struct Host {
    pub(crate) dir: PathBuf,
    number: usize,
    daemon: Option<Daemon>,
    /// What it said beside its answers.
    told: Vec<String>,
    /// All that was said, for whoever has to understand a failure.
    transcript: Vec<(Duration, String)>,
}

struct Daemon {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; it is reaped either way.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Host {
    pub(crate) fn new(dir: &Path, number: usize) -> Result<Self, String> {
        fs::create_dir_all(dir.join("run")).map_err(|error| error.to_string())?;
        let host = Self {
            dir: dir.to_owned(),
            number,
            daemon: None,
            told: Vec::new(),
            transcript: Vec::new(),
        };
        host.new_boot()?;
        Ok(host)
    }

    fn boot(&self) -> PathBuf {
        self.dir.join("boot")
    }

    /// From here on it is as if the host had been started anew.
    fn new_boot(&self) -> Result<(), String> {
        let id = format!("{}\n", Uuid::new_v4());
        fs::write(self.boot(), id).map_err(|error| error.to_string())
    }

    /// Starts its daemon, as a supervisor does, and waits until it serves.
    pub(crate) fn start(&mut self, lab: &Lab) -> Result<(), String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = lab.command(self.number, &self.boot());
        command
            .arg(program)
            .arg("--be-daemon")
            .arg(&self.dir)
            .arg(self.number.to_string());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start the daemon: {error}"))?;
        let input = child.stdin.take().ok_or("its input is piped")?;
        let output = child.stdout.take().ok_or("its output is piped")?;
        let (said, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        self.daemon = Some(Daemon {
            child,
            input,
            lines,
        });
        self.wait(ANSWERS, |line| line == "ready").map(drop)
    }

    pub(crate) fn has_daemon(&self) -> bool {
        self.daemon.is_some()
    }

    fn daemon(&mut self) -> Result<&mut Daemon, String> {
        self.daemon
            .as_mut()
            .ok_or_else(|| "no daemon runs".to_owned())
    }

    /// Waits for a line, and keeps the others.
    fn wait(&mut self, limit: Duration, is_it: impl Fn(&str) -> bool) -> Result<String, String> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = match self.daemon()?.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("the daemon of {} is silent", self.dir.display()));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("the daemon of {} has ended", self.dir.display()));
                }
            };
            self.note("says", &line);
            if is_it(&line) {
                return Ok(line);
            }
            self.told.push(line);
        }
    }

    fn tell(&mut self, order: &str) -> Result<(), String> {
        self.note("hears", order);
        writeln!(self.daemon()?.input, "{order}").map_err(|error| format!("{order}: {error}"))
    }

    /// Sends an order. Yields what a good answer says.
    pub(crate) fn ask(&mut self, order: &str) -> Result<String, String> {
        self.tell(order)?;
        let is_answer = |line: &str| line.starts_with("ok ") || line.starts_with("error ");
        let answer = self.wait(ANSWERS, is_answer)?;
        let good = answer.strip_prefix("ok ").map(str::to_owned);
        good.ok_or_else(|| format!("{order}: {answer}"))
    }

    /// Waits until it has said a line that begins so, if it does in time.
    pub(crate) fn says(&mut self, limit: Duration, wanted: &str) -> bool {
        // It may have come before an answer.
        if self.told(wanted).is_some() {
            return true;
        }
        let said = self.wait(limit, |line| line.starts_with(wanted));
        // What was waited for has been told as well.
        self.told.extend(said.as_ref().ok().cloned());
        said.is_ok()
    }

    /// What it has said so far that begins with `word`.
    pub(crate) fn told(&mut self, word: &str) -> Option<String> {
        let lines: Vec<_> = match &self.daemon {
            Some(daemon) => daemon.lines.try_iter().collect(),
            None => Vec::new(),
        };
        for line in lines {
            self.note("says", &line);
            self.told.push(line);
        }
        self.told
            .iter()
            .rfind(|line| line.starts_with(word))
            .cloned()
    }

    pub(crate) fn forget_told(&mut self) {
        self.told.clear();
        self.transcript.clear();
    }

    /// What happened to it, and what was said. The same answer again and again is kept once.
    pub(crate) fn note(&mut self, who: &str, line: &str) {
        let line = format!("{} {who}: {line}", ["source", "destination"][self.number]);
        let is_known = self
            .transcript
            .iter()
            .rev()
            .take(2)
            .any(|known| known.1 == line);
        if !is_known {
            self.transcript.push((now(), line));
        }
    }

    pub(crate) fn transcript(&self) -> &[(Duration, String)] {
        &self.transcript
    }

    /// Ends its daemon as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.note("daemon", "killed");
        self.daemon = None;
    }

    pub(crate) fn signal(&mut self, signal: Signal) -> Result<(), String> {
        kill(self.daemon()?.child.id(), signal);
        Ok(())
    }

    /// All that does not outlive a host goes; its processes have ended before.
    pub(crate) fn lose_power(&mut self) -> Result<(), String> {
        let run = self.dir.join("run");
        fs::remove_dir_all(&run)
            .and_then(|()| fs::create_dir(&run))
            .map_err(|error| format!("empty {}: {error}", run.display()))?;
        self.new_boot()
    }

    /// Ends the guest and the daemon in good order.
    pub(crate) fn end(&mut self) -> Result<(), String> {
        if self.daemon.is_none() {
            return Ok(());
        }
        self.ask("end")?;
        let status = self.daemon()?.child.wait();
        self.daemon = None;
        let status = status.map_err(|error| error.to_string())?;
        let is_good = status.success();
        is_good
            .then_some(())
            .ok_or_else(|| format!("the daemon ended with {status}"))
    }

    fn filler(&self) -> PathBuf {
        self.dir.join("state/filler")
    }

    /// Leaves no byte free on the disk of its records.
    pub(crate) fn fill(&self) -> Result<(), String> {
        let mut file = fs::File::create(self.filler()).map_err(|error| error.to_string())?;
        while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
        Ok(())
    }

    pub(crate) fn free(&self) -> Result<(), String> {
        fs::remove_file(self.filler()).map_err(|error| error.to_string())
    }

    /// The files of the journal, which belong to nobody but migrations.
    pub(crate) fn journal(&self) -> Vec<PathBuf> {
        files(&self.dir.join("state/migrations"))
    }

    /// The first record of the journal, if there is one that can be read.
    pub(crate) fn record(&self) -> Option<Vec<u8>> {
        let store = FileStore::new(&self.dir.join("run"), &self.dir.join("state")).ok()?;
        let found = store.list(Shelf::Migrations).ok()?;
        found.into_iter().next()?.1.ok()
    }

    fn definition(&self, uuid: Uuid) -> PathBuf {
        self.dir.join(format!("state/domains/{uuid}.json"))
    }

    /// What its daemon keeps of the guest, as it is written there.
    pub(crate) fn kept(&self, uuid: Uuid) -> Result<Vec<u8>, String> {
        fs::read(self.definition(uuid)).map_err(|error| error.to_string())
    }

    /// Puts that there, as an earlier daemon would have left it.
    pub(crate) fn keep(&self, uuid: Uuid, kept: &[u8]) -> Result<(), String> {
        fs::write(self.definition(uuid), kept).map_err(|error| error.to_string())
    }

    /// What of the guest is left when it is gone: records, sockets, logs.
    pub(crate) fn left(&self, uuid: Uuid) -> Vec<PathBuf> {
        let mut left = self.journal();
        left.extend(files(&self.dir.join("run/records")));
        left.extend(files(&self.dir.join("state/domains")));
        let directory = self.dir.join("run").join(uuid.to_string());
        left.extend(directory.exists().then_some(directory));
        left
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
