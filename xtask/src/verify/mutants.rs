//! `verify --mutants`: breaks a copy of job-core once per invariant and rule, and counts how many of the breaks its
//! tests notice.
//!
//! The tree itself is never touched: the copy is a workspace of its own under `target/mutants`. A break whose text is
//! no longer there, or that does not compile, is a failure too: it proves nothing any more.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::Failure;
use crate::{run, workspace};

struct Mutant {
    /// What it breaks.
    rule: &'static str,
    file: &'static str,
    /// Occurs once in the file.
    from: &'static str,
    to: &'static str,
}

const fn slots(rule: &'static str, from: &'static str, to: &'static str) -> Mutant {
    Mutant {
        rule,
        file: "src/slots.rs",
        from,
        to,
    }
}

const MUTANTS: &[Mutant] = &[
    slots(
        "1: the mask holds back",
        "u16::from(mask.bits()) | 1 << lane::NESTED",
        "NORMAL_LANES | 1 << lane::NESTED",
    ),
    slots(
        "1: one agent job at a time",
        "if agent.is_none() {",
        "if agent.is_none() || self.closed == self.lanes.is_empty() {",
    ),
    slots(
        "1: nothing beside a normal job",
        "if normal.is_none() {",
        "if normal.as_ref().is_none_or(|slot| slot.generation != self.generation) {",
    ),
    slots(
        "2: a wider mask grants at once",
        "slot.want = Want::Async(kind, mask);\n            self.pump(now, effects);",
        "slot.want = Want::Async(kind, mask);\n            let _ = (now, effects);",
    ),
    slots(
        "2: a grant that is left passes on",
        "self.remove(key);\n        self.pump(now, effects);",
        "self.remove(key);\n        let _ = (now, effects);",
    ),
    slots(
        "2: a grant that is taken back passes on",
        "if taken > 0 {\n            self.pump(now, effects);",
        "if taken > 1 {\n            self.pump(now, effects);",
    ),
    slots("3: the oldest goes first", "place < first", "place > first"),
    slots(
        "3: abort goes before the others",
        "lane == JobKind::Abort as usize",
        "lane == JobKind::Query as usize",
    ),
    slots(
        "3: a thaw goes before the others",
        "|| lane == lane::THAW",
        "|| lane == lane::ASYNC",
    ),
    slots(
        "3: a sleeper keeps its age",
        "tail == NONE || self.waiter(tail).id < id",
        "tail == NONE || self.live > 0",
    ),
    slots(
        "4: close fails all who wait",
        "self.fail_waiters(Failure::Closed, effects);",
        "let _ = effects;",
    ),
    slots(
        "4: nothing is granted after close",
        "self.closed = true;",
        "self.closed = self.live > 2;",
    ),
    slots(
        "5: a flow that asks for a second job is told",
        "flow.and_then(|flow| self.conflict(want, flow))",
        "None",
    ),
    slots(
        "5: a flow that waits for two gets one",
        "if let Some(held) = self.conflict(want, flow) {",
        "if let Some(held) = None {",
    ),
    slots(
        "6: nothing new beside an old async job",
        "Some(slot) if slot.generation != self.generation => 0,",
        "",
    ),
    slots(
        "6: an old async job has no new parts",
        "slot.id == id && slot.generation == self.generation",
        "slot.id == id",
    ),
    slots(
        "7: a grant is told",
        "effects.granted[want.slot() as usize] = Some(key);",
        "",
    ),
    slots(
        "7: the guest's end is told to all",
        "waiter.next = NONE;\n                effects.failed.push(key);",
        "waiter.next = NONE;",
    ),
    slots(
        "8: destroy passes every mask",
        "u16::from(mask.bits()) |",
        "u16::from(mask.bits()) & !2 |",
    ),
    slots(
        "8: an old holder can be evicted",
        "held.take_if(|slot| slot.generation != generation)",
        "held.take_if(|slot| slot.generation > generation)",
    ),
    slots(
        "9: a grant that is left frees its slot",
        "State::Granted => self.held[self.waiter(key).want.slot() as usize] = None,",
        "State::Granted => {}",
    ),
    slots(
        "9: the guest's end takes grants nobody saw",
        "held.take_if(|slot| !slot.is_claimed());",
        "let _ = held;",
    ),
    slots(
        "limits are met",
        "self.waiting[class] >= self.limit(want.slot())",
        "self.waiting[class] > self.limit(want.slot())",
    ),
    slots(
        "limits spare abort",
        "JobKind::Destroy | JobKind::Abort)",
        "JobKind::Destroy)",
    ),
    slots(
        "only the holder ends its job",
        "held.as_ref().is_some_and(|slot| slot.id == id)",
        "held.is_some()",
    ),
    slots(
        "only what is due is taken back",
        "&& slot.granted <= limit",
        "&& slot.granted < limit",
    ),
    Mutant {
        rule: "a waiter leaves a waker at each poll",
        file: "src/held.rs",
        from: "std::mem::swap(&mut place.waker, &mut mine);",
        to: "let _ = (place, &mut mine);",
    },
    Mutant {
        rule: "a dropped waiter leaves the queue",
        file: "src/held.rs",
        from: "ledger.slots.withdraw(key, now, &mut effects);",
        to: "let _ = key;",
    },
    Mutant {
        rule: "who fails is woken",
        file: "src/ledger.rs",
        from: "for key in effects.failed {",
        to: "for key in effects.failed.into_iter().skip(1) {",
    },
    Mutant {
        rule: "a token that fires wakes all",
        file: "src/token.rs",
        from: "for (_, waker) in waiting {",
        to: "for (_, waker) in waiting.into_iter().skip(1) {",
    },
];

/// A test that runs for longer hangs, which is a way of noticing.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run() -> Result<(), Failure> {
    let home = workspace::target()?.join("mutants");
    let krate = copy(&home)?;
    let pristine = tests(&home)?;
    if let Some(test) = noticing(&pristine)? {
        return Err(Failure::wrong(format!("{test} fails without a break")));
    }
    let mut missed = Vec::new();
    for (number, mutant) in (1..).zip(MUTANTS) {
        let path = krate.join(mutant.file);
        let text = read(&path)?;
        let outcome = if text.matches(mutant.from).count() == 1 {
            write(&path, &text.replace(mutant.from, mutant.to))?;
            let outcome = match tests(&home) {
                Ok(tests) => noticing(&tests)?.ok_or("not noticed"),
                Err(_) => Err("does not compile"),
            };
            write(&path, &text)?;
            outcome
        } else {
            Err("no longer there")
        };
        let told = outcome
            .as_ref()
            .map_or_else(|why| (*why).to_owned(), |test| format!("caught by {test}"));
        println!("mutant {number:>2}  {:<46} {told}", mutant.rule);
        if let Err(why) = outcome {
            missed.push(format!("mutant {number} ({}) is {why}", mutant.rule));
        }
    }
    let (caught, all) = (MUTANTS.len() - missed.len(), MUTANTS.len());
    println!("caught {caught} of {all}");
    println!(
        "figure mutants-caught {caught} mutants bar >= {all} {}",
        if missed.is_empty() { "ok" } else { "short" }
    );
    if missed.is_empty() {
        Ok(())
    } else {
        Err(Failure::Wrong(missed))
    }
}

/// The crate in a workspace of its own. Yields the crate's folder.
fn copy(home: &Path) -> Result<PathBuf, Failure> {
    let krate = home.join("job-core");
    if krate.exists() {
        fs::remove_dir_all(&krate)
            .map_err(Failure::because(format!("remove {}", krate.display())))?;
    }
    copy_folder(&workspace::root().join("job-core"), &krate)?;
    let manifest = read(&workspace::root().join("Cargo.toml"))?;
    let (before, rest) = manifest
        .split_once("members = [")
        .ok_or_else(|| Failure::wrong("the workspace names no members"))?;
    let (_, after) = rest
        .split_once(']')
        .ok_or_else(|| Failure::wrong("the workspace's members have no end"))?;
    let manifest = format!("{before}members = [\"job-core\"]{after}");
    write(&home.join("Cargo.toml"), &manifest)?;
    write(
        &home.join("Cargo.lock"),
        &read(&workspace::root().join("Cargo.lock"))?,
    )?;
    Ok(krate)
}

fn copy_folder(from: &Path, to: &Path) -> Result<(), Failure> {
    let failed = || Failure::because(format!("copy {}", from.display()));
    fs::create_dir_all(to).map_err(failed())?;
    for entry in fs::read_dir(from).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy_folder(&source, &target)?;
        } else {
            fs::copy(&source, &target).map_err(failed())?;
        }
    }
    Ok(())
}

/// Builds the tests of the copy. Yields the programs, the walk first: what it can notice, it must.
fn tests(home: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut build = run::cargo();
    build.current_dir(home);
    build.env("CARGO_TARGET_DIR", home.join("target"));
    build.args(["test", "--quiet", "--package", "job-core", "--no-run"]);
    build.args(["--message-format", "json", "--lib"]);
    for test in ["walk", "rules", "cancel", "histories"] {
        build.args(["--test", test]);
    }
    let answer = run::ask(build.stderr(Stdio::null()))?;
    let mut programs: Vec<_> = String::from_utf8_lossy(&answer)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    programs.sort_by_key(|program| name_of(program) != "walk");
    Ok(programs)
}

/// The first test program that fails or hangs.
fn noticing(tests: &[PathBuf]) -> Result<Option<String>, Failure> {
    for test in tests {
        let name = name_of(test);
        let failed = || Failure::because(format!("run {name}"));
        let mut child = Command::new(test)
            .args(["--quiet", "--test-threads", "2"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed())?;
        let end = Instant::now() + PATIENCE;
        let passed = loop {
            if let Some(status) = child.try_wait().map_err(failed())? {
                break status.success();
            }
            if Instant::now() > end {
                child.kill().and_then(|()| child.wait()).map_err(failed())?;
                break false;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if !passed {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// A test program's name without the hash behind it.
fn name_of(program: &Path) -> &str {
    let name = program.file_stem().and_then(OsStr::to_str);
    let name = name.unwrap_or_default();
    name.rsplit_once('-').map_or(name, |(name, _)| name)
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(Failure::because(format!("read {}", path.display())))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(Failure::because(format!("write {}", path.display())))
}
