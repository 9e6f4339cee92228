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
    Dump,
    /// A freeze that is held.
    Freeze,
    /// Overlays on a frozen guest.
    Snapshot,
    /// Overlays, and the guest's memory in a file.
    SnapshotMemory,
    InsideSave,
    InsideLoad,
    InsideDelete,
    /// A copy of all that is on the disk.
    Backup,
    /// A copy of what changed since the one before.
    BackupSince,
    /// Another disk.
    Plug,
    PlugCard,
    Unplug,
    UnplugCard,
    /// The disk moves to another file.
    Mirror,
    /// An overlay goes back into what is behind it.
    Commit,
    /// What is behind an overlay goes into it.
    Stream,
}

impl Doing {
    /// Whether it is about disks and cards that come and go, and what else the guest has does not change.
    pub(crate) fn is_of_parts(self) -> bool {
        matches!(
            self,
            Self::Plug | Self::PlugCard | Self::Unplug | Self::UnplugCard
        )
    }

    pub(crate) fn is_block_job(self) -> bool {
        matches!(self, Self::Mirror | Self::Commit | Self::Stream)
    }

    /// Whether the guest must have an agent that answers and write to its disk.
    pub(crate) fn wants_writer(self) -> bool {
        !matches!(
            self,
            Self::Nothing
                | Self::Start
                | Self::Save
                | Self::Restore
                | Self::Pause
                | Self::Resume
                | Self::Destroy
        )
    }
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
    /// A freeze is written down, and no job.
    Frozen,
    DumpPartial,
    DumpWhole,
    /// Overlays are made, and QEMU was not told to put them in place.
    OverlaysMade,
    /// It was about to be, or was.
    OverlaysTaken,
    InsideBegun,
    InsideDone,
    BackupBegun,
    BackupWhole,
    /// A part is on its way in, or out; such a row has no job.
    ComesIn,
    GoesOut,
    /// A block job is begun, or about to be.
    BlockJob,
    /// The disk moves to another file while the guest stands still.
    Pivot,
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

/// All cells. Three rows of the table have none, since no kill of a daemon leads there: a revert inside an image that QEMU
/// failed half way, a restore whose file somebody took away, and a backup that QEMU failed.
///
/// The kill of a guest's QEMU comes while no daemon is there.
pub(crate) const CELLS: [[Cell; 2]; 33] = [
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
    cell(
        Doing::Freeze,
        ANY,
        400_000,
        Row::Frozen,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Dump,
        &["preparing", "writing"],
        120_000,
        Row::DumpPartial,
        [&["Undone"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Dump,
        &["ending"],
        600,
        Row::DumpWhole,
        [&["Finished"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Snapshot,
        &["preparing"],
        60_000,
        Row::OverlaysMade,
        [&["Undone"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Snapshot,
        &["taking"],
        150_000,
        Row::OverlaysTaken,
        // Whether it is in place is QEMU's word; if QEMU is gone it stays in any case.
        [&["Undone", "Finished"], &["Finished"]],
        RUNNING,
    ),
    cell(
        Doing::Snapshot,
        &["finishing"],
        3000,
        Row::OverlaysTaken,
        [&["Finished"], &["Finished"]],
        RUNNING,
    ),
    cell(
        Doing::SnapshotMemory,
        &["writing"],
        100_000,
        Row::OverlaysMade,
        [&["Undone"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::InsideSave,
        &["saving"],
        200_000,
        Row::InsideBegun,
        [&["Undone", "Finished"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::InsideSave,
        &["ending"],
        600,
        Row::InsideDone,
        [&["Finished"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::InsideLoad,
        &["loading"],
        60_000,
        Row::InsideBegun,
        [&["Undone", "Finished"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::InsideDelete,
        &["deleting"],
        4000,
        Row::InsideBegun,
        [&["Finished"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Backup,
        &["preparing", "beginning"],
        20_000,
        Row::BackupBegun,
        [&["Undone", "GoesOn"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Backup,
        &["copying"],
        300_000,
        Row::BackupBegun,
        [&["GoesOn"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Backup,
        &["ending"],
        3000,
        Row::BackupWhole,
        [&["Finished"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::BackupSince,
        &["copying"],
        5000,
        Row::BackupBegun,
        // What changed is little, is soon copied, and may be whole when the next driver looks.
        [&["GoesOn", "Finished"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Plug,
        ANY,
        10_000,
        Row::ComesIn,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::PlugCard,
        ANY,
        10_000,
        Row::ComesIn,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Unplug,
        ANY,
        100_000,
        Row::GoesOut,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::UnplugCard,
        ANY,
        100_000,
        Row::GoesOut,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Mirror,
        ANY,
        300_000,
        Row::BlockJob,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Mirror,
        &["ready"],
        30_000,
        Row::Pivot,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Commit,
        ANY,
        40_000,
        Row::BlockJob,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Commit,
        &["ready"],
        30_000,
        Row::Pivot,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
    cell(
        Doing::Stream,
        ANY,
        20_000,
        Row::BlockJob,
        [&["Kept"], &["Ended"]],
        RUNNING,
    ),
];
