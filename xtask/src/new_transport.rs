//! `new-transport NAME`: a plugin crate of that name, copied from `transport-template` and joined
//! to the workspace.
//!
//! What it writes builds and conforms at once; its author replaces the channel piece by piece.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Failure;
use crate::workspace;

const TEMPLATE: &str = "template";
/// Clause 1.6 of `transport-abi`.
const LONGEST: usize = 32;
/// Crates that are no transports but are called like one.
const TAKEN: [&str; 2] = ["abi", "host"];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let [name] = arguments else {
        return Err(Failure::Usage("new-transport takes one name".into()));
    };
    check(name)
        .map_err(|why| Failure::Usage(format!("no transport can be called '{name}': {why}")))?;
    let folder = write(workspace::root(), name)?;
    let stem = stem(name);
    println!("wrote {}; next:", folder.display());
    println!("  cargo test -p transport-{name}");
    println!("  cargo build -p transport-{name}");
    println!(
        "  cargo xtask conformance target/debug/libtransport_{stem}.so {name}:/tmp/door --short"
    );
    Ok(())
}

/// What clause 1.6 asks of a name, and a little more taste.
fn check(name: &str) -> Result<(), String> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if !name.starts_with(|first: char| first.is_ascii_lowercase()) {
        return Err("it begins with a letter from a to z".into());
    }
    if !name.bytes().all(fits) {
        return Err("it is made of a to z, 0 to 9 and -".into());
    }
    if name.ends_with('-') || name.contains("--") {
        return Err("a - stands between two others".into());
    }
    if name.len() > LONGEST {
        return Err(format!("{} bytes, {LONGEST} fit", name.len()));
    }
    if TAKEN.contains(&name) {
        return Err(format!("transport-{name} is a crate of the ABI"));
    }
    Ok(())
}

fn stem(name: &str) -> String {
    name.replace('-', "_")
}

/// Writes the crate below `root`, and gives its folder.
fn write(root: &Path, name: &str) -> Result<PathBuf, Failure> {
    let from = root.join(format!("plugins/transport-{TEMPLATE}"));
    let to = root.join(format!("plugins/transport-{name}"));
    if to.exists() {
        return Err(Failure::wrong(format!("{} is there already", to.display())));
    }
    let failed = || Failure::because(format!("copy {} to {}", from.display(), to.display()));
    fs::create_dir_all(to.join("src")).map_err(failed())?;
    for file in ["Cargo.toml", "README.md"] {
        copy(&from.join(file), &to.join(file), name).map_err(failed())?;
    }
    for source in fs::read_dir(from.join("src")).map_err(failed())? {
        let source = source.map_err(failed())?;
        let copied = to.join("src").join(source.file_name());
        copy(&source.path(), &copied, name).map_err(failed())?;
    }
    let manifest = root.join("Cargo.toml");
    let joined = fs::read_to_string(&manifest)
        .map_err(Failure::because("read the workspace's Cargo.toml"))
        .and_then(|text| join(&text, name))?;
    fs::write(&manifest, joined).map_err(Failure::because("write the workspace's Cargo.toml"))?;
    Ok(to)
}

fn copy(from: &Path, to: &Path, name: &str) -> std::io::Result<()> {
    fs::write(to, rename(&fs::read_to_string(from)?, name))
}

/// The template's text under another name: the crate's, the symbol's stem, the scheme.
fn rename(text: &str, name: &str) -> String {
    let stem = stem(name);
    text.replace("transport-template", &format!("transport-{name}"))
        .replace("transport_template", &format!("transport_{stem}"))
        .replace("(Doors, \"template\")", &format!("(Doors, \"{stem}\")"))
        .replace("\"template\"", &format!("\"{name}\""))
        .replace("template:", &format!("{name}:"))
        .replace(": the one to copy", "")
}

/// The workspace's manifest with one member more.
fn join(manifest: &str, name: &str) -> Result<String, Failure> {
    let after = format!("    \"plugins/transport-{TEMPLATE}\",\n");
    let (before, behind) = manifest
        .split_once(&after)
        .ok_or_else(|| Failure::wrong("the workspace's Cargo.toml does not list the template"))?;
    Ok(format!(
        "{before}{after}    \"plugins/transport-{name}\",\n{behind}"
    ))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::{conformance, run};

    #[test]
    fn names_that_no_target_could_begin_with_are_refused() {
        for silly in [
            "",
            "Unix",
            "1st",
            "-a",
            "a-",
            "a--b",
            "a_b",
            "a b",
            "a/b",
            "../a",
            "é",
            "a:b",
            "abi",
            "host",
            &"a".repeat(33),
        ] {
            assert!(check(silly).is_err(), "{silly:?}");
        }
        for good in ["a", "serial", "vsock-unix", "x25", &"a".repeat(32)] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn every_name_of_the_template_is_replaced() {
        let text = "name = \"transport-template\"\nexport_transport!(Doors, \"template\");\n\
                    (\"template\", false) `template:` libtransport_template.so named pipes: the one to copy\n";
        assert_eq!(
            rename(text, "far-away"),
            "name = \"transport-far-away\"\nexport_transport!(Doors, \"far_away\");\n\
             (\"far-away\", false) `far-away:` libtransport_far_away.so named pipes\n"
        );
    }

    #[test]
    fn the_manifest_gains_one_member_and_keeps_the_rest() {
        let manifest = fs::read_to_string(workspace::root().join("Cargo.toml")).unwrap();
        let joined = join(&manifest, "far-away").unwrap();
        assert_eq!(
            joined.replace("    \"plugins/transport-far-away\",\n", ""),
            manifest
        );
        assert!(join("[workspace]\nmembers = []\n", "far-away").is_err());
    }

    /// In a workspace of its own, with what the template needs.
    #[test]
    fn a_new_plugin_builds_and_passes_its_tests_and_the_kit() {
        let root = std::env::temp_dir().join(format!("vmwright-xtask-new-{}", std::process::id()));
        for package in ["transport-abi", "transport-template"] {
            let package = format!("plugins/{package}");
            fs::create_dir_all(root.join("plugins")).unwrap();
            let mut cp = Command::new("cp");
            cp.arg("-r")
                .arg(workspace::root().join(&package))
                .arg(root.join(&package));
            assert!(cp.status().unwrap().success());
        }
        fs::copy(
            workspace::root().join("Cargo.lock"),
            root.join("Cargo.lock"),
        )
        .unwrap();
        let manifest = fs::read_to_string(workspace::root().join("Cargo.toml")).unwrap();
        let (_, rest) = manifest.split_once("]\n").unwrap();
        let members = "[workspace]\nresolver = \"3\"\nmembers = [\n    \"plugins/transport-abi\",\n    \
                       \"plugins/transport-template\",\n]\n";
        fs::write(
            root.join("Cargo.toml"),
            format!("{members}{}", rest.split_once("]\n").unwrap().1),
        )
        .unwrap();

        write(&root, "far-away").unwrap();
        assert!(write(&root, "far-away").is_err(), "it is there already");
        for task in ["build", "test"] {
            let mut cargo = run::cargo();
            cargo.current_dir(&root).args([
                task,
                "--quiet",
                "--offline",
                "--package",
                "transport-far-away",
            ]);
            let output = cargo
                .env("CARGO_TARGET_DIR", root.join("target"))
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let built = root.join("target/debug/libtransport_far_away.so");
        let mut kit = conformance::kit();
        kit.arg(conformance::stage(&built).unwrap());
        kit.arg(format!("far-away:{}", root.join("door").display()))
            .arg("--short");
        let output = kit.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        fs::remove_dir_all(&root).unwrap();
    }
}
