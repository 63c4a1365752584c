"""A hypervisor whose VMs are bytes in memory: tests write to a disk and back it up, without QEMU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from backupcore import hookimpl
from backupcore.context import Context
from backupcore.disk.extents import Extent, Kind
from backupcore.disk.qcow2 import CLUSTER, DiskArtifact, Layout, MemoryBlocks
from backupcore.errors import Busy, ConfigError, IncrementImpossible, NotFound
from backupcore.hypervisor import Checkpoint, Definition, DiskFile, Finding, Pool, Unchanged, VMDisk, VMState
from backupcore.model import (
    VM,
    Artifact,
    BackupRun,
    BytesArtifact,
    Disk,
    DiskEstimate,
    Estimate,
    Outcome,
    Prepared,
    RunState,
)
from backupcore.near import near

__all__ = ["MemoryGuest", "MemoryHypervisor"]


@dataclass
class MemoryGuest:
    """One VM. `checkpoints` maps a point to the clusters written since, per disk; `files` are further artifacts.

    `owners` says which installation has made a checkpoint, by its point.
    """

    vm: VM
    disks: dict[str, bytearray]
    settings: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    busy: str = ""
    owners: dict[str, str] = field(default_factory=dict)

    def write(self, disk: str, offset: int, data: bytes) -> None:
        """Write as the guest would; a disk grows if the data reach past its end."""
        self.disks[disk].extend(bytes(max(0, offset + len(data) - len(self.disks[disk]))))
        self.disks[disk][offset : offset + len(data)] = data
        for dirty in self.checkpoints.values():
            dirty.setdefault(disk, set()).update(range(offset // CLUSTER, -(-(offset + len(data)) // CLUSTER)))


def _now() -> datetime:
    return datetime.now(UTC)


class MemoryHypervisor:
    """Keeps the contract of a hypervisor for the guests it is given. `clock` says what the instants are dated."""

    def __init__(self, guests: Iterable[MemoryGuest], clock: Callable[[], datetime] = _now) -> None:
        self.guests = {guest.vm.uuid: guest for guest in guests}
        self.clock = clock

    def _extents(self, data: bytes, dirty: set[int] | None) -> Iterable[Extent]:
        for cluster in range(-(-len(data) // CLUSTER)):
            if dirty is not None and cluster not in dirty:
                continue
            block = data[cluster * CLUSTER : (cluster + 1) * CLUSTER]
            if block.count(0) != len(block):
                yield Extent(cluster * CLUSTER, CLUSTER, Kind.DATA)
            elif dirty is not None:
                yield Extent(cluster * CLUSTER, CLUSTER, Kind.ZERO)

    @hookimpl
    def prebackup(self, run: BackupRun, ctx: Context) -> Prepared | None:
        """A copy of every disk as it is now, and a checkpoint for the next increment."""
        guest = self.guests[run.vm.uuid]
        dirty: Mapping[str, set[int]] | None = None
        if run.parent:
            if run.parent.point not in guest.checkpoints:
                raise IncrementImpossible(f"checkpoint of point {run.parent.point} is gone")
            dirty = guest.checkpoints[run.parent.point]
        held = {disk.id for disk in run.parent.disks} if run.parent else set()
        ctx.touch()
        guest.busy = run.id
        artifacts: list[Artifact] = [BytesArtifact("vm.xml", f"<domain><name>{run.vm.name}</name></domain>".encode())]
        artifacts += [BytesArtifact(name, data) for name, data in guest.files.items()]
        disks = []
        for name, content in guest.disks.items():
            data = bytes(content)
            whole = dirty is None or name not in held
            extents = self._extents(data, None if whole or dirty is None else dirty.get(name, set()))
            artifact = DiskArtifact(f"disk.{name}.qcow2", Layout(len(data), extents), MemoryBlocks(data))
            artifacts.append(artifact)
            reason = "added since the last backup" if whole and run.parent else ""
            disks.append(Disk(id=name, artifact=artifact.name, virtual_size=len(data), whole=whole, reason=reason))
        if run.tracked:
            guest.checkpoints[run.point] = {}
            guest.owners[run.point] = run.installation
        return Prepared(
            artifacts=tuple(artifacts),
            date=self.clock(),
            consistency="crash",
            frozen_seconds=0.0,
            disks=tuple(disks),
            versions={"memory": "1"},
        )

    @hookimpl
    def postbackup(self, run: BackupRun, outcome: Outcome) -> None:
        """Let go of the guest and of the checkpoints that nobody needs any more."""
        guest = self.guests.get(run.vm.uuid)
        if guest is None:
            return  # it was undefined meanwhile: nothing of it is held
        guest.busy = ""
        recorded = outcome.state is RunState.RECORDED
        gone = set(run.spent if recorded else (run.point,))
        if run.keep is not None:
            needed = {*run.keep, *((run.parent.point,) if run.parent else ()), *((run.point,) if recorded else ())}
            gone |= set(self._own(guest, run.installation)) - needed
        for point in gone:
            guest.checkpoints.pop(point, None)

    def recover(self, vm: VM, spent: Collection[str], ctx: Context, installation: str = "") -> None:
        """Let go of the guest, and of the checkpoints that nobody needs any more."""
        del installation  # these guests have no overlays
        guest = self.guests.get(vm.uuid)
        if guest is None:
            return
        if guest.busy:
            ctx.did(f"let go of the guest, held by run {guest.busy}")
            guest.busy = ""
        for point in sorted(set(guest.checkpoints) & set(spent)):
            del guest.checkpoints[point]
            ctx.did(f"forgot checkpoint {point}")

    def vms(self) -> Sequence[VMState]:
        """Every guest."""
        return [self._state(guest) for guest in sorted(self.guests.values(), key=lambda guest: guest.vm.name)]

    def find(self, vm: str, defaults: Mapping[str, str] | None = None) -> VMState:
        """By name or UUID; the settings choose nothing here."""
        del defaults
        chosen = [guest for guest in self.guests.values() if vm in (guest.vm.name, guest.vm.uuid)]
        if len(chosen) > 1:
            raise ConfigError(f"{vm} is the name of one VM and the UUID of another")
        for guest in chosen:
            return self._state(guest)
        raise NotFound(f"no VM {vm}", near(vm, (guest.vm.name for guest in self.guests.values())))

    def _state(self, guest: MemoryGuest) -> VMState:
        disks = tuple(
            VMDisk(id=name, path=f"memory:{name}", format="raw", virtual_size=len(data))
            for name, data in guest.disks.items()
        )
        return VMState(vm=guest.vm, state="running", disks=disks)

    def estimate(self, run: BackupRun) -> Estimate:
        """The size of every disk."""
        guest = self.guests[run.vm.uuid]
        whole = run.parent is None
        disks = (DiskEstimate(id=name, bytes=len(data), whole=whole) for name, data in guest.disks.items())
        return Estimate(disks=tuple(disks), left_out=())

    @contextmanager
    def unchanged(self, run: BackupRun, disks: Collection[str], ctx: Context) -> Iterator[Sequence[Unchanged]]:
        """A copy of every disk as it is now, and the clusters that `MemoryGuest.write` has not touched."""
        ctx.check()
        guest = self.guests[run.vm.uuid]
        assert run.parent is not None
        if run.parent.point not in guest.checkpoints:
            raise IncrementImpossible(f"checkpoint of point {run.parent.point} is gone")
        dirty = guest.checkpoints[run.parent.point]
        guest.busy = run.id
        try:
            yield [self._unchanged(disk, guest.disks.get(disk), dirty.get(disk, set())) for disk in disks]
        finally:
            guest.busy = ""

    def _unchanged(self, disk: str, content: bytearray | None, dirty: set[int]) -> Unchanged:
        if content is None:
            return Unchanged(id=disk, why_not="the VM has no such disk any more")
        data = bytes(content)
        clean = set(range(-(-len(data) // CLUSTER))) - dirty
        extents = tuple(self._extents(data, clean))
        return Unchanged(id=disk, virtual_size=len(data), extents=extents, blocks=MemoryBlocks(data))

    def _own(self, guest: MemoryGuest, installation: str) -> list[str]:
        return [point for point in guest.checkpoints if guest.owners.get(point, "") in ("", installation)]

    def checkpoints(self, vm: VM) -> Sequence[Checkpoint]:
        """Those of the guest; each has the name of its point."""
        guest = self.guests[vm.uuid]
        return [
            Checkpoint(name=point, point=point, installation=guest.owners.get(point, ""))
            for point in sorted(guest.checkpoints)
        ]

    def forget(self, vm: VM, installation: str = "", *, foreign: bool = False) -> Sequence[str]:
        """Drop checkpoints."""
        guest = self.guests[vm.uuid]
        own = self._own(guest, installation)
        gone = sorted(set(guest.checkpoints).difference(own) if foreign else own)
        for point in gone:
            del guest.checkpoints[point]
        return gone

    def settings(self, vm: VM) -> Mapping[str, str]:
        """As `configure` set them."""
        if vm.uuid not in self.guests:
            raise NotFound(f"no VM {vm.name}")
        return dict(self.guests[vm.uuid].settings)

    def configure(self, vm: VM, settings: Mapping[str, str]) -> None:
        """Replace them."""
        self.guests[vm.uuid].settings = dict(settings)

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
        """A definition with nothing but the name and the files to boot from."""
        del stored, disks, nvram, no_ip, no_nic, keep_uuid, new_mac, redact
        named = "".join(f"<{part}>{path}</{part}>" for part, path in (boot or {}).items())
        xml = f"<domain><name>{name}</name>{named}</domain>".encode()
        lost = ("devices/hostdev",)
        return Definition(xml=xml, left_out=lost, effects={"loses a device": lost})

    def require_definable(self, name: str, uuid: str | None, folder: Path) -> None:
        """The name and the UUID must be free."""
        del folder
        if any(name == guest.vm.name or uuid == guest.vm.uuid for guest in self.guests.values()):
            raise ConfigError(f"there is a VM {name} already", "Choose another --name.")

    def define(self, definition: bytes) -> VM:
        """A guest without disks."""
        name = definition.decode().partition("<name>")[2].partition("</name>")[0]
        vm = VM(uuid=str(uuid4()), name=name)
        self.guests[vm.uuid] = MemoryGuest(vm, {})
        return vm

    def pool(self, name: str) -> Pool:
        """There is none."""
        raise NotFound(f"there is no storage pool {name}", "It has none.")

    def add_volume(self, pool: Pool, volume: str, size: int) -> Path:
        """Never asked for, see above."""
        raise NotImplementedError

    def remove_volume(self, pool: Pool, volume: str) -> None:
        """Never asked for, see above."""
        raise NotImplementedError

    def refresh(self, pool: Pool) -> None:
        """Never asked for, see above."""
        raise NotImplementedError

    def require_replaceable(self, vm: VM, disks: Sequence[str], *, nvram: bool = False) -> Mapping[str, DiskFile]:
        """These guests always run."""
        del disks, nvram
        raise Busy(f"VM {vm.name} is running; its disks cannot be replaced", "Power it off.")

    def keep_closed(self, files: Sequence[Path]) -> AbstractContextManager[None]:
        """No guest uses a file."""
        del files
        return nullcontext()

    def fit(self, written: Path, old: DiskFile) -> None:
        """Never asked for, see above."""
        raise NotImplementedError

    def check(self, *, try_vm: bool = True) -> Sequence[Finding]:
        """All is well."""
        del try_vm
        return [Finding(subject="memory", ok=True, detail="there")]
