"""Empty images for QEMU to write to, made before the instant instead of by libvirt within it."""
