//! What is loaded and what is refused: each refusal is of its own kind, says what to do, and costs
//! no other plugin.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "support/stage.rs"]
mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use support::{Stage, linked};
use transport_abi::Mismatch;
use transport_host::{Blame, Error, ErrorKind, Transports};

fn refused(path: impl AsRef<Path>) -> Error {
    Transports::builder().load(path).unwrap_err()
}

/// A table that is right but for `fields`, which come last and so win.
fn table(symbol: &str, name: &str, fields: &str) -> String {
    format!(
        r#"
        #pragma GCC diagnostic ignored "-Woverride-init"
        static vmw_status begin(const vmw_request *r, vmw_dial **d, vmw_failure *f) {{ return VMW_FAILED; }}
        static vmw_status step(vmw_dial *d, vmw_progress *p, vmw_failure *f) {{ return VMW_FAILED; }}
        static void finish(vmw_dial *d) {{ }}
        const vmw_transport vmwright_transport_{symbol}_v1 = {{
            .magic = VMW_MAGIC, .size = sizeof(vmw_transport), .major = VMW_MAJOR, .minor = VMW_MINOR,
            .name = VMW_TEXT("{name}"), .version = VMW_TEXT("1.2.3"),
            .dial_begin = begin, .dial_step = step, .dial_free = finish, {fields}
        }};"#
    )
}

#[test]
fn a_folder_loads_in_order_and_tells_versions() {
    let stage = Stage::new();
    for name in ["vsock", "unix", "tcp"] {
        stage.built(name);
    }
    stage.compiled("in_c", &table("in_c", "in-c", ""));
    stage.write("README", b"no plugin at all");
    let mut builder = Transports::builder();
    let report = builder.load_dir(stage.dir()).unwrap();
    assert!(report.refused.is_empty(), "{:?}", report.refused);
    let loaded: Vec<_> = report
        .loaded
        .iter()
        .map(|one| (one.name.as_str(), one.version.as_str(), one.abi))
        .collect();
    let ours = env!("CARGO_PKG_VERSION");
    assert_eq!(
        loaded,
        [
            ("in-c", "1.2.3", (1, 0)),
            ("tcp", ours, (1, 0)),
            ("unix", ours, (1, 0)),
            ("vsock", ours, (1, 0))
        ]
    );
    assert_eq!(
        builder.build().unwrap().names().collect::<Vec<_>>(),
        ["in-c", "tcp", "unix", "vsock"]
    );
}

#[test]
fn bad_plugins_of_a_folder_are_refused_each_for_its_own_reason_and_cost_no_other() {
    let stage = Stage::new();
    stage.built("unix");
    stage.write("libtransport_text.so", b"I am a text");
    stage.compiled("bare", "int nothing_of_ours;");
    stage.compiled("magic", &table("magic", "magic", ".magic = 42,"));
    stage.compiled("major", &table("major", "major", ".major = 2,"));
    stage.compiled(
        "needy",
        &table("needy", "needy", ".minor = 9, .needs_minor = 9,"),
    );
    stage.compiled("short", &table("short", "short", ".size = 64,"));
    stage.compiled("alias", &table("alias", "other", ""));
    stage.compiled(
        "unresolved",
        &format!(
            "extern int missing(void); int (*use)(void) = missing; {}",
            table("unresolved", "unresolved", "")
        ),
    );
    fs::create_dir(stage.dir().join("libtransport_folder.so")).unwrap();
    symlink("/nonexistent", stage.dir().join("libtransport_dangling.so")).unwrap();
    fs::set_permissions(
        stage.write("libtransport_open.so", b""),
        fs::Permissions::from_mode(0o757),
    )
    .unwrap();

    let mut builder = Transports::builder();
    let report = builder.load_dir(stage.dir()).unwrap();
    assert_eq!(report.loaded.len(), 1);
    let reason = |name: &str| {
        let found = report
            .refused
            .iter()
            .find(|one| one.path.ends_with(format!("libtransport_{name}.so")));
        found
            .unwrap_or_else(|| panic!("{name} was not refused"))
            .error
            .kind()
            .clone()
    };
    assert_eq!(reason("text"), ErrorKind::NotALibrary);
    assert_eq!(reason("unresolved"), ErrorKind::NotALibrary);
    assert_eq!(
        reason("bare"),
        ErrorKind::NoSymbol {
            symbol: "vmwright_transport_bare_v1".to_owned()
        }
    );
    assert_eq!(
        reason("magic"),
        ErrorKind::Mismatched(Mismatch::NotATable { found: Some(42) })
    );
    assert_eq!(
        reason("major"),
        ErrorKind::Mismatched(Mismatch::Major { plugin: 2 })
    );
    assert_eq!(
        reason("needy"),
        ErrorKind::Mismatched(Mismatch::NeedsNewerHost {
            plugin: 9,
            needs: 9
        })
    );
    assert!(matches!(
        reason("short"),
        ErrorKind::Mismatched(Mismatch::Truncated { size: 64, .. })
    ));
    assert_eq!(
        reason("alias"),
        ErrorKind::WrongName {
            name: "other".to_owned(),
            stem: "alias".to_owned()
        }
    );
    assert!(matches!(reason("folder"), ErrorKind::NotAFile { .. }));
    assert!(matches!(reason("dangling"), ErrorKind::Unreadable { .. }));
    assert!(matches!(
        reason("open"),
        ErrorKind::WritableByOthers { mode: 0o757, .. }
    ));
    assert_eq!(report.refused.len(), 11);
    assert_eq!(
        builder.build().unwrap().names().collect::<Vec<_>>(),
        ["unix"]
    );
}

#[test]
fn a_newer_plugin_in_c_with_a_longer_table_is_loaded() {
    let stage = Stage::new();
    let newer = table("newer", "newer", ".minor = 9").replace(
        "const vmw_transport vmw",
        "const struct { vmw_transport known; void *added[4]; } vmw",
    );
    let newer = newer
        .replace(
            "= {\n            .magic",
            "= { .known = {\n            .magic",
        )
        .replace(
            ".minor = 9\n        };",
            ".minor = 9, .size = sizeof(vmw_transport) + 32 } };",
        );
    let loaded = Transports::builder()
        .load(stage.compiled("newer", &newer))
        .unwrap();
    assert_eq!(loaded.abi, (1, 9));
}

#[test]
fn relative_paths_are_refused_for_files_and_folders() {
    assert_eq!(
        refused("libtransport_unix.so").kind(),
        &ErrorKind::RelativePath
    );
    let error = Transports::builder().load_dir("plugins").unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot search for transport plugins in plugins: path is relative; give an absolute one"
    );
}

#[test]
fn a_file_of_another_name_is_refused() {
    let stage = Stage::new();
    assert!(matches!(
        refused(stage.write("unix.so", b"")).kind(),
        ErrorKind::BadFileName { .. }
    ));
    assert!(matches!(
        refused(stage.write("libtransport_.so", b"")).kind(),
        ErrorKind::BadFileName { .. }
    ));
}

#[test]
fn a_folder_that_others_can_write_is_refused_wherever_it_is_above() {
    let stage = Stage::new();
    let plugin = stage.built("unix");
    for writable in [stage.dir(), stage.dir().parent().unwrap()] {
        let before = writable.metadata().unwrap().permissions();
        fs::set_permissions(writable, fs::Permissions::from_mode(0o775)).unwrap();
        let error = refused(&plugin);
        assert!(
            matches!(error.kind(), ErrorKind::WritableByOthers { path, mode: 0o775 } if path == writable),
            "{error}"
        );
        assert_eq!(error.blame(), Blame::Plugin);
        fs::set_permissions(writable, before).unwrap();
    }
    assert!(Transports::builder().load(&plugin).is_ok());
}

#[test]
fn a_symlink_is_judged_by_where_it_leads() {
    let stage = Stage::new();
    let tmp = std::env::temp_dir();
    let outside = tempfile::Builder::new()
        .prefix("libtransport_out")
        .suffix(".so")
        .tempfile_in(&tmp)
        .unwrap();
    let link = stage.dir().join("libtransport_link.so");
    symlink(outside.path(), &link).unwrap();
    let error = refused(&link);
    let canonical = tmp.canonicalize().unwrap();
    assert!(
        matches!(error.kind(), ErrorKind::WritableByOthers { path, .. } if *path == canonical),
        "{error}"
    );

    let inside = stage.path("libtransport_unix.so");
    symlink(stage.built("unix"), &inside).unwrap();
    let loaded = Transports::builder().load(&inside).unwrap();
    assert_eq!(
        loaded.path,
        stage
            .dir()
            .canonicalize()
            .unwrap()
            .join("libtransport_unix.so")
    );
}

#[test]
fn a_name_is_given_once() {
    let stage = Stage::new();
    let mut builder = linked();
    let error = builder.load(stage.built("unix")).unwrap_err();
    assert_eq!(
        error.kind(),
        &ErrorKind::NameTaken {
            name: "unix".to_owned(),
            by: "a linked table".to_owned()
        }
    );
    let twice = linked().register_table(&transport_unix::TABLE).build();
    assert!(matches!(
        twice.unwrap_err().kind(),
        ErrorKind::NameTaken { .. }
    ));
}

#[test]
fn refusals_tell_both_versions_and_keep_the_linkers_words() {
    let stage = Stage::new();
    let error = refused(stage.compiled("major", &table("major", "major", ".major = 3,")));
    let text = error.to_string();
    assert!(
        text.contains("plugin speaks transport ABI 3") && text.contains("host speaks 1.0"),
        "{text}"
    );
    let error = refused(stage.write("libtransport_text.so", b"I am a text"));
    assert!(std::error::Error::source(&error).is_some());
}
