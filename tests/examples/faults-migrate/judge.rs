//! What must have come of a run, whatever the fault was.
//!
//! That never two copies ran at one instant is shown three times over. The QEMUs say when their guest ran, by the machine's
//! one clock ([`witness`](crate::witness)): no two spans may share a microsecond. Both append to one console file, so the
//! kernel keeps the order in which they wrote, whoever wrote: the number counted there may neither repeat nor leave one out,
//! and a second copy would count the same numbers again. And a guest that finds a word of its memory changed says so.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bed::Bed;
use crate::cells::{Cell, Fault, Phase, Side};
use crate::strike::Struck;
use crate::witness::{Life, overlap};

/// By then a link that is cut has been noticed by everybody: memory and requests are given up after three seconds of silence.
const NOTICED: Duration = Duration::from_secs(7);

/// By then a daemon that has settled a migration has told so.
const SAID: Duration = Duration::from_secs(5);

/// Between two questions to the daemons.
const AGAIN: Duration = Duration::from_millis(25);

/// How a kernel says that its memory is not what it was. It may go on after the first two.
const BROKEN: [&str; 3] = ["BUG: ", "Oops: ", "Kernel panic"];

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum End {
    /// Exactly one copy runs.
    OneRuns,
    /// The only complete copy was killed, and that is named.
    LossNamed,
    /// The destination's host went down when its journal called the guest its own, and no QEMU had said yet that it ran:
    /// nobody can know whether it did, and the loss is named.
    TakenLossNamed,
    /// Nobody ran, both sides named the migration, and then exactly one ran.
    DoubtEnded,
}

/// What both daemons say at one time.
struct Told([Value; 2]);

impl Told {
    fn is_settled(&self) -> bool {
        let is_quiet = |host: &Value| {
            host["held"] == false && host["open"].as_array().is_some_and(Vec::is_empty)
        };
        self.0.iter().all(is_quiet)
    }

    /// The one migration that both name, if they do.
    fn migration(&self) -> Option<&str> {
        let open = |host: usize| self.0[host]["open"][0]["migration"].as_str();
        open(0).filter(|one| open(1) == Some(one))
    }

    /// Whether both name it, and the source does not know whose the guest is.
    fn is_in_doubt(&self) -> bool {
        self.0[0]["open"][0]["owner"] == "InDoubt" && self.migration().is_some()
    }
}

impl Bed {
    /// Waits until all is settled that can be, and judges the end. Mends the link in the end.
    pub(crate) fn judge(
        &mut self,
        cell: Cell,
        struck: Struck,
        deadline: Instant,
    ) -> Result<End, String> {
        let mut end = End::OneRuns;
        if cell.fault == Fault::CutForGood {
            end = self.judge_the_cut(cell, deadline)?;
            for host in 0..2 {
                self.lab.set_cable(host, true)?;
            }
        }
        let began = Instant::now();
        let mut last = String::new();
        while !self.is_over(struck, &mut last)? {
            if Instant::now() > deadline {
                return Err(format!("not settled in time: {last}"));
            }
            if end == End::OneRuns
                && began.elapsed() > NOTICED
                && self.is_left_to_a_person(struck)?
            {
                self.decide()?;
                end = End::DoubtEnded;
            }
            std::thread::sleep(AGAIN);
        }
        self.check_history()?;
        let mut sides = [Side::Source, Side::Destination].into_iter();
        let running = sides.find(|side| self.qemu(*side).is_some_and(|life| life.is_running()));
        match running {
            Some(side) => {
                self.counts_on()?;
                self.is_as_told(struck, side)?;
                self.is_not_started_twice()?;
                Ok(end)
            }
            None => {
                self.loss_is_named()?;
                Ok(if struck.was_taken && !self.has_run_there() {
                    End::TakenLossNamed
                } else {
                    End::LossNamed
                })
            }
        }
    }

    /// Whether all is settled on both sides, and one copy runs or none can.
    fn is_over(&mut self, struck: Struck, last: &mut String) -> Result<bool, String> {
        let lives = self.lives()?;
        let told = self.told()?;
        let there = lives.iter().filter(|life| !life.is_over).count();
        let running = lives.iter().filter(|life| life.is_running()).count();
        *last = format!(
            "{running} of {there} QEMUs run; {}; {}",
            told.0[0], told.0[1]
        );
        // A copy that runs although the guest was another one, which is dead, has gone back in time.
        let is_due = self.is_loss_due(struck);
        let is_right = match there {
            0 => is_due,
            count => count == 1 && running == 1 && !is_due,
        };
        Ok(told.is_settled() && is_right)
    }

    /// All QEMUs so far, none of which ran while another did.
    fn lives(&self) -> Result<Vec<Life>, String> {
        let lives = self.witness.lives();
        match overlap(&lives) {
            Some(overlap) => Err(format!("two copies ran: {overlap}")),
            None => Ok(lives),
        }
    }

    /// Whether the fault killed the only complete copy that is the guest. That is the destination's once it has run, by its
    /// QEMU's own word, or once its host has gone down with a journal that calls the guest its own: what ran there, and wrote
    /// to the disks, cannot be known then, so what is whole at the source may be of yesterday. Before, it is the source's,
    /// unless the destination had all of it.
    fn is_loss_due(&self, struck: Struck) -> bool {
        match struck.killed {
            None => false,
            Some(Side::Source) => self.arrived().iter().all(|life| !life.is_loaded),
            Some(Side::Destination) => struck.was_taken || self.has_run_there(),
        }
    }

    /// Whether the guest ran at the destination, by the word of a QEMU there.
    fn has_run_there(&self) -> bool {
        self.arrived().iter().any(|life| !life.spans.is_empty())
    }

    /// The QEMUs that there are, or were, at the destination.
    fn arrived(&self) -> Vec<Life> {
        let network = self.lab.inode(Side::Destination as usize);
        let lives = self.witness.lives().into_iter();
        lives.filter(|life| life.network == network).collect()
    }

    /// Whether the source's copy was killed after its last byte was sent and before it was offered. The other one is whole,
    /// and nobody can prove that it is the newest: QEMU lets a guest run again by itself when it takes a migration for failed.
    fn is_left_to_a_person(&mut self, struck: Struck) -> Result<bool, String> {
        if struck.killed != Some(Side::Source) {
            return Ok(false);
        }
        let waits = |life: Life| life.is_loaded && life.spans.is_empty();
        let is_waiting = self.qemu(Side::Destination).is_some_and(waits);
        let told = self.told()?;
        Ok(is_waiting && told.migration().is_some())
    }

    /// An operator, who knows that nothing runs at the source, lets the destination have the guest.
    fn decide(&mut self) -> Result<(), String> {
        self.host(Side::Destination).ask("resolve fenced").map(drop)
    }

    fn told(&mut self) -> Result<Told, String> {
        let mut told = [Value::Null, Value::Null];
        for (host, told) in self.hosts.iter_mut().zip(&mut told) {
            let text = host.ask("status")?;
            *told = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        }
        Ok(Told(told))
    }

    /// The link is cut: one copy runs, or nobody does and both sides say why.
    fn judge_the_cut(&mut self, cell: Cell, deadline: Instant) -> Result<End, String> {
        std::thread::sleep(NOTICED);
        loop {
            let running = self
                .lives()?
                .iter()
                .filter(|life| life.is_running())
                .count();
            let told = self.told()?;
            if cell.phase == Phase::PostCopy && told.migration().is_some() {
                // It is called running there, and waits for memory that cannot come.
                return Ok(End::DoubtEnded);
            }
            if running == 1 {
                return Ok(End::OneRuns);
            }
            if running == 0 && cell.may_be_in_doubt() && told.is_in_doubt() {
                return Ok(End::DoubtEnded);
            }
            if Instant::now() > deadline {
                let told = format!("{}; {}", told.0[0], told.0[1]);
                return Err(format!("the link is cut, and {running} run: {told}"));
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// No two spans overlap, and the console has neither a gap nor a repeat.
    fn check_history(&self) -> Result<(), String> {
        self.lives()?;
        let text = self.console().text();
        if let Some(line) = text.lines().find(|line| line.contains("CORRUPT")) {
            return Err(format!("its memory is not what it was: {line}"));
        }
        let is_broken = |line: &&str| BROKEN.iter().any(|words| line.contains(words));
        if let Some(line) = text.lines().find(is_broken) {
            return Err(format!("its kernel found itself broken: {line}"));
        }
        let ticks = self.console().ticks();
        match ticks.windows(2).find(|pair| pair[1] != pair[0] + 1) {
            Some(pair) => Err(format!("after {} it counted {}", pair[0], pair[1])),
            None => Ok(()),
        }
    }

    /// The guest that runs counts on.
    fn counts_on(&mut self) -> Result<(), String> {
        let last = self.console().ticks().last().copied().unwrap_or(0);
        let goes_on = |bed: &mut Self| {
            let last_now = bed.console().ticks().last().copied();
            last_now.is_some_and(|tick| tick > last)
        };
        let counted = self.until(Duration::from_secs(10), "the guest counts on", goes_on);
        self.check_history().and(counted)
    }

    /// What the call that migrates said, and the answer to a cancel, are true.
    fn is_as_told(&mut self, struck: Struck, runs: Side) -> Result<(), String> {
        let moved = self.host(Side::Source).told("moved").unwrap_or_default();
        let owner = match () {
            () if moved.starts_with("moved ok") => Some(Side::Destination),
            () if moved.contains("owner is now: source") => Some(Side::Source),
            () if moved.contains("owner is now: destination") => Some(Side::Destination),
            () => None,
        };
        if owner.is_some_and(|owner| owner != runs) {
            return Err(format!("it runs at the {runs:?}, and was said: {moved}"));
        }
        let Some(asked) = struck.cancelled else {
            return Ok(());
        };
        let answer = self.host(asked).told("cancel");
        let answer = answer.ok_or("a cancel was not answered")?;
        if answer == "cancel ok" && runs != Side::Source {
            return Err(format!(
                "it was cancelled at the {asked:?}, and moved all the same"
            ));
        }
        Ok(())
    }

    /// Whoever knows the guest, and does not have it, does not start it either.
    fn is_not_started_twice(&mut self) -> Result<(), String> {
        for side in [Side::Source, Side::Destination] {
            if self.qemu(side).is_none() && self.host(side).ask("start").is_ok() {
                return Err(format!(
                    "it runs, and a second one was started at the {side:?}"
                ));
            }
        }
        Ok(())
    }

    /// The guest is off on both sides, and somebody says what became of it: which comes a little after all is settled.
    fn loss_is_named(&mut self) -> Result<(), String> {
        self.until(SAID, "somebody names the loss", |bed| {
            let mut hosts = bed.hosts.iter_mut();
            hosts.any(|host| {
                host.told("moved")
                    .or_else(|| host.told("recovered"))
                    .is_some()
            })
        })?;
        let told = self.told()?;
        let is_off = |host: &Value| host["run"] == "off" || host["run"] == "unknown";
        if told.0.iter().all(is_off) {
            return Ok(());
        }
        Err(format!(
            "it is lost, and called: {}; {}",
            told.0[0], told.0[1]
        ))
    }
}
