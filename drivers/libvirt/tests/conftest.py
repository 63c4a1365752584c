"""Small VMs without an operating system, on the libvirtd of this host; their disks are written by QEMU's monitor."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest
from backupcore_libvirt.plugin import Libvirt

from backupcore.context import Context
from backupcore.model import VM, BackupRun, Link, Outcome, Prepared, RunState, Type, new_id

URI = "qemu:///system" if os.geteuid() == 0 else "qemu:///session"
MiB = 1 << 20


def qemu_img(*arguments: object) -> str:
    """The output of one call of qemu-img."""
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: Callable[[], object], what: str, limit: float = 10.0) -> None:
    """Wait until the condition holds; a failure after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(0.01)


@dataclass
class SmallVM:
    """One VM; `disks` maps each target to its image."""

    domain: libvirt.virDomain
    folder: Path
    disks: dict[str, Path]

    @property
    def vm(self) -> VM:
        return VM(uuid=self.domain.UUIDString(), name=self.domain.name())

    def monitor(self, command: str, **arguments: object) -> object:
        answer = libvirt_qemu.qemuMonitorCommand(
            self.domain, json.dumps({"execute": command, "arguments": arguments}), 0
        )
        return json.loads(answer)["return"]

    def io(self, disk: str, command: str) -> None:
        """One command of qemu-io through the guest's own device, so that bitmaps see it."""
        number = list(self.disks).index(disk)
        device = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        line = f'qemu-io -d {device} "{command}"'
        said = libvirt_qemu.qemuMonitorCommand(self.domain, line, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        assert "rror" not in said, said
        assert "failed" not in said, said

    def copy(self, target: Path) -> dict[str, Path]:
        """The truth: each disk as raw, by qemu-img, while the VM is suspended."""
        target.mkdir(exist_ok=True)
        running = self.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        if running:
            self.domain.suspend()
        for disk in self.disks:
            self.io(disk, "flush")
        copies = {}
        for disk, image in self.disks.items():
            copies[disk] = target / f"{disk}.truth"
            qemu_img("convert", "-U", "-O", "raw", image, copies[disk])
        if running:
            self.domain.resume()
        return copies

    def checkpoints(self) -> set[str]:
        return {checkpoint.getName() for checkpoint in self.domain.listAllCheckpoints(0)}

    def bitmaps(self) -> dict[str, list[str]]:
        """The bitmaps on each qcow2 disk, as QEMU has them."""
        found = {}
        for node in self.monitor("query-named-block-nodes", flat=True):
            for disk, image in self.disks.items():
                if node["drv"] == "qcow2" and node["file"] == str(image):
                    found[disk] = sorted(bitmap["name"] for bitmap in node.get("dirty-bitmaps", ()))
        return found

    def job(self) -> int:
        return self.domain.jobInfo()[0]

    def pid(self) -> int:
        return int(Path(f"/run/libvirt/qemu/{self.domain.name()}.pid").read_text())

    def kill(self) -> None:
        """kill -9 of this VM's QEMU, and wait until libvirt knows."""
        os.kill(self.pid(), signal.SIGKILL)
        wait_for(lambda: not self.domain.isActive(), "libvirt notices the death of QEMU")

    def untouched(self) -> None:
        """No trace of a backup: the guest was not touched."""
        assert self.job() == 0
        assert self.checkpoints() == set()
        assert all(not names for names in self.bitmaps().values())


@dataclass
class Lab:
    """Makes VMs in a folder that QEMU's user may pass, and removes them all."""

    folder: Path
    connection: libvirt.virConnect
    made: list[SmallVM] = field(default_factory=list)

    def vm(
        self,
        disks: Sequence[str] = ("qcow2:64M",),
        *,
        start: bool = True,
        more: str = "",
        os_more: str = "",
        options: str = "",
    ) -> SmallVM:
        """A VM. A disk is FORMAT:SIZE; `more` goes into its devices, `options` into each disk's driver element."""
        name = f"bclv-{uuid.uuid4().hex[:8]}"
        images: dict[str, Path] = {}
        elements = ""
        for letter, spec in zip("abcdef", disks, strict=False):
            shape, _, size = spec.partition(":")
            image = self.folder / f"{name}-vd{letter}.{shape}"
            compat = ["-o", "compat=0.10"] if shape == "qcow2v2" else []
            shape = shape.removesuffix("v2")
            qemu_img("create", "-q", "-f", shape, *compat, image, size)
            images[f"vd{letter}"] = image
            elements += (
                f"<disk type='file' device='disk'><driver name='qemu' type='{shape}' discard='unmap' {options}/>"
                f"<source file='{image}'/><target dev='vd{letter}' bus='virtio'/>"
                f"<boot order='{len(images)}'/></disk>"  # SeaBIOS shows a guest only the disks that it may boot from
            )
        domain = self.connection.defineXML(
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type>{os_more}</os><features><acpi/></features>"
            f"<devices>{elements}<controller type='usb' model='none'/><memballoon model='none'/>{more}</devices>"
            "</domain>"
        )
        vm = SmallVM(domain, self.folder, images)
        self.made.append(vm)
        if start:
            domain.create()
        return vm

    def clean(self) -> None:
        """Remove every VM and the folder."""
        for vm in self.made:
            # Quicker than a graceful end, which writes bitmaps that nobody wants any more.
            with contextlib.suppress(OSError):
                os.kill(vm.pid(), signal.SIGKILL)
            with contextlib.suppress(libvirt.libvirtError):
                vm.domain.destroy()
            with contextlib.suppress(libvirt.libvirtError):
                vm.domain.undefineFlags(
                    libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                )
        self.made.clear()
        shutil.rmtree(self.folder)


def new_lab(connection: libvirt.virConnect) -> Lab:
    folder = Path(tempfile.mkdtemp(prefix="bclv-"))
    folder.chmod(0o711)
    return Lab(folder, connection)


@pytest.fixture(scope="session")
def daemon(libvirt_uri: str) -> Iterator[libvirt.virConnect]:
    libvirt.registerErrorHandler(lambda *_: None, None)
    connection = libvirt.open(libvirt_uri)
    yield connection
    connection.close()


@pytest.fixture(scope="session")
def cleaners() -> Iterator[ThreadPoolExecutor]:
    """The end of a VM takes libvirt 2 s of waiting: that goes on beside the next tests."""
    with ThreadPoolExecutor(4) as pool:
        waiting: list[Future[None]] = []
        pool.later = lambda job: waiting.append(pool.submit(job))  # type: ignore[attr-defined]
        yield pool
        for future in waiting:
            future.result()


@pytest.fixture
def lab(daemon: libvirt.virConnect, cleaners: ThreadPoolExecutor) -> Iterator[Lab]:
    made = new_lab(daemon)
    yield made
    cleaners.later(made.clean)  # type: ignore[attr-defined]  # set above


@pytest.fixture(scope="session")
def _shared(daemon: libvirt.virConnect) -> Iterator[SmallVM]:
    made = new_lab(daemon)
    yield made.vm(["qcow2:16M", "qcow2:8M"])
    made.clean()


@pytest.fixture
def small(_shared: SmallVM) -> Iterator[SmallVM]:
    """A running VM with vda (16 MiB) and vdb (8 MiB), both qcow2, shared by the tests that leave it as it was."""
    _shared.untouched()
    yield _shared
    for checkpoint in _shared.domain.listAllCheckpoints(0):
        with contextlib.suppress(libvirt.libvirtError):
            checkpoint.delete(0)
    if _shared.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        _shared.domain.resume()


@pytest.fixture(name="wait_for")
def _wait_for() -> Callable[..., None]:
    return wait_for


@pytest.fixture
def tmpfs(lab: Lab) -> Iterator[Callable[[int], Path]]:
    """Mounts a small file system: its size in MiB -> its folder."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = lab.folder / f"tmpfs{len(mounted)}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m,mode=711", "bclv", str(folder)], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def hypervisor(lab: Lab) -> Libvirt:
    return Libvirt(URI, lab.folder / "scratch")


@dataclass
class Taken:
    """One backup that a test holds open."""

    run: BackupRun
    ctx: Context
    prepared: Prepared


@dataclass
class Runs:
    """Takes backups of one VM the way the session does."""

    hypervisor: Libvirt
    folder: Path

    def run(self, vm: SmallVM, parent: Taken | None = None, **more: object) -> BackupRun:
        return BackupRun(
            id=new_id(),
            vm=vm.vm,
            host="here",
            datastore="nas",
            image="0" * 32,
            number=0,
            point=new_id(),
            type=Type.INCREMENT if parent else Type.FULL,
            parent=Link(point=parent.run.point, digest="0" * 64, disks=parent.prepared.disks) if parent else None,
            **more,
        )

    @contextlib.contextmanager
    def context(self, run: BackupRun) -> Iterator[Context]:
        folder = self.folder / run.id
        folder.mkdir(mode=0o700)
        with Context(folder) as ctx:
            yield ctx

    @contextlib.contextmanager
    def take(self, run: BackupRun, *, state: RunState = RunState.RECORDED) -> Iterator[Taken]:
        """prebackup, the block, the artifacts closed, postbackup with this state (FAILED after an error)."""
        outcome = Outcome(state=RunState.FAILED)
        with self.context(run) as ctx:
            try:
                prepared = self.hypervisor.prebackup(run, ctx)
                try:
                    yield Taken(run, ctx, prepared)
                finally:
                    for artifact in prepared.artifacts:
                        artifact.close()
                outcome = Outcome(state=state)
            finally:
                self.hypervisor.postbackup(run, outcome, ctx)
        assert not (self.hypervisor.scratch / run.id).exists()

    def keep(self, taken: Taken, folder: Path) -> dict[str, Path]:
        """Every disk artifact as a file, read as a driver reads it."""
        folder.mkdir(exist_ok=True)
        kept = {}
        for disk in taken.prepared.disks:
            artifact = next(a for a in taken.prepared.artifacts if a.name == disk.artifact)
            kept[disk.id] = folder / artifact.name
            with artifact.open() as source, kept[disk.id].open("wb") as target:
                shutil.copyfileobj(source, target, MiB)
            assert kept[disk.id].stat().st_size == artifact.size
            qemu_img("check", "-q", kept[disk.id])
        return kept


@pytest.fixture
def runs(hypervisor: Libvirt, tmp_path: Path) -> Runs:
    folder = tmp_path / "runs"
    folder.mkdir()
    return Runs(hypervisor, folder)


def restored(layers: Sequence[Path], target: Path) -> Path:
    """Layers, oldest first, put together by qemu-img alone, as raw."""
    for below, above in itertools.pairwise(layers):
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, above)
    qemu_img("convert", "-O", "raw", layers[-1], target)
    return target


@pytest.fixture(name="restored")
def _restored() -> Callable[[Sequence[Path], Path], Path]:
    return restored


@pytest.fixture
def same(tmp_path: Path) -> Callable[[Sequence[dict[str, Path]], dict[str, Path]], None]:
    """Asserts that layers (oldest first) give exactly these copies of the disks."""

    def check(layers: Sequence[dict[str, Path]], truth: dict[str, Path]) -> None:
        for disk, copy in truth.items():
            files = [layer[disk] for layer in layers if disk in layer]
            chain = []
            for number, file in enumerate(files):  # copies: rebase writes to them
                chain.append(tmp_path / f"chain-{disk}-{number}.qcow2")
                shutil.copy(file, chain[-1])
            result = restored(chain, tmp_path / f"restored-{disk}")
            done = subprocess.run(["cmp", str(result), str(copy)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{disk}: {done.stdout}{done.stderr}"

    return check
