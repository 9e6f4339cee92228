//! What a run takes: two hosts, a cable, a guest to move, a witness. Brings a guest up, has its move begun, takes a daemon
//! to where the fault is to come, and clears everything away again.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use driver::{Disk, DiskFormat, Guest, Kernel, Serial};
use fastrand::Rng;
use uuid::Uuid;

use crate::cells::{Point, Side};
use crate::gate;
use crate::host::Host;
use crate::lab::Lab;
use crate::rig::{Console, Env, Signal, kill, uneven_memory};
use crate::witness::{Life, Witness};

/// Between two looks at what tells nobody that it changed.
pub(crate) const LOOK: Duration = Duration::from_millis(5);
/// MiB a second: fast where memory is not the point, slow where the fault is to come while it moves.
const FAST: u64 = 48;
const SLOW: u64 = 24;
/// MiB of the guest.
const MEMORY: u64 = 128;
/// Bytes of its disk.
const DISK: u64 = 1 << 20;
/// The longest a daemon takes to come to a point, and memory to begin to move.
const REACHED: Duration = Duration::from_secs(15);

pub(crate) struct Bed {
    pub(crate) dir: PathBuf,
    env: Env,
    pub(crate) uuid: Uuid,
    pub(crate) lab: Lab,
    pub(crate) witness: Witness,
    pub(crate) hosts: [Host; 2],
    /// What is kept of the guest at the destination: it was there once, was to start with that host, and has moved away.
    kept_there: Vec<u8>,
}

impl Bed {
    pub(crate) fn new(env: Env, dir: &Path) -> Result<Self, String> {
        let mut lab = Lab::new()?;
        for host in ["a", "b"] {
            lab.mount(&dir.join(host).join("state"))?;
        }
        let hosts = [Host::new(&dir.join("a"), 0)?, Host::new(&dir.join("b"), 1)?];
        let mut bed = Self {
            dir: dir.to_owned(),
            env,
            uuid: Uuid::new_v4(),
            lab,
            witness: Witness::listen(&dir.join("witness"))?,
            hosts,
            kept_there: Vec::new(),
        };
        bed.make_golden()?;
        Ok(bed)
    }

    pub(crate) fn host(&mut self, side: Side) -> &mut Host {
        &mut self.hosts[side as usize]
    }

    fn golden(&self) -> PathBuf {
        self.dir.join("golden")
    }

    /// The one file that is its disk on both hosts, and that as it was when the guest was saved.
    fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    fn golden_disk(&self) -> PathBuf {
        self.dir.join("golden-disk")
    }

    /// The guest of all runs: it counts on its console and on its disk, dirties memory, and has its QEMU dial the witness.
    fn guest(&self) -> String {
        let words = "console=ttyS0 quiet vmwright.qga=none vmwright.dirty=8 vmwright.dirtyrate=4 \
                     vmwright.count=/dev/vda";
        let kernel = Kernel {
            initrd: Some(self.env.initrd.clone()),
            arguments: words.into(),
            ..Kernel::new(&self.env.kernel)
        };
        let witness = format!(
            "socket,id=witness,path={}",
            self.dir.join("witness").display()
        );
        let dials = ["-chardev", &witness, "-mon", "chardev=witness,mode=control"];
        let dials = dials.map(str::to_owned).into_iter();
        let guest = Guest {
            uuid: self.uuid,
            memory_mib: MEMORY,
            disks: vec![Disk::new("data", self.disk(), DiskFormat::Raw)],
            kernel: Some(kernel),
            serial: Serial::File(self.dir.join("console")),
            extra_arguments: dials.chain(uneven_memory(MEMORY)).collect(),
            ..Guest::new(crate::NAME)
        };
        serde_json::to_string(&guest).expect("a guest is JSON")
    }

    /// Boots the guest once, at the destination, moves it to the source and saves it there: what every run begins with is
    /// restored from a copy of that.
    fn make_golden(&mut self) -> Result<(), String> {
        let disk = fs::File::create(self.disk()).and_then(|file| file.set_len(DISK));
        disk.map_err(|error| format!("cannot make the disk: {error}"))?;
        let (guest, golden) = (self.guest(), self.golden());
        for host in &mut self.hosts {
            host.start(&self.lab)?;
        }
        self.host(Side::Destination).ask(&format!("boot {guest}"))?;
        let limit = Duration::from_secs(60);
        self.until(limit, "it boots", |bed| {
            bed.console().ticks().len() > 5 && bed.counted().is_some_and(|number| number > 5)
        })?;
        self.is_disk_locked()?;
        let moved = self.host(Side::Destination);
        moved.ask(&format!("move {FAST}"))?;
        if !moved.says(REACHED, "moved ok") {
            return Err("it does not come to the source".to_owned());
        }
        self.kept_there = self.hosts[Side::Destination as usize].kept(self.uuid)?;
        let has_moved = String::from_utf8_lossy(&self.kept_there).contains("\"moved_away\": true");
        if !has_moved {
            return Err("it moved, and that is not written down".to_owned());
        }
        self.hosts[0].ask(&format!("save {}", golden.display()))?;
        let copied = fs::copy(self.disk(), self.golden_disk());
        copied.map_err(|error| format!("cannot copy the disk: {error}"))?;
        self.end_run()
    }

    /// Nobody else gets at the disk of a guest that runs, by QEMU's own lock: what would be a second guest on it ends.
    fn is_disk_locked(&self) -> Result<(), String> {
        let disk = self.disk().display().to_string();
        // As large as it is already: nothing would change if nobody had it.
        let size = DISK.to_string();
        match self.env.qemu_img(&["resize", "-f", "raw", &disk, &size]) {
            Err(refused) if refused.contains("lock") => Ok(()),
            other => Err(format!("the disk is not locked: {other:?}")),
        }
    }

    /// Two daemons, and the guest at the source.
    pub(crate) fn set_up(&mut self) -> Result<(), String> {
        self.hosts[Side::Destination as usize].keep(self.uuid, &self.kept_there)?;
        for host in 0..2 {
            self.hosts[host].start(&self.lab)?;
        }
        let copy = self.dir.join("copy");
        let copied =
            fs::copy(self.golden(), &copy).and_then(|_| fs::copy(self.golden_disk(), self.disk()));
        copied.map_err(|error| format!("cannot copy the golden save: {error}"))?;
        let guest = self.guest();
        self.hosts[0].ask(&format!("restore {} {guest}", copy.display()))?;
        fs::remove_file(copy).map_err(|error| error.to_string())?;
        let limit = Duration::from_secs(10);
        self.until(limit, "the guest counts", |bed| {
            !bed.console().ticks().is_empty()
        })
    }

    /// Has the move begun, and a daemon come to the point. Whether it did.
    pub(crate) fn reach(&mut self, point: Point, random: &mut Rng) -> Result<bool, String> {
        if let Point::Held(side, name) = point {
            self.host(side).ask(&format!("arm {name}"))?;
            self.hosts[0].ask(&format!("move {FAST}"))?;
            let is_there = self.host(side).says(REACHED, &format!("at {name}"));
            if !is_there {
                self.host(side).ask("go")?;
            }
            return Ok(is_there);
        }
        let how = if point == Point::Following {
            " post-copy"
        } else {
            ""
        };
        self.hosts[0].ask(&format!("move {SLOW}{how}"))?;
        if point == Point::Stopping {
            let has_stopped = |bed: &mut Self| bed.has_stopped();
            self.until(REACHED, "the guest stops", has_stopped)?;
            return Ok(true);
        }
        let is_moving = |bed: &mut Self| bed.qemu(Side::Source).is_some_and(|life| life.is_moving);
        self.until(REACHED, "memory moves", is_moving)?;
        if point == Point::Following {
            self.hosts[0].ask("follow")?;
            let is_following = |bed: &mut Self| bed.is_at(Point::Following);
            self.until(REACHED, "the rest of the memory follows", is_following)?;
        }
        sleep(Duration::from_millis(random.u64(..1000)));
        Ok(true)
    }

    /// The stage that the journal of that side stands at, if it has a record.
    pub(crate) fn stage(&self, side: Side) -> Option<String> {
        let record = self.hosts[side as usize].record()?;
        gate::stage(&record)
    }

    fn has_stopped(&self) -> bool {
        let source = self.qemu(Side::Source);
        source.is_some_and(|life| !life.spans.is_empty() && !life.is_running())
    }

    /// Whether the fault that has just come came where it was meant to: a daemon that was held at its point was there, and
    /// what moves by itself is seen by the journal of the source and the word of the QEMUs.
    pub(crate) fn is_at(&mut self, point: Point) -> bool {
        let stage = self.stage(Side::Source);
        let is_performing = stage.as_deref() == Some("perform");
        match point {
            Point::Held(..) => true,
            Point::Moving => {
                is_performing
                    && self
                        .qemu(Side::Source)
                        .is_some_and(|life| life.is_running())
            }
            Point::Stopping => {
                let there = self.qemu(Side::Destination);
                is_performing && self.has_stopped() && there.is_some_and(|life| !life.is_loaded)
            }
            Point::Following => {
                let there = self.qemu(Side::Destination);
                let is_partial = |life: Life| life.is_running() && !life.is_loaded;
                stage.as_deref() == Some("post-copy") && there.is_some_and(is_partial)
            }
        }
    }

    /// The QEMU of that host, if there is one.
    pub(crate) fn qemu(&self, side: Side) -> Option<Life> {
        let network = self.lab.inode(side as usize);
        let lives = self.witness.lives().into_iter();
        lives
            .filter(|life| !life.is_over)
            .find(|life| life.network == network)
    }

    pub(crate) fn console(&self) -> Console {
        Console::at(self.dir.join("console"))
    }

    /// The number that the guest wrote to its disk last.
    pub(crate) fn counted(&self) -> Option<u64> {
        let disk = fs::read(self.disk()).ok()?;
        let line = disk.split(|byte| *byte == b'\n').next()?;
        std::str::from_utf8(line).ok()?.parse().ok()
    }

    pub(crate) fn until(
        &mut self,
        limit: Duration,
        what: &str,
        mut done: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), String> {
        let began = Instant::now();
        while !done(self) {
            if began.elapsed() > limit {
                return Err(format!("waited {limit:?} until {what}"));
            }
            sleep(LOOK);
        }
        Ok(())
    }

    /// Ends guest and daemons, and sees that nothing is left.
    pub(crate) fn end_run(&mut self) -> Result<(), String> {
        for host in &mut self.hosts {
            host.end()?;
        }
        self.clean()
    }

    /// Nothing of a run is left: no process, no record, no socket. Then the next one begins anew.
    fn clean(&mut self) -> Result<(), String> {
        let is_over = |bed: &mut Self| bed.witness.lives().iter().all(|life| life.is_over);
        self.until(Duration::from_secs(5), "no QEMU is left", is_over)?;
        let mut left: Vec<_> = self.guests().iter().map(u32::to_string).collect();
        for host in &mut self.hosts {
            let files = host.left(self.uuid).into_iter();
            left.extend(files.map(|path| path.display().to_string()));
            host.forget_told();
        }
        if !left.is_empty() {
            return Err(format!("these are left: {left:?}"));
        }
        self.witness.clear();
        // The next one counts anew.
        fs::remove_file(self.dir.join("console")).map_err(|error| error.to_string())
    }

    /// What was said and done on both hosts, in order, for whoever has to understand a failure.
    pub(crate) fn transcript(&self) -> String {
        let mut all: Vec<_> = self.hosts.iter().flat_map(Host::transcript).collect();
        all.sort();
        let Some(first) = all.first().map(|line| line.0) else {
            return String::new();
        };
        let line = |(at, line): &&(Duration, String)| {
            format!("  {:>7.3} {line}\n", (*at - first).as_secs_f64())
        };
        all.iter().map(line).collect()
    }

    /// The processes of the guest, by the list of all processes.
    pub(crate) fn guests(&self) -> Vec<u32> {
        let uuid = self.uuid.to_string();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_guest = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            words.any(|word| word == b"-uuid") && words.next() == Some(uuid.as_bytes())
        };
        pids.filter(is_guest).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            host.kill();
        }
        for pid in self.guests() {
            kill(pid, Signal::KILL);
        }
        // Their disks can be taken away once they have ended.
        let began = Instant::now();
        while !self.guests().is_empty() && began.elapsed() < Duration::from_secs(5) {
            sleep(LOOK);
        }
    }
}
