//! What the QEMUs themselves say of when their guests ran, heard over a monitor of the campaign's own.
//!
//! Every QEMU of the guest dials one socket when it starts (the description tells it to), on either host, whoever started
//! it. It says `RESUME` and `STOP` with the time of the machine's one clock, to the microsecond; the end of the connection
//! is the end of the process. So the spans in which each copy ran are known without a word of the daemons'.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};

use crate::bed::LOOK;

/// What questions are known by.
const QUESTION: &str = "question";
/// How long an answer is waited for.
const ANSWERS: Duration = Duration::from_secs(2);

/// One QEMU of the guest, from its start to its end.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) pid: u32,
    /// The namespace it is in.
    pub(crate) network: Option<u64>,
    /// When its guest ran; the last span is open while it does.
    pub(crate) spans: Vec<(Duration, Option<Duration>)>,
    pub(crate) is_over: bool,
    /// Whether its guest's state is there whole: nothing is awaited from elsewhere any more.
    pub(crate) is_loaded: bool,
    /// Whether memory has begun to leave it.
    pub(crate) is_moving: bool,
    /// Whether its guest was booted, not brought here from elsewhere.
    pub(crate) is_booted: bool,
    /// What it told last of a migration.
    pub(crate) migration: String,
    /// Where it can be asked.
    line: Option<Arc<UnixStream>>,
    /// What it was asked, and what it has answered to that.
    asked: usize,
    answers: Vec<String>,
}

impl Life {
    /// Whether no question to it is open.
    pub(crate) fn has_answered_last(&self) -> bool {
        self.answers.len() >= self.asked
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.is_over && self.spans.last().is_some_and(|span| span.1.is_none())
    }
}

#[derive(Clone, Default)]
pub(crate) struct Witness(Arc<Mutex<Vec<Life>>>);

impl Witness {
    pub(crate) fn listen(path: &Path) -> Result<Self, String> {
        let listener = UnixListener::bind(path).map_err(|error| error.to_string())?;
        let witness = Self::default();
        let hearing = witness.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let witness = hearing.clone();
                std::thread::spawn(move || witness.follow(stream));
            }
        });
        Ok(witness)
    }

    /// All QEMUs since the last [`clear`](Self::clear).
    pub(crate) fn lives(&self) -> Vec<Life> {
        self.with(|lives| lives.clone())
    }

    /// Forgets those that are over.
    pub(crate) fn clear(&self) {
        self.with(|lives| lives.retain(|life| !life.is_over));
    }

    /// Asks it, command by command, each with the words of a person's monitor where it takes those. Yields the answers that
    /// come soon.
    pub(crate) fn ask(&self, pid: u32, questions: &[(&str, Option<&str>)]) -> Vec<String> {
        let life = |witness: &Self| witness.lives().into_iter().rfind(|life| life.pid == pid);
        let Some((line, before)) = life(self).and_then(|life| Some((life.line?, life.asked)))
        else {
            return Vec::new();
        };
        self.change(pid, |life| life.asked += questions.len());
        for (command, words) in questions {
            let mut question = json!({"execute": command, "id": QUESTION});
            if let Some(words) = words {
                question["arguments"] = json!({"command-line": words});
            }
            // One that has died since answers nothing, which is told.
            let _died = writeln!(&*line, "{question}");
        }
        let began = Instant::now();
        loop {
            let answers = life(self).map_or_else(Vec::new, |life| life.answers);
            let answers: Vec<_> = answers.into_iter().skip(before).collect();
            if answers.len() >= questions.len() {
                return answers;
            }
            if began.elapsed() > ANSWERS {
                let open = questions[answers.len()];
                let silent = format!("no answer in {ANSWERS:?} to {open:?}");
                return answers.into_iter().chain([silent]).collect();
            }
            std::thread::sleep(LOOK);
        }
    }

    fn with<R>(&self, change: impl FnOnce(&mut Vec<Life>) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn follow(&self, stream: UnixStream) {
        let Ok(peer) = socket_peercred(&stream) else {
            return;
        };
        let pid = peer.pid.as_raw_nonzero().get().unsigned_abs();
        let network = fs::metadata(format!("/proc/{pid}/ns/net")).ok();
        // Its state may have come before it is first asked.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        let is_incoming = words.any(|word| word == b"-incoming");
        self.with(|lives| {
            lives.push(Life {
                pid,
                network: network.map(|facts| facts.ino()),
                spans: Vec::new(),
                is_over: false,
                is_loaded: false,
                is_moving: false,
                is_booted: !is_incoming,
                migration: String::new(),
                line: stream.try_clone().ok().map(Arc::new),
                asked: 0,
                answers: Vec::new(),
            });
        });
        // It may die at any time, which is what is told at the end.
        let _broken = self.hear(pid, stream);
        self.change(pid, |life| {
            life.is_over = true;
            life.stop(now());
        });
    }

    fn hear(&self, pid: u32, mut stream: UnixStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let _greeting = lines.next();
        for command in ["qmp_capabilities", "query-status"] {
            writeln!(stream, "{}", json!({"execute": command, "id": command}))?;
        }
        for line in lines {
            let Ok(said) = serde_json::from_str::<Value>(&line?) else {
                continue;
            };
            let at = &said["timestamp"];
            let part = |name: &str| at[name].as_u64().unwrap_or_default();
            let at =
                Duration::from_secs(part("seconds")) + Duration::from_micros(part("microseconds"));
            let event = said["event"].as_str().unwrap_or_default();
            self.change(pid, |life| {
                if event == "MIGRATION" {
                    let status = said["data"]["status"].as_str();
                    life.migration = status.unwrap_or_default().to_owned();
                }
                life.hear(event, at, &said);
            });
        }
        Ok(())
    }
    fn change(&self, pid: u32, change: impl FnOnce(&mut Life)) {
        self.with(|lives| {
            let life = lives.iter_mut().rev().find(|life| life.pid == pid);
            life.map(change)
        });
    }
}

impl Life {
    fn hear(&mut self, event: &str, at: Duration, said: &Value) {
        match event {
            "RESUME" => {
                // What moved before brought it here.
                self.is_moving = false;
                self.spans.push((at, None));
            }
            "STOP" => self.stop(at),
            "MIGRATION" if said["data"]["status"] == "completed" => self.is_loaded = true,
            "MIGRATION" if said["data"]["status"] == "active" => self.is_moving = true,
            _ if said["id"] == QUESTION => {
                let answer = said.get("return").or_else(|| said.get("error"));
                let answer = answer.map(|answer| match answer.as_str() {
                    Some(text) => text.replace("\r\n", "\n    "),
                    None => answer.to_string(),
                });
                self.answers.push(answer.unwrap_or_default());
            }
            _ if said["id"] == "query-status" => {
                let status = &said["return"];
                self.is_loaded |= status["status"] != "inmigrate";
                if status["running"] == true && self.spans.is_empty() {
                    self.spans.push((now(), None));
                }
            }
            _ => {}
        }
    }

    fn stop(&mut self, at: Duration) {
        if let Some(span) = self.spans.last_mut()
            && span.1.is_none()
        {
            span.1 = Some(at);
        }
    }
}

/// Two copies that ran at the same instant, if any did.
pub(crate) fn overlap(lives: &[Life]) -> Option<String> {
    for (index, one) in lives.iter().enumerate() {
        for other in &lives[index + 1..] {
            for (a, b) in one
                .spans
                .iter()
                .flat_map(|a| other.spans.iter().map(move |b| (a, b)))
            {
                let ends = |span: &(Duration, Option<Duration>)| span.1.unwrap_or(Duration::MAX);
                if a.0 < ends(b) && b.0 < ends(a) {
                    return Some(format!(
                        "process {} ran at {a:?} and process {} at {b:?}",
                        one.pid, other.pid
                    ));
                }
            }
        }
    }
    None
}

pub(crate) fn now() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("the clock is past 1970")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(pid: u32, spans: &[(u64, Option<u64>)]) -> Life {
        let span = |span: &(u64, Option<u64>)| {
            let at = Duration::from_micros;
            (at(span.0), span.1.map(at))
        };
        Life {
            pid,
            network: None,
            spans: spans.iter().map(span).collect(),
            is_over: false,
            is_loaded: true,
            is_moving: false,
            is_booted: false,
            migration: String::new(),
            line: None,
            asked: 0,
            answers: Vec::new(),
        }
    }

    #[test]
    fn copies_that_take_turns_do_not_overlap() {
        let lives = [
            life(1, &[(0, Some(10)), (20, Some(30))]),
            life(2, &[(10, Some(20)), (31, None)]),
        ];
        assert_eq!(overlap(&lives), None);
    }

    #[test]
    fn one_microsecond_of_two_copies_is_found() {
        let lives = [life(1, &[(0, Some(10))]), life(2, &[(9, None)])];
        assert!(overlap(&lives).is_some());
        let lives = [life(1, &[(5, None)]), life(2, &[(0, Some(6))])];
        assert!(overlap(&lives).is_some());
    }
}
