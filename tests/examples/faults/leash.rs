//! The daemon as a process: a line in, a line out. And what other processes there are.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// One that runs, and is killed when this is dropped.
pub(crate) struct Daemon {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Daemon {
    /// Starts one and waits until it has found its guests. Yields what it says of them.
    pub(crate) fn start(dir: &Path) -> Result<(Self, Vec<String>), String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut child = Command::new(program)
            .arg("--be-daemon")
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start the daemon: {error}"))?;
        let input = child.stdin.take().ok_or("its input is piped")?;
        let output = BufReader::new(child.stdout.take().ok_or("its output is piped")?);
        let mut daemon = Self {
            child,
            input,
            output,
        };
        let mut told = Vec::new();
        loop {
            let line = daemon
                .line()?
                .ok_or("the daemon ended before it was ready")?;
            if line == "ready" {
                return Ok((daemon, told));
            }
            told.push(line);
        }
    }

    /// The next line, or none if it has ended.
    pub(crate) fn line(&mut self) -> Result<Option<String>, String> {
        let mut line = String::new();
        let read = self.output.read_line(&mut line);
        let read = read.map_err(|error| error.to_string())?;
        Ok((read > 0).then(|| line.trim_end().to_owned()))
    }

    /// Sends a command. Yields its answer, or none if the daemon died of it.
    pub(crate) fn ask(&mut self, command: &str) -> Result<Option<String>, String> {
        writeln!(self.input, "{command}").map_err(|error| error.to_string())?;
        self.line()
    }

    /// Sends a command that must not fail. Yields its answer.
    pub(crate) fn must(&mut self, command: &str) -> Result<String, String> {
        match self.ask(command)? {
            Some(line) => match line.strip_prefix("ok ") {
                Some(answer) => Ok(answer.to_owned()),
                None => Err(format!("{command}: {line}")),
            },
            None => Err(format!("{command}: the daemon ended")),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; it is reaped either way.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// All processes of this machine with their command lines. One that has ended, and waits to be reaped, has none.
pub(crate) fn processes() -> Vec<(u32, Vec<String>)> {
    let entries = fs::read_dir("/proc").expect("there is a list of processes");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words = line
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty());
        let words = words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        Some((pid, words))
    })
    .collect()
}
