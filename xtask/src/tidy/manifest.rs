//! Cargo's files: one source of versions, no features, nothing from outside the registry.

use super::{Finding, Source};

/// Words that have no business in a cargo file.
const WORDS: &[(&str, &str)] = &[
    (
        "[features]",
        "no features: a variant is a crate, a plugin or a value",
    ),
    (
        "[patch",
        "no patches: what is released must build from the registry",
    ),
    (
        "[source",
        "no other source: which mirror is used is up to each machine",
    ),
    (
        "git =",
        "a dependency comes from the registry or from this workspace",
    ),
    (
        "registry =",
        "a dependency comes from the one registry that everybody has",
    ),
    (
        "crates.io",
        "names no host: which mirror is used is up to each machine",
    ),
];

pub(super) fn check(file: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Workspaces of their own (fuzzing, peers) state their own versions.
    let member = !file.text.contains("[workspace]") && file.path.ends_with("Cargo.toml");
    let mut section = "";
    for (index, line) in file.text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.starts_with('[') {
            section = line;
        }
        for (_, why) in WORDS.iter().filter(|(word, _)| line.contains(word)) {
            findings.push(file.finding(index + 1, *why));
        }
        let dependency = section.ends_with("dependencies]") && line.contains('=');
        if member && dependency && !inherits(line) {
            findings.push(file.finding(
                index + 1,
                "a version is stated once, in the workspace's Cargo.toml",
            ));
        }
    }
    if member && !file.text.contains("[lints]\nworkspace = true") {
        findings.push(file.finding(1, "does not inherit the workspace's lints"));
    }
    findings
}

fn inherits(line: &str) -> bool {
    line.contains(".workspace = true")
        || line.contains("workspace = true,")
        || line.contains("workspace = true }")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(text: &str) -> Vec<usize> {
        let file = Source {
            path: "x/Cargo.toml".into(),
            text: text.into(),
        };
        check(&file)
            .into_iter()
            .map(|finding| finding.line)
            .collect()
    }

    #[test]
    fn a_manifest_that_inherits_everything_is_fine() {
        let text = "[package]\nname = \"x\" # see the registry = page\n[dependencies]\nserde.workspace = true\n\
                    tokio = { workspace = true, features = [\"rt\"] }\n\n[lints]\nworkspace = true\n";
        assert!(findings(text).is_empty());
    }

    #[test]
    fn versions_features_and_foreign_sources_are_found() {
        let text = "[lints]\nworkspace = true\n[features]\nfast = []\n[dev-dependencies]\nserde = \"1\"\n\
                    x = { git = \"ssh://h/x\" }\n";
        assert_eq!(findings(text), [3, 6, 7, 7]);
    }

    #[test]
    fn lints_of_its_own_are_found() {
        assert_eq!(findings("[package]\nname = \"x\"\n"), [1]);
    }

    #[test]
    fn a_workspace_states_versions() {
        assert!(findings("[workspace]\n[workspace.dependencies]\nserde = \"1\"\n").is_empty());
    }
}
