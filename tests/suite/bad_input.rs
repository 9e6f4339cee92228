//! Bad input is refused with an error that tells a person what is wrong, and nothing is lost.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use driver::{Driver, ErrorKind, Guest, Kernel, StartOptions};
use transport_host::Transports;

use crate::guests::is_off;
use crate::harness::tests;
use crate::rig::{Rig, is_clean};

tests! {
    a_description_with_nonsense_is_refused_by_member,
    a_name_that_is_taken_is_refused_and_the_first_stays,
    a_socket_that_is_no_monitor_is_called_so,
    a_path_that_does_not_exist_is_named,
    a_kernel_that_does_not_exist_is_named_and_the_domain_is_not_kept,
    a_text_file_among_the_plugins_costs_no_other,
    a_qemu_that_exits_at_once_leaves_its_last_words_in_the_error,
    a_qemu_that_is_no_qemu_is_named,
    a_run_directory_that_others_may_write_to_is_refused,
    a_second_driver_on_one_run_directory_is_refused,
    a_save_to_a_relative_path_is_refused,
    a_run_directory_that_is_too_long_for_sockets_is_called_so,
}

async fn a_description_with_nonsense_is_refused_by_member(rig: Rig) {
    let error = rig
        .driver
        .define(Guest {
            memory_mib: 0,
            ..rig.empty("web")
        })
        .await
        .expect_err("no memory");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        format!("{error:#}").contains("memory_mib: 0 MiB"),
        "{error:#}"
    );
    assert!(rig.driver.list().is_empty());
}

async fn a_name_that_is_taken_is_refused_and_the_first_stays(rig: Rig) {
    let first = rig
        .driver
        .define(rig.empty("web"))
        .await
        .expect("it is free");
    let error = rig
        .driver
        .define(rig.empty("web"))
        .await
        .expect_err("taken");
    assert_eq!(error.kind(), ErrorKind::Exists);
    let same = Guest {
        uuid: first.uuid(),
        ..rig.empty("other")
    };
    assert_eq!(
        rig.driver.define(same).await.expect_err("taken").kind(),
        ErrorKind::Exists
    );
    assert!(
        rig.driver.by_name("other").is_none(),
        "the name is free again"
    );
    assert_eq!(
        rig.driver.by_name("web").map(|found| found.uuid()),
        Some(first.uuid())
    );
}

async fn a_socket_that_is_no_monitor_is_called_so(rig: Rig) {
    let path = rig.dir.path().join("smtp.sock");
    let listener = UnixListener::bind(&path).expect("it can be bound");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("somebody connects");
        // The client may have hung up at the first line.
        let _told = stream.write_all(b"220 mail.example ESMTP\r\n");
        std::io::copy(&mut stream, &mut std::io::sink())
    });
    let error = rig
        .driver
        .attach(format!("unix:{}", path.display()))
        .await
        .expect_err("it is no monitor");
    assert_eq!(error.kind(), ErrorKind::Monitor, "{error:#}");
    assert!(
        format!("{error:#}").contains("220 mail.example"),
        "it shows what came instead: {error:#}"
    );
    assert!(rig.driver.list().is_empty(), "nothing is kept of it");
    server
        .join()
        .expect("no panic")
        .expect("the client hung up");
}

async fn a_path_that_does_not_exist_is_named(rig: Rig) {
    let error = rig
        .driver
        .attach("unix:/no/such/qmp.sock")
        .await
        .expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Transport, "{error:#}");
    assert!(
        format!("{error:#}").contains("/no/such/qmp.sock"),
        "{error:#}"
    );
    let error = rig
        .driver
        .attach("carrier-pigeon:coop")
        .await
        .expect_err("no such transport");
    assert!(format!("{error:#}").contains("carrier-pigeon"), "{error:#}");
}

async fn a_kernel_that_does_not_exist_is_named_and_the_domain_is_not_kept(rig: Rig) {
    let guest = Guest {
        kernel: Some(Kernel::new("/no/such/vmlinuz")),
        ..rig.empty("web")
    };
    let error = rig
        .driver
        .start(guest, StartOptions::default())
        .await
        .expect_err("there is no kernel");
    assert_eq!(error.kind(), ErrorKind::Io, "{error:#}");
    assert!(error.to_string().contains("/no/such/vmlinuz"), "{error}");
    assert!(rig.driver.by_name("web").is_none());
    rig.driver
        .start(rig.empty("web"), StartOptions::default())
        .await
        .expect("the name is free");
}

async fn a_text_file_among_the_plugins_costs_no_other(rig: Rig) {
    let folder = rig.dir.path().join("transports");
    fs::create_dir(&folder).expect("it can be made");
    fs::set_permissions(&folder, Permissions::from_mode(0o755)).expect("it is ours");
    let good = "libtransport_unix.so";
    fs::copy(rig.env.transports.join(good), folder.join(good)).expect("it can be copied");
    let text = folder.join("libtransport_letter.so");
    fs::write(&text, "Dear loader,\n").expect("it can be written");
    fs::set_permissions(&text, Permissions::from_mode(0o644)).expect("it is ours");

    let mut builder = Transports::builder();
    let report = builder.load_dir(&folder).expect("the folder can be read");
    assert_eq!(report.loaded.len(), 1);
    let [refused] = &report.refused[..] else {
        panic!("{report:?}")
    };
    assert!(
        refused.error.to_string().contains("libtransport_letter.so"),
        "{}",
        refused.error
    );
    let driver = Driver::builder(
        builder.build().expect("one is loaded"),
        rig.dir.path().join("run2"),
    );
    let driver = driver.qemu(&rig.env.qemu).build().expect("it can be made");
    let domain = driver
        .start(rig.empty("web"), StartOptions::default())
        .await
        .expect("through the good one");
    domain.destroy().await.expect("it ends");
}

async fn a_qemu_that_exits_at_once_leaves_its_last_words_in_the_error(rig: Rig) {
    let guest = Guest {
        machine: "no-such-machine".into(),
        ..rig.empty("web")
    };
    let domain = rig
        .driver
        .define(guest)
        .await
        .expect("the description could make sense");
    let error = domain
        .start()
        .await
        .expect_err("QEMU knows no such machine");
    assert_eq!(error.kind(), ErrorKind::Process, "{error:#}");
    assert!(
        error.to_string().contains("unsupported machine type"),
        "{error}"
    );
    assert!(
        error.to_string().contains("exited with status 1"),
        "{error}"
    );
    // The next start waits for the clean-up, fails the same way, and nothing is left behind.
    domain.start().await.expect_err("still");
    is_off(&domain).await;
    domain.remove().await.expect("it is off and cleaned up");
    assert!(is_clean(&rig, &domain));
}

async fn a_qemu_that_is_no_qemu_is_named(rig: Rig) {
    let transports = rig.env.transports().expect("the staged plugins load");
    let driver = Driver::builder(transports, rig.dir.path().join("run3"))
        .qemu("/no/such/qemu")
        .build();
    let driver = driver.expect("it can be made");
    let error = driver
        .start(rig.empty("web"), StartOptions::default())
        .await
        .expect_err("there is none");
    assert_eq!(error.kind(), ErrorKind::Io, "{error:#}");
    assert!(error.to_string().contains("/no/such/qemu"), "{error}");
}

async fn a_run_directory_that_is_too_long_for_sockets_is_called_so(rig: Rig) {
    let transports = rig.env.transports().expect("the staged plugins load");
    let deep = rig.dir.path().join("x".repeat(90));
    let error = Driver::builder(transports, deep)
        .build()
        .expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:#}");
    assert!(
        error.to_string().contains("shorter run directory"),
        "{error}"
    );
}

async fn a_run_directory_that_others_may_write_to_is_refused(rig: Rig) {
    let open = rig.dir.path().join("open");
    fs::create_dir(&open).expect("it can be made");
    fs::set_permissions(&open, Permissions::from_mode(0o777)).expect("it is ours");
    let transports = rig.env.transports().expect("the staged plugins load");
    let error = Driver::builder(transports, open)
        .build()
        .expect_err("not private");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:#}");
    assert!(error.to_string().contains("mode 777"), "{error}");
}

async fn a_second_driver_on_one_run_directory_is_refused(rig: Rig) {
    let transports = rig.env.transports().expect("the staged plugins load");
    let error = Driver::builder(transports, rig.dir.path().join("run"))
        .build()
        .expect_err("it is in use");
    assert_eq!(error.kind(), ErrorKind::Exists, "{error:#}");
}

async fn a_save_to_a_relative_path_is_refused(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let error = domain
        .save("web.save", driver::SaveOptions::default())
        .await
        .expect_err("relative to what");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:#}");
    assert!(domain.query_status().await.expect("it answers").running);
}
