//! The transports against their real peers: QEMU's monitor and a real `qemu-ga`, dialed and dialing, over every plugin
//! as the daemon loads it.
//!
//! ```text
//!  monitor.rs  QMP over tcp and unix: QEMU listens, or QEMU dials us
//!  agent.rs    the agent over tcp out of a guest, over unix on this machine
//!  vsock.rs    inside a guest, whose kernel has the loopback: the conformance kit, the agent
//!  hybrid.rs   a guest's vsock that ends in a unix socket of this machine, either way
//!    ├─ inside.rs  a guest that runs programs of this machine
//!    └─ parts.rs   what else they share: a QEMU that reports to us, an agent's paces
//! ```

mod agent;
mod hybrid;
mod inside;
mod monitor;
mod parts;
mod vsock;

use crate::harness::tests;

use self::agent::{
    a_qemu_ga_that_listens_on_a_unix_path_is_asked_and_known_by_its_pid,
    an_agent_behind_a_tcp_chardev_is_asked_and_runs_a_program,
};
use self::hybrid::{
    a_guest_that_dials_its_host_is_brought_to_a_unix_listener_of_ours,
    an_agent_behind_a_vhost_user_vsock_is_asked_through_its_unix_socket,
};
use self::monitor::{
    a_monitor_on_tcp_is_spoken_to_and_then_taken_in_by_the_driver,
    a_monitor_on_unix_is_spoken_to_and_then_taken_in_by_the_driver,
    a_qemu_that_dials_us_over_tcp_is_served_and_comes_back,
    a_qemu_that_dials_us_over_unix_is_known_by_uid_and_pid_and_comes_back,
};
pub(crate) use self::vsock::visitor;
use self::vsock::{
    an_agent_that_listens_on_vsock_is_asked_from_inside_its_guest,
    over_vsock_a_daemon_serves_the_contexts_on_its_list_alone,
    the_vsock_plugin_conforms_in_a_guest_whose_kernel_has_the_loopback,
};

tests! {
    a_monitor_on_tcp_is_spoken_to_and_then_taken_in_by_the_driver,
    a_monitor_on_unix_is_spoken_to_and_then_taken_in_by_the_driver,
    a_qemu_that_dials_us_over_tcp_is_served_and_comes_back,
    a_qemu_that_dials_us_over_unix_is_known_by_uid_and_pid_and_comes_back,
    an_agent_behind_a_tcp_chardev_is_asked_and_runs_a_program,
    a_qemu_ga_that_listens_on_a_unix_path_is_asked_and_known_by_its_pid,
    over_vsock_a_daemon_serves_the_contexts_on_its_list_alone,
    the_vsock_plugin_conforms_in_a_guest_whose_kernel_has_the_loopback,
    an_agent_that_listens_on_vsock_is_asked_from_inside_its_guest,
    an_agent_behind_a_vhost_user_vsock_is_asked_through_its_unix_socket,
    a_guest_that_dials_its_host_is_brought_to_a_unix_listener_of_ours,
}
