//! What a list shows of the observed state, in one word that is read at once.
//!
//! A list of ten thousand domains is bound by memory: each further place that it must visit for a row, and wait for, costs
//! more than all it does there (measured: half of its time was reading this much through a pointer). So what the list
//! wants lies in the domain itself. Whatever does not fit is [`None`], and is read where it is kept in full.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use monitor_qmp::command::RunState;

use super::state::Run;

/// The states that have a number, which is their place plus one. What a newer QEMU may call a state has none.
static NUMBERED: [Run; 19] = [
    Run::Off,
    Run::Starting,
    Run::Lost,
    Run::Qemu(RunState::Running),
    Run::Qemu(RunState::Paused),
    Run::Qemu(RunState::PreLaunch),
    Run::Qemu(RunState::InMigrate),
    Run::Qemu(RunState::PostMigrate),
    Run::Qemu(RunState::FinishMigrate),
    Run::Qemu(RunState::RestoreVm),
    Run::Qemu(RunState::SaveVm),
    Run::Qemu(RunState::Shutdown),
    Run::Qemu(RunState::Suspended),
    Run::Qemu(RunState::Watchdog),
    Run::Qemu(RunState::GuestPanicked),
    Run::Qemu(RunState::InternalError),
    Run::Qemu(RunState::IoError),
    Run::Qemu(RunState::Debug),
    Run::Qemu(RunState::Colo),
];

/// The bits of the number. Those above count microseconds since 1970, and do so for two thousand years.
const NUMBER: u32 = 8;
/// What does not fit.
const NOTHING: u64 = 0;

/// A published state and since when, to the microsecond.
pub(super) struct Glance(AtomicU64);

impl Glance {
    pub(super) fn new(run: &Run, since: SystemTime) -> Self {
        Self(AtomicU64::new(packed(run, since)))
    }

    pub(super) fn publish(&self, run: &Run, since: SystemTime) {
        self.0.store(packed(run, since), Ordering::Release);
    }

    pub(super) fn read(&self) -> Option<(Run, SystemTime)> {
        unpacked(self.0.load(Ordering::Acquire))
    }
}

fn packed(run: &Run, since: SystemTime) -> u64 {
    let number = NUMBERED.iter().position(|known| known == run);
    let micros = since.duration_since(SystemTime::UNIX_EPOCH);
    let micros = micros
        .ok()
        .and_then(|since| u64::try_from(since.as_micros()).ok());
    match (number, micros) {
        (Some(number), Some(micros)) if micros < 1 << (u64::BITS - NUMBER) => {
            micros << NUMBER | (number as u64 + 1)
        }
        _ => NOTHING,
    }
}

fn unpacked(word: u64) -> Option<(Run, SystemTime)> {
    let number = (word & ((1 << NUMBER) - 1)) as usize;
    let run = NUMBERED.get(number.checked_sub(1)?)?;
    let since = SystemTime::UNIX_EPOCH + Duration::from_micros(word >> NUMBER);
    Some((run.clone(), since))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_number_comes_back_as_it_was() {
        let times = [0, 1, 1_764_300_000_123_456, (1 << 56) - 1];
        for run in &NUMBERED {
            for micros in times {
                let since = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
                assert_eq!(unpacked(packed(run, since)), Some((run.clone(), since)));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_nothing() {
        let now = SystemTime::now();
        let newer = Run::Qemu(RunState::from("dreaming"));
        let (early, late) = (Duration::from_secs(1), Duration::from_micros(1 << 56));
        for (run, since) in [
            (newer, now),
            (Run::Off, SystemTime::UNIX_EPOCH - early),
            (Run::Off, SystemTime::UNIX_EPOCH + late),
        ] {
            let glance = Glance::new(&run, since);
            assert_eq!(glance.read(), None, "{run:?} {since:?}");
        }
    }
}
