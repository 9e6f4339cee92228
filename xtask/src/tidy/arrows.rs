//! Who may depend on whom: the picture in DESIGN §2 as a table, against cargo's metadata.

use std::path::Path;

use serde_json::Value;

use super::{Finding, Source};
use crate::workspace;

/// Each crate with those of ours that it may use. A transport that is not listed is a plugin.
const ARROWS: &[(&str, &[&str])] = &[
    ("job-core", &[]),
    ("monitor-qmp", &[]),
    ("agent-qga", &[]),
    ("remote-migrate", &[]),
    ("transport-abi", &[]),
    ("transport-host", &["transport-abi"]),
    (
        "driver",
        &[
            "job-core",
            "monitor-qmp",
            "agent-qga",
            "remote-migrate",
            "transport-host",
        ],
    ),
    ("tests", &[]),
    ("xtask", &[]),
];
const PLUGIN: &[&str] = &["transport-abi"];
/// What the tests of any crate may use beside that.
const FOR_TESTS: &[&str] = &["tests", "transport-host"];

/// `job-core` runs under any executor and under loom, so it takes little from outside.
const JOB_CORE: &[&str] = &["async-trait", "rustix", "tracing"];
const JOB_CORE_UNDER_LOOM: &[&str] = &["loom"];

pub(super) fn check(packages: &[Value], files: &[Source], root: &Path) -> Vec<Finding> {
    packages
        .iter()
        .flat_map(|package| {
            let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
            let path = manifest
                .strip_prefix(root)
                .unwrap_or(manifest)
                .to_string_lossy()
                .into_owned();
            let text = files
                .iter()
                .find(|file| file.path == path)
                .map_or("", |file| &file.text);
            wrong_arrows(package)
                .into_iter()
                .map(move |(dependency, message)| {
                    let line = text
                        .lines()
                        .position(|line| line.starts_with(&dependency))
                        .map_or(1, |index| index + 1);
                    Finding {
                        path: path.clone(),
                        line,
                        message,
                    }
                })
        })
        .collect()
}

/// Dependencies of one package that it may not have, each with the reason.
fn wrong_arrows(package: &Value) -> Vec<(String, String)> {
    let name = package["name"].as_str().unwrap_or_default();
    let listed = ARROWS
        .iter()
        .find(|(crate_name, _)| *crate_name == name)
        .map(|(_, allowed)| *allowed);
    let Some(allowed) = listed.or_else(|| name.starts_with("transport-").then_some(PLUGIN)) else {
        return vec![("name".into(), format!("{name} is no crate of DESIGN §2"))];
    };

    let mut wrong = Vec::new();
    for dependency in workspace::list(package, "dependencies") {
        let target = dependency["name"].as_str().unwrap_or_default();
        let for_tests = dependency["kind"] == "dev";
        let ours = !dependency["path"].is_null();
        let message = if ours && for_tests {
            let loads_them = name == "transport-host" && target.starts_with("transport-");
            let fine = name == "tests"
                || loads_them
                || allowed.contains(&target)
                || FOR_TESTS.contains(&target);
            (!fine).then(|| {
                format!(
                    "the tests of {name} may not use {target}; move them to the suite in tests/"
                )
            })
        } else if ours {
            (!allowed.contains(&target)).then(|| format!("{name} must not know {target}"))
        } else if name == "job-core" && !for_tests {
            let extra = if dependency["target"].is_null() {
                &[]
            } else {
                JOB_CORE_UNDER_LOOM
            };
            let fine = JOB_CORE.contains(&target) || extra.contains(&target);
            (!fine).then(|| {
                format!("job-core takes {JOB_CORE:?} from outside and nothing else, not {target}")
            })
        } else {
            None
        };
        wrong.extend(message.map(|message| (target.to_owned(), message)));
    }
    wrong
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn package(name: &str, dependencies: &[(&str, Option<&str>, bool)]) -> Value {
        let dependencies: Vec<_> = dependencies
            .iter()
            .map(|(name, kind, ours)| json!({ "name": name, "kind": kind, "path": ours.then_some("/x"), "target": null }))
            .collect();
        json!({ "name": name, "manifest_path": format!("/w/{name}/Cargo.toml"), "dependencies": dependencies })
    }

    #[test]
    fn the_arrows_of_the_design_are_allowed() {
        for good in [
            package(
                "driver",
                &[
                    ("job-core", None, true),
                    ("tokio", None, false),
                    ("tests", Some("dev"), true),
                ],
            ),
            package(
                "tests",
                &[("driver", Some("dev"), true), ("serde_json", None, false)],
            ),
            package("transport-template", &[("transport-abi", None, true)]),
            package("monitor-qmp", &[("transport-host", Some("dev"), true)]),
            package("transport-host", &[("transport-tcp", Some("dev"), true)]),
            package(
                "job-core",
                &[("tracing", None, false), ("tokio", Some("dev"), false)],
            ),
        ] {
            assert_eq!(wrong_arrows(&good), []);
        }
    }

    #[test]
    fn every_other_arrow_is_found() {
        for bad in [
            package("monitor-qmp", &[("job-core", None, true)]),
            package("monitor-qmp", &[("driver", Some("dev"), true)]),
            package("agent-qga", &[("job-core", Some("build"), true)]),
            package("tests", &[("driver", None, true)]),
            package("transport-tcp", &[("transport-host", None, true)]),
            package("job-core", &[("tokio", None, false)]),
            package("job-core", &[("loom", None, false)]),
            package("vmwright-util", &[]),
        ] {
            assert_eq!(wrong_arrows(&bad).len(), 1, "{bad}");
        }
    }

    #[test]
    fn loom_is_allowed_where_its_cfg_is_set() {
        let mut package = package("job-core", &[("loom", None, false)]);
        package["dependencies"][0]["target"] = json!("cfg(job_core_loom)");
        assert_eq!(wrong_arrows(&package), []);
    }

    #[test]
    fn a_finding_points_to_the_line_in_the_manifest() {
        let files = [Source {
            path: "agent-qga/Cargo.toml".into(),
            text: "[package]\n[dependencies]\nmonitor-qmp.workspace = true\n".into(),
        }];
        let packages = [package("agent-qga", &[("monitor-qmp", None, true)])];
        let findings = check(&packages, &files, Path::new("/w"));
        assert_eq!(
            findings,
            [files[0].finding(3, "agent-qga must not know monitor-qmp")]
        );
    }
}
