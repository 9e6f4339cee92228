//! All that a task on a real guest needs, gathered and built in one go, as the environment
//! variables by which the suite, the demo and the benches find it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Failure;
use crate::{guest, needs, plugins, run, workspace};

/// A QEMU, a guest to boot in it, and transports to reach both.
#[must_use = "a rig is of use only to the command it is handed to"]
pub(crate) struct Rig {
    variables: Vec<(&'static str, PathBuf)>,
}

impl Rig {
    /// Finds, fetches and builds; `qemu` overrules what would be found.
    pub(crate) fn prepare(qemu: Option<&Path>) -> Result<Self, Failure> {
        let needs = needs::gather(qemu)?;
        let image = guest::build(&needs)?;
        let transports = plugins::stage()?;
        let agent = needs::agent::here(&needs)?;
        let variables = vec![
            ("VMWRIGHT_QEMU", needs.qemu),
            ("VMWRIGHT_QGA", agent),
            ("VMWRIGHT_QEMU_IMG", needs.images),
            ("VMWRIGHT_KERNEL", image.kernel),
            ("VMWRIGHT_INITRD", image.initrd),
            ("VMWRIGHT_TRANSPORTS", transports),
        ];
        Ok(Self { variables })
    }

    /// With a newer QEMU beside the one there is.
    pub(crate) fn and_newer(mut self, qemu: PathBuf) -> Self {
        self.variables.push(("VMWRIGHT_QEMU_NEWER", qemu));
        self
    }

    /// Cargo with the rig in its environment, at the root of the checkout.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = run::cargo();
        command.current_dir(workspace::root());
        for (name, value) in &self.variables {
            command.env(name, value);
        }
        command
    }
}
