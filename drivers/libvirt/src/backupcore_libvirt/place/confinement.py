"""What confines QEMU beyond its user, and what an admin does where it refuses something."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from backupcore.typed import typed

__all__ = ["described", "enforcing", "remedy"]

_APPARMOR = Path("/etc/apparmor.d")
_SELINUX = Path("/sys/fs/selinux/enforce")


def enforcing() -> bool:
    """Whether SELinux refuses what its rules do not allow, or only reports it (permissive); False where it is not."""
    try:
        return _SELINUX.read_text().strip() == "1"
    except OSError:
        return False


def described(models: Collection[str]) -> str:
    """The security models under which libvirt runs VMs, for a line of text."""
    if "selinux" in models:
        return f"SELinux, {'enforcing' if enforcing() else 'permissive'}"
    return "AppArmor" if "apparmor" in models else ", ".join(models) or "no confinement"


def remedy(models: Collection[str], scratch: Path) -> str:
    """What lets QEMU use the scratch folder, for the hint of an error."""
    if "apparmor" in models:
        return (
            f"AppArmor confines QEMU: put the line '{scratch}/** rwk,' into {_local_rules()}, then restart the VM; "
            "'dmesg | grep DENIED' shows what was refused."
        )
    if "selinux" in models:
        return (
            "SELinux confines QEMU: 'ausearch -m avc -ts recent' shows what was refused. Let libvirt label what lies "
            f"there: {typed('semanage fcontext -a -t virt_image_t', f'{scratch}(/.*)?')} && "
            f"{typed('restorecon -R', scratch)}"
        )
    return f"Let QEMU's user pass every folder on the way to {scratch}, or set 'scratch' to another folder."


def _local_rules() -> Path:
    """Where a host's own rules for all VMs go: a folder since libvirt 10, one file before (Debian 13 and 12)."""
    folder = _APPARMOR / "abstractions/libvirt-qemu.d"
    return folder / "vmkeep" if folder.is_dir() else _APPARMOR / "local/abstractions/libvirt-qemu"
