//! Plugins of other versions of the ABI: loaded, or refused with both versions in the message.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "support/stage.rs"]
mod support;

use support::{Stage, later};
use tokio::io::AsyncReadExt;
use transport_host::{Blame, ErrorKind, Transports};

#[tokio::test]
async fn a_plugin_that_was_built_against_1_0_still_loads_and_dials() {
    let stage = Stage::new();
    let mut builder = Transports::builder();
    let plugin = stage.compiled_alone("frozen", include_str!("frozen_1_0.c"));
    assert_eq!(builder.load(plugin).unwrap().abi, (1, 0));
    let transports = builder.build().unwrap();
    let mut stream = transports.dial("frozen:any", later()).await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "1.0");
}

/// Major, minor, the minor it needs, and how many bytes longer its table is than ours; and what
/// becomes of it.
type Row = ((u32, u32, u32, usize), Result<(), &'static [&'static str]>);

const MATRIX: &[Row] = &[
    ((1, 0, 0, 0), Ok(())),
    ((1, 3, 0, 8), Ok(())),
    ((1, 900, 0, 4096), Ok(())),
    (
        (1, 3, 3, 8),
        Err(&["ABI 1.3", "host of 1.3", "host speaks 1.0"]),
    ),
    (
        (1, 5, 3, 8),
        Err(&["ABI 1.5", "host of 1.3", "host speaks 1.0"]),
    ),
    ((2, 0, 0, 0), Err(&["ABI 2", "host speaks 1.0"])),
    ((0, 9, 0, 0), Err(&["ABI 0", "host speaks 1.0"])),
];

#[test]
fn every_version_loads_or_is_refused_with_both_versions() {
    let stage = Stage::new();
    for (row, ((major, minor, needs, longer), expected)) in MATRIX.iter().enumerate() {
        let source = plugin(&format!("row{row}"), *major, *minor, *needs, *longer);
        let plugin = stage.compiled(&format!("row{row}"), &source);
        match (Transports::builder().load(plugin), expected) {
            (Ok(loaded), Ok(())) => assert_eq!(loaded.abi, (*major, *minor)),
            (Err(error), Err(words)) => {
                assert!(matches!(error.kind(), ErrorKind::Mismatched(_)), "{error}");
                assert_eq!(error.blame(), Blame::Plugin);
                let text = error.to_string();
                assert!(words.iter().all(|word| text.contains(word)), "{text}");
            }
            (outcome, _) => panic!("row {row}: {outcome:?}"),
        }
    }
}

/// A plugin that only dials, with a table of that version and that many bytes more.
fn plugin(name: &str, major: u32, minor: u32, needs: u32, longer: usize) -> String {
    format!(
        r#"
        static vmw_status begin(const vmw_request *r, vmw_dial **d, vmw_failure *f) {{ return VMW_FAILED; }}
        static vmw_status step(vmw_dial *d, vmw_progress *p, vmw_failure *f) {{ return VMW_FAILED; }}
        static void finish(vmw_dial *d) {{ }}
        const struct {{ vmw_transport known; char added[{longer}]; }} vmwright_transport_{name}_v1 = {{
            .known = {{
                .magic = VMW_MAGIC, .size = sizeof(vmw_transport) + {longer},
                .major = {major}, .minor = {minor}, .needs_minor = {needs},
                .name = VMW_TEXT("{name}"), .version = VMW_TEXT("1"),
                .dial_begin = begin, .dial_step = step, .dial_free = finish,
            }},
        }};"#
    )
}
