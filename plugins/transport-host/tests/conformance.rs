//! The conformance kit: our transports and the one in C pass it, and a plugin that breaks a clause
//! is told which.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "support/stage.rs"]
mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;

use support::Stage;

const IN_C: &str = include_str!("../../transport-abstract/abstract.c");

fn kit(plugin: &Path, target: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_transport-conformance"))
        .arg(plugin)
        .args([target, "--short"])
        .output()
        .unwrap()
}

/// Abstract names are the whole machine's.
fn abstract_target(name: &str) -> String {
    format!("abstract:vmwright-test-{}-{name}", std::process::id())
}

#[test]
fn our_transports_and_the_one_in_c_keep_the_contract() {
    let stage = Stage::new();
    let plugins = [
        (stage.built("unix"), stage.unix("s")),
        (stage.built("tcp"), "tcp:127.0.0.1:0".to_owned()),
        (
            stage.built("template"),
            format!("template:{}", stage.path("door").display()),
        ),
        (
            stage.compiled_alone("abstract", IN_C),
            abstract_target("good"),
        ),
    ];
    for (plugin, target) in plugins {
        let output = kit(&plugin, &target);
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{told}");
        assert!(told.ends_with("29 kept, 0 broken, 1 not tried\n"), "{told}");
        assert_eq!(told.matches(" ok\n").count(), 3, "three figures: {told}");
    }
}

#[test]
fn a_target_that_only_listens_is_said_not_to_be_dialed() {
    let stage = Stage::new();
    let output = kit(&stage.built("vsock"), "vsock:any:any");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("not tried"), "{told}");
}

#[test]
fn a_plugin_that_only_dials_is_judged_on_a_live_server() {
    let stage = Stage::new();
    let path = stage.path("vmm");
    let vmm = UnixListener::bind(&path).unwrap();
    // It serves one after the other for as long as the test runs.
    thread::spawn(move || {
        for asked in vmm.incoming() {
            let mut asked = asked.unwrap();
            // Whoever gave up in the middle did not ask, or does not hear the answer.
            if asked.read_exact(&mut [0; 10]).is_ok() {
                let _gone = asked.write_all(b"OK 9\n");
            }
        }
    });
    let plugin = stage.built("vsock_unix");
    let output = kit(&plugin, &format!("vsock-unix:{}:9", path.display()));
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("\nkept   11.1  dial after dial"), "{told}");
    assert_eq!(told.matches(" ok\n").count(), 3, "three figures: {told}");

    let nobody = format!("vsock-unix:{}:9", stage.path("nobody").display());
    let told = kit(&plugin, &nobody).stdout;
    let told = String::from_utf8_lossy(&told);
    assert!(told.contains("the target is no live server"), "{told}");
}

/// What is done to the plugin in C, and the line that tells of it.
const BREACHES: &[(&str, &str, &str)] = &[
    (
        "NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC",
        "NULL, NULL, SOCK_CLOEXEC",
        "BROKEN 6.1   what is handed over is a connected stream socket",
    ),
    (
        "dial->socket = -1;",
        "",
        "BROKEN 6.1   and the host's alone",
    ),
    (
        "    if (dial->socket >= 0)\n        close(dial->socket);\n",
        "",
        "BROKEN 11.1  free gives everything back",
    ),
    (
        "progress->events = VMW_READABLE;",
        "",
        "BROKEN 7.1   a listener without peers names what to wait for",
    ),
    (
        "    if (length > failure->capacity)\n        length = failure->capacity;\n",
        "",
        "2.4: dial_step wrote past what it was lent",
    ),
    (
        "if (name > capacity)",
        "if (0)",
        "2.4: listen_address wrote past what it was lent",
    ),
    (
        "free(made); /* nothing is left to free (9.1) */",
        "*dial = made;",
        "9.1: failed, but set an operation",
    ),
    (
        "    *dial = made;\n",
        "    *dial = made;\n    memset(malloc(8192), 1, 8192);\n",
        "BROKEN 11.1  round after round",
    ),
    (
        "    *dial = made;\n",
        "    *dial = made;\n    static int calls;\n    if (++calls == 5) usleep(1200000);\n",
        "3.1: dial_begin took 1.2",
    ),
    (
        "    *dial = made;\n",
        "    *dial = made;\n    setenv(\"CHANGED\", \"1\", 1);\n",
        "BROKEN 14.1  directory, environment, file mask and signals are as before: the environment",
    ),
];

#[test]
fn each_breach_is_found_and_named() {
    let stage = Stage::new();
    let stage = &stage;
    thread::scope(|scope| {
        for (number, breach) in BREACHES.iter().enumerate() {
            scope.spawn(move || breach_is_found(stage, number, breach));
        }
    });
}

fn breach_is_found(stage: &Stage, number: usize, (right, wrong, line): &(&str, &str, &str)) {
    assert!(IN_C.contains(right), "{right:?} is gone from the source");
    let stem = format!("broken{number}");
    let source = IN_C
        .replace(right, wrong)
        .replace(
            "vmwright_transport_abstract_v1",
            &format!("vmwright_transport_{stem}_v1"),
        )
        .replace("VMW_TEXT(\"abstract\")", &format!("VMW_TEXT(\"{stem}\")"));
    let plugin = stage.compiled_alone(&stem, &source);
    let target = abstract_target(&stem).replace("abstract:", &format!("{stem}:"));
    let output = kit(&plugin, &target);
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{told}");
    assert!(told.contains(line), "{line:?} is not in:\n{told}");
}
