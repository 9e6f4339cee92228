//! A daemon of an older release at the other end: version 1, no features, its frames as it wrote them.
//!
//! The frames are kept as text, not made from today's types, so that a change of those shows here: as a frame that an
//! older peer would not know, or one of its own that is not understood any more.

use remote_migrate::{ErrorKind, Owner};
use tokio::io::DuplexStream;

use crate::{
    ends::{Played, peer_over, serve},
    rig::{Fails, Rig, Where},
};

const HELLO: &str = r#"{"hello":{"magic":"vmwright-migrate","version":1}}"#;
/// The same of a release after this one, which speaks this one's version, too.
const NEXT: &str =
    r#"{"hello":{"magic":"vmwright-migrate","version":2,"features":["mirror"],"of":9}}"#;

const PREPARE: &str = r#"{"request":{"id":1,"within_ms":W,"request":{"migration":"M","epoch":1,"domain":"00000000-0000-0000-0000-000000000007","call":{"prepare":{"cookie":"a guest","run":"running","home":""}}}}}"#;
const PREPARED: &str = r#"{"answer":{"id":1,"answer":{"migration":"M","epoch":1,"reply":{"prepared":{"connect":"there","cookie":""}}}}}"#;
const FINISH: &str = r#"{"request":{"id":2,"within_ms":W,"request":{"migration":"M","epoch":1,"domain":"00000000-0000-0000-0000-000000000007","call":"finish"}}}"#;
const OWNED: &str = r#"{"answer":{"id":2,"answer":{"migration":"M","epoch":1,"reply":"owned"}}}"#;
const KEEP: &str = r#"{"request":{"id":3,"within_ms":W,"request":{"migration":"M","epoch":1,"domain":"00000000-0000-0000-0000-000000000007","call":{"confirm":"keep"}}}}"#;
const DISCARD: &str = r#"{"request":{"id":2,"within_ms":W,"request":{"migration":"M","epoch":1,"domain":"00000000-0000-0000-0000-000000000007","call":{"confirm":"discard"}}}}"#;
const CLOSED: &str = r#"{"answer":{"id":3,"answer":{"migration":"M","epoch":1,"reply":"closed"}}}"#;
const DISCARDED: &str =
    r#"{"answer":{"id":2,"answer":{"migration":"M","epoch":1,"reply":"closed"}}}"#;

/// The older daemon, frame by frame.
struct Older {
    wire: Played,
    migration: String,
    pings: u64,
}

impl Older {
    async fn greeting(stream: DuplexStream, hello: &str, rig: &Rig) -> Self {
        let mut wire = Played::new(stream);
        wire.say_text(hello).await;
        let ours = wire.hear_frame().await.unwrap();
        let ours = String::from_utf8(ours.to_vec()).unwrap();
        assert!(ours.starts_with(r#"{"hello":{"magic":"vmwright-migrate","version":1,"#));
        let migration = rig.id().to_string();
        Self {
            wire,
            migration,
            pings: 0,
        }
    }

    async fn say(&mut self, text: &str) {
        let text = text.replace('M', &self.migration).replace('W', "9000");
        self.wire.say_text(&text).await;
    }

    /// The next that comes is this very frame, but for how long its asker waits. Pings are answered as that release did.
    async fn hears(&mut self, expected: &str) {
        loop {
            let frame = self.wire.hear_frame().await.expect("it hung up");
            let frame = String::from_utf8(frame.to_vec()).unwrap();
            let ping = format!(r#"{{"ping":{{"id":{}}}}}"#, self.pings + 1);
            if frame == ping {
                self.pings += 1;
                let pong = format!(r#"{{"pong":{{"id":{}}}}}"#, self.pings);
                self.wire.say_text(&pong).await;
                continue;
            }
            let (before, after) = expected.split_once('W').unwrap_or((expected, ""));
            let before = before.replace('M', &self.migration);
            let after = after.replace('M', &self.migration);
            let is_it = frame
                .strip_prefix(&before)
                .and_then(|rest| rest.strip_suffix(&after));
            let within = is_it.unwrap_or_else(|| panic!("{frame} in place of {expected}"));
            assert!(within.bytes().all(|byte| byte.is_ascii_digit()), "{frame}");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_moves_to_a_daemon_of_an_older_release_and_of_the_next_one() {
    for hello in [HELLO, NEXT] {
        let rig = Rig::new();
        let (near, far) = tokio::io::duplex(64 * 1024);
        let peer = peer_over(near);
        let answers = async {
            let mut older = Older::greeting(far, hello, &rig).await;
            older.hears(PREPARE).await;
            rig.arrives_elsewhere();
            older.say(PREPARED).await;
            older.hears(FINISH).await;
            older.say(OWNED).await;
            older.hears(KEEP).await;
            older.say(CLOSED).await;
            older
        };
        let (report, _older) = tokio::join!(rig.migrate_over(&peer), answers);
        let report = report.unwrap();
        assert_eq!((report.owner, report.settled), (Owner::Destination, true));
        assert_eq!(report.downtime, None, "it does not tell when the guest ran");
        assert!(rig.forgotten().await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_comes_from_a_daemon_of_an_older_release_and_of_the_next_one() {
    for hello in [HELLO, NEXT] {
        let rig = Rig::new();
        let (near, _served) = serve(rig.destination());
        let mut older = Older::greeting(near, hello, &rig).await;
        older.say(PREPARE).await;
        older.hears(PREPARED).await;
        rig.memory_has_moved();
        older.say(FINISH).await;
        older.hears(OWNED).await;
        assert_eq!(rig.runs(), Where::Destination);
        older.say(KEEP).await;
        older.hears(CLOSED).await;
        assert!(rig.forgotten().await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_was_paused_on_its_way_stays_where_an_older_daemon_would_let_it_run() {
    let rig = Rig::new();
    rig.fail(Fails::Paused);
    let (near, far) = tokio::io::duplex(64 * 1024);
    let peer = peer_over(near);
    let answers = async {
        let mut older = Older::greeting(far, HELLO, &rig).await;
        older.hears(PREPARE).await;
        rig.arrives_elsewhere();
        older.say(PREPARED).await;
        // Nothing is offered.
        older.hears(DISCARD).await;
        older.say(DISCARDED).await;
        older
    };
    let (moved, _older) = tokio::join!(rig.migrate_over(&peer), answers);
    let error = moved.unwrap_err();
    assert_eq!(
        (error.kind(), error.owner_now()),
        (ErrorKind::TooOld, Owner::Source)
    );
    assert_eq!(rig.runs(), Where::Nowhere, "it is paused still");
    assert!(error.is_settled() && rig.forgotten().await);
}
