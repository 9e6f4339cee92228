//! A newer QEMU beside the installed one, for guests that move from the one to the other: Debian's backports, from the mirror
//! that this machine is configured with, unpacked under the target directory. The machine's own lists, keys and packages are
//! only read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::agent::put;
use crate::error::Failure;
use crate::{run, workspace};

/// QEMU itself, and what it reads as it starts.
const PACKAGES: [&str; 5] = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
    "ipxe-qemu",
];
/// Where Debian keeps the keys of its archive.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What to call to run it. Says why there is none to be had.
pub(crate) fn qemu() -> Result<PathBuf, Failure> {
    let place = workspace::target()?.join("newer");
    let tree = place.join("tree");
    let program = tree.join("usr/bin/qemu-system-x86_64");
    if !program.exists() {
        fetch(&place, &tree).map_err(|failure| {
            let why = failure.summary();
            Failure::wrong(format!("no newer QEMU can be had here: {why}"))
        })?;
    }
    let path = place.join("qemu-system-x86_64");
    let failed = Failure::because(format!("write {}", path.display()));
    put(&path, &script(&tree)).map_err(failed)?;
    Ok(path)
}

/// It looks for its data where it would be installed. Its process becomes QEMU, whose number its starter knows.
fn script(tree: &Path) -> String {
    let quoted = |path: PathBuf| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let data = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];
    let data: Vec<_> = data
        .iter()
        .map(|folder| format!("-L {}", quoted(tree.join(folder))))
        .collect();
    let program = quoted(tree.join("usr/bin/qemu-system-x86_64"));
    format!("#!/bin/sh\nexec {program} {} \"$@\"\n", data.join(" "))
}

fn fetch(place: &Path, tree: &Path) -> Result<(), Failure> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Failure::wrong("this machine is no x86-64"));
    }
    if run::find_program("apt-get").is_none() {
        return Err(Failure::wrong("this is no Debian machine"));
    }
    let release =
        fs::read_to_string("/etc/os-release").map_err(Failure::because("read os-release"))?;
    let codename = codename(&release)
        .ok_or_else(|| Failure::wrong("os-release does not say which Debian this is"))?;
    let format = "$(REPO_URI) $(CODENAME) $(COMPONENT)";
    let known = run::ask(
        Command::new("apt-get")
            .args(["indextargets", "--format", format, "Created-By: Packages"])
            .env("LC_ALL", "C"),
    )?;
    let known = String::from_utf8_lossy(&known).into_owned();
    let mirror = mirror(&known, codename)
        .ok_or_else(|| Failure::wrong(format!("apt knows no mirror of {codename}, main")))?;

    let draft = place.with_file_name(format!("newer.{}", std::process::id()));
    let broken = || Failure::because(format!("unpack it under {}", draft.display()));
    for folder in [
        "lists/partial",
        "cache/archives/partial",
        "packages",
        "tree",
    ] {
        fs::create_dir_all(draft.join(folder)).map_err(broken())?;
    }
    let sources = draft.join("sources.list");
    fs::write(&sources, suites(mirror, codename)).map_err(broken())?;
    let apt = || {
        let mut apt = Command::new("apt-get");
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        apt.args(["-o", &option("Dir::Etc::sourcelist", &sources)]);
        apt.args(["-o", "Dir::Etc::sourceparts=-"]);
        apt.args(["-o", &option("Dir::State::lists", &draft.join("lists"))]);
        apt.args(["-o", &option("Dir::Cache", &draft.join("cache"))]);
        apt.args(["-o", "APT::Sandbox::User=root"]);
        apt.env("DEBIAN_FRONTEND", "noninteractive");
        apt.current_dir(draft.join("packages"));
        apt
    };
    let fetched = (|| {
        run::run_aside(apt().arg("update"))?;
        let suite = format!("{codename}-backports");
        run::run_aside(
            apt()
                .args(["--target-release", &suite, "download"])
                .args(PACKAGES),
        )?;
        let packages = fs::read_dir(draft.join("packages")).map_err(broken())?;
        for package in packages.flatten() {
            run::run_aside(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .arg(package.path())
                    .arg(draft.join("tree")),
            )?;
        }
        fs::create_dir_all(place).map_err(broken())?;
        match fs::rename(draft.join("tree"), tree) {
            // Another xtask was faster.
            Err(_) if tree.exists() => Ok(()),
            other => other.map_err(broken()),
        }
    })();
    let _remains = fs::remove_dir_all(&draft);
    fetched
}

fn codename(release: &str) -> Option<&str> {
    let named = |line: &'_ str| line.starts_with("VERSION_CODENAME=");
    let line = release.lines().find(|line| named(line))?;
    let name = line.split_once('=')?.1.trim_matches('"');
    (!name.is_empty()).then_some(name)
}

/// Where the release itself comes from, by the lines `URI CODENAME COMPONENT`.
fn mirror<'a>(known: &'a str, codename: &str) -> Option<&'a str> {
    known.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let uri = words.next()?;
        (words.next()? == codename && words.next()? == "main").then_some(uri)
    })
}

/// The release and its backports, from that mirror.
fn suites(mirror: &str, codename: &str) -> String {
    let signed = if Path::new(KEYS).exists() {
        format!("[signed-by={KEYS}] ")
    } else {
        String::new()
    };
    ["", "-backports"]
        .map(|suite| format!("deb {signed}{mirror} {codename}{suite} main\n"))
        .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_that_the_release_itself_comes_from() {
        let known = "mirror://one/ trixie-updates main\nmirror://two/ trixie contrib\nmirror://three/ trixie main\n";
        assert_eq!(mirror(known, "trixie"), Some("mirror://three/"));
        assert_eq!(mirror(known, "forky"), None);
        assert!(
            suites("mirror://three/", "trixie").contains("mirror://three/ trixie-backports main\n")
        );
    }

    #[test]
    fn a_release_without_a_name_has_no_backports() {
        let named = "ID=debian\nVERSION_CODENAME=trixie\n";
        assert_eq!(codename(named), Some("trixie"));
        assert_eq!(codename("ID=debian\n"), None);
        assert_eq!(codename("VERSION_CODENAME=\n"), None);
    }

    #[test]
    fn it_is_told_where_its_data_is_also_below_a_folder_with_a_quote() {
        let text = script(Path::new("/it's"));
        assert!(
            text.starts_with("#!/bin/sh\nexec '/it'\\''s/usr/bin/qemu-system-x86_64' -L '/it'")
        );
        assert!(text.ends_with("\"$@\"\n"));
    }
}
