//! What must have come of a run, whatever the fault was.
//!
//! That never two copies ran at one instant is shown three times over. The QEMUs say when their guest ran, by the machine's
//! one clock ([`witness`](crate::witness)): no two spans may share a microsecond. Both append to one console file, so the
//! kernel keeps the order in which they wrote, whoever wrote: the number counted there may neither repeat nor leave one out,
//! and a second copy would count the same numbers again. And a guest that finds a word of its memory changed, or its disk
//! counted on by somebody else, says so: so does an older copy that goes on on a newer disk.
//!
//! A guest that is lost with a host that was to start it is started there anew, from its disk, once the migration that had it
//! is settled; and nowhere else.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bed::Bed;
use crate::cells::{Cell, Fault, Phase, Side};
use crate::strike::Struck;
use crate::witness::{Life, overlap};

/// By then a link that is cut has been noticed by everybody: memory and requests are given up after three seconds of silence.
const NOTICED: Duration = Duration::from_secs(7);

/// By then a daemon that has settled a migration has told so.
const SAID: Duration = Duration::from_secs(5);

/// A guest that gets no memory has stood still for so long: it counts ten times as often.
const STILL: Duration = Duration::from_secs(1);

/// The longest a guest goes on, on what it has of its memory, once the rest cannot come.
const STANDS: Duration = Duration::from_secs(8);

/// By then what starts with its host is started, once nothing has it any more.
const STARTED: Duration = Duration::from_secs(10);

/// Between two questions to the daemons.
const AGAIN: Duration = Duration::from_millis(25);

/// How a kernel says that its memory is not what it was. It may go on after the first two.
const BROKEN: [&str; 3] = ["BUG: ", "Oops: ", "Kernel panic"];

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum End {
    /// Exactly one copy runs.
    OneRuns,
    /// The only complete copy was killed, and that is named.
    LossNamed,
    /// The link was cut for good: nobody ran, both sides named the migration, in doubt, and then exactly one ran.
    DoubtEnded,
    /// The same in post-copy: the one copy stood still, and both sides named the migration, paused.
    PausedEnded,
    /// The source's copy was killed when all had been sent, and nothing proves that it did not run on: nobody runs until a
    /// person has ruled.
    LeftToAPerson,
    /// The destination's host went down when its journal called the guest its own, and no QEMU had said yet that it ran:
    /// nobody can know whether it did, and the loss is named, though the source's copy was whole.
    TakenLossNamed,
}

impl End {
    /// All of them, each in words.
    pub(crate) const ALL: [(Self, &str); 6] = [
        (Self::OneRuns, "exactly one runs"),
        (
            Self::LossNamed,
            "the only complete copy was killed, and the loss is named",
        ),
        (
            Self::DoubtEnded,
            "the link was cut: nobody ran, both sides named the migration in doubt, and then exactly one ran",
        ),
        (
            Self::PausedEnded,
            "the link was cut: the guest stood still, both sides named its post-copy paused, and then exactly one ran",
        ),
        (
            Self::LeftToAPerson,
            "the source's copy was killed at the switchover: nobody ran until a person ruled, and then exactly one did",
        ),
        (
            Self::TakenLossNamed,
            "the destination's host went down when the guest was taken: the loss is named, whether it had run or not",
        ),
    ];
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

    /// Whether both name it, and call its post-copy paused.
    fn is_paused(&self) -> bool {
        let is_paused = |host: &Value| host["open"][0]["post_copy"] == "Paused";
        self.migration().is_some() && self.0.iter().all(is_paused)
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
                end = End::LeftToAPerson;
            }
            std::thread::sleep(AGAIN);
        }
        self.check_history()?;
        let mut sides = [Side::Source, Side::Destination].into_iter();
        let is_the_guest = |life: Life| life.is_running() && !life.is_booted;
        let running = sides.find(|side| self.qemu(*side).is_some_and(is_the_guest));
        match running {
            Some(side) => {
                self.counts_on()?;
                self.is_as_told(cell, struck, side)?;
                self.is_not_started_twice()?;
                Ok(end)
            }
            None => {
                self.loss_is_named(struck)?;
                self.is_started_anew(struck)?;
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
        // Whoever was started anew is no copy of it.
        let lives: Vec<_> = lives.into_iter().filter(|life| !life.is_booted).collect();
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

    /// The QEMUs that there are, or were, at the destination, of the guest that set out.
    fn arrived(&self) -> Vec<Life> {
        let network = self.lab.inode(Side::Destination as usize);
        let lives = self.witness.lives().into_iter();
        let have_come = lives.filter(|life| life.network == network && !life.is_booted);
        have_come.collect()
    }

    /// Whether the source's copy was killed after its last byte was sent and before its journal said that it may be offered,
    /// as it is of a guest that QEMU has stopped itself. The other one is whole, and nobody can prove that it is the newest:
    /// QEMU lets such a guest run again by itself when it takes a migration for failed.
    fn is_left_to_a_person(&mut self, struck: Struck) -> Result<bool, String> {
        let stage = self.stage(Side::Source);
        let is_unoffered = matches!(stage.as_deref(), Some("perform" | "switching"));
        if struck.killed != Some(Side::Source) || !is_unoffered {
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
            if cell.phase == Phase::PostCopy {
                // It is called running there, and waits for memory that cannot come.
                if self.are_paused() && told.is_paused() {
                    self.stands_still()?;
                    return Ok(End::PausedEnded);
                }
            } else if running == 1 {
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

    /// Whether both QEMUs say that the rest of the memory does not follow any more.
    fn are_paused(&self) -> bool {
        let is_paused = |life: Life| life.migration == "postcopy-paused";
        [Side::Source, Side::Destination]
            .into_iter()
            .all(|side| self.qemu(side).is_some_and(is_paused))
    }

    /// The guest counts no more. That nothing comes is told by nothing but time.
    fn stands_still(&mut self) -> Result<(), String> {
        let mut last = (self.console().ticks().len(), Instant::now());
        self.until(STANDS, "the guest stands still", |bed| {
            let count = bed.console().ticks().len();
            if count != last.0 {
                last = (count, Instant::now());
            }
            last.1.elapsed() > STILL
        })
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
        // Whoever was started anew begins anew, once.
        let mut starts = self.lives()?.iter().filter(|life| life.is_booted).count();
        let mut follows = |pair: &[u64]| {
            let is_start = pair[1] == 0 && starts > 0;
            starts -= usize::from(is_start);
            is_start || pair[1] == pair[0] + 1
        };
        match ticks.windows(2).find(|pair| !follows(pair)) {
            Some(pair) => Err(format!("after {} it counted {}", pair[0], pair[1])),
            None => Ok(()),
        }
    }

    /// The guest that runs counts on, on its console and on its disk.
    fn counts_on(&mut self) -> Result<(), String> {
        let last = self.console().ticks().last().copied().unwrap_or(0);
        let on_disk = self.counted();
        let goes_on = |bed: &mut Self| {
            let last_now = bed.console().ticks().last().copied();
            last_now.is_some_and(|tick| tick > last) && bed.counted() > on_disk
        };
        let counted = self.until(Duration::from_secs(10), "the guest counts on", goes_on);
        self.check_history().and(counted)
    }

    /// What the call that migrates said, and the answer to a cancel, are true.
    fn is_as_told(&mut self, cell: Cell, struck: Struck, runs: Side) -> Result<(), String> {
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
        // At the switchover it is too late as soon as the guest is about to be offered, and at the destination as soon as all
        // of it is there. Elsewhere the phase says which it is, if it came in its phase.
        let is_late = matches!(cell.phase, Phase::Finish | Phase::Confirm | Phase::PostCopy);
        let is_open = cell.phase == Phase::Switchover || !struck.is_hit;
        let is_right = match answer.as_str() {
            "cancel ok" => (is_open || !is_late) && runs == Side::Source,
            _ if !struck.is_hit => true,
            refused => {
                (is_open || is_late)
                    && refused.starts_with("cancel error too late: ")
                    && runs == Side::Destination
            }
        };
        if is_right {
            return Ok(());
        }
        Err(format!(
            "it was to be cancelled at the {asked:?}, was said \"{answer}\", and runs at the {runs:?}"
        ))
    }

    /// Whoever knows the guest, and does not have it, does not start it either.
    fn is_not_started_twice(&mut self) -> Result<(), String> {
        if self.witness.lives().iter().any(|life| life.is_booted) {
            return Err("it runs, and another one was started with its host".to_owned());
        }
        for side in [Side::Source, Side::Destination] {
            if self.qemu(side).is_none() && self.host(side).ask("start").is_ok() {
                return Err(format!(
                    "it runs, and a second one was started at the {side:?}"
                ));
            }
        }
        Ok(())
    }

    /// The guest is off on both sides, and somebody says that it is lost: the migration, of the guest that it had; or, of one
    /// that had arrived, the host that it died on. Which comes a little after all is settled.
    fn loss_is_named(&mut self, struck: Struck) -> Result<(), String> {
        self.until(SAID, "somebody names the loss", |bed| {
            let [source, destination] = &mut bed.hosts;
            let has_arrived = ["moved ok", "recovered migration-out Finished"]
                .into_iter()
                .any(|words| source.told(words).is_some());
            let died_there = ["gone ", "recovered migration-in Ended"]
                .into_iter()
                .any(|words| destination.told(words).is_some());
            [source, destination].into_iter().any(|host| {
                let moved = host.told("moved error").unwrap_or_default();
                let recovered = host.told("recovered ").unwrap_or_default();
                moved.contains("owner is now: nobody") || recovered.ends_with(" Lost")
            }) || has_arrived && died_there
        })?;
        let told = self.told()?;
        let is_off = |side: Side| {
            let run = &told.0[side as usize]["run"];
            struck.rebooted == Some(side) || run == "off" || run == "unknown"
        };
        if is_off(Side::Source) && is_off(Side::Destination) {
            return Ok(());
        }
        Err(format!(
            "it is lost, and called: {}; {}",
            told.0[0], told.0[1]
        ))
    }

    /// A host that went down with the guest starts it anew, since it is to be started with it; and nobody else does.
    fn is_started_anew(&mut self, struck: Struck) -> Result<(), String> {
        let booted = |bed: &Self| {
            let lives = bed.witness.lives().into_iter();
            let booted = lives.filter(|life| life.is_booted);
            booted.map(|life| life.network).collect::<Vec<_>>()
        };
        let wanted: Vec<_> = struck
            .rebooted
            .map(|side| self.lab.inode(side as usize))
            .into_iter()
            .collect();
        // Whether one that was only about to be taken is written down as that host's again was a matter of moments.
        let is_open = struck.was_taken && !self.has_run_there();
        let is_started = |bed: &mut Self| booted(bed) == wanted;
        if !wanted.is_empty() && !is_open {
            self.until(STARTED, "it is started with its host", is_started)?;
        }
        if is_open && booted(self).is_empty() {
            return Ok(());
        }
        let found = booted(self);
        if found != wanted {
            return Err(format!(
                "it was to be started anew on {wanted:?}, and was on {found:?}"
            ));
        }
        self.check_history()
    }
}
