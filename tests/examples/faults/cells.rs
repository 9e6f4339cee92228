//! The cells of the campaign: each row of the driver's recovery table, how a kill gets there, and what must come of it.
//!
//! Written from the table's text, not from its code.

/// What is done when the daemon is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    Nothing,
    Start,
    Save,
    Restore,
    Pause,
    Resume,
    Destroy,
}

/// What a kill left behind: the work in the record, and the file of a save or restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Row {
    Idle,
    Start,
    SavePartial,
    SaveWhole,
    RestoreUnused,
    RestoreUsed,
}

/// One cell: an operation, the phases in which the kill may land, and whether QEMU is killed, too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) doing: Doing,
    pub(crate) phases: &'static [&'static str],
    /// The longest the daemon lives on after the phase began, in microseconds.
    pub(crate) within: u64,
    pub(crate) row: Row,
    pub(crate) is_qemu_killed: bool,
    /// What the driver that comes back must say of it.
    pub(crate) became: &'static [&'static str],
    /// What the guest does then.
    pub(crate) run: &'static [&'static str],
}

const fn cell(
    doing: Doing,
    phases: &'static [&'static str],
    within: u64,
    row: Row,
    became: [&'static [&'static str]; 2],
    run: &'static [&'static str],
) -> [Cell; 2] {
    let there = Cell {
        doing,
        phases,
        within,
        row,
        is_qemu_killed: false,
        became: became[0],
        run,
    };
    let gone = Cell {
        is_qemu_killed: true,
        became: became[1],
        run: &["off"],
        ..there
    };
    [there, gone]
}

const RUNNING: &[&str] = &["running"];
const OFF: &[&str] = &["off"];
const ANY: &[&str] = &["any"];

/// All cells. The kill of a guest's QEMU comes while no daemon is there.
pub(crate) const CELLS: [[Cell; 2]; 9] = [
    cell(
        Doing::Nothing,
        ANY,
        2000,
        Row::Idle,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Pause,
        ANY,
        3000,
        Row::Idle,
        [&["Kept"], &["Ended"]],
        &["running", "paused"],
    ),
    cell(
        Doing::Resume,
        ANY,
        3000,
        Row::Idle,
        [&["Kept"], &["Ended"]],
        &["running", "paused"],
    ),
    cell(
        Doing::Destroy,
        ANY,
        300,
        Row::Idle,
        // QEMU may have been told to end, and be about to.
        [&["Kept", "Ended"], &["Ended"]],
        &["running", "off"],
    ),
    cell(
        Doing::Start,
        &["launching", "connecting", "running"],
        40_000,
        Row::Start,
        [&["Finished"], &["Undone"]],
        RUNNING,
    ),
    cell(
        Doing::Save,
        &["preparing", "writing"],
        200_000,
        Row::SavePartial,
        [&["Undone"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Save,
        &["ending"],
        4000,
        Row::SaveWhole,
        [&["Finished"], &["Finished"]],
        OFF,
    ),
    cell(
        Doing::Restore,
        &["launching", "connecting", "reading"],
        300_000,
        Row::RestoreUnused,
        [&["Undone"], &["Undone"]],
        OFF,
    ),
    cell(
        Doing::Restore,
        &["running"],
        4000,
        Row::RestoreUsed,
        [&["Finished"], &["Ended"]],
        RUNNING,
    ),
];
