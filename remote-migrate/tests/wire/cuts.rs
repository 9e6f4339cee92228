//! The connection breaks at every byte of a migration, each way, heard and unheard. Whatever comes of it,
//! once the link heals there is one owner and nothing is left behind.

use std::sync::atomic::Ordering;

use remote_migrate::{ErrorKind, Owner};

use crate::{
    ends::{Cut, Road},
    rig::{Fails, Rig, Where},
};

/// How many bytes pass each way when nothing breaks.
async fn whole(bytewise: bool) -> (u64, u64) {
    let rig = Rig::new();
    let cut = Cut {
        bytewise,
        ..Cut::NEVER
    };
    let road = Road::new(rig.destination(), cut, false);
    let report = rig.migrate_over(&road.peer()).await.unwrap();
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(rig.runs(), Where::Destination);
    assert!(rig.forgotten().await && rig.clean());
    assert_eq!(road.dialled.load(Ordering::Relaxed), 1);
    let passed = |bytes: &std::sync::atomic::AtomicU64| bytes.load(Ordering::Relaxed);
    (passed(&road.passed.up), passed(&road.passed.down))
}

/// What became of one story, for the count.
#[derive(Default, Debug)]
struct Ends {
    /// By post-copy, whose stream breaks once.
    post_copy: bool,
    stories: usize,
    moved: usize,
    kept: usize,
    in_doubt: usize,
}

impl Ends {
    /// A migration whose first connection breaks at `cut`; with `closes`, no other can be made until the
    /// call has returned.
    async fn story(&mut self, cut: Cut, closes: bool) {
        let rig = Rig::new();
        let road = Road::new(rig.destination(), cut, closes);
        let peer = road.peer();
        let outcome = if self.post_copy {
            rig.fail(Fails::Drain);
            rig.migrate_by_post_copy(&peer).await
        } else {
            rig.migrate_over(&peer).await
        };
        let doubt = matches!(&outcome, Err(error) if error.kind() == ErrorKind::InDoubt);
        if closes {
            road.heal();
            match rig.recover_over(&peer).await {
                Ok(report) => assert!(report.settled, "{cut:?}"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{cut:?}: {error}"),
            }
        } else {
            assert!(!doubt, "{cut:?}: the peer could be asked again");
        }
        rig.reconcile().await;
        self.stories += 1;
        self.in_doubt += usize::from(doubt);
        match rig.runs() {
            Where::Source => self.kept += 1,
            Where::Destination => self.moved += 1,
            place => panic!("{cut:?}, closes: {closes}: the guest runs {place:?}"),
        }
        if let Ok(report) = &outcome {
            assert_eq!(
                (report.owner, rig.runs()),
                (Owner::Destination, Where::Destination)
            );
        }
        assert!(
            rig.forgotten().await && rig.clean(),
            "{cut:?}, closes: {closes}"
        );
    }
}

async fn cut_everywhere(heard: bool, closes: bool, mut ends: Ends) {
    let (up, down) = whole(false).await;
    // In post-copy there are two more questions.
    let (up, down) = match ends.post_copy {
        true => (up + up / 3, down + down / 3),
        false => (up, down),
    };
    // What nobody hears costs many beats each: there every third byte has to do.
    let step = if heard && !ends.post_copy { 1 } else { 3 };
    for at in (0..=up).step_by(step) {
        let cut = Cut {
            up: at,
            heard,
            ..Cut::NEVER
        };
        ends.story(cut, closes).await;
    }
    for at in (0..=down).step_by(step) {
        let cut = Cut {
            down: at,
            heard,
            ..Cut::NEVER
        };
        ends.story(cut, closes).await;
    }
    println!(
        "{} stories: {} moved, {} kept, {} of them in doubt first",
        ends.stories, ends.moved, ends.kept, ends.in_doubt
    );
    assert!(ends.moved > 0 && ends.kept > 0, "{ends:?}");
    assert_eq!(ends.in_doubt > 0, closes, "{ends:?}");
}

#[tokio::test(start_paused = true)]
async fn a_migration_passes_byte_by_byte() {
    assert_eq!(whole(true).await, whole(false).await);
}

#[tokio::test(start_paused = true)]
async fn a_link_cut_at_any_byte_and_dialled_again_ends_with_one_owner() {
    cut_everywhere(true, false, Ends::default()).await;
}

#[tokio::test(start_paused = true)]
async fn a_link_cut_at_any_byte_and_healed_later_ends_with_one_owner() {
    cut_everywhere(true, true, Ends::default()).await;
}

#[tokio::test(start_paused = true)]
async fn a_link_that_falls_silent_at_any_byte_and_is_dialled_again_ends_with_one_owner() {
    cut_everywhere(false, false, Ends::default()).await;
}

#[tokio::test(start_paused = true)]
async fn a_link_that_falls_silent_at_any_byte_and_heals_later_ends_with_one_owner() {
    cut_everywhere(false, true, Ends::default()).await;
}

#[tokio::test(start_paused = true)]
async fn a_link_cut_at_any_byte_of_post_copy_and_healed_later_ends_with_one_owner() {
    let post_copy = Ends {
        post_copy: true,
        ..Ends::default()
    };
    cut_everywhere(true, true, post_copy).await;
}
