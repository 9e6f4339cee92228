//! Many rounds, and what they leave behind: descriptors, threads, memory, changed manners.
//!
//! Must not know what goes through a connection.

use crate::process::{Held, beat, resident_kib};
use crate::report::{Check, Clause, figure, with_causes};
use crate::server::nobody;
use crate::subject::{Needs, Subject, soon};

pub(crate) const CLAUSES: &[Clause] = &[
    Clause {
        number: "11.1",
        says: "round after round of dial and accept: no descriptor, thread or memory is left",
        needs: Needs::Both,
        check: |subject| subject.run(rounds),
    },
    Clause {
        number: "11.1",
        says: "dial after dial to a server: no descriptor, thread or memory is left",
        needs: Needs::Server,
        check: |subject| subject.run(dials),
    },
    Clause {
        number: "14.1",
        says: "directory, environment, file mask and signals are as before",
        needs: Needs::Nothing,
        check: |subject| subject.manners.must_be_kept(),
    },
];

/// What allocators may keep for later. Spread over 10 000 rounds, a leak of 53 bytes a round shows.
const MEMORY_KIB: u64 = 512;

async fn rounds(subject: &Subject) -> Check {
    let listener = subject.listen().await?;
    measure(subject, async || {
        let (dialed, accepted) = subject.join(&listener).await?;
        // In this order a tcp port that lingers is the listener's, and dialers never run out.
        drop(accepted);
        drop(dialed);
        Ok(())
    })
    .await
}

async fn dials(subject: &Subject) -> Check {
    if let Err(error) = subject.transports.dial(&subject.target, soon()).await {
        return Err(nobody(&with_causes(&error)));
    }
    measure(subject, async || {
        beat();
        drop(subject.transports.dial(&subject.target, soon()).await?);
        Ok(())
    })
    .await
}

async fn measure(subject: &Subject, round: impl AsyncFn() -> Check) -> Check {
    // What is kept for the next round is there after some.
    let warm_up = subject.rounds.div_ceil(10).max(100);
    for _ in 0..warm_up {
        round().await?;
        tokio::task::yield_now().await;
    }
    let held = Held::now()?.settled()?;
    let memory = resident_kib()?;
    for _ in 0..subject.rounds {
        round().await?;
        // Tokio lets go of what was registered only when its reactor has a turn.
        tokio::task::yield_now().await;
    }
    let now = held.settled()?;
    let grown = resident_kib()?.saturating_sub(memory);
    let left = |now: usize, before: usize| now.saturating_sub(before) as u64;
    let descriptors = left(now.descriptors, held.descriptors);
    let threads = left(now.threads, held.threads);
    let figures = [
        figure(subject, "descriptors-left", descriptors, "descriptors", 0),
        figure(subject, "threads-left", threads, "threads", 0),
        figure(subject, "memory-grown", grown, "KiB", MEMORY_KIB),
    ];
    figures.into_iter().collect()
}
