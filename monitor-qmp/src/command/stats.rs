//! Statistics of KVM (QEMU 7.1 and later).

use serde::Deserialize;
use serde_json::Value;

use super::{arguments, commands};

commands! {
    QueryStats => "query-stats" -> Vec<StatsOf>,
    QueryStatsSchemas => "query-stats-schemas" -> Vec<StatsSchema>,
}

arguments! {
    /// The statistics.
    QueryStats {
        /// Of what: `vm` or `vcpu`.
        target: String,
    } optional {
        /// Only of these CPUs, by QOM path.
        vcpus: Vec<String>,
        /// Only from these providers.
        providers: Vec<StatsProvider>,
    }
}

arguments! {
    /// A provider of statistics, and which of them are wanted.
    StatsProvider {
        /// As `kvm`.
        provider: String,
    } optional {
        /// Only these.
        names: Vec<String>,
    }
}

/// One of [`QueryStats`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct StatsOf {
    /// As `kvm`.
    pub provider: String,
    /// The CPU they are of, if they are of one.
    pub qom_path: Option<String>,
    /// The values.
    pub stats: Vec<Stat>,
}

/// A value in [`StatsOf`].
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[non_exhaustive]
pub struct Stat {
    /// Its name.
    pub name: String,
    /// A number, a list of numbers (a histogram), or a truth value.
    pub value: Value,
}

arguments! {
    /// What the statistics mean.
    QueryStatsSchemas optional {
        /// Only those of this provider.
        provider: String,
    }
}

/// One of [`QueryStatsSchemas`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct StatsSchema {
    /// As `kvm`.
    pub provider: String,
    /// Of what they are.
    pub target: String,
    /// Each of them.
    pub stats: Vec<StatMeaning>,
}

/// What one value of [`StatsSchema`] means: value × base ^ exponent units.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct StatMeaning {
    /// Its name.
    pub name: String,
    /// As `cumulative` or `instant`.
    #[serde(rename = "type")]
    pub kind: String,
    /// As `seconds`.
    pub unit: Option<String>,
    /// 2 or 10.
    pub base: Option<i8>,
    /// Its exponent.
    pub exponent: i16,
    /// The width of a linear histogram's buckets.
    pub bucket_size: Option<u32>,
}
