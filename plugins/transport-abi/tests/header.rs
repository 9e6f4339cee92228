//! The C header says exactly what the Rust definitions say: sizes, offsets and numbers.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fmt::Write as _;
use std::io::Write as _;
use std::mem::offset_of;
use std::process::{Command, Stdio};

use transport_abi::{
    ABI_MAJOR, ABI_MINOR, Events, Flags, MAGIC, RawFailure, RawProgress, RawRequest, RawText,
    Status, Table,
};

/// Compiles `source` against the header, as strictly as the compiler can.
fn compile(language: &str, source: &str) -> Result<(), String> {
    let include = concat!("-I", env!("CARGO_MANIFEST_DIR"), "/include");
    let mut cc = Command::new("cc")
        .args([
            "-x",
            language,
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-fsyntax-only",
            include,
            "-",
        ])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a C compiler called cc is installed");
    cc.stdin
        .take()
        .unwrap()
        .write_all(source.as_bytes())
        .unwrap();
    let output = cc.wait_with_output().unwrap();
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

macro_rules! layout {
    ($asserts:ident, $rust:ty, $c:literal, $($field:ident)*) => {
        writeln!($asserts, "_Static_assert(sizeof({}) == {}, \"{0}\");", $c, size_of::<$rust>()).unwrap();
        writeln!($asserts, "_Static_assert(_Alignof({}) == {}, \"{0}\");", $c, align_of::<$rust>()).unwrap();
        $(
            let offset = offset_of!($rust, $field);
            writeln!($asserts, "_Static_assert(offsetof({}, {}) == {offset}, \"{0}.{1}\");", $c, stringify!($field)).unwrap();
        )*
    };
}

#[test]
fn sizes_offsets_and_numbers_agree() {
    let mut asserts = String::from("#include \"vmwright_transport.h\"\n");
    layout!(asserts, RawText, "vmw_text", bytes length);
    layout!(asserts, RawRequest, "vmw_request", size host_minor address);
    layout!(asserts, RawProgress, "vmw_progress", size fd events flags retry_after_us);
    layout!(asserts, RawFailure, "vmw_failure", size os_error text capacity length);
    layout!(asserts, Table, "vmw_transport",
        magic size major minor needs_minor flags name version dial_begin dial_step dial_free
        listen_begin listen_step listen_accept listen_address listen_free);
    let numbers = [
        ("VMW_MAGIC", i128::from(MAGIC)),
        ("VMW_MAJOR", i128::from(ABI_MAJOR)),
        ("VMW_MINOR", i128::from(ABI_MINOR)),
        ("VMW_READY", i128::from(Status::READY.0)),
        ("VMW_WAIT", i128::from(Status::WAIT.0)),
        ("VMW_FAILED", i128::from(Status::FAILED.0)),
        ("VMW_BAD_ADDRESS", i128::from(Status::BAD_ADDRESS.0)),
        ("VMW_UNSUPPORTED", i128::from(Status::UNSUPPORTED.0)),
        ("VMW_PANICKED", i128::from(Status::PANICKED.0)),
        ("VMW_HOST_PORT", i128::from(Flags::HOST_PORT.0)),
        ("VMW_READABLE", i128::from(Events::READABLE.0)),
        ("VMW_WRITABLE", i128::from(Events::WRITABLE.0)),
    ];
    for (name, value) in numbers {
        writeln!(asserts, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
    }
    compile("c", &asserts).unwrap();
    assert!(
        compile(
            "c",
            &format!("{asserts}_Static_assert(sizeof(vmw_text) == 1, \"wrong\");")
        )
        .is_err()
    );
}

#[test]
fn a_whole_plugin_compiles_as_c_and_the_header_as_cpp() {
    let plugin = r#"
        #include "vmwright_transport.h"
        static vmw_status begin(const vmw_request *r, vmw_dial **d, vmw_failure *f) { (void)r; (void)d; (void)f; return VMW_FAILED; }
        static vmw_status step(vmw_dial *d, vmw_progress *p, vmw_failure *f) { (void)d; (void)p; (void)f; return VMW_FAILED; }
        static void finish(vmw_dial *d) { (void)d; }
        extern const vmw_transport vmwright_transport_nil_v1;
        const vmw_transport vmwright_transport_nil_v1 = {
            .magic = VMW_MAGIC, .size = sizeof(vmw_transport), .major = VMW_MAJOR, .minor = VMW_MINOR,
            .name = VMW_TEXT("nil"), .version = VMW_TEXT("1"),
            .dial_begin = begin, .dial_step = step, .dial_free = finish,
        };"#;
    let lenient = plugin.replacen(
        "#include",
        "#pragma GCC diagnostic ignored \"-Wmissing-field-initializers\"\n#include",
        1,
    );
    compile("c", &lenient).unwrap();
    compile("c++", "#include \"vmwright_transport.h\"\n").unwrap();
}

#[test]
fn version_1_0_never_changes_its_size() {
    let numbers = 32;
    let functions = size_of::<[Option<extern "C" fn()>; 8]>();
    let end_of_1_0 = offset_of!(Table, listen_free) + size_of::<Option<extern "C" fn()>>();
    assert_eq!(end_of_1_0, numbers + 2 * size_of::<RawText>() + functions);
}
