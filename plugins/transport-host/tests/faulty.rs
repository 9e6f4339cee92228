//! A plugin that breaks the contract in every way that can be survived: each has its own error, and
//! the next dial works.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "support/stage.rs"]
mod support;

use std::time::Duration;

use support::{Stage, later, linked};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transport_abi::{CannotListen, Dial, Failure, Request, Step, Transport};
use transport_host::{Deadline, Error, ErrorKind, Peer, Transports};

/// Does what its address says.
const FAULTY: &str = r#"
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct vmw_dial { char script[32]; int pair[2]; };

static vmw_status fail(vmw_failure *failure, vmw_status status, const char *text) {
    failure->length = strlen(text) < failure->capacity ? strlen(text) : failure->capacity;
    memcpy(failure->text, text, failure->length);
    return status;
}

static vmw_status begin(const vmw_request *request, vmw_dial **dial, vmw_failure *failure) {
    if (request->address.length == 6 && !memcmp(request->address.bytes, "forget", 6)) return VMW_READY;
    if (request->address.length == 4 && !memcmp(request->address.bytes, "wait", 4)) return VMW_WAIT;
    vmw_dial *made = calloc(1, sizeof *made);
    memcpy(made->script, request->address.bytes, request->address.length);
    int type = !strcmp(made->script, "datagram") ? SOCK_DGRAM : SOCK_STREAM;
    if (socketpair(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, made->pair)) abort();
    *dial = made;
    return VMW_READY;
}

static vmw_status step(vmw_dial *dial, vmw_progress *progress, vmw_failure *failure) {
    static int kept = -1;
    const char *script = dial->script;
    if (!strcmp(script, "closed")) { progress->fd = 987654; return VMW_READY; }
    if (!strcmp(script, "negative")) { progress->fd = -7; return VMW_READY; }
    if (!strcmp(script, "file")) { progress->fd = open("/dev/null", O_RDWR); return VMW_READY; }
    if (!strcmp(script, "again")) {
        if (kept < 0) { kept = dial->pair[0]; dial->pair[0] = -1; }
        progress->fd = kept;
        return VMW_READY;
    }
    if (!strcmp(script, "idle")) return VMW_WAIT;
    if (!strcmp(script, "events")) { progress->fd = dial->pair[0]; progress->events = 64; return VMW_WAIT; }
    if (!strcmp(script, "lend-closed")) { progress->fd = 987654; progress->events = VMW_READABLE; return VMW_WAIT; }
    if (!strcmp(script, "lend-file")) {
        close(dial->pair[0]);
        dial->pair[0] = open("/etc/passwd", O_RDONLY);
        progress->fd = dial->pair[0];
        progress->events = VMW_READABLE;
        return VMW_WAIT;
    }
    if (!strcmp(script, "silent")) { progress->fd = dial->pair[0]; progress->events = VMW_READABLE; return VMW_WAIT; }
    if (!strcmp(script, "forever")) { progress->retry_after_us = UINT64_MAX; return VMW_WAIT; }
    if (!strcmp(script, "status")) return 42;
    if (!strcmp(script, "future")) return fail(failure, -99, "do what is not yet invented");
    if (!strcmp(script, "threw")) return fail(failure, VMW_PANICKED, "boom");
    if (!strcmp(script, "verbose")) { fail(failure, VMW_FAILED, "short"); failure->length = 1u << 30; return VMW_FAILED; }
    progress->fd = dial->pair[0];
    dial->pair[0] = -1;
    return VMW_READY;
}

static void finish(vmw_dial *dial) {
    if (dial->pair[0] >= 0) close(dial->pair[0]);
    close(dial->pair[1]);
    free(dial);
}

const vmw_transport vmwright_transport_faulty_v1 = {
    .magic = VMW_MAGIC, .size = sizeof(vmw_transport), .major = VMW_MAJOR, .minor = VMW_MINOR,
    .name = VMW_TEXT("faulty"), .version = VMW_TEXT("0"),
    .dial_begin = begin, .dial_step = step, .dial_free = finish,
};
"#;

fn faulty() -> (Stage, Transports) {
    let stage = Stage::new();
    let mut builder = linked();
    builder.load(stage.compiled("faulty", FAULTY)).unwrap();
    let transports = builder.build().unwrap();
    (stage, transports)
}

fn clause(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::Breach { clause, .. } => clause,
        other => panic!("not a breach: {other:?}"),
    }
}

#[tokio::test]
async fn every_breach_has_its_own_error_and_the_next_dial_works() {
    let (_stage, transports) = faulty();
    let breaches = [
        (
            "closed",
            "6.1",
            "it handed over descriptor 987654, which is not open",
        ),
        (
            "negative",
            "6.1",
            "it handed over descriptor -7, which is no descriptor",
        ),
        ("file", "6.1", "which is no socket"),
        ("datagram", "6.1", "descriptor is no stream socket"),
        ("idle", "7.1", "it waits for nothing"),
        ("events", "7.1", "it waits for events 0x40"),
        (
            "lend-closed",
            "6.2",
            "it lent descriptor 987654, which is not open",
        ),
        (
            "lend-file",
            "6.2",
            "it lent a descriptor that cannot be waited for",
        ),
        ("status", "8.2", "dial_step answered 42"),
        ("forget", "9.1", "dial_begin is ready but set no operation"),
        ("wait", "7.2", "dial_begin asks to wait"),
    ];
    for (script, broken, text) in breaches {
        let error = transports
            .dial(&format!("faulty:{script}"), later())
            .await
            .unwrap_err();
        assert_eq!(clause(&error), broken, "{error}");
        assert!(
            error
                .to_string()
                .starts_with(&format!("cannot dial faulty:{script}: ")),
            "{error}"
        );
        assert!(error.to_string().ends_with(text), "{error}");
        assert!(transports.dial("faulty:good", later()).await.is_ok());
    }
}

#[tokio::test]
async fn a_descriptor_handed_over_twice_stays_with_its_first_owner() {
    let (_stage, transports) = faulty();
    let first = transports.dial("faulty:again", later()).await.unwrap();
    let error = transports.dial("faulty:again", later()).await.unwrap_err();
    assert_eq!(clause(&error), "6.1");
    assert!(
        error.to_string().ends_with("which it handed over before"),
        "{error}"
    );
    // Also when the stream gave it away: somebody else owns it now.
    let given_away = first.into_fd();
    assert!(transports.dial("faulty:again", later()).await.is_err());
    assert!(given_away.try_clone().is_ok(), "still open");
}

#[tokio::test]
async fn failures_of_all_sorts_are_told_apart() {
    let (_stage, transports) = faulty();
    let dial = async |script: &str| {
        transports
            .dial(&format!("faulty:{script}"), later())
            .await
            .unwrap_err()
            .kind()
            .clone()
    };
    assert_eq!(
        dial("threw").await,
        ErrorKind::Panicked {
            message: "boom".to_owned()
        }
    );
    assert_eq!(
        dial("future").await,
        ErrorKind::Failed {
            step: "do what is not yet invented".to_owned()
        }
    );
    assert!(
        matches!(dial("verbose").await, ErrorKind::Failed { step } if step.starts_with("short"))
    );
    let error = transports.listen("faulty:x", later()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot listen on faulty:x: this transport does not listen"
    );
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_never_gets_anywhere_ends_by_its_deadline() {
    let (_stage, transports) = faulty();
    for (script, last) in [
        ("silent", "a readable descriptor"),
        ("forever", "the next try"),
    ] {
        let deadline = Deadline::now() + Duration::from_secs(7);
        let error = transports
            .dial(&format!("faulty:{script}"), deadline)
            .await
            .unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut { waited, last: what, .. }
            if *waited >= Duration::from_secs(7) && what == last),
            "{error}"
        );
        assert_eq!(Deadline::now(), deadline);
    }
}

/// Panics where its address says; the panic is real and crosses the same functions as in a loaded
/// plugin.
struct Panics;

impl Transport for Panics {
    const NAME: &'static str = "panics";
    type Dial = Self;
    type Listen = CannotListen;

    fn begin_dial(request: &Request<'_>) -> Result<Self, Failure> {
        assert_ne!(request.address(), "begin", "as asked");
        Ok(Self)
    }
}

impl Dial for Panics {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        panic!("in step, as asked")
    }
}

transport_abi::export_transport!(Panics, "panics");

#[tokio::test]
async fn a_panic_costs_its_own_dial_only() {
    let transports = linked().register_table(&TABLE).build().unwrap();
    for at in ["begin", "step"] {
        let error = transports
            .dial(&format!("panics:{at}"), later())
            .await
            .unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Panicked { message } if message.contains("as asked")),
            "{error}"
        );
    }
    let stage = Stage::new();
    let listener = transports.listen(&stage.unix("s"), later()).await.unwrap();
    tokio::try_join!(
        transports.dial(listener.target(), later()),
        listener.accept(later())
    )
    .unwrap();
}

#[tokio::test]
async fn the_far_end_of_a_pumped_channel_is_nobody() {
    let (_stage, transports) = faulty();
    let mut stream = transports.dial("faulty:good", later()).await.unwrap();
    assert_eq!(stream.peer(), &Peer::Unidentified);
    assert_eq!(
        stream.read(&mut [0]).await.unwrap(),
        0,
        "the plugin closed its end"
    );
    assert!(
        stream.write_all(b"x").await.is_err(),
        "and that is an error, not a signal"
    );
}
