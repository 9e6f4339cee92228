//! `qmp-check [QEMU…]`: the typed commands and events against the live schema of each QEMU.
//!
//! Without a name it takes every `qemu-system-*` in `PATH` and the one that `VMWRIGHT_QEMU`
//! names. The comparison itself is an example of `monitor-qmp`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::error::Failure;
use crate::{run, workspace};

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(other) = arguments.iter().find(|word| word.starts_with('-')) {
        return Err(Failure::Usage(format!("qmp-check does not know '{other}'")));
    }
    let found = if arguments.is_empty() {
        installed()
    } else {
        arguments.iter().map(PathBuf::from).collect()
    };
    if found.is_empty() {
        return Err(Failure::wrong(
            "no qemu-system-* in PATH; name one, or set VMWRIGHT_QEMU",
        ));
    }
    let mut check = run::cargo();
    check.current_dir(workspace::root());
    check.args(["run", "--quiet", "--package", "monitor-qmp"]);
    check.args(["--example", "qmp-check", "--"]).args(found);
    run::run(&mut check)
}

/// Every QEMU of this machine, each once.
fn installed() -> BTreeSet<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let named = std::env::var_os("VMWRIGHT_QEMU").filter(|value| !value.is_empty());
    std::env::split_paths(&path)
        .filter_map(|folder| folder.read_dir().ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("qemu-system-") && file.is_file()
        })
        .chain(named.map(PathBuf::from))
        .filter_map(|file| file.canonicalize().ok())
        .collect()
}
