//! A daemon with a real guest, killed with `SIGKILL` inside every kind of operation, and started again each time.
//!
//! ```text
//!  controller ──"die writing 730 save /…"──► daemon ──► QEMU
//!      │  ◄──────────── SIGKILL ─────────────  ✝           │ runs on, or is killed here, too
//!      ├─ which row of the recovery table is this?  ◄──────┘
//!      └─ daemon again ──► "recovered save Undone" ──► one QEMU, no file, nothing frozen, no gap in what the guest counts
//! ```
//!
//! A run counts once its kill has landed in the cell it was for; until then it is tried again. The seed and the number of
//! a run decide all that is random in it. Called by `cargo xtask faults daemon`, which finds QEMU and builds the guest.

mod cells;
mod daemon;
mod hand;
mod images;
mod leash;
mod parts;
#[path = "../../suite/rig.rs"]
mod rig;
mod told;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use cells::{CELLS, Cell};
use driver::{Disk, DiskFormat, Guest, Kernel, Serial};
use hand::Hand;
use rig::Env;
use told::Told;
use uuid::Uuid;

/// What the guest is called.
pub(crate) const NAME: &str = "web";
/// And its disk.
pub(crate) const DISK: &str = "root";
/// A campaign has so many, unless it is told otherwise: each cell three times.
const RUNS: u64 = 200;
/// A kill that does not land in its cell is tried again so often.
const TRIES: u32 = 40;

/// The guest's uuid follows from the campaign's directory: a campaign beside this one counts its own QEMUs.
fn uuid(dir: &Path) -> Uuid {
    let mut hasher = DefaultHasher::new();
    dir.hash(&mut hasher);
    Uuid::from_u64_pair(0x5eed, hasher.finish())
}

/// The guest of all runs: it boots the image and counts on its console.
pub(crate) fn guest(env: &Env, dir: &Path) -> Guest {
    let kernel = Kernel {
        initrd: Some(env.initrd.clone()),
        arguments: "console=ttyS0 quiet".into(),
        ..Kernel::new(&env.kernel)
    };
    Guest {
        uuid: uuid(dir),
        memory_mib: 128,
        kernel: Some(kernel),
        serial: Serial::File(console(dir)),
        disks: vec![Disk::new(DISK, disk(dir), DiskFormat::Qcow2)],
        ..Guest::new(NAME)
    }
}

pub(crate) fn disk(dir: &Path) -> PathBuf {
    dir.join("root.qcow2")
}

pub(crate) fn console(dir: &Path) -> PathBuf {
    dir.join("console")
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match &arguments[..] {
        [word, dir] if word == "--be-daemon" => daemon::serve(Path::new(dir)),
        rest => campaign(rest),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faults: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The short form has one run for each cell.
fn campaign(arguments: &[String]) -> Result<(), String> {
    let told = Told::by(arguments)?;
    let cells: Vec<Cell> = CELLS.into_iter().flatten().collect();
    let all = if told.is_short {
        cells.len() as u64
    } else {
        RUNS
    };
    let runs = told.runs(all)?;
    let done = runs.end - runs.start;
    let mut hits = vec![0_u64; cells.len()];
    let mut outside = 0_u64;
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut hand = Hand::new(Env::find()?, dir.path())?;
    hand.make_golden()?;
    let began = Instant::now();
    for run in runs {
        let place = (run % cells.len() as u64) as usize;
        let cell = cells[place];
        let mut random = told.random(run);
        let failed = |error| format!("run {run} of seed {}, {cell:?}: {error}", told.seed);
        let mut landed = None;
        for _ in 0..TRIES {
            landed = hand.attempt(cell, &mut random).map_err(failed)?;
            if landed.is_some() {
                break;
            }
            outside += 1;
        }
        let phase = landed.ok_or_else(|| failed("no kill landed in its cell".to_owned()))?;
        hits[place] += 1;
        println!(
            "run {run:>3}  {:<14} killed at {phase:<22} {:<14} qemu {:<7} became {}",
            format!("{:?}", cell.doing).to_lowercase(),
            format!("{:?}", cell.row),
            if cell.is_qemu_killed {
                "killed"
            } else {
                "there"
            },
            hand.became()
        );
    }
    hand.end()?;
    println!("\nhits of each cell, {outside} kills landed outside and do not count");
    for (cell, hits) in cells.iter().zip(&hits) {
        let qemu = if cell.is_qemu_killed {
            "killed"
        } else {
            "there"
        };
        println!(
            "{hits:>4}  {:<14} {:<14} qemu {qemu:<7} at {}",
            format!("{:?}", cell.doing),
            format!("{:?}", cell.row),
            cell.phases.join(", ")
        );
    }
    println!("figure faults-daemon {done} runs bar >= {done} ok");
    let least = hits.iter().min().copied().unwrap_or(0);
    let is_whole = done >= 2 * cells.len() as u64;
    println!(
        "figure faults-daemon-least-hit {least} hits bar >= {} {}",
        if is_whole { 2 } else { 0 },
        if !is_whole || least >= 2 {
            "ok"
        } else {
            "short"
        }
    );
    println!(
        "{done} of {done} runs in {:.0} s",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}
