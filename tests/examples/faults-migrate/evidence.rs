//! What there is to be seen of the QEMUs that are left when a run has failed, for whoever has to find out why.
//!
//! Asks over the witness's own monitor and the kernel's list of threads, twice: what stands still has not changed in
//! between. A QEMU that does not answer is a finding, too. Judges nothing, and changes nothing.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use crate::bed::Bed;

/// Between the two looks.
const BETWEEN: Duration = Duration::from_millis(500);

/// What a QEMU is asked: of its state, and where its processor stands.
const QUESTIONS: [(&str, Option<&str>); 3] = [
    ("query-status", None),
    ("query-migrate", None),
    ("human-monitor-command", Some("info registers")),
];

/// So many lines of the console that are no numbers are shown: what else the guest said.
const LINES: usize = 60;

impl Bed {
    /// All that can be seen, as lines.
    pub(crate) fn evidence(&self) -> String {
        let mut text = String::new();
        for look in 1..=2 {
            for life in self.witness.lives() {
                if life.is_over {
                    continue;
                }
                let (pid, spans) = (life.pid, &life.spans);
                text.push_str(&format!("  look {look} at process {pid}, ran {spans:?}\n"));
                text.push_str(&threads(pid));
                if life.has_answered_last() {
                    for answer in self.witness.ask(pid, &QUESTIONS) {
                        text.push_str(&format!("    {answer}\n"));
                    }
                }
            }
            let ticks = self.console().ticks();
            text.push_str(&format!("  the console has {:?}\n", ticks.last()));
            sleep(BETWEEN);
        }
        let said = self.console().text();
        let other = said.lines().filter(|line| !line.starts_with("tick "));
        for line in other.take(LINES) {
            text.push_str(&format!("  console: {line}\n"));
        }
        for file in ["/proc/loadavg", "/proc/pressure/cpu"] {
            let told = fs::read_to_string(file).unwrap_or_default();
            text.push_str(&format!("  {file}: {}\n", told.trim().replace('\n', "; ")));
        }
        text
    }
}

/// Each thread of the process: its name, state, time spent in ticks, and where in the kernel it waits.
fn threads(pid: u32) -> String {
    let entries = fs::read_dir(format!("/proc/{pid}/task"));
    let mut lines = String::new();
    for entry in entries.into_iter().flatten().flatten() {
        let read = |name: &str| {
            let text = fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            text.trim().to_owned()
        };
        let (name, stat) = (read("comm"), read("stat"));
        let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
        let words: Vec<_> = after.split(' ').collect();
        let word = |at: usize| words.get(at).copied().unwrap_or("?");
        let (state, user, system) = (word(0), word(11), word(12));
        let wait = read("wchan");
        lines.push_str(&format!(
            "    thread {name}: {state}, {user}+{system} ticks, waits in {wait}\n"
        ));
    }
    lines
}
