"""/dev/kvm that root may open and QEMU's user may not: a trap on machines without udev (containers, small cloud VMs).

libvirt (seen with 9.0) asks QEMU what it can do with CAP_DAC_OVERRIDE kept, so QEMU reports KVM; then it sees that
QEMU's user cannot open /dev/kvm and throws the answer away as outdated. Every look at it asks QEMU again, at 2 to 4 s a
time: starting one VM takes over a minute. Where udev runs, /dev/kvm belongs to the group kvm and all is well.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

_DEVICE = Path("/dev/kvm")
_EMULATOR = "/usr/bin/qemu-system-x86_64"
_WITHOUT_KVM = f"""#!/bin/sh
# QEMU as it is, but libvirt's question "what can you do?" is answered without KVM.
for argument; do
    shift
    [ "$argument" = none,accel=kvm:tcg ] && argument=none,accel=tcg
    set -- "$@" "$argument"
done
exec {_EMULATOR} "$@"
"""


def closed_to(user: str) -> bool:
    """Whether /dev/kvm is there, but not for this user."""
    if not _DEVICE.exists():
        return False
    account = pwd.getpwnam(user)
    status = _DEVICE.stat()
    if status.st_uid == account.pw_uid:
        allowed = status.st_mode >> 6
    elif status.st_gid in os.getgrouplist(user, account.pw_gid):
        allowed = status.st_mode >> 3
    else:
        allowed = status.st_mode
    return allowed & 0o6 != 0o6


def emulator_without_kvm(folder: Path) -> Path:
    """A program in `folder`, which QEMU's user can reach, that runs QEMU and never reports KVM."""
    script = folder / "qemu-without-kvm"
    if not script.exists():
        fresh = folder / f"qemu-without-kvm.{os.getpid()}"
        fresh.write_text(_WITHOUT_KVM)
        fresh.chmod(0o755)
        fresh.rename(script)  # in one step: another worker may be about to run it
    return script
