//! The cells of the campaign: every phase of a migration, and every fault that can come in it.
//!
//! Written from what must hold, not from the driver's code. A point is where a daemon is made to stand still, so that the
//! fault lands in its phase and nowhere else; memory moves by itself, and a fault in the middle of it, or just when the guest
//! has stopped, is checked instead.

use std::fmt;

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

use Side::{Destination, Source};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Begin,
    Prepare,
    Perform,
    Switchover,
    Finish,
    Confirm,
    /// The guest runs at the destination, and the rest of its memory is at the source.
    PostCopy,
}

pub(crate) const PHASES: [Phase; 7] = [
    Phase::Begin,
    Phase::Prepare,
    Phase::Perform,
    Phase::Switchover,
    Phase::Finish,
    Phase::Confirm,
    Phase::PostCopy,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    KillDaemon(Side),
    KillQemu(Side),
    StopDaemon(Side),
    StopQemu(Side),
    CutAndMend,
    CutForGood,
    Cancel(Side),
    DiskFull(Side),
    Reboot(Side),
}

pub(crate) const FAULTS: [Fault; 16] = [
    Fault::KillDaemon(Source),
    Fault::KillDaemon(Destination),
    Fault::KillQemu(Source),
    Fault::KillQemu(Destination),
    Fault::StopDaemon(Source),
    Fault::StopDaemon(Destination),
    Fault::StopQemu(Source),
    Fault::StopQemu(Destination),
    Fault::CutAndMend,
    Fault::CutForGood,
    Fault::Cancel(Source),
    Fault::Cancel(Destination),
    Fault::DiskFull(Destination),
    Fault::DiskFull(Source),
    Fault::Reboot(Source),
    Fault::Reboot(Destination),
];

/// One in so many cells is one of the short form.
const THIN: usize = 3;

/// Where the fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// That daemon stands still there.
    Held(Side, &'static str),
    /// Memory moves.
    Moving,
    /// The guest was stopped, and the last of it is on its way.
    Stopping,
    /// The guest runs at the destination, and the rest of it is on its way.
    Following,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) phase: Phase,
    pub(crate) fault: Fault,
}

impl Cell {
    /// Where in the phase that fault can come; none if it cannot.
    pub(crate) fn points(self) -> Vec<Point> {
        let is_of_qemu =
            |side| self.fault == Fault::KillQemu(side) || self.fault == Fault::StopQemu(side);
        let held = |side, names: &[&'static str]| -> Vec<Point> {
            names.iter().map(|name| Point::Held(side, name)).collect()
        };
        let (here, there) = match self.phase {
            // There is no copy yet that could be killed, nor anything to be cancelled there.
            Phase::Begin if is_of_qemu(Destination) || self.fault == Fault::Cancel(Destination) => {
                (vec![], vec![])
            }
            // It only forgets what it wrote, which a full disk never refuses.
            Phase::Confirm | Phase::PostCopy if self.fault == Fault::DiskFull(Destination) => {
                (vec![], vec![])
            }
            Phase::Begin if self.fault == Fault::DiskFull(Source) => {
                (held(Source, &["stores begin"]), vec![])
            }
            Phase::Begin => (held(Source, &["stored begin"]), vec![]),
            Phase::Prepare if is_of_qemu(Destination) => (
                held(Source, &["heard prepare"]),
                held(Destination, &["stored prepared"]),
            ),
            // It has heard of the guest by then.
            Phase::Prepare if self.fault == Fault::Cancel(Destination) => (
                held(Source, &["heard prepare"]),
                held(Destination, &["stored preparing", "stored prepared"]),
            ),
            Phase::Prepare if self.fault == Fault::DiskFull(Source) => {
                (held(Source, &["stores prepare"]), vec![])
            }
            Phase::Prepare if self.fault == Fault::DiskFull(Destination) => (
                vec![],
                held(Destination, &["stores preparing", "stores prepared"]),
            ),
            Phase::Prepare => (
                held(Source, &["asks prepare", "heard prepare"]),
                held(Destination, &["stored preparing", "stored prepared"]),
            ),
            Phase::Perform if self.fault == Fault::DiskFull(Source) => {
                (held(Source, &["stores perform"]), vec![Point::Moving])
            }
            Phase::Perform => (vec![Point::Moving], vec![]),
            Phase::PostCopy => (vec![Point::Following], vec![]),
            Phase::Switchover if matches!(self.fault, Fault::DiskFull(_)) => {
                (held(Source, &["stores handing-over"]), vec![])
            }
            Phase::Switchover => (
                held(Source, &["stores handing-over"]),
                vec![Point::Stopping],
            ),
            Phase::Finish if self.fault == Fault::DiskFull(Destination) => (
                vec![],
                held(Destination, &["stores starting", "stores owned"]),
            ),
            Phase::Finish => (
                held(Source, &["asks finish", "heard finish"]),
                held(
                    Destination,
                    &["stored starting", "stores owned", "stored owned"],
                ),
            ),
            // Its QEMU is there until the source has written that it is given up, and a little longer.
            Phase::Confirm if is_of_qemu(Source) => (
                held(Source, &["stores released", "stored released"]),
                vec![],
            ),
            // And here it knows of it still.
            Phase::Confirm if self.fault == Fault::Cancel(Destination) => (
                held(
                    Source,
                    &["stores released", "stored released", "asks confirm"],
                ),
                held(Destination, &["stores nothing"]),
            ),
            Phase::Confirm if self.fault == Fault::DiskFull(Source) => {
                (held(Source, &["stores released"]), vec![])
            }
            Phase::Confirm => (
                held(
                    Source,
                    &[
                        "stores released",
                        "stored released",
                        "asks confirm",
                        "heard confirm",
                    ],
                ),
                held(Destination, &["stores nothing"]),
            ),
        };
        here.into_iter().chain(there).collect()
    }

    /// Whether it may end with nobody running, and both sides in doubt, until the link is mended or a person decides.
    pub(crate) fn may_be_in_doubt(self) -> bool {
        self.fault == Fault::CutForGood
            && matches!(self.phase, Phase::Finish | Phase::Confirm | Phase::PostCopy)
    }
}

/// All cells that there are, or every third on the diagonals, for the short form: every fault in two or three phases, early
/// and late, and every phase with a third of the faults, so that each family comes to each phase from one side or the other.
pub(crate) fn cells(is_short: bool) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (row, fault) in FAULTS.into_iter().enumerate() {
        for (column, phase) in PHASES.into_iter().enumerate() {
            let cell = Cell { phase, fault };
            let is_on_diagonal = (row + column) % THIN == 0;
            if (is_on_diagonal || !is_short) && !cell.points().is_empty() {
                cells.push(cell);
            }
        }
    }
    cells
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = format!("{:?}", self.phase).to_lowercase();
        f.pad(&format!("{phase:<11} {}", self.fault))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |side: &Side| match side {
            Source => "source",
            Destination => "destination",
        };
        match self {
            Self::KillDaemon(at) => write!(f, "daemon killed, {}", side(at)),
            Self::KillQemu(at) => write!(f, "QEMU killed, {}", side(at)),
            Self::StopDaemon(at) => write!(f, "daemon stopped, {}", side(at)),
            Self::StopQemu(at) => write!(f, "QEMU stopped, {}", side(at)),
            Self::CutAndMend => f.write_str("link cut and mended"),
            Self::CutForGood => f.write_str("link cut for good"),
            Self::Cancel(at) => write!(f, "cancel, {}", side(at)),
            Self::DiskFull(at) => write!(f, "disk full, {}", side(at)),
            Self::Reboot(at) => write!(f, "host rebooted, {}", side(at)),
        }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held(Source, name) => write!(f, "source {name}"),
            Self::Held(Destination, name) => write!(f, "destination {name}"),
            Self::Moving => f.write_str("memory moves"),
            Self::Stopping => f.write_str("the guest has stopped"),
            Self::Following => f.write_str("the rest follows"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_form_has_every_fault_in_two_phases_and_every_phase_with_three_faults() {
        let short = cells(true);
        for fault in FAULTS {
            let phases = short.iter().filter(|cell| cell.fault == fault).count();
            assert!(phases >= 2, "{fault}: {phases}");
        }
        for phase in PHASES {
            let faults = short.iter().filter(|cell| cell.phase == phase).count();
            assert!(faults >= 3, "{phase:?}: {faults}");
        }
    }
}
