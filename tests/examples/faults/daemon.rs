//! A small daemon that can be told to die: one line in, one line out, and `SIGKILL` to itself at a phase of an operation.
//!
//! What it knows of its guests after that is what the driver wrote down.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_qga::Limits;
use driver::{
    BackupOf, BackupOptions, BackupTarget, Domain, Driver, DumpFormat, FreezeOptions, Notice,
    SaveOptions, SnapshotOptions, StartOptions, What,
};
use rustix::process::{Signal, getpid, kill_process};
use tokio::time::Instant as Clock;

use crate::parts;
use crate::rig::{Env, WRITER};

/// Longer than a run: what is thawed earlier was thawed by somebody.
const HOLD: Duration = Duration::from_secs(600);
/// The bitmap of backups that follow one another.
const CHAIN: &str = "chain";

/// When it is to die: once that [`moment`] is told, and so long after it; at once without a phase.
struct Death {
    phase: String,
    after: Duration,
}

/// Serves its standard input on the directories below `dir`.
pub(crate) fn serve(dir: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(run(dir))
}

async fn run(dir: &Path) -> Result<(), String> {
    let env = Env::find()?;
    let text = |error: driver::Error| format!("{error:#}");
    let driver = Driver::builder(env.transports()?, dir.join("run"))
        .state_dir(dir.join("state"))
        .qemu(&env.qemu)
        .build()
        .map_err(text)?;
    let all = driver.recovered(Clock::now() + Duration::from_secs(60));
    for found in all.await.map_err(text)? {
        let job = found
            .job
            .map_or_else(|| "none".to_owned(), |job| job.to_string());
        say(&format!("recovered {job} {:?}", found.became));
    }
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let done = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(obey(&driver, &env, dir, &line))
        });
        match done {
            Ok(text) => say(&format!("ok {text}")),
            Err(error) => say(&format!("error {error}")),
        }
    }
    Ok(())
}

fn say(line: &str) {
    println!("{line}");
    std::io::stdout().flush().expect("somebody listens");
}

/// `[die PHASE MICROSECONDS] OPERATION [PATH]`
async fn obey(driver: &Driver, env: &Env, dir: &Path, line: &str) -> Result<String, String> {
    let mut words: Vec<&str> = line.split(' ').collect();
    if let ["die", phase, after, ..] = words[..] {
        let after = after.parse().map_err(|_| format!("{after} is no number"))?;
        let death = Death {
            phase: phase.to_owned(),
            after: Duration::from_micros(after),
        };
        let mut news = driver.subscribe();
        if death.phase == "any" {
            std::thread::spawn(move || die(&death));
        } else {
            tokio::spawn(async move {
                loop {
                    if let Notice::News { news, .. } = news.next().await
                        && moment(&news.what) == Some(&*death.phase)
                    {
                        die(&death);
                    }
                }
            });
        }
        words.drain(..3);
    }
    let text = |error: driver::Error| format!("{error:#}");
    let path = words.get(1).map(PathBuf::from);
    let path = || path.clone().ok_or("which file?");
    match words[0] {
        "wait" => std::future::pending().await,
        "start" => {
            let guest = crate::guest(env, dir);
            let started = driver.start(guest, StartOptions::default());
            started.await.map_err(text)?;
        }
        "restore" => drop(driver.restore(path()?).await.map_err(text)?),
        "save" => {
            let options = SaveOptions::default();
            let saved = web(driver)?.save(path()?, options);
            saved.await.map_err(text)?;
        }
        "dump" => drop(
            web(driver)?
                .dump(path()?, DumpFormat::Elf)
                .await
                .map_err(text)?,
        ),
        "freeze" => {
            let options = FreezeOptions {
                hold: HOLD,
                ..FreezeOptions::default()
            };
            let _lease = web(driver)?.freeze(options).await.map_err(text)?;
            std::future::pending::<()>().await;
        }
        "frozen" => {
            let state = web(driver)?.freeze_state().await.map_err(text)?;
            return Ok(format!("{state:?}").to_lowercase());
        }
        "write" => {
            let script = format!("({WRITER}) </dev/null >/dev/null 2>&1 &");
            let arguments = vec!["-c".to_owned(), script];
            let web = web(driver)?;
            let ready = web.wait_agent().deadline(Duration::from_secs(90));
            ready.await.map_err(text)?;
            let ran = web.exec("/bin/sh", arguments, Limits::default());
            ran.await.map_err(text)?;
        }
        "snapshot" | "snapshot-memory" => {
            let is_frozen = words[0] == "snapshot";
            let options = SnapshotOptions {
                freeze: is_frozen.then(|| FreezeOptions {
                    hold: HOLD,
                    ..FreezeOptions::default()
                }),
                memory: (!is_frozen).then_some(path()?.with_extension("memory")),
                ..SnapshotOptions::default()
            };
            let overlay = (crate::DISK.to_owned(), path()?);
            let taken = web(driver)?.snapshot(vec![overlay], options);
            taken.await.map_err(text)?;
        }
        "inside-save" => web(driver)?.snapshot_inside(words[1]).await.map_err(text)?,
        "inside-load" => web(driver)?.revert_inside(words[1]).await.map_err(text)?,
        "inside-delete" => web(driver)?.delete_inside(words[1]).await.map_err(text)?,
        "backup" | "backup-chain" | "backup-since" => {
            let (of, speed) = match words[0] {
                "backup" => (BackupOf::Everything, Some(32 << 20)),
                "backup-chain" => (BackupOf::EverythingAnd(CHAIN.into()), None),
                _ => (BackupOf::Since(CHAIN.into()), Some(64 << 10)),
            };
            let options = BackupOptions {
                of,
                speed,
                ..BackupOptions::default()
            };
            let target = BackupTarget {
                disk: crate::DISK.to_owned(),
                path: path()?,
                // What the hand had copied before it.
                behind: (words[0] == "backup-since").then_some(path()?.with_extension("first")),
            };
            let copied = web(driver)?.backup(vec![target], options);
            copied.await.map_err(text)?;
        }
        "pause" => web(driver)?.pause().await.map_err(text)?,
        "resume" => web(driver)?.resume().await.map_err(text)?,
        "destroy" => web(driver)?.destroy().await.map_err(text)?,
        "forget" => web(driver)?.remove().await.map_err(text)?,
        "status" => {
            let Ok(web) = web(driver) else {
                return Ok("unknown".to_owned());
            };
            let held = web.jobs().asynchronous.is_some();
            let run = web.observed().run.name().to_owned();
            return Ok(if held { format!("{run} held") } else { run });
        }
        _ => return parts::obey(&web(driver)?, &words).await,
    }
    Ok(words[0].to_owned())
}

/// The name of what is told: a phase of an operation, or that a block job has copied all and the disk is about to move.
fn moment(what: &What) -> Option<&str> {
    match what {
        What::Phase { phase, .. } => Some(phase),
        What::BlockJobReady { .. } => Some("ready"),
        _ => None,
    }
}

fn web(driver: &Driver) -> Result<Domain, String> {
    driver
        .by_name(crate::NAME)
        .ok_or_else(|| "no such domain".to_owned())
}

/// Ends this process as a power cut would. To the microsecond, so it spins.
fn die(death: &Death) {
    let since = Instant::now();
    while since.elapsed() < death.after {
        std::hint::spin_loop();
    }
    let _never = kill_process(getpid(), Signal::KILL);
}
