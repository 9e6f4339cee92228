//! Processors, machine types and what accelerates them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{commands, open_enum, plain};

commands! {
    QueryCpusFast => "query-cpus-fast" -> Vec<Cpu>,
    QueryHotpluggableCpus => "query-hotpluggable-cpus" -> Vec<HotpluggableCpu>,
    QueryCpuDefinitions => "query-cpu-definitions" -> Vec<CpuDefinition>,
    QueryCpuModelExpansion => "query-cpu-model-expansion" -> ExpandedCpuModel,
    QueryMachines => "query-machines" -> Vec<MachineType>,
    QueryCurrentMachine => "query-current-machine" -> CurrentMachine,
    QueryKvm => "query-kvm" -> Kvm,
    QueryIothreads => "query-iothreads" -> Vec<IoThread>,
    QuerySev => "query-sev" -> Sev,
    QuerySevCapabilities => "query-sev-capabilities" -> SevCapabilities,
    QueryTpmModels => "query-tpm-models" -> Vec<String>,
    QueryTpmTypes => "query-tpm-types" -> Vec<String>,
}

plain! {
    /// The virtual CPUs and their threads.
    QueryCpusFast,
    /// Where CPUs are and could be plugged in.
    QueryHotpluggableCpus,
    /// The CPU models.
    QueryCpuDefinitions,
    /// The machine types.
    QueryMachines,
    /// What the machine that runs can do.
    QueryCurrentMachine,
    /// Whether KVM is there and used.
    QueryKvm,
    /// The I/O threads.
    QueryIothreads,
    /// How AMD's memory encryption is used.
    QuerySev,
    /// What the host offers for AMD's memory encryption. Refused where it has none.
    QuerySevCapabilities,
    /// The models of TPMs that can be emulated.
    QueryTpmModels,
    /// The backends for TPMs.
    QueryTpmTypes,
}

/// One of [`QueryCpusFast`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    /// Its number.
    pub cpu_index: u32,
    /// Its QOM path.
    pub qom_path: String,
    /// The host's thread that runs it.
    pub thread_id: u32,
    /// The architecture, as `x86_64`.
    pub target: String,
}

/// One of [`QueryHotpluggableCpus`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct HotpluggableCpu {
    /// What to plug in there with `device_add`.
    #[serde(rename = "type")]
    pub cpu_type: String,
    /// How many virtual CPUs that makes.
    pub vcpus_count: u32,
    /// Where that is, as `device_add` wants it.
    pub props: CpuPlace,
    /// The QOM path of what is there; absent where nothing is.
    pub qom_path: Option<String>,
}

/// A place for a CPU.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct CpuPlace {
    /// The NUMA node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_id: Option<i64>,
    /// The socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_id: Option<i64>,
    /// The die in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub die_id: Option<i64>,
    /// The cluster in that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<i64>,
    /// The core in that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub core_id: Option<i64>,
    /// The thread in that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<i64>,
}

/// One of [`QueryCpuDefinitions`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinition {
    /// The name that `-cpu` takes.
    pub name: String,
    /// Whether a guest on it can migrate to a host of another kind; absent if QEMU cannot tell.
    pub migration_safe: Option<bool>,
    /// Whether it means the same in every QEMU and machine type.
    pub r#static: bool,
    /// What keeps it from running on this host; empty if nothing does.
    #[serde(default)]
    pub unavailable_features: Vec<String>,
    /// Its QOM type.
    pub typename: String,
    /// The model it stands for.
    pub alias_of: Option<String>,
    /// Whether it is to go away.
    pub deprecated: bool,
}

/// What a CPU model consists of.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct QueryCpuModelExpansion {
    /// How far to take it apart.
    #[serde(rename = "type")]
    pub expansion: CpuModelExpansion,
    /// Which.
    pub model: CpuModel,
}

open_enum! {
    /// How far a CPU model is taken apart.
    pub enum CpuModelExpansion {
        Static = "static",
        Full = "full",
    }
}

/// A CPU model and what was changed about it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct CpuModel {
    /// Its name.
    pub name: String,
    /// Properties and their values, an object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub props: Option<Value>,
}

/// Reply of [`QueryCpuModelExpansion`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct ExpandedCpuModel {
    /// The model, taken apart.
    pub model: CpuModel,
}

/// One of [`QueryMachines`].
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct MachineType {
    /// The name that `-M` takes.
    pub name: String,
    /// Its other name, as `q35` for the newest.
    pub alias: Option<String>,
    /// Whether it is taken if none is named.
    #[serde(default)]
    pub is_default: bool,
    /// The most virtual CPUs it takes.
    pub cpu_max: u32,
    /// Whether CPUs can be plugged in.
    pub hotpluggable_cpus: bool,
    /// Whether it can have NUMA nodes of memory.
    pub numa_mem_supported: bool,
    /// Whether it is to go away.
    pub deprecated: bool,
    /// The type of CPU it has if none is named.
    pub default_cpu_type: Option<String>,
    /// The id of its memory.
    pub default_ram_id: Option<String>,
}

/// Reply of [`QueryCurrentMachine`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct CurrentMachine {
    /// Whether a guest that sleeps can be woken.
    pub wakeup_suspend_support: bool,
}

/// Reply of [`QueryKvm`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Kvm {
    /// Whether it is used.
    pub enabled: bool,
    /// Whether this QEMU has it.
    pub present: bool,
}

/// One of [`QueryIothreads`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct IoThread {
    /// Its id.
    pub id: String,
    /// The host's thread.
    pub thread_id: u32,
    /// The longest time it polls, in nanoseconds; 0 is never.
    pub poll_max_ns: u64,
    /// By what that time grows.
    pub poll_grow: u64,
    /// By what it shrinks.
    pub poll_shrink: u64,
    /// The most requests it hands over at once; 0 is QEMU's choice.
    pub aio_max_batch: u64,
}

/// Reply of [`QuerySev`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct Sev {
    /// Whether the guest's memory is encrypted.
    pub enabled: bool,
    /// The firmware interface's major version.
    pub api_major: u8,
    /// And its minor one.
    pub api_minor: u8,
    /// The firmware's build.
    pub build_id: u8,
    /// Where the guest is in its launch.
    pub state: String,
}

/// Reply of [`QuerySevCapabilities`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub struct SevCapabilities {
    /// The platform's key, in base 64.
    pub pdh: String,
    /// The platform's certificates, in base 64.
    pub cert_chain: String,
    /// The first processor's id, in base 64.
    pub cpu0_id: String,
    /// The bit of an address that says "encrypted".
    pub cbitpos: u32,
    /// By how many bits addresses are shorter.
    pub reduced_phys_bits: u32,
}
