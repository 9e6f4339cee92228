//! A scripted QEMU.
