//! Following several of QEMU's jobs that end together. Decides nothing: [`Group`] does.

use std::time::Duration;

use job_core::Guard;
use monitor_qmp::command;
use tokio::time::{Instant, timeout};

use crate::error::{Cause, Error};
use crate::grouped::Group;
use crate::ops::AsyncOp;
use crate::ops::job_watch::{cancel, dismiss};

/// How often QEMU is asked how far its jobs are. An event has it asked at once.
const ASK: Duration = Duration::from_millis(250);

/// Follows the jobs of these ids until they are copied or have ended. Asked to stop, or out of time, it says so and leaves
/// them as they are.
pub(crate) async fn follow(op: &mut AsyncOp, ids: &[String]) -> Result<Group, Error> {
    let began = Instant::now();
    // From before the first question, so that no event is missed in between.
    let mut news = op.domain().subscribe();
    loop {
        op.check_cancelled()?;
        let jobs = op.monitor().await?.execute(command::QueryJobs).await?;
        let (done, total) = Group::progress(&jobs, ids);
        op.report(done, total);
        let group = Group::of(&jobs, ids);
        if group != Group::UnderWay {
            return Ok(group);
        }
        if Instant::now() >= op.deadline() {
            let (what, waited) = ("QEMU to end its jobs", began.elapsed());
            return Err(Cause::TimedOut { what, waited }.into());
        }
        let token = op.job().token();
        tokio::select! {
            _news_or_late = timeout(ASK, news.next()) => {}
            _ = token.stop() => {}
        }
    }
}

/// Ends the jobs, however far they are, and takes them off the list. Whatever waited to take effect does not.
pub(crate) async fn cancel_all(op: &mut AsyncOp, ids: &[String]) -> Result<(), Error> {
    let mut news = op.domain().subscribe();
    for id in ids {
        cancel(op, id).await?;
    }
    loop {
        let jobs = op.monitor().await?.execute(command::QueryJobs).await?;
        if !matches!(Group::of(&jobs, ids), Group::UnderWay | Group::Copied) {
            break;
        }
        if Instant::now() >= op.deadline() {
            let (what, waited) = ("QEMU to give its jobs up", Duration::ZERO);
            return Err(Cause::TimedOut { what, waited }.into());
        }
        let _news_or_late = timeout(ASK, news.next()).await;
    }
    dismiss_all(op, ids).await
}

pub(crate) async fn dismiss_all(op: &mut AsyncOp, ids: &[String]) -> Result<(), Error> {
    for id in ids {
        dismiss(op, id).await?;
    }
    Ok(())
}
