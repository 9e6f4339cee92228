//! Pattern 4: an agent command. Under an agent job, which waits for no normal or async job and keeps none waiting: a
//! silent guest costs only those who ask it.
//!
//! ```text
//! agent TRANSPORTS RUN_DIR guest.json
//! ```

use std::time::Duration;

use agent_qga::{GetOsinfo, Limits};
use driver::{Deadline, Driver, StartOptions};
use job_core::AgentKind;
use transport_host::Transports;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [transports_dir, run_dir, guest] = &arguments[..] else {
        return Err("usage: agent TRANSPORTS RUN_DIR GUEST.json".into());
    };
    let mut transports = Transports::builder();
    transports.load_dir(transports_dir)?;
    let driver = Driver::builder(transports.build()?, run_dir).build()?;
    let description = serde_json::from_slice(&std::fs::read(guest)?)?;
    let guest = driver.start(description, StartOptions::default()).await?;
    guest.wait_agent().deadline(Duration::from_secs(60)).await?;

    let deadline = Deadline::now() + Duration::from_secs(10);
    let told = guest.run_agent("look", AgentKind::Query, deadline, |mut op| async move {
        let agent = op.agent()?;
        let system = agent.execute(GetOsinfo).await?;
        let uptime = agent
            .run("/bin/cat", &["/proc/uptime"], &[], Limits::default())
            .await?;
        Ok((
            system.kernel_release,
            String::from_utf8_lossy(&uptime.stdout).into_owned(),
        ))
    });
    let (kernel, uptime) = told.await?;
    println!("the guest says: kernel {kernel:?}, up {uptime}");
    Ok(guest.destroy().await?)
}
