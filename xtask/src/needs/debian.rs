//! Fetches what is missing on a Debian machine.
//!
//! QEMU is installed, since it takes forty libraries with it. The rest is only downloaded and
//! unpacked under the target directory: an installed kernel would build an initrd and turn to
//! the boot loader, an installed agent would come with a service, and a static busybox would
//! drive out the machine's own.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::error::Failure;
use crate::needs::Part;
use crate::run;

/// Gets what it can of `missing`. Says what kept it from the rest, for a message that lists it.
pub(crate) fn fetch(missing: &[Part], store: &Path) -> Result<String, Failure> {
    if std::env::consts::ARCH != "x86_64" {
        return Ok(
            "Packages of this architecture cannot run in the guest, which is x86-64.".into(),
        );
    }
    if !Path::new("/etc/debian_version").exists() || run::find_program("apt-get").is_none() {
        return Ok("This is no Debian machine, so nothing was fetched.".into());
    }

    let mut troubles = Vec::new();
    let mut note = |outcome: Result<(), Failure>| {
        if let Err(failure) = outcome {
            troubles.push(failure.summary());
        }
    };
    // Lists may be absent (a fresh container) or name versions that the mirror has dropped.
    note(as_root(&["update"]));
    // First QEMU: some libraries of the agent come with it.
    if missing.contains(&Part::Qemu) {
        note(as_root(&[
            "install",
            "-y",
            "--no-install-recommends",
            Part::Qemu.package(),
        ]));
    }
    for part in missing.iter().filter(|part| **part != Part::Qemu) {
        note(
            packages(*part).and_then(|names| names.iter().try_for_each(|name| unpack(name, store))),
        );
    }
    Ok(troubles.join("\n"))
}

/// Installs a package that a campaign needs beside the guest. Says why not, where it cannot.
pub(crate) fn install(package: &str) -> Result<(), Failure> {
    if run::find_program("apt-get").is_none() {
        return Err(Failure::wrong(format!(
            "this is no Debian machine, so {package} was not fetched"
        )));
    }
    as_root(&["update"])?;
    as_root(&["install", "-y", "--no-install-recommends", package])
}

/// The packages to unpack for a part.
fn packages(part: Part) -> Result<Vec<String>, Failure> {
    match part {
        Part::Kernel => {
            // The package asked for is empty and depends on the newest image.
            let depends = apt("apt-cache", &["depends", part.package()])?;
            Ok(vec![image_of(&depends).ok_or_else(|| {
                Failure::wrong(format!("{} names no image", part.package()))
            })?])
        }
        Part::Agent => {
            // What an installation would add is the agent and those of its libraries that are not here.
            let plan = apt(
                "apt-get",
                &[
                    "--simulate",
                    "install",
                    "--no-install-recommends",
                    part.package(),
                ],
            )?;
            let mut names = installed_by(&plan);
            if !names.iter().any(|name| name == part.package()) {
                names.push(part.package().to_owned());
            }
            Ok(names)
        }
        Part::Qemu | Part::Busybox | Part::Images => Ok(vec![part.package().to_owned()]),
    }
}

fn image_of(depends: &str) -> Option<String> {
    let names = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    names
        .map(str::trim)
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
}

fn installed_by(plan: &str) -> Vec<String> {
    let lines = plan.lines().filter_map(|line| line.strip_prefix("Inst "));
    lines
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// Downloads a package and unpacks it to `store/NAME`, which appears whole or not at all.
fn unpack(name: &str, store: &Path) -> Result<(), Failure> {
    let place = store.join(name);
    if place.exists() {
        return Ok(());
    }
    let broken = || Failure::because(format!("unpack {name} under {}", store.display()));
    let draft = store.with_file_name(format!("deb.{}.{name}", std::process::id()));
    let tree = draft.join("tree");
    fs::create_dir_all(&tree).map_err(broken())?;
    fs::create_dir_all(store).map_err(broken())?;

    // Downloads are dropped to user _apt where that can write; here it need not.
    run::run_aside(
        apt_get()
            .args(["-o", "APT::Sandbox::User=root", "download", name])
            .current_dir(&draft),
    )?;
    let archive = fs::read_dir(&draft)
        .map_err(broken())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| Failure::wrong(format!("apt-get downloaded no file for {name}")))?;
    run::run_aside(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(&tree),
    )?;
    match fs::rename(&tree, &place) {
        // Another xtask was faster; its copy is as good.
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
        other => other.map_err(broken())?,
    }
    fs::remove_dir_all(&draft).map_err(broken())
}

/// An `apt-get` that changes the machine, through sudo where that takes it.
fn as_root(arguments: &[&str]) -> Result<(), Failure> {
    if fs::metadata("/proc/self").is_ok_and(|facts| facts.uid() == 0) {
        return run::run_aside(apt_get().args(arguments));
    }
    if run::find_program("sudo").is_none() {
        return Err(Failure::wrong(format!(
            "not root and no sudo here for: apt-get {}",
            arguments.join(" ")
        )));
    }
    eprintln!(
        "xtask: as root through sudo, since a real guest takes it: apt-get {}",
        arguments.join(" ")
    );
    let mut sudo = Command::new("sudo");
    run::run_aside(
        sudo.args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"])
            .args(arguments),
    )
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn apt(program: &str, arguments: &[&str]) -> Result<String, Failure> {
    // Untranslated: the answer is read by us.
    let answer = run::ask(Command::new(program).args(arguments).env("LC_ALL", "C"))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_behind_the_empty_package_is_found() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n  Breaks: other\n";
        assert_eq!(
            image_of(depends).unwrap(),
            "linux-image-6.1.0-56-cloud-amd64"
        );
        assert_eq!(image_of("linux-image-cloud-amd64\n"), None);
    }

    #[test]
    fn a_plan_names_each_package_it_would_install() {
        let plan = "Reading package lists...\nInst liburing2 (2.3-3 Debian:12 [amd64])\n\
                    Inst qemu-guest-agent (1:7.2)\nConf liburing2 (2.3-3)\n";
        assert_eq!(installed_by(plan), ["liburing2", "qemu-guest-agent"]);
    }
}
