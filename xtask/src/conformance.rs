//! `conformance PATH TARGET`: a transport plugin against the contract, clause by clause.
//!
//! The kit is a program of `transport-host`; here its plugin is put where a daemon would load it
//! from. A plugin in C may be given as its one source file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Failure;
use crate::{figures, plugins, run, workspace};

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let [plugin, target, rest @ ..] = arguments else {
        return Err(Failure::Usage(
            "conformance wants a plugin and a target".into(),
        ));
    };
    if let Some(flag) = [plugin, target]
        .into_iter()
        .find(|word| word.starts_with('-'))
    {
        return Err(Failure::Usage(format!(
            "'{flag}' is no plugin and no target"
        )));
    }
    let mut rest_of = rest.iter();
    while let Some(word) = rest_of.next() {
        let fine = match word.as_str() {
            "--short" => true,
            "--unreachable" => rest_of.next().is_some(),
            _ => false,
        };
        if !fine {
            return Err(Failure::Usage(format!(
                "conformance does not know '{word}'"
            )));
        }
    }
    let staged = stage(Path::new(plugin))?;
    let scheme = target.split(':').next().unwrap_or_default();
    let mut kit = kit();
    kit.arg(staged).arg(target).args(rest);
    figures::collect(&mut kit, &format!("conformance-{scheme}"))
}

/// The kit, to be given a plugin and a target.
pub(crate) fn kit() -> Command {
    let mut cargo = run::cargo();
    cargo.current_dir(workspace::root()).args([
        "run",
        "--quiet",
        "--package",
        "transport-host",
        "--bin",
        "transport-conformance",
        "--",
    ]);
    cargo
}

/// The plugin in a folder that a daemon loads from.
pub(crate) fn stage(plugin: &Path) -> Result<PathBuf, Failure> {
    let built = match plugin.extension().and_then(|extension| extension.to_str()) {
        Some("c") => compile(plugin)?,
        _ => plugin.to_owned(),
    };
    let name = built
        .file_name()
        .ok_or_else(|| Failure::Usage(format!("{} is no file", plugin.display())))?;
    let folder = plugins::folder(&workspace::target()?.join("conformance"))?;
    plugins::place(&built, &folder).map_err(Failure::because(format!(
        "stage {} in {}",
        built.display(),
        folder.display()
    )))?;
    Ok(folder.join(name))
}

/// Builds `NAME.c` to `libtransport_NAME.so`, as strictly as a compiler can.
fn compile(source: &Path) -> Result<PathBuf, Failure> {
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let folder = workspace::target()?.join("c-plugins");
    fs::create_dir_all(&folder).map_err(Failure::because(format!("make {}", folder.display())))?;
    let library = folder.join(format!("libtransport_{stem}.so"));
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O2", "-fPIC", "-shared"])
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(workspace::root().join("plugins/transport-abi/include"))
        .arg("-o")
        .args([library.as_path(), source]);
    run::run_aside(&mut cc)?;
    Ok(library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_in_c_is_built_and_staged_for_its_user_alone_to_change() {
        use std::os::unix::fs::PermissionsExt;
        let source = workspace::root().join("plugins/transport-abstract/abstract.c");
        let staged = stage(&source).unwrap();
        assert!(staged.ends_with("libtransport_abstract.so"));
        assert_eq!(staged.metadata().unwrap().permissions().mode() & 0o022, 0);
    }

    #[test]
    fn a_plugin_that_is_not_there_is_told_by_its_path() {
        let Err(failure) = stage(Path::new("/nowhere/libtransport_x.so")) else {
            panic!("staged")
        };
        assert!(failure.summary().contains("/nowhere/libtransport_x.so"));
    }
}
