//! Walks every state of the shipped `slots.rs` that a few callers can reach, against the specification.
//!
//! Breadth first, to a depth that is printed. After every transition the slots must agree with the specification in all
//! that can be seen of them, and the invariants at the head of `slots.rs` must hold. States are counted once, however
//! they were reached: tickets, keys and generations are made relative, and callers that differ only by name are one.
//!
//! A debug build walks for a few seconds; `JOB_CORE_WALK=long` in a release build goes beyond a million states.

#![allow(
    unfulfilled_lint_expectations,
    reason = "the shipped files expect lints that only what is public meets"
)]

#[expect(
    unreachable_pub,
    reason = "the shipped file, which knows no other way to be public"
)]
#[path = "../src/kind.rs"]
mod kind;
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the shipped file, of which the walk needs a part"
)]
#[path = "../src/slots.rs"]
mod slots;

#[path = "spec/invariants.rs"]
mod invariants;
#[path = "spec/model.rs"]
mod model;
#[path = "spec/world.rs"]
mod world;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::thread;

use invariants::Tally;
use kind::{AgentKind, AsyncKind, JobKind};
use model::Mask;
use slots::Limits;
use world::{Cast, Step, World};

/// Every kind there is, and masks beside those of the table.
fn all_kinds() -> Cast {
    let mut asyncs: Vec<_> = AsyncKind::ALL.map(|kind| (kind, Mask::row(kind))).to_vec();
    asyncs.push((AsyncKind::Snapshot, Mask::of(&[])));
    asyncs.push((AsyncKind::Snapshot, Mask::of(&JobKind::ALL)));
    Cast {
        name: "3 callers, all kinds",
        callers: 3,
        normal: JobKind::ALL.to_vec(),
        agent: AgentKind::ALL.to_vec(),
        asyncs,
        masks: vec![
            Mask::of(&[]),
            Mask::of(&[JobKind::Query, JobKind::Suspend, JobKind::MigrationOp]),
            Mask::of(&JobKind::ALL),
        ],
        limits: Limits::default(),
    }
}

/// One more caller, so that queues are longer than their limits, and only kinds that differ in what they meet.
fn long_queues() -> Cast {
    Cast {
        name: "4 callers, tight limits",
        callers: 4,
        normal: vec![
            JobKind::Query,
            JobKind::Modify,
            JobKind::Abort,
            JobKind::Destroy,
        ],
        agent: vec![AgentKind::Modify, AgentKind::Thaw],
        asyncs: vec![
            (AsyncKind::Save, Mask::row(AsyncKind::Save)),
            (AsyncKind::Start, Mask::row(AsyncKind::Start)),
        ],
        masks: vec![Mask::of(&[]), Mask::of(&[JobKind::Query, JobKind::Modify])],
        limits: Limits {
            normal: 2,
            asynchronous: 1,
            agent: 1,
        },
    }
}

/// Few enough to be walked to the end: no state is left whose steps were not taken.
fn few() -> Cast {
    Cast {
        name: "3 callers, few kinds, to the end",
        callers: 3,
        normal: vec![JobKind::Query, JobKind::Modify, JobKind::Destroy],
        agent: vec![AgentKind::Modify],
        asyncs: vec![(AsyncKind::Save, Mask::row(AsyncKind::Save))],
        masks: vec![],
        limits: Limits {
            normal: 1,
            asynchronous: 1,
            agent: 1,
        },
    }
}

/// Ends with the lines that `cargo xtask verify` collects.
#[test]
fn every_reachable_state_keeps_the_invariants_and_agrees_with_the_specification() {
    let long = std::env::var("JOB_CORE_WALK").is_ok_and(|word| word == "long");
    let walks = if long {
        vec![(all_kinds(), 7), (long_queues(), 9), (few(), usize::MAX)]
    } else {
        vec![(all_kinds(), 3), (long_queues(), 3), (few(), usize::MAX)]
    };
    let mut tally = Tally::default();
    for (cast, depth) in walks {
        let walked = walk(&cast, depth);
        println!("\n{}: states by depth {:?}", cast.name, walked.by_depth);
        assert!(depth < usize::MAX || walked.by_depth.last() == Some(&0));
        tally += walked.tally;
    }
    let (states, bar) = (tally.states(), if long { 1_000_000 } else { 10_000 });
    assert!(states > bar, "only {states} states were found");
    print!("{tally}");
    println!("figure walk-states {states} states bar > {bar} ok");
}

struct Walked {
    by_depth: Vec<usize>,
    tally: Tally,
}

fn walk(cast: &Cast, depth: usize) -> Walked {
    let seen: Vec<Mutex<HashSet<u128>>> = (0..64).map(|_| Mutex::default()).collect();
    let is_new = |world: &World| {
        let print = fingerprint(&world.canonical());
        let shard = &seen[print as usize % seen.len()];
        shard.lock().expect("no walker panicked").insert(print)
    };
    is_new(&World::new(cast));
    // A state is kept as the way to it: a few bytes instead of a copy of the world.
    let mut frontier: Vec<Box<[Step]>> = vec![Box::default()];
    let mut by_depth = vec![1];
    let mut tally = Tally::default();
    let walkers = thread::available_parallelism().map_or(1, usize::from);
    while by_depth.len() <= depth && !frontier.is_empty() {
        let share = frontier.len().div_ceil(walkers).max(1);
        let parts: Vec<_> = thread::scope(|scope| {
            let is_new = &is_new;
            let start = |part| scope.spawn(move || expand(cast, part, is_new));
            let walkers: Vec<_> = frontier.chunks(share).map(start).collect();
            let join = |walker: thread::ScopedJoinHandle<'_, _>| {
                walker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            walkers.into_iter().map(join).collect()
        });
        frontier = Vec::new();
        for (found, counts) in parts {
            frontier.extend(found);
            tally += counts;
        }
        by_depth.push(frontier.len());
    }
    Walked { by_depth, tally }
}

/// All new states one step beyond these, each checked.
fn expand(
    cast: &Cast,
    part: &[Box<[Step]>],
    is_new: &impl Fn(&World) -> bool,
) -> (Vec<Box<[Step]>>, Tally) {
    let mut found = Vec::new();
    let mut tally = Tally::default();
    for path in part {
        let mut before = World::new(cast);
        for step in path {
            before.play(cast, *step).expect("it was walked before");
        }
        for step in before.steps(cast) {
            let mut after = before.clone();
            let fail = |what: String| {
                panic!(
                    "{what}\nafter {path:?}\nthen {step:?}\nin {after:#?}",
                    after = before
                )
            };
            let told = after.play(cast, step).unwrap_or_else(fail);
            if let Err(what) = tally.transition(&before, &after, &told) {
                fail(what);
            }
            if is_new(&after) {
                if let Err(what) = tally.state(&after) {
                    fail(what);
                }
                found.push(path.iter().copied().chain([step]).collect());
            }
        }
    }
    (found, tally)
}

/// 128 bits, so that even a billion states meet no other's print by chance.
fn fingerprint(canonical: &[u8]) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, canonical).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}
