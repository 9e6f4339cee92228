//! Walks every state that both machines can reach together, to a stated bound, and checks the law.
//!
//! Around the machines: a channel that delays, reorders, duplicates and loses, journals and hosts that
//! fail, daemons that crash between any two actions and in the middle of one, and guests that are
//! killed. Breadth first, so that a broken rule shows its shortest story.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod world;

use std::collections::{HashMap, VecDeque};

use world::{Break, Faults, World};

/// A walk ends with an error beyond this many states: then its bound does not hold any more.
const TOO_MANY: usize = 5_000_000;

struct Walk {
    states: usize,
    steps: usize,
    settled: usize,
}

/// The shortest story that breaks the law.
struct Broken {
    law: &'static str,
    story: Vec<&'static str>,
    world: World,
}

fn walk(faults: Faults, mutation: Break) -> Result<Walk, Broken> {
    let mut index = HashMap::new();
    let mut worlds = Vec::new();
    let mut came_from: Vec<(usize, &'static str)> = Vec::new();
    // Which states lead to this one without a further fault.
    let mut healing: Vec<Vec<u32>> = Vec::new();
    let mut queue = VecDeque::new();
    let mut steps = 0;

    let first = World::new(faults);
    index.insert(first.clone(), 0_usize);
    worlds.push(first);
    came_from.push((0, "begin"));
    healing.push(Vec::new());
    queue.push_back(0);

    while let Some(here) = queue.pop_front() {
        for step in worlds[here].steps(mutation) {
            steps += 1;
            if let Some(law) = step.broken {
                let mut story = tell(here, &came_from);
                story.push(step.label);
                return Err(Broken {
                    law,
                    story,
                    world: step.world,
                });
            }
            let there = *index.entry(step.world).or_insert_with_key(|world| {
                worlds.push(world.clone());
                came_from.push((here, step.label));
                healing.push(Vec::new());
                queue.push_back(worlds.len() - 1);
                worlds.len() - 1
            });
            if !step.fault {
                healing[there].push(u32::try_from(here).unwrap());
            }
        }
        assert!(
            worlds.len() < TOO_MANY,
            "the bound does not hold: {} states",
            worlds.len()
        );
    }

    let mut heals = vec![false; worlds.len()];
    let mut queue: VecDeque<usize> = (0..worlds.len())
        .filter(|at| worlds[*at].is_settled())
        .collect();
    let settled = queue.len();
    queue.iter().for_each(|at| heals[*at] = true);
    while let Some(here) = queue.pop_front() {
        for before in &healing[here] {
            let before = *before as usize;
            if !std::mem::replace(&mut heals[before], true) {
                queue.push_back(before);
            }
        }
    }
    if let Some(stuck) = heals.iter().position(|heals| !heals) {
        return Err(Broken {
            law: "with links healed and daemons back, one owner is reached",
            story: tell(stuck, &came_from),
            world: worlds.swap_remove(stuck),
        });
    }
    Ok(Walk {
        states: worlds.len(),
        steps,
        settled,
    })
}

fn tell(mut at: usize, came_from: &[(usize, &'static str)]) -> Vec<&'static str> {
    let mut story = Vec::new();
    while at != 0 {
        story.push(came_from[at].1);
        at = came_from[at].0;
    }
    story.reverse();
    story
}

#[track_caller]
fn holds(name: &str, faults: Faults) -> usize {
    match walk(faults, Break::Nothing) {
        Ok(Walk {
            states,
            steps,
            settled,
        }) => {
            println!("{name}: {states} states, {steps} steps, {settled} settled; the law holds");
            states
        }
        Err(Broken { law, story, world }) => {
            panic!(
                "{name}: broken: {law}\n  {}\n{world:#?}",
                story.join("\n  ")
            )
        }
    }
}

/// Each daemon crashes once, at any point.
const CRASHES: Faults = Faults {
    source_crashes: 1,
    destination_crashes: 1,
    ..Faults::NONE
};

#[test]
fn without_faults_the_guest_moves() {
    holds("no faults", Faults::NONE);
}

#[test]
fn the_law_holds_when_requests_come_late_or_twice() {
    let faults = Faults {
        strays: 1,
        gives_up: 1,
        cancels: 1,
        ..CRASHES
    };
    let states = holds("strays", faults);
    assert!(
        states >= 20_000,
        "only {states} states: the walk has lost its reach"
    );
}

#[test]
fn the_law_holds_when_daemons_crash_again_and_again() {
    let faults = Faults {
        source_crashes: 2,
        destination_crashes: 2,
        ..Faults::NONE
    };
    holds("crashes", faults);
}

#[test]
fn the_law_holds_when_hosts_and_journals_fail() {
    holds(
        "failures",
        Faults {
            failures: 2,
            ..CRASHES
        },
    );
}

#[test]
fn the_law_holds_when_guests_are_killed() {
    holds(
        "kills",
        Faults {
            kills: 2,
            ..CRASHES
        },
    );
}

#[test]
#[ignore = "minutes: over a million states, for a change of the machines"]
fn the_law_holds_to_a_wider_bound() {
    let all = Faults {
        failures: 1,
        strays: 1,
        cancels: 1,
        gives_up: 1,
        ..CRASHES
    };
    let killed = Faults {
        strays: 1,
        kills: 1,
        failures: 1,
        ..CRASHES
    };
    let states = holds("wide", all) + holds("wide, killed", killed);
    assert!(
        states >= 1_000_000,
        "only {states} states: the walk has lost its reach"
    );
}

#[track_caller]
fn is_found(mutation: Break) {
    let faults = Faults {
        strays: 1,
        failures: 1,
        cancels: 1,
        ..CRASHES
    };
    let Err(Broken { law, story, .. }) = walk(faults, mutation) else {
        panic!("nobody noticed {mutation:?}");
    };
    println!("{mutation:?} breaks: {law}, in {} steps", story.len());
}

#[test]
fn resuming_after_a_lost_finish_answer_is_found() {
    is_found(Break::ResumeOnLostFinish);
}

#[test]
fn killing_the_source_after_a_lost_finish_answer_is_found() {
    is_found(Break::KillOnLostFinish);
}

#[test]
fn starting_the_guest_before_the_journal_says_so_is_found() {
    is_found(Break::StartBeforeJournal);
}

#[test]
fn offering_the_guest_before_the_journal_says_so_is_found() {
    is_found(Break::OfferBeforeJournal);
}

#[test]
fn refusing_before_the_journal_says_so_is_found() {
    is_found(Break::RefuseBeforeJournal);
}

#[test]
fn cancelling_past_the_point_of_return_is_found() {
    is_found(Break::CancelTooLate);
}

#[test]
fn discarding_a_complete_copy_upon_silence_is_found() {
    is_found(Break::DiscardOnSilence);
}

#[test]
fn forgetting_before_the_peer_has_confirmed_is_found() {
    is_found(Break::ForgetUnconfirmed);
}
