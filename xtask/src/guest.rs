//! Builds the guest that tests and demo boot: a kernel image and an initramfs, without root.
//!
//! ```text
//!  busybox, qemu-ga + libraries, modules   from the machine   ┐
//!  init, shutdown, dirty.c, count.c        xtask/guest/       ┴─ target/guest/initramfs.cpio
//!  kernel image                            from the machine   ── target/guest/vmlinuz
//! ```
//!
//! What the guest says and does is in `guest/init`. The initramfs is not compressed: an emulated
//! processor would take longer to unpack it than QEMU takes to load it.

mod cpio;
mod modules;

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Failure;
use crate::needs::{self, Needs};
use crate::{run, workspace};
use cpio::Archive;

const INIT: &str = include_str!("../guest/init");
const SHUTDOWN: &str = include_str!("../guest/shutdown");
const DIRTY: &str = include_str!("../guest/dirty.c");
const COUNT: &str = include_str!("../guest/count.c");
/// Changes when this file packs the same inputs in another way.
const LAYOUT: u32 = 2;

/// What QEMU is given as `-kernel` and `-initrd`.
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

/// Builds the image, or leaves it as it is if no input changed.
pub(crate) fn build(needs: &Needs) -> Result<Image, Failure> {
    let folder = workspace::target()?.join("guest");
    let image = Image {
        kernel: folder.join("vmlinuz"),
        initrd: folder.join("initramfs.cpio"),
    };
    let stamp = folder.join("inputs");
    let inputs = inputs(needs).map_err(Failure::because("read the guest's parts"))?;
    let fresh = fs::read_to_string(&stamp).is_ok_and(|known| known == inputs);
    if fresh && image.kernel.is_file() && image.initrd.is_file() {
        return Ok(image);
    }

    eprintln!("xtask: building the guest image in {}", folder.display());
    let failed = || Failure::because(format!("build the guest image in {}", folder.display()));
    fs::create_dir_all(&folder).map_err(failed())?;
    let dirty = compile(&folder, "dirty", DIRTY)?;
    let count = compile(&folder, "count", COUNT)?;
    let modules = modules::collect(&needs.kernel.modules)?;
    let applets = needs::applets(&needs.busybox)?;
    let initramfs = pack(
        needs,
        &applets,
        &modules,
        &[("dirty", dirty), ("count", count)],
    )
    .map_err(failed())?;
    let kernel = fs::read(&needs.kernel.image).map_err(failed())?;

    // The stamp goes first and comes back last: a build that was cut short is not taken for done.
    let _ = fs::remove_file(&stamp);
    replace(&image.kernel, &kernel).map_err(failed())?;
    replace(&image.initrd, &initramfs).map_err(failed())?;
    replace(&stamp, inputs.as_bytes()).map_err(failed())?;
    Ok(image)
}

/// All that the image depends on, as one short text: files by path, length and time.
fn inputs(needs: &Needs) -> io::Result<String> {
    let Needs {
        agent,
        libraries,
        busybox,
        kernel,
        qemu: _,
        images: _,
    } = needs;
    let mut hasher = DefaultHasher::new();
    (LAYOUT, INIT, SHUTDOWN, DIRTY, COUNT, libraries).hash(&mut hasher);
    let files = [agent, busybox, &kernel.image, &kernel.modules];
    for file in files
        .into_iter()
        .chain(libraries.iter().map(|library| &library.path))
    {
        let facts = fs::metadata(file)?;
        (file, facts.len(), facts.mtime(), facts.mtime_nsec()).hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

/// One of the guest's own programs, which needs no library.
fn compile(folder: &Path, name: &str, text: &str) -> Result<Vec<u8>, Failure> {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let source = folder.join(format!("{name}.c"));
    let program = folder.join(format!("{name}.{}", std::process::id()));
    replace(&source, text.as_bytes())
        .map_err(Failure::because(format!("write {}", source.display())))?;
    let mut command = Command::new(&compiler);
    command
        .args(["-static", "-O2", "-Wall", "-o"])
        .arg(&program)
        .arg(&source);
    run::ask(&mut command).map_err(|failure| {
        Failure::wrong(format!(
            "cannot build a static C program, which a C compiler (cc, or what CC names) and a static \
             C library (package libc6-dev on Debian, glibc-static elsewhere) are needed for:\n{}",
            failure.summary()
        ))
    })?;
    let failed = || Failure::because(format!("read {}", program.display()));
    let content = fs::read(&program).map_err(failed())?;
    fs::remove_file(&program).map_err(failed())?;
    Ok(content)
}

fn pack(
    needs: &Needs,
    applets: &[String],
    modules: &[modules::Module],
    programs: &[(&str, Vec<u8>)],
) -> io::Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for folder in [
        "bin", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr",
    ] {
        archive.folder(folder)?;
    }
    // One folder of programs under all the names that programs are looked for by.
    archive.symlink("sbin", "bin")?;
    archive.symlink("usr/bin", "../bin")?;
    archive.symlink("usr/sbin", "../bin")?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("bin/shutdown", 0o755, SHUTDOWN.as_bytes())?;
    for (name, program) in programs {
        archive.file(&format!("bin/{name}"), 0o755, program)?;
    }
    archive.file("bin/qemu-ga", 0o755, &fs::read(&needs.agent)?)?;
    archive.file("bin/busybox", 0o755, &fs::read(&needs.busybox)?)?;
    for applet in applets.iter().filter(|applet| *applet != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }

    // acpid runs the file named after the event; this one is the power button.
    archive.symlink("etc/acpi/PWRF/00000080", "/bin/shutdown")?;
    archive.file(
        "etc/os-release",
        0o644,
        b"ID=vmwright\nNAME=\"vmwright test guest\"\nVERSION_ID=1\n",
    )?;
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\n")?;

    // Loaders look in either place, depending on who built them.
    archive.symlink("lib64", "lib/x86_64-linux-gnu")?;
    for library in &needs.libraries {
        archive.file(
            &format!("lib/x86_64-linux-gnu/{}", library.name),
            0o755,
            &fs::read(&library.path)?,
        )?;
    }
    let mut order = String::new();
    for module in modules {
        archive.file(
            &format!("lib/modules/{}", module.file),
            0o644,
            &module.content,
        )?;
        order += &format!("{}\n", module.file);
    }
    archive.file("etc/modules", 0o644, order.as_bytes())?;
    archive.finish()
}

/// Writes beside and renames over, so that a QEMU about to read sees the old file or the new one.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let draft = path.with_extension(format!("draft.{}", std::process::id()));
    fs::write(&draft, content)?;
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o644))?;
    fs::rename(&draft, path)
}
