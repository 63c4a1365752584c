"""What host tooling asks of a hypervisor plugin beyond the hooks of a run.

A hypervisor is built from a URI and a scratch folder and does nothing until it is asked. It is the only part that knows
libvirt, domain XML and QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from backupcore.model import VM, BackupRun, Estimate

__all__ = ["Finding", "Hypervisor", "VMDisk", "VMState", "open_hypervisor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VMDisk:
    """A disk of a VM as it is now. `left_out` says why a backup would not hold it, or "" if it would."""

    id: str
    path: str
    format: str
    virtual_size: int | None
    left_out: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VMState:
    """A VM as it is now. `being_read` is whether a backup reads its disks: if it is off, it cannot start until then."""

    vm: VM
    state: Literal["running", "paused", "off", "saved", "other"]
    disks: tuple[VMDisk, ...]
    being_read: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer of a check: what was looked at, whether it is as a backup needs it, and what to do if not."""

    subject: str
    ok: bool
    detail: str
    hint: str = ""


class Hypervisor(Protocol):
    """The hypervisor's side of `vmkeep vm`, `backup --dry-run`, `check`, and of a restored definition."""

    def vms(self) -> Sequence[VMState]:
        """Every VM of this host, by name. HypervisorError if libvirt is away."""

    def find(self, vm: str, defaults: Mapping[str, str] | None = None) -> VMState:
        """The VM of that name or UUID. NotFound, with near names as a hint.

        With `defaults`, the settings of VMs that say nothing themselves, its disks are shown as the VM's own settings
        over these choose them; without, by rule alone.
        """

    def estimate(self, run: BackupRun) -> Estimate:
        """What `prebackup` would take for this run, raising what it would raise, and touching nothing."""

    def forget(self, vm: VM) -> Sequence[str]:
        """Remove what backupcore made on this VM to tell changes: checkpoints, bitmaps, overlays; their names.

        The next backup of each of its chains is then a full.
        """

    def settings(self, vm: VM) -> Mapping[str, str]:
        """The VM's backup configuration out of its own metadata: upper-case keys (``MODE``) and their values."""

    def configure(self, vm: VM, settings: Mapping[str, str]) -> None:
        """Replace the VM's backup configuration, for the running VM and for its next start."""

    def definition(
        self,
        stored: bytes,
        *,
        name: str,
        disks: Mapping[str, Path],
        nvram: Path | None,
        no_ip: bool,
        no_nic: bool,
        boot: Mapping[str, Path] | None = None,
    ) -> bytes:
        """A restored VM's definition from the ``vm.xml`` of a backup.

        `disks` maps each restored disk's ID to its file; disks that are not in it are dropped. The stored XML is
        untrusted: only listed elements are carried over. `no_ip` drops the NICs' addresses (MACs and IPs), `no_nic`
        the NICs. `boot` are restored files that the VM boots from (``kernel``, ``initrd``, ``dtb``). The result has
        `name` and no UUID, so it can be defined beside the VM that it comes from. IntegrityError if `stored` is no
        domain definition.
        """

    def check(self) -> Sequence[Finding]:
        """Is everything here that backups need: libvirt and QEMU versions, folders that QEMU can write to?"""


def open_hypervisor(name: str, *, uri: str, scratch: Path) -> Hypervisor:
    """The hypervisor plugin of that entry-point name (group ``backupcore.hypervisors``); only that one is loaded."""
    from backupcore.plugins import load  # noqa: PLC0415 - entry points are looked up only where a plugin is opened

    plugin: Hypervisor = load("backupcore.hypervisors", name)(uri=uri, scratch=scratch)
    return plugin
