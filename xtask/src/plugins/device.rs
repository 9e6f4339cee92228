//! The peer of `vsock-unix:`: a vsock device that runs beside QEMU, from the registry.
//!
//! It takes minutes to build, so only `integration` fetches it. Without it two tests are skipped by name.

use crate::error::Failure;
use crate::{run, workspace};

const PROGRAM: &str = "vhost-device-vsock";
/// The one that was seen to work, with QEMU 7.2 and 10.0.
const VERSION: &str = "0.3.0";
/// What it is for.
const TESTS: [&str; 2] = [
    "real::transports::an_agent_behind_a_vhost_user_vsock_is_asked_through_its_unix_socket",
    "real::transports::a_guest_that_dials_its_host_is_brought_to_a_unix_listener_of_ours",
];

/// Whether a filter of tests lets one through that needs it.
pub(crate) fn is_wanted(filter: Option<&str>) -> bool {
    filter.is_none_or(|filter| TESTS.iter().any(|test| test.contains(filter)))
}

/// Builds it into `target/tools`, where the suite looks, unless the machine has it.
pub(crate) fn fetch() -> Result<(), Failure> {
    let named = std::env::var_os("VMWRIGHT_VHOST_VSOCK").is_some();
    if named || run::find_program(PROGRAM).is_some() {
        return Ok(());
    }
    let tools = workspace::target()?.join("tools");
    if tools.join("bin").join(PROGRAM).is_file() {
        return Ok(());
    }
    let mut install = run::cargo();
    install.args(["install", PROGRAM, "--version", VERSION, "--locked"]);
    run::run_aside(install.arg("--root").arg(&tools))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_wanted_where_its_tests_run() {
        assert!(is_wanted(None) && is_wanted(Some("transports")) && is_wanted(Some("vsock")));
        assert!(!is_wanted(Some("save")));
    }
}
