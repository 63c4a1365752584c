"""The ways of holding one instant of a VM's disks; `choice` says which VM is held in which way.

- `live_job`: libvirt's backup job of a VM that runs;
- `temporary_overlays`: overlays for the time of one run, of a VM whose QEMU a backup job would kill;
- `off_nbd`: `qemu-nbd` on the disks of a VM that is off;
- `overlays`: overlays that stay between backups (INCREMENT_MODE=SNAPSHOT).
"""
