//! The hand that starts the daemon, has it killed, looks at what is left, and judges what the next one makes of it.
//!
//! Looks from outside only: at processes, files and the guest's own console.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::process::Signal;
use uuid::Uuid;

use crate::cells::{Cell, Doing, Row};
use crate::leash::{Daemon, processes};
use crate::rig::{Console, Env, kill};
use crate::{console, guest, images};

/// Longer than any operation here takes, also where others load the machine.
const LONG: Duration = Duration::from_secs(180);
/// Between two looks at what tells nobody that it changed: a file, a process list.
const LOOK: Duration = Duration::from_millis(5);

pub(crate) struct Hand {
    pub(crate) env: Env,
    pub(crate) dir: PathBuf,
    uuid: Uuid,
    daemon: Option<Daemon>,
    saves: u32,
    /// Whether the guest is one that writes to its disk and whose agent answers.
    is_writer: bool,
    /// The overlays that the guest's disk lies in.
    pub(crate) layers: Vec<PathBuf>,
    /// What the last driver that came back said.
    told: Vec<String>,
}

impl Hand {
    pub(crate) fn new(env: Env, dir: &Path) -> Result<Self, String> {
        let uuid = guest(&env, dir).uuid;
        let mut hand = Self {
            env,
            dir: dir.to_owned(),
            uuid,
            daemon: None,
            saves: 0,
            is_writer: false,
            layers: Vec::new(),
            told: Vec::new(),
        };
        hand.restart()?;
        Ok(hand)
    }

    /// What the last driver that came back said of the guest.
    pub(crate) fn became(&self) -> &str {
        let line = self.told.first().map_or("", String::as_str);
        line.rsplit(' ').next().unwrap_or(line)
    }

    pub(crate) fn daemon(&mut self) -> Result<&mut Daemon, String> {
        self.daemon
            .as_mut()
            .ok_or_else(|| "no daemon runs".to_owned())
    }

    fn restart(&mut self) -> Result<Vec<String>, String> {
        let (daemon, told) = Daemon::start(&self.dir)?;
        self.daemon = Some(daemon);
        Ok(told)
    }

    /// Boots a guest once, has it write, and saves it: what every run begins with is restored from a copy of that and of its
    /// disk.
    pub(crate) fn make_golden(&mut self) -> Result<(), String> {
        let golden = self.golden();
        self.make_blank()?;
        self.daemon()?.must("start")?;
        self.past(3)?;
        self.daemon()?.must("write")?;
        self.until("the guest writes", |hand| {
            hand.console().written().is_some()
        })?;
        self.daemon()?.must(&format!("save {}", golden.display()))?;
        self.keep_golden_disk()?;
        self.daemon()?.must("forget").map(drop)
    }

    fn golden(&self) -> PathBuf {
        self.dir.join("golden")
    }

    /// One kill. Yields where it landed if it was in the cell.
    pub(crate) fn attempt(
        &mut self,
        cell: Cell,
        random: &mut Rng,
    ) -> Result<Option<String>, String> {
        let file = self.set_up(cell)?;
        let phase = cell.phases[random.usize(..cell.phases.len())];
        let after = random.u64(..cell.within);
        let operation = match cell.doing {
            Doing::Nothing => "wait".to_owned(),
            Doing::Start => "start".to_owned(),
            Doing::Save => format!("save {}", file.display()),
            Doing::Restore => format!("restore {}", file.display()),
            Doing::Pause => "pause".to_owned(),
            Doing::Resume => "resume".to_owned(),
            Doing::Destroy => "destroy".to_owned(),
            Doing::Dump => format!("dump {}", file.display()),
            Doing::Freeze => "freeze".to_owned(),
            Doing::Snapshot => format!("snapshot {}", file.display()),
            Doing::SnapshotMemory => format!("snapshot-memory {}", file.display()),
            Doing::InsideSave => format!("inside-save t{}", self.saves),
            Doing::InsideLoad => format!("inside-load t{}", self.saves),
            Doing::InsideDelete => format!("inside-delete t{}", self.saves),
            Doing::Backup => format!("backup {}", file.display()),
            Doing::BackupSince => format!("backup-since {}", file.display()),
            Doing::Plug => format!("plug {}", file.display()),
            Doing::PlugCard => "plug-card".to_owned(),
            Doing::Unplug => "unplug".to_owned(),
            Doing::UnplugCard => "unplug-card".to_owned(),
            Doing::Mirror => format!("mirror {}", file.display()),
            Doing::Commit => "commit".to_owned(),
            Doing::Stream => "stream".to_owned(),
        };
        let command = format!("die {phase} {after} {operation}");
        let mut answer = self.daemon()?.ask(&command)?;
        let is_outside = answer.is_some();
        if let Some(error) = answer.as_ref().filter(|line| line.starts_with("error")) {
            return Err(format!("{command}: {error}"));
        }
        // It ended before the kill: wait for that, unless nothing is to kill it.
        while answer.is_some() && phase == "any" {
            answer = self.daemon()?.line()?;
        }
        self.daemon = None;
        self.settle_forks();

        let there = self.guests();
        if there.len() > 1 {
            return Err(format!("the guest runs {} times", there.len()));
        }
        let row = self.row(&file);
        let is_hit = !is_outside && row == Some(cell.row) && !there.is_empty();
        if is_hit && cell.is_qemu_killed {
            for pid in &there {
                kill(*pid, Signal::KILL);
            }
            self.until("QEMU ends", |hand| hand.guests().is_empty())?;
        }
        let told = self.restart()?;
        self.told.clone_from(&told);
        self.judge(cell, is_hit, row, &told, &file)?;
        Ok(is_hit.then(|| format!("{phase} +{after} us")))
    }

    /// Brings guest and files to where the operation begins. Yields the file it is about.
    fn set_up(&mut self, cell: Cell) -> Result<PathBuf, String> {
        self.saves += 1;
        let file = self.dir.join(format!("{}.save", self.saves));
        let is_up = |status: &str| status != "off" && status != "unknown";
        let is_off_wanted = matches!(cell.doing, Doing::Start | Doing::Restore);
        let is_other_wanted = cell.doing.wants_writer() && !self.is_writer;
        let mut status = self.daemon()?.must("status")?;
        if (is_off_wanted || is_other_wanted) && is_up(&status) {
            self.daemon()?.must("destroy")?;
            "off".clone_into(&mut status);
        }
        if is_off_wanted && status != "unknown" {
            self.daemon()?.must("forget")?;
        }
        if !is_up(&status) {
            // A guest of another past counts anew, on a disk of that past.
            let _none = fs::remove_file(console(&self.dir));
            self.lay_disk(cell.doing == Doing::Start)?;
            self.is_writer = cell.doing != Doing::Start;
        }
        if cell.doing == Doing::Restore {
            self.copy(&self.golden(), &file)?;
        }
        if !is_off_wanted && !is_up(&status) {
            let copy = self.dir.join("copy");
            self.copy(&self.golden(), &copy)?;
            self.daemon()?
                .must(&format!("restore {}", copy.display()))?;
            fs::remove_file(copy).map_err(|error| error.to_string())?;
        }
        if status == "paused" && !is_off_wanted {
            self.daemon()?.must("resume")?;
        }
        if !is_off_wanted {
            let last = self.ticks().last().copied().unwrap_or(0);
            self.past(last)?;
        }
        match cell.doing {
            Doing::Resume => drop(self.daemon()?.must("pause")?),
            Doing::InsideLoad | Doing::InsideDelete => {
                let made = format!("inside-save t{}", self.saves);
                self.daemon()?.must(&made)?;
            }
            Doing::BackupSince => {
                let first = file.with_extension("first");
                let copied = format!("backup-chain {}", first.display());
                self.daemon()?.must(&copied)?;
                self.check(&first)?;
            }
            Doing::Plug => self.make_data(&file)?,
            Doing::Unplug => {
                self.make_data(&file)?;
                self.daemon()?.must(&format!("plug {}", file.display()))?;
                self.daemon()?.must("sees /sys/block/vdb")?;
            }
            Doing::UnplugCard => {
                self.daemon()?.must("plug-card")?;
                self.daemon()?.must("sees /sys/class/net/eth0")?;
            }
            Doing::Commit | Doing::Stream => {
                let overlay = file.with_extension("overlay");
                self.daemon()?
                    .must(&format!("overlay {}", overlay.display()))?;
                self.layers.push(overlay);
                let before = self.console().written();
                self.until("the guest writes into it", |hand| {
                    hand.console().written() > before
                })?;
            }
            _ => {}
        }
        Ok(file)
    }

    /// Which row of the table the kill has left.
    fn row(&self, file: &Path) -> Option<Row> {
        let record = fs::read_to_string(self.record()).ok()?;
        let work = |name: &str| record.contains(&format!("\"{name}\": {{"));
        let is_set = |name: &str| record.contains(&format!("\"{name}\": true"));
        if let Some(row) = images::row(work, is_set) {
            return Some(row);
        }
        // The state is a word at a fixed place of the head.
        let state = fs::read(file)
            .ok()
            .map(|head| head.get(16..24).map(<[u8]>::to_vec));
        let state = state.flatten();
        let is = |word: &str| state.as_deref() == Some(word.as_bytes());
        Some(if work("start") {
            Row::Start
        } else if work("save") && is("complete") {
            Row::SaveWhole
        } else if work("save") {
            Row::SavePartial
        } else if work("restore") && is("restored") {
            Row::RestoreUsed
        } else if work("restore") {
            Row::RestoreUnused
        } else if record.contains("\"pivoting\"") {
            Row::Pivot
        } else if record.contains("\"block_jobs\"") {
            Row::BlockJob
        } else if record.contains("\"way\": \"in\"") {
            Row::ComesIn
        } else if record.contains("\"way\": \"out\"") {
            Row::GoesOut
        } else if record.contains("\"freezes\"") {
            Row::Frozen
        } else {
            Row::Idle
        })
    }

    /// What the driver that came back says and has, against what must be.
    fn judge(
        &mut self,
        cell: Cell,
        is_hit: bool,
        row: Option<Row>,
        told: &[String],
        file: &Path,
    ) -> Result<(), String> {
        if self.became() == "GoesOn" {
            let is_over = |record: &str| record.contains("\"job\": null");
            self.until("the job is over", |hand| {
                fs::read_to_string(hand.record()).is_ok_and(|record| is_over(&record))
            })?;
            // Its note goes first, and then its job.
            while self.daemon()?.must("status")?.contains("held") {
                sleep(LOOK);
            }
        }
        self.settle(cell.doing)?;
        let status = self.daemon()?.must("status")?;
        let guests = self.guests();
        let is_off = status == "off" || status == "unknown";
        if status.contains("held") || guests.len() != usize::from(!is_off) {
            return Err(format!(
                "it is {status}, and {} QEMUs run: {told:?}",
                guests.len()
            ));
        }
        if row.is_some() && told.len() != 1 {
            return Err(format!(
                "one guest has a record, and was told of so: {told:?}"
            ));
        }
        if is_hit {
            let said = |line: &String| {
                line.rsplit(' ')
                    .next()
                    .is_some_and(|word| cell.became.contains(&word))
            };
            let is_as_said = told.iter().all(said);
            if !is_as_said || !cell.run.contains(&&*status) {
                return Err(format!("it is {status}: {told:?}"));
            }
        }
        // Where the guest is: in a QEMU, in a whole file, or it was killed, or never was. Nothing else is left.
        let state = fs::read(file)
            .ok()
            .filter(|head| head.starts_with(b"VMWRIGHT SAVE"))
            .map(|head| String::from_utf8_lossy(&head[16..24]).into_owned());
        match (row, state.as_deref(), is_off) {
            (_, Some("partial "), _) => return Err("a file that is not whole is left".to_owned()),
            (Some(Row::SavePartial), Some(_), _) => {
                return Err("a save that was undone left its file".to_owned());
            }
            (_, Some("complete"), false) => {
                return Err("the guest runs, and is in its file".to_owned());
            }
            _ => {}
        }
        if is_off {
            let left = self.left_behind();
            if !left.is_empty() {
                return Err(format!("it is off, and these are left: {left:?}"));
            }
        } else {
            self.count_on(cell.doing, &status)?;
            self.is_thawed(&status)?;
        }
        self.judge_files(cell.doing, row, file, is_off)
    }

    /// Nothing is left frozen, by the word of the guest's agent and by what it writes.
    fn is_thawed(&mut self, status: &str) -> Result<(), String> {
        if !self.is_writer || status != "running" {
            return Ok(());
        }
        let began = Instant::now();
        loop {
            // An agent whose file systems are frozen says so, or is being thawed and says nothing yet.
            let state = self.daemon()?.ask("frozen")?;
            if state.as_deref() == Some("ok thawed") {
                break;
            }
            if began.elapsed() > LONG {
                return Err(format!("its file systems are {state:?}"));
            }
            sleep(LOOK);
        }
        let before = self.console().written();
        self.until("the guest writes on", |hand| {
            hand.console().written() > before
        })
    }

    pub(crate) fn console(&self) -> Console {
        Console::at(console(&self.dir))
    }

    /// The guest counts on, with no number twice and none left out.
    fn count_on(&mut self, doing: Doing, status: &str) -> Result<(), String> {
        let before = self.ticks();
        if status == "running" {
            self.past(before.last().copied().unwrap_or(0))?;
        }
        let ticks = self.ticks();
        let mut jumps = ticks.windows(2).filter(|pair| pair[1] != pair[0] + 1);
        if doing == Doing::InsideLoad {
            // One that went back counts from there.
            let went_back = jumps.clone().take(1).all(|pair| pair[1] <= pair[0]);
            if went_back {
                let _back = jumps.next();
            }
            fs::write(console(&self.dir), "").map_err(|error| error.to_string())?;
        }
        match jumps.next() {
            Some(pair) => Err(format!("after {} it counted {}", pair[0], pair[1])),
            None => Ok(()),
        }
    }

    /// What a guest that is off has left in the run directory.
    fn left_behind(&self) -> Vec<PathBuf> {
        let directory = self.dir.join("run").join(self.uuid.to_string());
        [directory, self.record()]
            .into_iter()
            .filter(|path| path.exists())
            .collect()
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.dir
            .join("run/records")
            .join(format!("{}.json", self.uuid))
    }

    fn ticks(&self) -> Vec<u64> {
        self.console().ticks()
    }

    fn past(&mut self, tick: u64) -> Result<(), String> {
        self.until("the guest counts on", |hand| {
            hand.ticks().last().is_some_and(|last| *last > tick)
        })
    }

    pub(crate) fn until(&self, what: &str, done: impl Fn(&Self) -> bool) -> Result<(), String> {
        let began = Instant::now();
        while !done(self) {
            if began.elapsed() > LONG {
                return Err(format!("waited {LONG:?} until {what}"));
            }
            sleep(LOOK);
        }
        Ok(())
    }

    /// A child that was forked and has not become QEMU yet looks like the daemon.
    fn settle_forks(&self) {
        let dir = self.dir.to_string_lossy().into_owned();
        let is_fork =
            |line: &[String]| line.len() == 3 && line[1] == "--be-daemon" && line[2] == dir;
        while processes().iter().any(|(_, line)| is_fork(line)) {
            sleep(LOOK);
        }
    }

    /// The processes of the guest.
    fn guests(&self) -> Vec<u32> {
        let uuid = self.uuid.to_string();
        let is_guest = |line: &[String]| {
            line.windows(2)
                .any(|pair| pair[0] == "-uuid" && pair[1] == uuid)
        };
        let all = processes().into_iter();
        all.filter(|(_, line)| is_guest(line))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Ends the guest of the last run, and looks once more for what is left. The disk of one that is off was judged with its run.
    pub(crate) fn end(&mut self) -> Result<(), String> {
        let status = self.daemon()?.must("status")?;
        let is_up = status != "off" && status != "unknown";
        if is_up {
            self.daemon()?.must("destroy")?;
        }
        let (guests, left) = (self.guests(), self.left_behind());
        if guests.is_empty() && left.is_empty() {
            return if is_up { self.check_disk() } else { Ok(()) };
        }
        Err(format!(
            "left in the end: processes {guests:?}, files {left:?}"
        ))
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.daemon = None;
        for pid in self.guests() {
            kill(pid, Signal::KILL);
        }
    }
}
