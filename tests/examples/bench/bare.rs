//! The floor: a QEMU of one's own and a plain, blocking client of its monitor that moves a guest and does nothing else.
//!
//! It waits for events, polls nothing, records nothing, asks nobody and undoes nothing. Its QEMUs are started with the
//! arguments of a guest of the driver's, but for the channels, which are paths here.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Longer than anything here takes.
const SILENCE: Duration = Duration::from_secs(30);

/// How a guest is started, whoever does it.
#[derive(Clone)]
pub(crate) struct Line {
    program: PathBuf,
    arguments: Vec<String>,
    dir: PathBuf,
}

impl Line {
    /// As that process of the driver's was started.
    pub(crate) fn of(pid: u32, dir: &Path) -> Self {
        let line = fs::read(format!("/proc/{pid}/cmdline")).expect("it runs");
        let words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        let mut words = words.map(|word| word.into_owned());
        let program = words.next().expect("it has a name").into();
        Self {
            program,
            arguments: words.filter(|word| !word.is_empty()).collect(),
            dir: dir.to_owned(),
        }
    }

    /// The arguments, with channels of its own below `number`; with `incoming` it waits for its state.
    fn arguments(&self, number: u32, incoming: bool) -> Vec<String> {
        let path = |name: &str| {
            self.dir
                .join(format!("{number}.{name}"))
                .display()
                .to_string()
        };
        let mut all = Vec::new();
        let mut words = self.arguments.iter().peekable();
        while let Some(word) = words.next() {
            // Its value is none of ours.
            if word == "-incoming" || word == "-add-fd" {
                words.next();
            } else if word.starts_with("socket,id=monitor,") {
                all.push(format!("socket,id=monitor,path={}", path("monitor")));
            } else if word.starts_with("socket,id=agent,") {
                let agent = path("agent");
                all.push(format!("socket,id=agent,path={agent},server=on,wait=off"));
            } else if word.starts_with("file,id=serial0,") {
                let console = self.dir.join("bare.console");
                let console = console.display();
                all.push(format!("file,id=serial0,path={console},append=on"));
            } else {
                all.push(word.clone());
            }
        }
        if incoming {
            all.extend(["-incoming", "defer"].map(str::to_owned));
        }
        all
    }
}

/// One QEMU and its monitor.
pub(crate) struct Bare {
    child: Child,
    input: UnixStream,
    output: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// When its guest stopped last.
    stopped: Duration,
    line: Line,
    number: u32,
}

/// When a move was asked for, and when the guest stood still.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) began: Duration,
    pub(crate) stopped: Duration,
    pub(crate) resumed: Duration,
}

impl Times {
    pub(crate) fn took(self) -> Duration {
        self.resumed.saturating_sub(self.began)
    }

    pub(crate) fn stood_still(self) -> Duration {
        self.resumed.saturating_sub(self.stopped)
    }
}

impl Bare {
    /// A guest that runs.
    pub(crate) fn boot(line: &Line) -> Self {
        let mut qemu = Self::spawn(line, 0, false);
        qemu.ask("cont", json!({}));
        qemu
    }

    fn spawn(line: &Line, number: u32, incoming: bool) -> Self {
        let path = line.dir.join(format!("{number}.monitor"));
        // It dials us, so nobody has to look for its socket.
        let listener = UnixListener::bind(path).expect("a socket can be made");
        let child = Command::new(&line.program)
            .args(line.arguments(number, incoming))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let (input, _) = listener.accept().expect("QEMU dials");
        let limited = input.set_read_timeout(Some(SILENCE));
        limited.expect("a socket has a limit");
        let output = BufReader::new(input.try_clone().expect("a socket has two ends"));
        let mut qemu = Self {
            child: child.expect("QEMU starts"),
            input,
            output,
            events: VecDeque::new(),
            stopped: Duration::ZERO,
            line: line.clone(),
            number,
        };
        qemu.read("its greeting");
        qemu.ask("qmp_capabilities", json!({}));
        let on = |name: &str| json!({"capability": name, "state": true});
        let names = ["events", "return-path", "pause-before-switchover"];
        let capabilities = names.map(on);
        qemu.ask(
            "migrate-set-capabilities",
            json!({"capabilities": capabilities}),
        );
        qemu
    }

    fn read(&mut self, awaited: &str) -> Value {
        let mut line = String::new();
        let read = self.output.read_line(&mut line);
        let said = read.ok().and_then(|_| serde_json::from_str(&line).ok());
        said.unwrap_or_else(|| panic!("QEMU {} did not say {awaited}: {line:?}", self.number))
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        // Whole, not a piece at a time.
        let request = format!("{request}\n");
        self.input
            .write_all(request.as_bytes())
            .expect("it listens");
        loop {
            let said = self.read(command);
            if said.get("event").is_some() {
                self.events.push_back(said);
                continue;
            }
            let done = said.get("return").cloned();
            return done.unwrap_or_else(|| panic!("{command}: {said}"));
        }
    }

    /// Waits for the next event that `is_it`, and says when it was.
    fn event(&mut self, awaited: &str, is_it: impl Fn(&Value) -> bool) -> Duration {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(awaited),
            };
            let part = |name: &str| event["timestamp"][name].as_u64().unwrap_or_default();
            let seconds = Duration::from_secs(part("seconds"));
            let at = seconds + Duration::from_micros(part("microseconds"));
            if event["event"] == "STOP" {
                self.stopped = at;
            }
            if is_it(&event) {
                return at;
            }
        }
    }

    /// Waits until its migration has that status.
    fn migration(&mut self, status: &str) {
        self.event(status, |event| {
            event["event"] == "MIGRATION" && event["data"]["status"] == status
        });
    }

    fn begin(&mut self, there: &mut Self, bandwidth: u64) {
        let uri = there.line.dir.join(format!("{}.memory", there.number));
        let uri = json!({"uri": format!("unix:{}", uri.display())});
        there.ask("migrate-incoming", uri.clone());
        self.ask(
            "migrate-set-parameters",
            json!({"max-bandwidth": bandwidth}),
        );
        self.ask("migrate", uri);
    }

    /// Moves the guest to a new QEMU, which takes the place of this one.
    pub(crate) fn migrate(self, bandwidth: u64) -> (Self, Times) {
        let began = now();
        let mut here = self;
        let mut there = Self::spawn(&here.line, here.number + 1, true);
        here.begin(&mut there, bandwidth);
        here.migration("pre-switchover");
        here.ask("migrate-continue", json!({"state": "pre-switchover"}));
        here.migration("completed");
        there.migration("completed");
        there.ask("cont", json!({}));
        let resumed = there.event("RESUME", |event| event["event"] == "RESUME");
        let times = Times {
            began,
            stopped: here.stopped,
            resumed,
        };
        (there, times)
    }

    /// Begins a move, cancels it after a while, and says how long QEMU took over that.
    pub(crate) fn cancel(&mut self, bandwidth: u64, after: Duration) -> Duration {
        let mut there = Self::spawn(&self.line, self.number + 1, true);
        self.begin(&mut there, bandwidth);
        self.migration("active");
        std::thread::sleep(after);
        let began = now();
        self.ask("migrate_cancel", json!({}));
        self.migration("cancelled");
        let took = now().saturating_sub(began);
        // The next one is to have the number again.
        let _gone = fs::remove_file(there.line.dir.join(format!("{}.monitor", there.number)));
        took
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It may have ended already; it is reaped either way.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

pub(crate) fn now() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("the clock is past 1970")
}
