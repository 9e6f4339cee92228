//! The guest's disk, and the files that jobs make of it: what there is before a run, and what must be there after it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cells::{Doing, Row};
use crate::hand::Hand;
use crate::parts::{DATA, Facts, LAN};
use crate::rig::ext4;

/// What `qemu-img check` ends with if an image is sound and holds clusters that nothing uses: a QEMU that was killed leaves
/// such.
const LEAKS_ONLY: i32 = 3;

/// Where in a qcow2 table's entry the place of its cluster is, and how large those of our images are.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const CLUSTER: u64 = 64 << 10;

/// The row that a job of storage left. `work` says whether the record is of that job, `is_set` whether a flag in it is.
pub(crate) fn row(work: impl Fn(&str) -> bool, is_set: impl Fn(&str) -> bool) -> Option<Row> {
    let of =
        |name, flag, before, after| work(name).then(|| if is_set(flag) { after } else { before });
    of("dump", "is_whole", Row::DumpPartial, Row::DumpWhole)
        .or_else(|| {
            of(
                "snapshot",
                "is_taking",
                Row::OverlaysMade,
                Row::OverlaysTaken,
            )
        })
        .or_else(|| of("inside", "is_done", Row::InsideBegun, Row::InsideDone))
        .or_else(|| of("backup", "is_whole", Row::BackupBegun, Row::BackupWhole))
}

impl Hand {
    /// Makes the image that a guest boots with, and puts it in place.
    pub(crate) fn make_blank(&mut self) -> Result<(), String> {
        let (raw, blank) = (ext4(&self.dir), self.blank());
        let words = ["convert", "-O", "qcow2", text(&raw), text(&blank)];
        self.env.qemu_img(&words)?;
        fs::remove_file(raw).map_err(|error| error.to_string())?;
        self.lay_disk(true)
    }

    /// Keeps the disk of the guest that was just saved.
    pub(crate) fn keep_golden_disk(&self) -> Result<(), String> {
        self.copy(&crate::disk(&self.dir), &self.golden_disk())
    }

    /// Puts the guest's disk in place: blank, or that of the golden save. What earlier guests had goes.
    pub(crate) fn lay_disk(&mut self, is_blank: bool) -> Result<(), String> {
        for layer in self.layers.drain(..) {
            fs::remove_file(layer).map_err(|error| error.to_string())?;
        }
        let from = if is_blank {
            self.blank()
        } else {
            self.golden_disk()
        };
        self.copy(&from, &crate::disk(&self.dir))
    }

    pub(crate) fn copy(&self, from: &Path, to: &Path) -> Result<(), String> {
        let copied = fs::copy(from, to);
        copied
            .map(drop)
            .map_err(|error| format!("cannot copy {}: {error}", from.display()))
    }

    fn blank(&self) -> PathBuf {
        self.dir.join("blank.qcow2")
    }

    fn golden_disk(&self) -> PathBuf {
        self.dir.join("golden.qcow2")
    }

    /// What there is of the job's files, against what must be; what nobody needs goes.
    pub(crate) fn judge_files(
        &mut self,
        doing: Doing,
        row: Option<Row>,
        file: &Path,
        is_off: bool,
    ) -> Result<(), String> {
        let became = self.became().to_owned();
        let must_be = match row {
            Some(Row::DumpPartial | Row::OverlaysMade) => Some(false),
            Some(Row::DumpWhole | Row::BackupWhole) => Some(true),
            Some(Row::OverlaysTaken) => Some(became == "Finished"),
            Some(Row::BackupBegun) => Some(matches!(&*became, "GoesOn" | "Finished")),
            _ => None,
        };
        if must_be.is_some_and(|must_be| must_be != file.exists()) {
            let is_there = if file.exists() { "is there" } else { "is gone" };
            return Err(format!("{row:?} became {became}, and its file {is_there}"));
        }
        let memory = file.with_extension("memory");
        if memory.exists() && !file.exists() {
            return Err("the guest's memory is left, and no snapshot".to_owned());
        }
        // One that was to be kept is told of by nobody any more.
        let _none = fs::remove_file(memory);
        if doing.is_of_parts() {
            self.judge_parts(is_off)?;
        }
        if doing.is_block_job() {
            self.judge_the_disk(doing, file, is_off)?;
        }
        match doing {
            _ if !file.exists() => {}
            // It is the disk.
            Doing::Mirror => self.layers.push(file.to_owned()),
            Doing::Snapshot | Doing::SnapshotMemory => self.layers.push(file.to_owned()),
            Doing::Dump => {
                let head = fs::read(file).map_err(|error| error.to_string())?;
                if !head.starts_with(b"\x7fELF") {
                    return Err("a dump is left that is none".to_owned());
                }
                fs::remove_file(file).map_err(|error| error.to_string())?;
            }
            Doing::Backup | Doing::BackupSince => {
                self.check(file)?;
                fs::remove_file(file).map_err(|error| error.to_string())?;
            }
            _ => fs::remove_file(file).map_err(|error| error.to_string())?,
        }
        // What a copy of what changed goes on from.
        let _none = fs::remove_file(file.with_extension("first"));
        if !is_off {
            return Ok(());
        }
        let is_cut = matches!(
            doing,
            Doing::InsideSave | Doing::InsideLoad | Doing::InsideDelete
        );
        self.check_layers(if is_cut { is_bookkeeping } else { |_| false })
    }

    /// An image of raw bytes, for a disk that comes and goes.
    pub(crate) fn make_data(&self, file: &Path) -> Result<(), String> {
        let made = fs::File::create_new(file).and_then(|file| file.set_len(1 << 20));
        made.map_err(|error| error.to_string())
    }

    /// Waits until nothing that was begun with the guest's parts and disks is left to do.
    pub(crate) fn settle(&self, doing: Doing) -> Result<(), String> {
        if !doing.is_of_parts() && !doing.is_block_job() {
            return Ok(());
        }
        self.until("its parts and disks are settled", |hand| {
            let record = fs::read_to_string(hand.record()).unwrap_or_default();
            !record.contains("\"moving\"") && !record.contains("\"block_jobs\"")
        })
    }

    fn facts(&mut self) -> Result<Facts, String> {
        let facts = self.daemon()?.must("facts")?;
        serde_json::from_str(&facts).map_err(|error| error.to_string())
    }

    /// The disk and the card are in the description and in QEMU, or in neither; and the guest lets go of what is there.
    fn judge_parts(&mut self, is_off: bool) -> Result<(), String> {
        if is_off {
            return Ok(());
        }
        for (name, unplug) in [(DATA, "unplug"), (LAN, "unplug-card")] {
            let facts = self.facts()?;
            let is_named = facts.parts.iter().any(|part| part == name);
            // A device, and what lies behind it: a node, or a backend.
            let wanted = if is_named { 2 } else { 0 };
            let of_it = facts.there.iter().filter(|found| found.starts_with(name));
            if of_it.count() != wanted {
                return Err(format!("{name} is there in part: {facts:?}"));
            }
            if is_named {
                self.daemon()?.must(unplug)?;
                let facts = self.facts()?;
                let is_left = |found: &String| found.starts_with(name);
                if facts.parts.iter().chain(&facts.there).any(is_left) {
                    return Err(format!("{name} left something behind: {facts:?}"));
                }
            }
        }
        Ok(())
    }

    /// Both descriptions name one file, which is there; a copy that is not the disk is gone, and no job is left.
    fn judge_the_disk(&mut self, doing: Doing, file: &Path, is_off: bool) -> Result<(), String> {
        let facts = self.facts()?;
        let is_one = is_off || facts.live == facts.defined;
        let is_there = facts.defined.as_ref().is_some_and(|disk| disk.exists());
        let is_copy_right = file.exists() == (facts.defined.as_deref() == Some(file));
        if is_one && is_there && facts.jobs == 0 && (doing != Doing::Mirror || is_copy_right) {
            return Ok(());
        }
        let copy = file.exists();
        Err(format!("its disk is not one file, copy {copy}: {facts:?}"))
    }

    /// The guest's disk is sound, in all of its layers.
    pub(crate) fn check_disk(&self) -> Result<(), String> {
        self.check_layers(|_| false)
    }

    fn check_layers(&self, is_spared: fn(&str) -> bool) -> Result<(), String> {
        let disk = crate::disk(&self.dir);
        let mut all = std::iter::once(&disk).chain(&self.layers);
        all.try_for_each(|image| self.check_but(image, is_spared))
    }

    /// An image without a fault; clusters that nothing uses are none.
    pub(crate) fn check(&self, image: &Path) -> Result<(), String> {
        self.check_but(image, |_| false)
    }

    /// The same, but for what `qemu-img` says that is spared.
    fn check_but(&self, image: &Path, is_spared: fn(&str) -> bool) -> Result<(), String> {
        let ran = Command::new(&self.env.qemu_img)
            .args(["check", "-q"])
            .arg(image)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        let is_sound = ran.status.success() || ran.status.code() == Some(LEAKS_ONLY);
        if is_sound || is_spared(&said) {
            return Ok(());
        }
        Err(format!("{} is damaged: {said}", image.display()))
    }
}

/// Whether all that `qemu-img` calls an error is the mark of clusters that have one owner: missing, or set before a count
/// that is too high went down. A QEMU that is killed at a snapshot inside the image leaves those, since it writes marks and
/// counts one after the other. Such a cluster is written to in place or copied first, and both are right, since nobody shares
/// it; one that is marked and has several owners would be damaged by the next write.
fn is_bookkeeping(said: &str) -> bool {
    let owners: HashMap<u64, u64> = said
        .lines()
        .filter_map(|line| {
            let (cluster, counts) = line.strip_prefix("Leaked cluster ")?.split_once(' ')?;
            let owners = counts.rsplit_once("reference=")?.1;
            Some((cluster.parse().ok()?, owners.trim().parse().ok()?))
        })
        .collect();
    let has_one_owner = |line: &str| {
        let (_, mark) = line
            .strip_prefix("ERROR OFLAG_COPIED ")?
            .split_once("_entry=")?;
        let (entry, count) = mark.split_once(" refcount=")?;
        let cluster = (u64::from_str_radix(entry, 16).ok()? & OFFSET) / CLUSTER;
        let counted = count.trim().parse().ok()?;
        Some(*owners.get(&cluster).unwrap_or(&counted) == 1)
    };
    let errors = said.lines().filter(|line| line.starts_with("ERROR"));
    let all: Vec<_> = errors.map(has_one_owner).collect();
    !all.is_empty() && all.iter().all(|one| *one == Some(true))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("our own paths are text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_that_is_missing_or_early_on_a_cluster_of_one_owner_is_spared() {
        for said in [
            "Leaked cluster 1448 refcount=1 reference=0\nERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry=40000 refcount=1\n",
            "Leaked cluster 5 refcount=2 reference=1\nERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=2\n",
        ] {
            assert!(is_bookkeeping(said), "{said}");
        }
    }

    #[test]
    fn a_cluster_that_is_shared_or_counted_too_low_is_damage() {
        for said in [
            "",
            "qemu-img: Could not open it",
            "ERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=2\n",
            "Leaked cluster 6 refcount=2 reference=1\nERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=2\n",
            "Leaked cluster 5 refcount=3 reference=2\nERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=3\n",
            "ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry=40000 refcount=1\nERROR cluster 4 refcount=1 reference=2\n",
        ] {
            assert!(!is_bookkeeping(said), "{said}");
        }
    }
}
