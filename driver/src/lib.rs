//! QEMU guests under job rules: start, attach, query, save, migrate, destroy.
