//! Files and programs through the driver, on a real agent: others are served in between.

use std::time::Duration;

use agent_qga::{Digest, Limits, Piece};
use driver::ErrorKind;
use tokio::fs::File;
use tokio::time::Instant;

use crate::harness::tests;
use crate::rig::{Rig, boot, jobs_until};

tests! {
    a_file_goes_in_and_out_while_others_are_served,
    a_program_is_heard_through_the_driver_while_it_runs,
}

const SECOND: Duration = Duration::from_secs(1);

async fn a_file_goes_in_and_out_while_others_are_served(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let content: Vec<u8> = (0..3_000_000_u32)
        .map(|number| (number >> 3) as u8)
        .collect();
    let path = rig.dir.path().join("content");
    std::fs::write(&path, &content).expect("it is written");
    let from = File::open(&path).await.expect("it is there");
    let mut copying = tokio::spawn(web.upload("/tmp/content", from).into_future());
    let mut pings = 0;
    let sent = loop {
        tokio::select! {
            sent = &mut copying => break sent.expect("no panic").expect("it is copied"),
            ping = web.ping() => { ping.expect("it is served in turn"); pings += 1; }
        }
    };
    assert!(pings > 2, "{pings} passed");
    assert_eq!((sent.bytes, sent.sha256), (3_000_000, Digest::of(&content)));

    let back = rig.dir.path().join("back");
    let to = File::create(&back).await.expect("it can be made");
    let got = web.download("/tmp/content", to, 4_000_000, Some(sent.sha256));
    assert_eq!(got.await.expect("it is copied").bytes, 3_000_000);
    assert_eq!(std::fs::read(&back).expect("it is there"), content);
    let to = File::create(&back).await.expect("it can be made");
    let error = web.download("/tmp/content", to, 1_000_000, None).await;
    let error = error.expect_err("it is longer");
    assert_eq!(error.kind(), ErrorKind::Agent, "{error:#}");
    assert!(
        error.to_string().contains("download from domain \"web\""),
        "{error}"
    );
    // The file is closed behind the caller.
    assert!(jobs_until(&web, 30 * SECOND, |jobs| jobs.agent.is_none()).await);
}

async fn a_program_is_heard_through_the_driver_while_it_runs(rig: Rig) {
    let (web, _) = boot(&rig, "web").await.expect("it boots");
    let arguments = vec!["-c".to_owned(), "echo one; read x; echo $x".to_owned()];
    let started = web.stream("/bin/sh", arguments, b"two\n".to_vec(), Limits::default());
    let mut program = started.await.expect("it starts");
    let mut heard = Vec::new();
    while let Some(piece) = program
        .next(Instant::now() + 30 * SECOND)
        .await
        .expect("it goes on")
    {
        web.ping().await.expect("the stream holds no job");
        let Piece::Stdout(bytes) = piece else {
            panic!("{piece:?}")
        };
        heard.extend(bytes);
    }
    assert_eq!(heard, b"one\ntwo\n");
    assert_eq!(program.end().expect("it ended").exit_code, Some(0));
}
