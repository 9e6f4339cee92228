//! How fast the guest writes to its memory, measured before a migration.

use serde::Deserialize;

use super::{arguments, commands, open_enum, plain};

commands! {
    CalcDirtyRate => "calc-dirty-rate",
    QueryDirtyRate => "query-dirty-rate" -> DirtyRate,
}

arguments! {
    /// Starts to measure; the reply comes at once.
    CalcDirtyRate {
        /// Seconds to measure.
        calc_time: i64,
    } optional {
        /// Pages of each GiB to look at.
        sample_pages: u32,
        /// How.
        mode: DirtyRateMode,
    }
}

open_enum! {
    /// How dirty memory is found.
    pub enum DirtyRateMode {
        PageSampling = "page-sampling",
        DirtyRing = "dirty-ring",
        DirtyBitmap = "dirty-bitmap",
    }
}

plain! {
    /// What was measured.
    QueryDirtyRate,
}

/// Reply of [`QueryDirtyRate`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRate {
    /// MiB a second, once measured.
    pub dirty_rate: Option<i64>,
    /// Where the measurement is.
    pub status: DirtyRateStatus,
    /// When it began, in seconds of the host's clock.
    pub start_time: i64,
    /// Seconds it takes.
    pub calc_time: i64,
    /// How it is done.
    pub mode: DirtyRateMode,
}

open_enum! {
    /// Where a measurement is.
    pub enum DirtyRateStatus {
        Unstarted = "unstarted",
        Measuring = "measuring",
        Measured = "measured",
    }
}
