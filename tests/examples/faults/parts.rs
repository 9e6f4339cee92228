//! What the daemon is told to do with disks and cards, and what it says of them: its descriptions beside QEMU's lists.

use std::path::PathBuf;
use std::time::Duration;

use agent_qga::Limits;
use driver::{
    CommitOptions, Disk, DiskFormat, Domain, MirrorOptions, Network, NetworkBackend, Pivot, Scope,
    SnapshotOptions, StreamOptions,
};
use job_core::JobKind;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::DISK;

/// The disk and the card that come and go.
pub(crate) const DATA: &str = "data";
pub(crate) const LAN: &str = "lan";
/// What a block job may copy a second: so that it takes a while, and a commit gets done although the guest writes on.
const SPEED: u64 = 16 << 20;
const COMMIT_SPEED: u64 = 4 << 20;
/// A guest finds, and lets go of, what it is told of within seconds, also where others load the machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the descriptions name, and what QEMU has.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// The file of the guest's disk by its definition, and as it runs.
    pub(crate) defined: Option<PathBuf>,
    pub(crate) live: Option<PathBuf>,
    /// Disks and cards as it runs, by name.
    pub(crate) parts: Vec<String>,
    /// QEMU's devices, nodes and backends, and the block jobs in it.
    pub(crate) there: Vec<String>,
    pub(crate) jobs: usize,
}

/// `OPERATION [PATH]`
pub(crate) async fn obey(web: &Domain, words: &[&str]) -> Result<String, String> {
    let text = |error: driver::Error| format!("{error:#}");
    let path = || words.get(1).map(PathBuf::from).ok_or("which file?");
    match words[0] {
        "plug" => {
            let disk = Disk::new(DATA, path()?, DiskFormat::Raw);
            web.plug_disk(disk, Scope::Live).await.map_err(text)?;
        }
        "plug-card" => {
            let card = Network::new(LAN, NetworkBackend::User);
            web.plug_network(card, Scope::Live).await.map_err(text)?;
        }
        "unplug" => {
            let unplugged = web.unplug_disk(DATA, Scope::Live).deadline(PATIENCE);
            unplugged.await.map_err(text)?;
        }
        "unplug-card" => {
            let unplugged = web.unplug_network(LAN, Scope::Live).deadline(PATIENCE);
            unplugged.await.map_err(text)?;
        }
        "sees" => return sees(web, words[1]).await,
        "overlay" => {
            let overlay = (DISK.to_owned(), path()?);
            let taken = web.snapshot(vec![overlay], SnapshotOptions::default());
            taken.await.map_err(text)?;
        }
        "mirror" | "commit" | "stream" => {
            let begun = match words[0] {
                "mirror" => web.mirror_disk(
                    DISK,
                    MirrorOptions {
                        path: path()?,
                        format: DiskFormat::Qcow2,
                        pivot: Pivot::WhenReady,
                        bandwidth: Some(SPEED),
                    },
                ),
                "commit" => web.commit_disk(
                    DISK,
                    CommitOptions {
                        bandwidth: Some(COMMIT_SPEED),
                        ..CommitOptions::default()
                    },
                ),
                _ => web.stream_disk(
                    DISK,
                    StreamOptions {
                        bandwidth: Some(SPEED),
                        ..StreamOptions::default()
                    },
                ),
            };
            let job = begun.await.map_err(text)?;
            let ended = job.wait(Instant::now() + PATIENCE);
            ended.await.map_err(text)?;
        }
        "facts" => {
            let facts = facts(web).await.map_err(text)?;
            return Ok(serde_json::to_string(&facts).expect("facts are JSON"));
        }
        other => return Err(format!("no such operation: {other}")),
    }
    Ok(words[0].to_owned())
}

/// Waits until the guest has found a file of its own system: what was plugged in.
async fn sees(web: &Domain, file: &str) -> Result<String, String> {
    let script = format!("until [ -e {file} ]; do sleep 0.05; done");
    let arguments = vec!["-c".to_owned(), script];
    let ran = web.exec("/bin/sh", arguments, Limits::default());
    match ran.deadline(PATIENCE).await {
        Ok(_) => Ok("sees".to_owned()),
        Err(error) => Err(format!("{error:#}")),
    }
}

async fn facts(web: &Domain) -> Result<Facts, driver::Error> {
    let file = |guest: &driver::Guest| {
        let mut disks = guest.disks.iter();
        let disk = disks.find(|disk| disk.name == DISK)?;
        Some(disk.path.clone())
    };
    let live = web.description();
    let parts = live.iter().flat_map(|guest| {
        let disks = guest.disks.iter().map(|disk| disk.name.clone());
        disks.chain(guest.networks.iter().map(|card| card.name.clone()))
    });
    let (mut there, mut jobs) = (Vec::new(), 0);
    if live.is_some() {
        let nodes = ask(web, "query-named-block-nodes", json!({"flat": true})).await?;
        let devices = ask(web, "qom-list", json!({"path": "/machine/peripheral"})).await?;
        there.extend(names(&nodes, "node-name"));
        there.extend(names(&devices, "name"));
        let info = json!({"command-line": "info network"});
        let info = ask(web, "human-monitor-command", info).await?;
        let is_backend = info.as_str().is_some_and(|info| info.contains("lan-net"));
        there.extend(is_backend.then(|| "lan-net".to_owned()));
        let all = ask(web, "query-jobs", json!({})).await?;
        jobs = all.as_array().map_or(0, Vec::len);
    }
    Ok(Facts {
        defined: web.records().definition.as_ref().and_then(file),
        live: live.as_deref().and_then(file),
        parts: parts.collect(),
        there,
        jobs,
    })
}

async fn ask(
    web: &Domain,
    command: &'static str,
    arguments: Value,
) -> Result<Value, driver::Error> {
    let deadline = Instant::now() + PATIENCE;
    let asked = web.run(
        "facts",
        JobKind::Query,
        deadline,
        move |mut op| async move { op.monitor()?.execute_raw(command, arguments).await },
    );
    asked.await
}

fn names(list: &Value, key: &str) -> Vec<String> {
    let all = list.as_array().into_iter().flatten();
    all.filter_map(|one| one[key].as_str().map(str::to_owned))
        .collect()
}
