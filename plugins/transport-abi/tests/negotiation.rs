//! Tables of versions older, newer and broken: taken or refused as clause 1 says, with both
//! versions in the message.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![expect(
    unsafe_code,
    reason = "reads tables that are larger or smaller than ours"
)]

use transport_abi::{
    ABI_MINOR, CannotListen, Dial, Failure, Flags, MAGIC, Mismatch, RawText, Request, Step, Table,
    Transport, Verified,
};

struct Good;
struct Never;

impl Transport for Good {
    const NAME: &'static str = "vsock-unix";
    type Dial = Never;
    type Listen = CannotListen;

    fn begin_dial(_request: &Request<'_>) -> Result<Never, Failure> {
        Ok(Never)
    }
}

impl Dial for Never {
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        Err(Failure::new("never"))
    }
}

transport_abi::export_transport!(Good, "vsock_unix");

fn read(change: impl FnOnce(&mut Table)) -> Result<Verified, Mismatch> {
    let mut table = TABLE;
    change(&mut table);
    // SAFETY: a whole table of our own, whose texts are constants; what is changed in it, is what
    // clause 1 lets vary.
    unsafe { Verified::read(&table) }
}

#[test]
fn a_table_of_our_own_version_is_taken() {
    let verified = Verified::of(&TABLE).unwrap();
    assert_eq!(
        (verified.name(), verified.version(), verified.abi()),
        ("vsock-unix", env!("CARGO_PKG_VERSION"), (1, 0))
    );
    assert!(verified.dial().is_some());
}

#[test]
fn a_newer_plugin_that_can_do_without_us_is_taken() {
    #[repr(C)]
    struct Newer {
        known: Table,
        added_in_1_7: [usize; 4],
    }
    let mut newer = Newer {
        known: TABLE,
        added_in_1_7: [usize::MAX; 4],
    };
    newer.known.minor = 7;
    newer.known.size = size_of::<Newer>() as u32;
    // SAFETY: `size` is true: the table and its tail lie in one struct, as clause 1.3 has it for a
    // plugin of version 1.7.
    let verified = unsafe { Verified::read(&raw const newer.known) }.unwrap();
    assert_eq!(verified.abi(), (1, 7));
    assert_eq!(newer.added_in_1_7, [usize::MAX; 4]);
}

#[test]
fn a_newer_plugin_that_needs_a_newer_host_is_refused_with_both_versions() {
    let refused = read(|table| (table.minor, table.needs_minor) = (7, ABI_MINOR + 5)).unwrap_err();
    assert_eq!(
        refused,
        Mismatch::NeedsNewerHost {
            plugin: 7,
            needs: 5
        }
    );
    let text = refused.to_string();
    assert!(
        text.contains("1.7") && text.contains("host of 1.5") && text.contains("host speaks 1.0"),
        "{text}"
    );
}

#[test]
fn another_major_is_refused_with_both_versions() {
    let text = read(|table| table.major = 2).unwrap_err().to_string();
    assert!(text.contains("ABI 2") && text.contains("1.0"), "{text}");
}

#[test]
fn what_is_no_table_is_refused_before_anything_else_is_read() {
    let wrong = read(|table| (table.magic, table.size) = (MAGIC + 1, u32::MAX)).unwrap_err();
    assert_eq!(
        wrong,
        Mismatch::NotATable {
            found: Some(MAGIC + 1)
        }
    );
    // SAFETY: null and misaligned pointers are refused without a look at what is there.
    let (null, odd) = unsafe {
        (
            Verified::read(std::ptr::null()),
            Verified::read(std::ptr::without_provenance(13)),
        )
    };
    assert_eq!(
        (null.unwrap_err(), odd.unwrap_err()),
        (
            Mismatch::NotATable { found: None },
            Mismatch::NotATable { found: None }
        )
    );
}

#[test]
fn a_truncated_table_is_refused() {
    let least = size_of::<Table>();
    let refused = read(|table| table.size -= 1).unwrap_err();
    assert_eq!(
        refused,
        Mismatch::Truncated {
            size: least - 1,
            least
        }
    );
}

#[test]
fn unknown_flags_are_refused_in_the_lower_half_only() {
    assert_eq!(
        read(|table| table.flags = Flags(2)).unwrap_err(),
        Mismatch::UnknownFlags { bits: 2, plugin: 0 }
    );
    assert!(read(|table| table.flags = Flags(1 << 63)).is_ok());
}

#[test]
fn names_follow_clause_1_6() {
    for wrong in [
        "",
        "Unix",
        "1nix",
        "un:ix",
        "un_ix",
        "-unix",
        &"u".repeat(33),
    ] {
        let wrong: &'static str = String::leak(wrong.to_owned());
        assert_eq!(
            read(|table| table.name = RawText::of(wrong)).unwrap_err(),
            Mismatch::BadName,
            "{wrong}"
        );
    }
    let none = RawText {
        bytes: std::ptr::null(),
        length: 4,
    };
    assert_eq!(
        read(|table| table.name = none).unwrap_err(),
        Mismatch::BadName
    );
    assert_eq!(
        read(|table| table.version = none).unwrap_err(),
        Mismatch::BadVersionText
    );
}

#[test]
fn functions_come_in_whole_groups() {
    let dial = |table: &mut Table| {
        (table.dial_begin, table.dial_step, table.dial_free) = (None, None, None);
    };
    assert!(read(dial).unwrap().dial().is_none());
    assert_eq!(
        read(|table| table.dial_step = None).unwrap_err(),
        Mismatch::Incomplete { group: "dial" }
    );
    assert_eq!(
        read(|table| table.listen_free = None).unwrap_err(),
        Mismatch::Incomplete { group: "listen" }
    );
    let nothing = read(|table| {
        dial(table);
        (table.listen_begin, table.listen_step, table.listen_accept) = (None, None, None);
        (table.listen_address, table.listen_free) = (None, None);
    });
    assert_eq!(
        nothing.unwrap_err(),
        Mismatch::Incomplete {
            group: "dial and listen"
        }
    );
}
