//! `tidy`: what DESIGN and STYLE ask of every file and no compiler checks. All findings are
//! reported at once, each as `path:line: message`.
//!
//! The checks are plain functions from text to findings; reading files is done here.

mod arrows;
mod docs;
mod layout;
mod manifest;
mod sources;

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Failure;
use crate::workspace;

/// Something to put right, and where.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    path: String,
    line: usize,
    message: String,
}

/// A file as the checks see it: its path from the root of the checkout, and its text.
#[derive(Debug)]
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn finding(&self, line: usize, message: impl Into<String>) -> Finding {
        Finding {
            path: self.path.clone(),
            line,
            message: message.into(),
        }
    }
}

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(other) = arguments.first() {
        return Err(Failure::Usage(format!(
            "tidy takes no argument, '{other}' was given"
        )));
    }
    let root = workspace::root();
    let files = read_all(root)?;
    let packages = workspace::list(workspace::metadata()?, "packages");

    let mut findings = layout::check(&names_in(root)?, &files, packages, root);
    findings.extend(arrows::check(packages, &files, root));
    // Tests count allocations with an allocator each, whose reasons are the same.
    let published = files.iter().filter(|file| is_library_code(&file.path));
    findings.extend(sources::repeated_safety(published));
    for file in &files {
        if file.path.ends_with(".rs") {
            findings.extend(sources::check(file));
            if is_library_code(&file.path) {
                findings.extend(docs::check(file));
            }
        } else {
            findings.extend(manifest::check(file));
        }
    }
    findings.sort();

    for Finding {
        path,
        line,
        message,
    } in files.iter().filter_map(sources::long_file)
    {
        println!("{path}:{line}: warning: {message}");
    }
    for Finding {
        path,
        line,
        message,
    } in &findings
    {
        println!("{path}:{line}: {message}");
    }
    println!("tidy: {} files, {} findings", files.len(), findings.len());
    if findings.is_empty() {
        return Ok(());
    }
    Err(Failure::wrong(format!("{} findings", findings.len())))
}

/// Code that is published: what lies in a crate's `src`, its own tests apart, and apart from the benches with other
/// projects' crates and the fuzz targets, which are workspaces of their own.
fn is_library_code(path: &str) -> bool {
    if ["tests/peers/", "tests/fuzz/"]
        .iter()
        .any(|own| path.starts_with(own))
    {
        return false;
    }
    let file = path.rsplit('/').next().unwrap_or(path);
    path.split('/').any(|folder| folder == "src") && file != "tests.rs"
}

/// Every Rust source and every cargo file of the checkout.
fn read_all(root: &Path) -> Result<Vec<Source>, Failure> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in paths_in(&folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                if !is_made(&name) {
                    folders.push(path);
                }
            } else if name.ends_with(".rs")
                || name == "Cargo.toml"
                || path.ends_with(".cargo/config.toml")
            {
                let text = fs::read_to_string(&path)
                    .map_err(Failure::because(format!("read {}", path.display())))?;
                let path = path.strip_prefix(root).expect("the walk began at the root");
                files.push(Source {
                    path: path.to_string_lossy().into_owned(),
                    text,
                });
            }
        }
    }
    files.sort_by(|left, right| left.path.cmp(&right.path));
    Ok(files)
}

fn names_in(folder: &Path) -> Result<Vec<String>, Failure> {
    let name = |path: &PathBuf| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let names = paths_in(folder)?
        .iter()
        .filter_map(name)
        .filter(|name| !is_made(name))
        .collect();
    Ok(names)
}

fn paths_in(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = || Failure::because(format!("list {}", folder.display()));
    let entries = fs::read_dir(folder).map_err(failed())?;
    entries
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed()))
        .collect()
}

/// What git and cargo make, which is no part of the sources.
fn is_made(name: &str) -> bool {
    matches!(name, ".git" | "target")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn library_code_is_what_lies_in_src() {
        assert!(is_library_code("driver/src/domain/state.rs"));
        assert!(is_library_code("tests/src/fake_qemu.rs"));
        assert!(!is_library_code("driver/src/domain/tests.rs"));
        assert!(!is_library_code("driver/examples/query.rs"));
        assert!(!is_library_code("tests/suite/main.rs"));
        assert!(!is_library_code("tests/peers/src/client.rs"));
    }
}
