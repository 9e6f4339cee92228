//! A guest moves to a newer QEMU than the one it was started with, and stays the machine it was.

use std::net::Ipv4Addr;
use std::num::NonZero;

use driver::{Landing, MigrateOptions};
use libtest_mimic::Completion;

use super::{SECOND, counts_on, peer};
use crate::authority::Authority;
use crate::rig::{Env, Rig, boot};

/// What has a newer QEMU, or why that is not tested here.
fn newer(env: &Env) -> Result<Env, Completion> {
    let Some(qemu) = std::env::var_os("VMWRIGHT_QEMU_NEWER") else {
        let why = "VMWRIGHT_QEMU_NEWER not set; `cargo xtask integration --newer` fetches one";
        return Err(Completion::ignored_with(why));
    };
    Ok(Env {
        qemu: qemu.into(),
        ..env.clone()
    })
}

/// One that was started by the short name of its machine, on the older QEMU, counts on.
async fn moves(rig: &Rig, there: &Rig, options: MigrateOptions) {
    assert_eq!(rig.guest("web").machine, "q35", "whatever that means there");
    let (domain, _) = boot(rig, "web").await.expect("it boots");
    let moved = domain.migrate(peer(there), options);
    moved.await.expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    let records = moved.records();
    let definition = records.definition.as_ref().expect("it is known there");
    assert!(
        definition.machine.starts_with("pc-q35-"),
        "{}",
        definition.machine
    );
    counts_on(rig, 2, 20 * SECOND).await;
}

pub(super) async fn a_guest_that_arrived_has_the_full_name_of_its_machine(rig: Rig) {
    let there = Rig::new(&rig.env);
    moves(&rig, &there, MigrateOptions::default()).await;
}

pub(super) async fn a_guest_moves_to_a_newer_qemu_with_the_machine_of_the_older(
    rig: Rig,
) -> Completion {
    let env = match newer(&rig.env) {
        Ok(env) => env,
        Err(skipped) => return skipped,
    };
    moves(&rig, &Rig::new(&env), MigrateOptions::default()).await;
    Completion::Completed
}

pub(super) async fn a_guest_moves_to_a_newer_qemu_under_tls(rig: Rig) -> Completion {
    let env = match newer(&rig.env) {
        Ok(env) => env,
        Err(skipped) => return skipped,
    };
    let authority = Authority::new();
    let here = Rig::at(&rig.env, authority.landing("a.example"));
    let there = Rig::at(&env, authority.landing("b.example"));
    moves(&here, &there, MigrateOptions::default()).await;
    Completion::Completed
}

pub(super) async fn a_guest_comes_over_several_connections_to_a_newer_qemu(rig: Rig) -> Completion {
    let env = match newer(&rig.env) {
        Ok(env) => env,
        Err(skipped) => return skipped,
    };
    let authority = Authority::new();
    let plaintext = || Landing::plaintext(Ipv4Addr::LOCALHOST.into()).trusting();
    for (from, to) in [
        (plaintext(), plaintext()),
        (
            authority.landing("a.example"),
            authority.landing("b.example"),
        ),
        (Landing::unix(), Landing::unix()),
    ] {
        let options = MigrateOptions {
            channels: NonZero::new(2),
            ..MigrateOptions::default()
        };
        moves(&Rig::at(&rig.env, from), &Rig::at(&env, to), options).await;
    }
    Completion::Completed
}
