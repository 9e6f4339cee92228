//! The shared libraries of a program that is to run inside the guest, as this machine's loader
//! resolves them.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Failure;
use crate::needs::Store;
use crate::run;

/// A library under the name that a program asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Library {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// All libraries of `program`, the loader among them; none if one cannot be found.
pub(crate) fn of(program: &Path, store: &Store) -> Result<Option<Vec<Library>>, Failure> {
    let content =
        fs::read(program).map_err(Failure::because(format!("read {}", program.display())))?;
    if !wants_loader(&content) {
        return Ok(Some(Vec::new()));
    }
    let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    let fetched: Vec<_> = folders
        .iter()
        .flat_map(|folder| store.files(folder))
        .map(OsString::from)
        .collect();
    let listed = run::ask(
        Command::new("ldd")
            .arg(program)
            .env("LD_LIBRARY_PATH", fetched.join(":".as_ref())),
    )?;
    Ok(parse(&String::from_utf8_lossy(&listed)))
}

/// Reads ldd's answer.
fn parse(listed: &str) -> Option<Vec<Library>> {
    let mut libraries = Vec::new();
    for line in listed.lines().map(str::trim) {
        if line.ends_with("not found") {
            return None;
        }
        // `NAME => PATH (0x…)`, and `PATH (0x…)` for the loader; the vdso has no path.
        let Some((file, _)) = line.rsplit_once(" (0x") else {
            continue;
        };
        let path = PathBuf::from(file.rsplit(" => ").next().unwrap_or(file));
        let asked = file.split(" => ").next().unwrap_or(file);
        if path.is_absolute() {
            let name = asked.rsplit('/').next().unwrap_or(asked).to_owned();
            libraries.push(Library { name, path });
        }
    }
    Some(libraries)
}

/// Whether an ELF program names a loader (PT_INTERP), so that it cannot run without libraries.
pub(crate) fn wants_loader(program: &[u8]) -> bool {
    // Offsets of ELF-64, little endian: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    const PT_INTERP: u64 = 3;
    let number = |at: usize, width: usize| {
        let bytes = program.get(at..at.checked_add(width)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte)),
        )
    };
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2))
    else {
        return false;
    };
    (0..count).any(|index| {
        let entry = usize::try_from(table.saturating_add(index * size)).ok();
        entry.and_then(|entry| number(entry, 4)) == Some(PT_INTERP)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_keep_the_name_they_are_asked_by() {
        let listed = "\tlinux-vdso.so.1 (0x00007f17)\n\
                      \tlibnuma.so.1 => /lib/x86_64-linux-gnu/libnuma.so.1 (0x00007f17)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f17)\n";
        let library = |name: &str, path: &str| Library {
            name: name.into(),
            path: path.into(),
        };
        assert_eq!(
            parse(listed).unwrap(),
            [
                library("libnuma.so.1", "/lib/x86_64-linux-gnu/libnuma.so.1"),
                library("ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2"),
            ]
        );
    }

    #[test]
    fn one_library_that_is_not_found_spoils_the_lot() {
        assert_eq!(
            parse("\tliburing.so.2 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x1)\n"),
            None
        );
    }

    #[test]
    fn this_test_wants_a_loader_and_text_does_not() {
        assert!(wants_loader(
            &fs::read(std::env::current_exe().unwrap()).unwrap()
        ));
        assert!(!wants_loader(b"#!/bin/sh\n"));
        assert!(!wants_loader(&[0xff; 64]));
    }
}
