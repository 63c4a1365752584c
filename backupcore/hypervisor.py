"""What host tooling asks of a hypervisor plugin beyond the hooks of a run.

A hypervisor is built from a URI and a scratch folder and does nothing until it is asked. It is the only part that knows
libvirt, domain XML and QEMU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from backupcore.model import VM, BackupRun, Estimate

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.disk.extents import Extent
    from backupcore.disk.qcow2 import Blocks

__all__ = [
    "EFFECTS",
    "Checkpoint",
    "Definition",
    "DiskFile",
    "Effect",
    "Finding",
    "Hypervisor",
    "Pool",
    "StateName",
    "Unchanged",
    "VMDisk",
    "VMState",
    "open_hypervisor",
]

StateName = Literal["running", "paused", "asleep", "crashed", "shutting down", "off", "saved", "other"]
"""What a VM does: `asleep` is one that its guest has suspended, `crashed` one that is kept as it was when it crashed
(libvirt's ``<on_crash>preserve``), `other` what the hypervisor plugin does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VMDisk:
    """A disk of a VM as it is now. `left_out` says why a backup would not hold it, or "" if it would.

    Where `path` is an overlay of ours, `lies_on` is the disk's own file or device below it.
    """

    id: str
    path: str
    format: str
    virtual_size: int | None
    left_out: str = ""
    lies_on: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VMState:
    """A VM as it is now. `being_read` is whether a backup reads its disks: if it is off, it cannot start until then.

    `remarks` are what somebody should see to, a line each: what a backup has left on its disks. `state_reason` says why
    it is in its state, where that is worth a word, or "".
    """

    vm: VM
    state: StateName
    disks: tuple[VMDisk, ...]
    being_read: bool = False
    remarks: tuple[str, ...] = ()
    state_reason: str = ""

    @property
    def state_in_full(self) -> str:
        """The state, and its reason."""
        return f"{self.state} ({self.state_reason})" if self.state_reason else self.state


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint, or a bitmap, that backupcore has made on a VM: its name, its point, and who has made it.

    `installation` is "" in one of a version that knew no installations.
    """

    name: str
    point: str
    installation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer of a check: what was looked at, whether it is as a backup needs it, and what to do if not."""

    subject: str
    ok: bool
    detail: str
    hint: str = ""


Effect = Literal["will not boot", "loses a device", "cosmetic"]
EFFECTS: tuple[Effect, ...] = ("will not boot", "loses a device", "cosmetic")
"""What it does to a guest that a part of its definition is missing, gravest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A restored VM's definition, and what of the stored one it does not hold: paths such as ``devices/hostdev``.

    `effects` are the paths of `left_out` by what their loss does to the guest. `nvram_format` is what it says of the
    file of the firmware's variables: raw or qcow2.
    """

    xml: bytes
    left_out: tuple[str, ...] = ()
    effects: Mapping[Effect, tuple[str, ...]] = field(default_factory=dict)
    nvram_format: Literal["raw", "qcow2"] = "raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFile:
    """The file that a disk of a powered-off VM consists of: its path without symbolic links, and its format.

    The variables of the VM's firmware and the state of its TPM are no disks: their format is qcow2, or "" for a file
    that holds nothing else. `needed` is whether the VM cannot start without it.
    """

    path: Path
    format: str
    needed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A storage pool of the hypervisor: its volumes are the files in `folder`, or block devices where that is None."""

    name: str
    kind: str
    folder: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchanged:
    """What of one disk is said not to have been written since a point, and where it can be read, at one instant.

    `extents` are whole clusters in guest order, DATA or ZERO as the disk reads now; `virtual_size` is the disk's size
    now. `why_not` says why nothing tells what changed; then there are no `blocks` and no extents.
    """

    id: str
    virtual_size: int = 0
    extents: Sequence[Extent] = ()
    blocks: Blocks | None = None
    why_not: str = ""


class Hypervisor(Protocol):
    """The hypervisor's side of `vmkeep vm`, `backup --dry-run`, `check`, and of a restored definition."""

    def vms(self) -> Sequence[VMState]:
        """Every VM of this host, by name. HypervisorError if libvirt is away."""

    def find(self, vm: str, defaults: Mapping[str, str] | None = None) -> VMState:
        """The VM of that name or UUID. NotFound, with near names as a hint; ConfigError where it is the name of one VM
        and the UUID of another.

        With `defaults`, the settings of VMs that say nothing themselves, its disks are shown as the VM's own settings
        over these choose them; without, by rule alone.
        """

    def estimate(self, run: BackupRun) -> Estimate:
        """What `prebackup` would take for this run, raising what it would raise, and touching nothing."""

    def unchanged(
        self, run: BackupRun, disks: Collection[str], ctx: Context
    ) -> AbstractContextManager[Sequence[Unchanged]]:
        """Hold one instant of these disks, and tell what is said not to have changed since `run.parent`.

        As `prebackup` does for an increment, with all that it looks at and puts right first; but no checkpoint is made
        and the guest is not brought to rest. IncrementImpossible where nothing tells of any of the disks. At the end of
        the block all is released, whatever happened, and what a killed process leaves the next run clears away. Whoever
        reads has closed its connections by then.
        """

    def checkpoints(self, vm: VM) -> Sequence[Checkpoint]:
        """What backupcore has made on this VM to tell changes from, whichever installation it was."""

    def forget(self, vm: VM, installation: str = "", *, foreign: bool = False) -> Sequence[str]:
        """Remove what `installation` made on this VM to tell changes: checkpoints, bitmaps, overlays; their names.

        Checkpoints that say no installation are anybody's, and go, too. The next backup of each chain is then a full.
        With `foreign` those of all other installations go instead, and nothing else. Busy where a job runs on the VM.
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
        keep_uuid: bool = False,
        new_mac: bool = False,
        boot: Mapping[str, Path] | None = None,
        redact: bool = False,
    ) -> Definition:
        """A restored VM's definition from the ``vm.xml`` of a backup.

        `disks` maps each restored disk's ID to its file; disks that are not in it are dropped. The stored XML is
        untrusted: only listed elements are carried over. `no_ip` drops the NICs' addresses (MACs and IPs), `no_nic`
        the NICs, `new_mac` the MACs only, `redact` all text in which people may have written secrets. `boot` are
        restored files that the VM boots from (``kernel``, ``initrd``, ``dtb``). The result has `name` and, without
        `keep_uuid`, no UUID, so it can be defined beside the VM that it comes from. IntegrityError if `stored` is no
        domain definition.
        """

    def require_definable(self, name: str, uuid: str | None, folder: Path) -> None:
        """That a VM of this name, and of this UUID if it is to be kept, can be defined on disks in `folder`.

        ConfigError if there is one already; AccessDenied if the VM could not reach the folder.
        """

    def define(self, definition: bytes) -> VM:
        """Define a VM; it is not started. An existing one is never changed: HypervisorError."""

    def pool(self, name: str) -> Pool:
        """The storage pool of that name, if disks can be restored into it.

        NotFound, with the names that there are; HypervisorError if it is not active; UnsupportedOperation, with what to
        do instead, for a kind that has neither a folder nor block devices that can be made one by one.
        """

    def add_volume(self, pool: Pool, volume: str, size: int) -> Path:
        """A new volume of a pool without a folder, of `size` bytes at least: its device. ConfigError if it exists."""

    def remove_volume(self, pool: Pool, volume: str) -> None:
        """Remove a volume that `add_volume` has made."""

    def refresh(self, pool: Pool) -> None:
        """Have the hypervisor list what was put into the folder of a pool."""

    def require_replaceable(self, vm: VM, disks: Sequence[str], *, nvram: bool = False) -> Mapping[str, DiskFile]:
        """That these disks of a VM may be replaced by others now, and the file of each.

        With `nvram` the files of its firmware's variables and of its TPM's state as well, as "nvram" and "tpm", if the
        VM has them. Busy if the VM is not
        powered off, or somebody has a disk open. UnsupportedOperation where more than that file belongs to a disk, or
        where the file belongs to other VMs as well. NotFound for a disk that the VM has not got.
        """

    def keep_closed(self, files: Sequence[Path]) -> AbstractContextManager[None]:
        """Until the end of the block no VM can start on these files, by whatever name. Busy if one is in use."""

    def fit(self, written: Path, old: DiskFile) -> None:
        """Make a qcow2 file what takes the place of `old`: its format, owner and mode; checked by the VM's own tools.

        Of what is no disk the contents stay as they were written.

        IntegrityError, and the old file untouched, if the tools find anything.
        """

    def recover(self, vm: VM, spent: Collection[str], ctx: Context, installation: str = "") -> None:
        """Put right what dead runs of this VM have left, whatever is known of them, and tell `ctx.did` of each thing.

        Guests frozen or stopped, jobs, files; and the checkpoints of the points in `spent` go. Those of other points
        stay: they may be of a catalog that the caller does not have. The caller knows that no run of its own of this VM
        lives. Overlays of other installations than `installation` stay. Repeated, it finds nothing to do.
        HypervisorError says what hinders it.
        """

    def check(self, *, try_vm: bool = True) -> Sequence[Finding]:
        """Is everything here that backups need: libvirt and QEMU versions, folders that QEMU can write to?

        With `try_vm` a backup is tried on a VM that is made for it, as far as the hypervisor can do that without harm.
        """


def open_hypervisor(name: str, *, uri: str, scratch: Path) -> Hypervisor:
    """The hypervisor plugin of that entry-point name (group ``backupcore.hypervisors``); only that one is loaded."""
    from backupcore.plugins import load, loading  # noqa: PLC0415 - entry points are looked up only where one is opened

    kind = load("backupcore.hypervisors", name)
    with loading(f"hypervisor plugin {name!r}", but=(OSError,)):
        plugin: Hypervisor = kind(uri=uri, scratch=scratch)
    return plugin
