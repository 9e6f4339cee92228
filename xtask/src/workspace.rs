//! Where things lie in this checkout and what cargo knows of its packages.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use crate::error::Failure;
use crate::run;

/// The folder that holds the workspace's `Cargo.toml`.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("xtask lies in a folder of the workspace")
}

/// What `cargo metadata` says of the packages of this workspace, asked once.
pub(crate) fn metadata() -> Result<&'static Value, Failure> {
    static METADATA: OnceLock<Value> = OnceLock::new();
    if let Some(known) = METADATA.get() {
        return Ok(known);
    }
    let answer = run::ask(
        run::cargo()
            .args(["metadata", "--format-version", "1", "--no-deps"])
            .current_dir(root()),
    )?;
    let value = serde_json::from_slice(&answer).map_err(Failure::because("read cargo metadata"))?;
    Ok(METADATA.get_or_init(|| value))
}

/// Cargo's target directory, wherever a person moved it to.
pub(crate) fn target() -> Result<PathBuf, Failure> {
    let path = metadata()?["target_directory"].as_str();
    path.map(PathBuf::from)
        .ok_or_else(|| Failure::wrong("cargo metadata names no target directory"))
}

/// An array inside cargo's answer; nothing where there is none.
pub(crate) fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}
