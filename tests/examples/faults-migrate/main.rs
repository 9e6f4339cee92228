//! Two daemons on two hosts, a guest on its way from one to the other, and whatever can go wrong in each of its phases.
//!
//! ```text
//!  host a (namespace)            cable            host b (namespace)         the campaign
//!  daemon ─ QEMU  ◄──────── requests, memory ───────► daemon ─ QEMU      kills, stops, cuts, fills, reboots
//!    │        │                                         │       │
//!   disk      └────────── one console, one witness ─────┴───────┘ ◄──── looks
//! ```
//!
//! A run counts once its fault has come in its phase; until then it is tried again. The seed and the number of a run decide
//! all that is random in it; what became of each is kept, so that a campaign that was cut short goes on where it was. Called by
//! `cargo xtask faults migrate`, which finds QEMU and builds the guest.

mod bed;
mod cells;
mod daemon;
mod evidence;
mod gate;
mod host;
mod judge;
mod lab;
#[path = "../../suite/rig.rs"]
mod rig;
mod strike;
mod tally;
#[path = "../faults/told.rs"]
mod told;
mod witness;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bed::Bed;
use cells::{Cell, cells};
use fastrand::Rng;
use judge::End;
use lab::Lab;
use rig::Env;
use strike::Struck;
use tally::Tally;
use told::Told;

/// What the guest is called.
pub(crate) const NAME: &str = "web";
/// Each cell is to be hit so often.
pub(crate) const OFTEN: u64 = 2;
/// A fault that does not come where it was meant to is tried again so often.
const TRIES: u32 = 10;
/// One run takes at most so long, from the order to move until nothing is left of it.
const CAP: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match &arguments[..] {
        [word, dir, host] if word == "--be-daemon" => {
            let host = host.parse().map_err(|_| "which host?".to_owned());
            host.and_then(|host| daemon::serve(Path::new(dir), host))
        }
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

/// The short form is one run of each of its cells.
fn campaign(arguments: &[String]) -> Result<(), String> {
    let told = Told::by(arguments)?;
    if let Some(lacks) = Lab::lacks() {
        if std::env::var("CI").is_ok_and(|ci| ci == "true") {
            return Err(format!("nothing is skipped here, and {lacks}"));
        }
        println!("skipped: faults migrate: {lacks}");
        return Ok(());
    }
    let cells = cells(told.is_short);
    let often = if told.is_short { 1 } else { OFTEN };
    let runs = told.runs(often * cells.len() as u64)?;
    let mut tally = Tally::of(told.seed, told.is_short, runs.start)?;
    let began = Instant::now();
    let mut bed = None;
    for run in runs.clone() {
        let cell = cells[place(run, &cells)];
        let mut random = told.random(run);
        let on = match bed.take() {
            Some(on) => on,
            None => Made::new()?,
        };
        match one(on, cell, &mut random, &mut tally) {
            Ok((on, end, what)) => {
                tally.note(run, Ok(end))?;
                println!("run {run:>3}  {cell:<40} {what}");
                bed = Some(on);
            }
            Err(error) => {
                // The next run gets hosts of its own, on which nothing is left of this one.
                let failure = format!("run {run} of seed {}, {cell}: {error}", told.seed);
                println!("FAILED {failure}");
                tally.note(run, Err(failure))?;
            }
        }
    }
    drop(bed);
    let left = Lab::leftovers();
    if !left.is_empty() {
        return Err(format!("these namespaces are left: {left:?}"));
    }
    tally.print(&cells, runs.end, began.elapsed())
}

/// Which of the cells a run is of.
fn place(run: u64, cells: &[Cell]) -> usize {
    (run % cells.len() as u64) as usize
}

/// Two hosts, and the directory that all of theirs is in, which goes last.
struct Made {
    bed: Bed,
    _dir: tempfile::TempDir,
}

impl Made {
    fn new() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        Ok(Self {
            bed: Bed::new(Env::find()?, dir.path())?,
            _dir: dir,
        })
    }
}

/// One run, tried until its fault comes in its phase. Yields how it ended, and that in words.
fn one(
    mut on: Made,
    cell: Cell,
    random: &mut Rng,
    tally: &mut Tally,
) -> Result<(Made, End, String), String> {
    for _ in 0..TRIES {
        let began = Instant::now();
        let tried = attempt(&mut on.bed, cell, random);
        let tried = tried.inspect_err(|_| {
            print!("{}{}", on.bed.transcript(), on.bed.evidence());
        });
        if let Some((end, point)) = tried? {
            let took = began.elapsed().as_secs_f64();
            return Ok((on, end, format!("{point:<32} {end:?} in {took:.1} s")));
        }
        tally.kept.outside += 1;
    }
    Err("it never came in its phase".to_owned())
}

/// One run. Yields how it ended and where the fault came, if it came where it was meant to.
fn attempt(bed: &mut Bed, cell: Cell, random: &mut Rng) -> Result<Option<(End, String)>, String> {
    let points = cell.points();
    let point = points[random.usize(..points.len())];
    bed.set_up()?;
    let began = Instant::now();
    let mut struck = Struck::default();
    if bed.reach(point, random)? {
        let at = |error| format!("at {point}: {error}");
        struck = bed.strike(point, cell.fault, random).map_err(at)?;
    }
    let at = |error| format!("at {point}, {struck:?}: {error}");
    let end = bed.judge(cell, struck, began + CAP).map_err(at)?;
    bed.end_run().map_err(at)?;
    let took = began.elapsed();
    if took > CAP {
        return Err(at(format!(
            "it took {took:.1?}, {CAP:?} at most are allowed"
        )));
    }
    Ok(struck.is_hit.then(|| (end, point.to_string())))
}
