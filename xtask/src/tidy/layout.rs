//! What lies where: the top level is the list in DESIGN §2, and every crate has a front page.

use std::path::Path;

use serde_json::Value;

use super::{Finding, Source};

const TOP_LEVEL: &[&str] = &[
    ".cargo",
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "agent-qga",
    "driver",
    "job-core",
    "monitor-qmp",
    "plugins",
    "remote-migrate",
    "tests",
    "xtask",
];

pub(super) fn check(
    top: &[String],
    files: &[Source],
    packages: &[Value],
    root: &Path,
) -> Vec<Finding> {
    let mut findings = top_level(top);
    for package in packages {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
        let readme = manifest.with_file_name("README.md");
        if !readme.is_file() {
            let path = readme
                .strip_prefix(root)
                .unwrap_or(&readme)
                .to_string_lossy()
                .into_owned();
            findings.push(Finding {
                path,
                line: 1,
                message: "missing; every crate has one".into(),
            });
        }
    }
    // Cargo takes `tests/x.rs` for a test of its own, so what tests share is in `tests/x/mod.rs`.
    let stray = files
        .iter()
        .filter(|file| file.path.ends_with("/mod.rs") && !file.path.contains("/tests/"));
    findings.extend(stray.map(|file| file.finding(1, "is named after its folder, not mod.rs")));
    findings
}

fn top_level(names: &[String]) -> Vec<Finding> {
    let finding = |path: &str, message: &str| Finding {
        path: path.into(),
        line: 1,
        message: message.into(),
    };
    let extra = names
        .iter()
        .filter(|name| !TOP_LEVEL.contains(&name.as_str()));
    let missing = TOP_LEVEL
        .iter()
        .filter(|wanted| !names.iter().any(|name| name == *wanted));
    extra
        .map(|name| finding(name, "does not belong to the top level (DESIGN §2)"))
        .chain(missing.map(|name| finding(name, "missing from the top level (DESIGN §2)")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(changed: impl FnOnce(&mut Vec<String>)) -> Vec<String> {
        let mut names = TOP_LEVEL.iter().map(|name| (*name).to_owned()).collect();
        changed(&mut names);
        names
    }

    #[test]
    fn the_top_level_of_the_design_is_fine() {
        assert_eq!(top_level(&names(|_| ())), []);
    }

    #[test]
    fn one_name_too_many_and_one_too_few_are_both_found() {
        let findings = top_level(&names(|names| {
            names.retain(|name| name != "README.md");
            names.push("utils".into());
        }));
        let paths: Vec<_> = findings
            .iter()
            .map(|finding| finding.path.as_str())
            .collect();
        assert_eq!(paths, ["utils", "README.md"]);
    }

    #[test]
    fn a_crate_without_readme_and_a_mod_file_are_found() {
        let package = serde_json::json!({ "manifest_path": "/nowhere/driver/Cargo.toml" });
        let files = [
            "driver/src/ops/mod.rs",
            "driver/src/ops.rs",
            "driver/tests/rig/mod.rs",
        ]
        .map(|path| Source {
            path: path.into(),
            text: String::new(),
        });
        let findings = check(&names(|_| ()), &files, &[package], Path::new("/nowhere"));
        let paths: Vec<_> = findings
            .iter()
            .map(|finding| finding.path.as_str())
            .collect();
        assert_eq!(paths, ["driver/README.md", "driver/src/ops/mod.rs"]);
    }
}
