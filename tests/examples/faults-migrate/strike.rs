//! The faults: what is done to a host, a process, a cable or a disk while a daemon stands at the point, and what is set
//! right again afterwards, as a supervisor, an administrator or the next start of the host would.

use std::thread::sleep;
use std::time::Duration;

use fastrand::Rng;

use crate::bed::Bed;
use crate::cells::{Fault, Point, Side};
use crate::rig::{Signal, kill};

/// The longest until a daemon writes to a disk that is full.
const REFUSED: Duration = Duration::from_secs(8);

/// What a fault has done, for the judge.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Struck {
    /// It came where it was meant to.
    pub(crate) is_hit: bool,
    /// Whose host was started anew.
    pub(crate) rebooted: Option<Side>,
    /// Whose QEMU it killed, if it did.
    pub(crate) killed: Option<Side>,
    /// Whether the journal of a destination whose host went down called the guest its own by then. Whether it was let run
    /// is written nowhere else, so that one copy was the guest from there on.
    pub(crate) was_taken: bool,
    /// Which side was asked to turn back.
    pub(crate) cancelled: Option<Side>,
}

impl Bed {
    /// Lets the fault come, and has whoever stands at the point go on. What is meant to be mended is, but for the link
    /// that is cut for good.
    pub(crate) fn strike(
        &mut self,
        point: Point,
        fault: Fault,
        random: &mut Rng,
    ) -> Result<Struck, String> {
        let while_it_lasts = Duration::from_millis(random.u64(300..3000));
        let mut struck = Struck::default();
        match fault {
            Fault::KillDaemon(side) => {
                self.host(side).kill();
                struck.is_hit = self.is_at(point);
                self.go_on(point)?;
                sleep(Duration::from_millis(random.u64(..1000)));
                self.hosts[side as usize].start(&self.lab)?;
            }
            Fault::KillQemu(side) => {
                struck = self.kill_qemu(point, side)?;
                self.go_on(point)?;
            }
            Fault::StopDaemon(side) => {
                self.host(side).signal(Signal::STOP)?;
                struck.is_hit = self.is_at(point);
                sleep(while_it_lasts);
                self.host(side).signal(Signal::CONT)?;
                self.go_on(point)?;
            }
            Fault::StopQemu(side) => {
                let pid = self.qemu(side).ok_or("there is no QEMU to stop")?.pid;
                kill(pid, Signal::STOP);
                struck.is_hit = self.is_at(point);
                self.go_on(point)?;
                sleep(while_it_lasts);
                kill(pid, Signal::CONT);
            }
            Fault::CutAndMend => {
                let host = random.usize(..2);
                self.lab.set_cable(host, false)?;
                struck.is_hit = self.is_at(point);
                self.go_on(point)?;
                sleep(while_it_lasts);
                self.lab.set_cable(host, true)?;
            }
            Fault::CutForGood => {
                self.lab.set_cable(random.usize(..2), false)?;
                struck.is_hit = self.is_at(point);
                self.go_on(point)?;
            }
            Fault::Cancel(side) => {
                self.host(side).ask("cancel")?;
                struck.is_hit = self.is_at(point);
                struck.cancelled = Some(side);
                // It is answered while the daemon stands at the point, or right after it.
                sleep(Duration::from_millis(random.u64(..50)));
                self.go_on(point)?;
            }
            Fault::DiskFull(side) => {
                self.host(side).fill()?;
                struck.is_hit = self.is_at(point);
                self.go_on(point)?;
                if !matches!(point, Point::Held(..)) {
                    // The next record is written when the memory is there. One that has just come is written already.
                    let _moved = self.hosts[Side::Source as usize].ask("hurry");
                }
                // A full disk that nobody writes to has shown nothing.
                struck.is_hit &= self.host(side).says(REFUSED, "refused ");
                sleep(while_it_lasts);
                self.host(side).free()?;
            }
            Fault::Reboot(side) => {
                self.host(side).kill();
                struck = self.kill_qemu(point, side)?;
                struck.rebooted = Some(side);
                let stage = self.stage(side);
                struck.was_taken = side == Side::Destination
                    && matches!(stage.as_deref(), Some("starting" | "owned"));
                self.go_on(point)?;
                self.host(side).lose_power()?;
                sleep(while_it_lasts);
                self.hosts[side as usize].start(&self.lab)?;
            }
        }
        Ok(struck)
    }

    /// Kills that host's QEMU, if there is one: a host may be rebooted while no guest is on it.
    fn kill_qemu(&mut self, point: Point, side: Side) -> Result<Struck, String> {
        let mut struck = Struck {
            is_hit: self.is_at(point),
            ..Struck::default()
        };
        if let Some(victim) = self.qemu(side) {
            kill(victim.pid, Signal::KILL);
            struck.killed = Some(side);
            self.until(Duration::from_secs(5), "a killed QEMU ends", |bed| {
                bed.qemu(side).is_none_or(|life| life.pid != victim.pid)
            })?;
        }
        Ok(struck)
    }

    /// Lets the daemon that stands at the point go on, if it lives.
    fn go_on(&mut self, point: Point) -> Result<(), String> {
        match point {
            Point::Held(side, _) if self.host(side).has_daemon() => {
                self.host(side).ask("go").map(drop)
            }
            _ => Ok(()),
        }
    }
}
