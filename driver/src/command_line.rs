//! A guest's description as QEMU's command line. Pure: what is opened and passed is the caller's matter.
//!
//! Whatever holds a path or a name from outside goes in as JSON or as an argument of its own, so that a comma in it
//! injects nothing. The sandbox denies QEMU what it needs only to hurt its host.

use std::ffi::OsString;
use std::os::fd::RawFd;

use serde_json::{Value, json};

use crate::devices;
use crate::guest::{AgentChannel, Guest, Serial};

/// Descriptors the child finds open.
#[derive(Clone, Debug)]
pub(crate) struct Channels {
    /// A listening socket for the monitor.
    pub(crate) monitor: RawFd,
    /// A listening socket for the agent's channel, where the guest has one.
    pub(crate) agent: Option<RawFd>,
    /// The serial port's file or listening socket, where the guest has one.
    pub(crate) serial: Option<RawFd>,
    /// The tap device of each card, where it is connected to one.
    pub(crate) taps: Vec<Option<RawFd>>,
}

/// The arguments after the program's name. The guest does not run until it is told to (`-S`); with `incoming` it waits
/// for its state first.
pub(crate) fn arguments(guest: &Guest, channels: &Channels, incoming: bool) -> Vec<OsString> {
    let mut line = Line(Vec::new());
    line.flag("-nodefaults").flag("-no-user-config").flag("-S");
    line.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    line.option("-name", format!("guest={}", guest.name));
    line.option("-uuid", guest.uuid.to_string());
    line.option("-machine", &guest.machine);
    line.option("-accel", guest.accelerator.name());
    line.option("-m", format!("size={}M", guest.memory_mib));
    line.option("-smp", format!("cpus={}", guest.vcpus));
    line.option("-display", "none");
    line.option("-msg", "timestamp=on");
    if incoming {
        line.option("-incoming", "defer");
    }

    // It waits for us before it goes on: with `wait=off` a client that is early meets QEMU while it still sets the
    // monitor up, and then 3 of 1500 never answered their first command (measured on 7.2), to any client.
    line.option(
        "-chardev",
        format!(
            "socket,id=monitor,fd={},server=on,wait=on",
            channels.monitor
        ),
    );
    line.option("-mon", "chardev=monitor,mode=control");
    if let (Serial::File(_), Some(fd)) = (&guest.serial, channels.serial) {
        line.option("-add-fd", format!("fd={fd},set=1,opaque=serial"));
        line.option("-chardev", "file,id=serial0,path=/dev/fdset/1,append=on");
        line.option("-serial", "chardev:serial0");
    }
    if let (Serial::Log(_), Some(fd)) = (&guest.serial, channels.serial) {
        let socket = format!("socket,id=serial0,fd={fd},server=on,wait=off");
        line.option("-chardev", socket);
        line.option("-serial", "chardev:serial0");
    }
    if let (AgentChannel::Virtio, Some(fd)) = (guest.agent, channels.agent) {
        line.option(
            "-chardev",
            format!("socket,id=agent,fd={fd},server=on,wait=off"),
        );
        line.json(
            "-device",
            json!({"driver": "virtio-serial-pci", "id": "channels"}),
        );
        line.json(
            "-device",
            json!({
                "driver": "virtserialport", "id": "agent", "bus": "channels.0", "chardev": "agent",
                "name": "org.qemu.guest_agent.0",
            }),
        );
    }
    if guest.balloon {
        line.json(
            "-device",
            json!({"driver": "virtio-balloon-pci", "id": "balloon"}),
        );
    }

    if let Some(kernel) = &guest.kernel {
        line.option("-kernel", &kernel.image);
        if let Some(initrd) = &kernel.initrd {
            line.option("-initrd", initrd);
        }
        if !kernel.arguments.is_empty() {
            line.option("-append", &kernel.arguments);
        }
    }
    for port in devices::ports(guest) {
        line.json("-device", port);
    }
    for (place, disk) in guest.disks.iter().enumerate() {
        let node = devices::first_node(&disk.name);
        line.json("-blockdev", devices::image_node(disk, node, None));
        let device = devices::disk_at(guest, disk, node, Some(place + 1));
        line.json("-device", device);
    }
    for (network, tap) in guest.networks.iter().zip(&channels.taps) {
        let tap = tap.map(|tap| tap.to_string());
        line.json("-netdev", devices::network_backend(network, tap.as_deref()));
        line.json("-device", devices::card(guest, network));
    }
    line.0
        .extend(guest.extra_arguments.iter().map(OsString::from));
    line.0
}

struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    fn json(&mut self, name: &str, value: Value) {
        self.option(name, value.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Disk, DiskFormat, Kernel, Network, NetworkBackend};

    const CHANNELS: Channels = Channels {
        monitor: 7,
        agent: Some(8),
        serial: Some(9),
        taps: Vec::new(),
    };

    fn after<'a>(line: &'a [OsString], option: &str) -> Vec<&'a str> {
        line.windows(2)
            .filter(|pair| pair[0] == *option)
            .map(|pair| pair[1].to_str().unwrap())
            .collect()
    }

    #[test]
    fn a_comma_in_a_path_injects_nothing() {
        let evil = "/images/x,readonly=off,driver=nbd\"}.raw";
        let guest = Guest {
            disks: vec![Disk {
                read_only: true,
                ..Disk::new("root", evil, DiskFormat::Raw)
            }],
            kernel: Some(Kernel::new("/boot/a,b")),
            serial: Serial::File("/log/a,path=/etc/passwd".into()),
            ..Guest::new("web")
        };
        let line = arguments(&guest, &CHANNELS, false);
        let blockdev: Value = serde_json::from_str(after(&line, "-blockdev")[0]).unwrap();
        assert_eq!(blockdev["file"]["filename"], evil);
        assert_eq!(blockdev["read-only"], true);
        assert_eq!(after(&line, "-kernel"), ["/boot/a,b"]);
        let mentions = line
            .iter()
            .filter(|argument| argument.to_str().unwrap().contains("passwd"))
            .count();
        assert_eq!(mentions, 0, "the serial file goes in as a descriptor");
    }

    #[test]
    fn the_sandbox_denies_spawning_and_nothing_is_there_by_default() {
        let line = arguments(&Guest::new("web"), &CHANNELS, false);
        assert!(after(&line, "-sandbox")[0].contains("spawn=deny"));
        assert!(line.contains(&"-nodefaults".into()) && line.contains(&"-no-user-config".into()));
        assert!(
            line.contains(&"-S".into()),
            "no guest runs before the driver says so"
        );
    }

    #[test]
    fn a_guest_without_an_agent_has_no_channel_for_one() {
        let line = arguments(
            &Guest {
                agent: AgentChannel::None,
                ..Guest::new("web")
            },
            &CHANNELS,
            true,
        );
        assert_eq!(after(&line, "-chardev").len(), 1);
        assert_eq!(after(&line, "-incoming"), ["defer"]);
    }

    #[test]
    fn cards_are_connected_and_keep_their_addresses() {
        let tap = NetworkBackend::Tap("tap0".into());
        let guest = Guest {
            networks: vec![
                Network::new("lan", tap),
                Network::new("wan", NetworkBackend::User),
            ],
            ..Guest::new("web")
        };
        let channels = Channels {
            taps: vec![Some(11), None],
            ..CHANNELS
        };
        let line = arguments(&guest, &channels, false);
        let json = |text: &&str| serde_json::from_str::<Value>(text).unwrap();
        let backends: Vec<_> = after(&line, "-netdev").iter().map(json).collect();
        assert_eq!(
            backends[0],
            json!({"type": "tap", "id": "lan-net", "fd": "11"})
        );
        assert_eq!(backends[1], json!({"type": "user", "id": "wan-net"}));
        let devices = after(&line, "-device");
        let mac = guest.networks[1].mac.to_string();
        let cards: Vec<_> = devices
            .iter()
            .filter(|text| text.contains("netdev"))
            .collect();
        assert!(cards[1].contains(&mac) && cards[1].contains("wan-net"));
    }
}
