//! The guest's processors and memory.

use serde::{Deserialize, Serialize};

use super::Command;

plain! {
    /// The guest's processors.
    GetVcpus = "guest-get-vcpus" -> Vec<Vcpu>;
    /// What the guest's processors have done (7.1).
    GetCpustats = "guest-get-cpustats" -> Vec<CpuStats>;
    /// How busy the guest is (10.0).
    GetLoad = "guest-get-load" -> Load;
    /// The guest's memory, in blocks (2.3).
    GetMemoryBlocks = "guest-get-memory-blocks" -> Vec<MemoryBlock>;
    /// How large such a block is (2.3).
    GetMemoryBlockInfo = "guest-get-memory-block-info" -> MemoryBlockInfo;
}

asked! {
    /// Turns processors on and off in the guest. Answers how many of the list were done, from its
    /// beginning; one that is none is an error of its own.
    SetVcpus = "guest-set-vcpus" -> i64 {
        /// Which, and what they shall be.
        vcpus: Vec<SetVcpu>,
    }

    /// Turns blocks of memory on and off in the guest (2.3).
    SetMemoryBlocks = "guest-set-memory-blocks" -> Vec<MemoryBlockChange> {
        /// Which, and what they shall be.
        mem_blks: Vec<SetMemoryBlock>,
    }
}

/// What a processor shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_structs, reason = "the arguments of the command")]
pub struct SetVcpu {
    /// Its number in the guest.
    pub logical_id: i64,
    /// Whether the guest shall use it.
    pub online: bool,
}

/// What a block of memory shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_structs, reason = "the arguments of the command")]
pub struct SetMemoryBlock {
    /// Its number.
    pub phys_index: u64,
    /// Whether the guest shall use it.
    pub online: bool,
}

answers! {
    /// A processor of the guest.
    Vcpu {
        /// Its number in the guest.
        logical_id: i64,
        /// Whether the guest uses it.
        online: bool,
        /// Whether the guest can do without it.
        can_offline: Option<bool>,
    }

    /// What a processor has done, in ticks of the guest's clock.
    CpuStats {
        /// Which system counts; `linux`.
        #[serde(rename = "type")]
        kind: String,
        /// Its number.
        cpu: i64,
        /// In programs.
        user: u64,
        /// In programs of low priority.
        nice: u64,
        /// In the kernel.
        system: u64,
        /// Doing nothing.
        idle: u64,
        /// Waiting for disks.
        iowait: Option<u64>,
        /// In interrupts.
        irq: Option<u64>,
        /// In what interrupts left to do.
        softirq: Option<u64>,
        /// Taken by the host.
        steal: Option<u64>,
        /// In guests of the guest.
        guest: Option<u64>,
        /// In guests of low priority.
        guestnice: Option<u64>,
    }

    /// A block of memory.
    MemoryBlock {
        /// Its number.
        phys_index: u64,
        /// Whether the guest uses it.
        online: bool,
        /// Whether the guest can do without it.
        can_offline: Option<bool>,
    }

    /// What became of a block of memory.
    MemoryBlockChange {
        /// Its number.
        phys_index: u64,
        /// What became of it.
        response: MemoryBlockResponse,
        /// The guest's error number.
        error_code: Option<i64>,
    }

    /// What holds for all blocks of memory.
    MemoryBlockInfo {
        /// How many bytes one has.
        size: u64,
    }
}

/// What became of a block of memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MemoryBlockResponse {
    /// It is as it shall be.
    Success,
    /// There is none of that number.
    NotFound,
    /// The guest cannot do such a thing.
    OperationNotSupported,
    /// The guest tried and failed.
    OperationFailed,
    /// A value that we do not know.
    #[serde(untagged)]
    Other(String),
}

/// How many programs wanted a processor, averaged.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[non_exhaustive]
pub struct Load {
    /// Over a minute.
    pub load1m: f64,
    /// Over five minutes.
    pub load5m: f64,
    /// Over a quarter of an hour.
    pub load15m: f64,
}
