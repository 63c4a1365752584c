"""VMs to back up, made by the lab, and what takes their backups the way the session does."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
import pytest

from backupcore import model, run_backup
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.model import BackupRun, Image, Increment, Link, Outcome, Prepared, RunState, Type, new_id
from backupcore.restore import restore
from backupcore.session import Recorded
from backupcore.testing.memory import MemoryDriver
from backupcore_libvirt.mechanisms import choice
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.release.guard import Guard
from lab import graft, kernel
from lab.domain_xml import DiskSpec, Firmware, domain_xml
from lab.loop import loop_device
from lab.patience import patient
from lab.poller import Poller
from lab.private_libvirtd import PrivateLibvirtd
from lab.vm import VM
from lab.vm import same as same_bytes

MiB = 1 << 20
_numbers = itertools.count(1)


def qemu_img(*arguments: object) -> str:
    """The output of one call of qemu-img."""
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: Callable[[], object], what: str, limit: float = 10.0) -> None:
    """Wait until the condition holds; a failure after `limit` seconds."""
    deadline = time.monotonic() + patient(limit)
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(0.01)


def _with_marks(disk: str, names: Sequence[str]) -> list[str]:
    marks = {name for name in names if re.fullmatch(r"backupcore-[0-9a-f-]{32,}-[a-z]+", name)}
    assert marks <= {f"{name}-{disk}" for name in names}, "a mark stays without its bitmap"
    return sorted(set(names) - marks)


class SmallVM(VM):
    """A VM of the lab, and what libvirt and QEMU hold of its backups."""

    @property
    def identity(self) -> model.VM:
        return model.VM(uuid=self.uuid, name=self.name)

    def monitor(self, command: str, **arguments: object) -> object:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuMonitorCommand(self.domain, request, 0))["return"]

    def node(self, target: str) -> str:
        """The name of a disk's top image among QEMU's block nodes."""
        found = self.monitor("query-named-block-nodes", flat=True)
        return next(node["node-name"] for node in found if node["file"] == str(self.disk(target)))

    def change(self, *pieces: tuple[str, str]) -> None:
        """Replace pieces of the stored definition."""
        text = self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        for old, new in pieces:
            assert old in text
            text = text.replace(old, new)
        self.connection.defineXML(text)

    def checkpoints(self) -> set[str]:
        return {checkpoint.getName() for checkpoint in self.domain.listAllCheckpoints(0)}

    def bitmaps(self) -> dict[str, list[str]]:
        """The bitmaps on each qcow2 disk, as QEMU has them, or as they lie in the images of a VM that is off.

        Each of ours has its mark beside it, or none has; marks are left out.
        """
        found = {}
        if not self.active:
            for target in self.targets():
                info = json.loads(qemu_img("info", "--output=json", self.disk(target)))
                if info["format"] == "qcow2":
                    listed = info["format-specific"]["data"].get("bitmaps", ())
                    found[target] = _with_marks(target, [bitmap["name"] for bitmap in listed])
            return found
        for node in self.monitor("query-named-block-nodes", flat=True):
            for target in self.targets():
                if node["drv"] == "qcow2" and node["file"] == str(self.disk(target)):
                    found[target] = _with_marks(target, [bitmap["name"] for bitmap in node.get("dirty-bitmaps", ())])
        return found

    def write(self, target: str, *commands: str) -> None:
        """qemu-io commands, through the guest's device, or on the image of a VM that is off."""
        if self.active:
            self.io(target, *commands)
            return
        path = self.disk(target)
        shape = json.loads(qemu_img("info", "--output=json", path))["format"] if path.suffix != ".raw" else "raw"
        options = [part for command in commands for part in ("-c", command)]
        subprocess.run(["qemu-io", "-f", shape, *options, str(path)], check=True, capture_output=True)

    def qemu_img(self, *arguments: object, disk: str, more: Sequence[object] = ()) -> None:
        """qemu-img on the qcow2 image of a VM that is off."""
        qemu_img(*arguments, "-f", "qcow2", self.disk(disk), *more)

    def resize(self, disk: str, *arguments: object) -> None:
        """qemu-img resize; the size comes last."""
        self.qemu_img("resize", "-q", *arguments[:-1], disk=disk, more=arguments[-1:])

    def copy(self, folder: Path) -> dict[str, Path]:
        """What the disks hold now, by QEMU's own tools."""
        return (
            self.copy_truth(folder) if self.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING else self.copy_disks(folder)
        )

    def redefine(self) -> None:
        """Undefine and define it, as management tools do: what libvirt knew of its checkpoints is lost."""
        text = self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        running = self.active
        flags = libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        self.domain.undefineFlags(flags)
        if running:
            self.domain.destroy()
        self.domain = self.connection.defineXML(text)

    def job(self) -> int:
        return self.domain.jobInfo()[0]

    def job_socket(self) -> Path:
        """Where the running backup job listens."""
        server = ElementTree.fromstring(self.domain.backupGetXMLDesc()).find("server")
        return Path(server.get("socket"))

    def kill(self) -> None:
        """kill -9 of this VM's QEMU, and wait until libvirt knows."""
        run = (
            Path("/run/libvirt/qemu") if os.geteuid() == 0 else Path(os.environ["XDG_RUNTIME_DIR"], "libvirt/qemu/run")
        )
        os.kill(int((run / f"{self.name}.pid").read_text()), signal.SIGKILL)
        wait_for(lambda: not self.active, "libvirt notices the death of QEMU")

    def life(self) -> int:
        """libvirt's number of the running VM: another one where its QEMU has died meanwhile."""
        return int(self.domain.ID())

    def overlays(self) -> list[Path]:
        """The overlays of ours beside its disks."""
        return sorted(path for path in self.folder.iterdir() if "backupcore" in path.name)

    def plain(self) -> None:
        """At rest: no overlay, no job, each disk on its own file, by both definitions, and the guest runs."""
        assert self.overlays() == []
        for disk in self.targets():
            assert self.disk(disk).name in (f"{disk}.qcow2", f"{disk}.raw")
            assert not self.active or self.domain.blockJobInfo(disk, 0) == {}
            assert str(self.disk(disk)) in self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        assert not self.active or self.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING

    def settled(self, disk: str) -> None:
        """Wait until no block job works on the disk."""
        wait_for(lambda: self.domain.blockJobInfo(disk, 0) == {}, "the end of the block job", 60)

    def commit(self, disk: str) -> None:
        """As `virsh blockcommit --active --shallow --pivot --delete`."""
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_DELETE
        self.domain.blockCommit(disk, None, None, 0, flags)

        def pivoted() -> bool:
            found = self.domain.blockJobInfo(disk, 0)
            with contextlib.suppress(libvirt.libvirtError):  # not ready yet
                if found["cur"] == found["end"]:
                    self.domain.blockJobAbort(disk, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
                    return True
            return False

        wait_for(pivoted, "the commit", 60)

    def untouched(self) -> None:
        """No trace of a backup: the guest was not touched."""
        assert self.job() == 0
        assert self.checkpoints() == set()
        assert all(not names for names in self.bitmaps().values())


@dataclass
class Lab:
    """Makes VMs with disks vda, vdb, … given as FORMAT:MEBIBYTES; `folder` is open to QEMU's user."""

    prefix: str
    folder: Path
    made: list[SmallVM] = field(default_factory=list)

    def vm(
        self,
        disks: Sequence[str] = ("qcow2:64",),
        *,
        start: bool = True,
        more: str = "",
        driver: str = "",
        content: Path | None = None,
        firmware: Firmware | None = None,
        iothread: Literal["", "disk", "controller"] = "",
        folder: Path | None = None,
        devices: Mapping[str, Path] | None = None,
    ) -> SmallVM:
        """A VM. `more` goes into its devices, `driver` into each disk's driver element, `content` onto its first disk.

        `iothread` says what has an I/O thread: every disk, or the SCSI controller, on which they are then. `devices`
        are the block devices of those disks that lie on one. `firmware` and `folder` as in `lab.vm.VM.create`.
        """
        if iothread == "disk":
            driver = f"{driver} iothread='1'"
        specs = []
        for letter, spec in zip(ascii_lowercase, disks, strict=False):
            shape, _, size = spec.partition(":")
            specs.append(
                DiskSpec(
                    target=f"vd{letter}",
                    size=int(size) * MiB,
                    format="raw" if shape == "raw" else "qcow2",
                    compat="0.10" if shape == "qcow2v2" else "1.1",
                    content=content if letter == "a" else None,
                    driver=driver,
                    bus="scsi" if iothread == "controller" else "virtio",
                    device=(devices or {}).get(f"vd{letter}"),
                )
            )
        name = f"{self.prefix}libvirt-{next(_numbers)}"
        vm = SmallVM.create(
            name,
            specs,
            devices=more,
            firmware=firmware,
            folder=folder,
            iothreads=1 if iothread else 0,
            scsi="iothread='1'" if iothread == "controller" else "",
        )
        self.made.append(vm)
        if start:
            vm.start()
        return vm

    def clean(self) -> None:
        """Remove every VM."""
        for vm in self.made:
            vm.remove()


@pytest.fixture(scope="session", autouse=True)
def _asked_meanwhile(request: pytest.FixtureRequest) -> Iterator[None]:
    """With LAB_POLLER=1 all VMs of these tests are asked of without a pause, from the first test to the last."""
    if os.environ.get("LAB_POLLER") != "1":
        yield
        return
    with Poller(request.getfixturevalue("libvirt_uri"), request.getfixturevalue("vm_prefix")):
        yield


@pytest.fixture
def poller(libvirt_uri: str, vm_prefix: str) -> Iterator[None]:
    """Others ask libvirt of this test's VMs, as fast as they can."""
    with Poller(libvirt_uri, vm_prefix) as asking:
        yield
    assert min(asking.asked.values()) > 0, asking.asked


@pytest.fixture(scope="session")
def cleaners() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Does a job beside the next tests: the end of a VM takes libvirt 2 s of waiting."""
    with ThreadPoolExecutor(4) as pool:
        waiting: list[Future[None]] = []
        yield lambda job: waiting.append(pool.submit(job))
        for future in waiting:
            future.result()


@pytest.fixture
def lab(
    libvirt_uri: str,
    qemu_tools: None,
    vm_prefix: str,
    vm_folder: Path,
    cleaners: Callable[[Callable[[], None]], None],
) -> Iterator[Lab]:
    made = Lab(vm_prefix, vm_folder)
    yield made
    cleaners(made.clean)


@pytest.fixture(scope="session")
def _shared(libvirt_uri: str, qemu_tools: None, vm_prefix: str) -> Iterator[SmallVM]:
    made = Lab(vm_prefix, Path("/nowhere"))
    yield made.vm(["qcow2:16", "qcow2:8"])
    made.clean()


@pytest.fixture
def small(_shared: SmallVM) -> Iterator[SmallVM]:
    """A running VM with vda (16 MiB) and vdb (8 MiB), both qcow2, shared by the tests that leave it as it was."""
    _shared.untouched()
    yield _shared
    for checkpoint in _shared.domain.listAllCheckpoints(0):
        name = checkpoint.getName()
        with contextlib.suppress(libvirt.libvirtError):
            checkpoint.delete(0)
        for disk in _shared.targets():
            with contextlib.suppress(libvirt.libvirtError, KeyError):  # its mark, which libvirt leaves
                _shared.monitor("block-dirty-bitmap-remove", node=_shared.node(disk), name=f"{name}-{disk}")
    if _shared.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        _shared.domain.resume()


def _counting_guest() -> bytes:
    """A boot sector that counts, and writes each number to the first disk, then to the second, for ever."""
    code = bytes.fromhex(
        "31c0 8ed8"  # xor ax,ax; mov ds,ax
        "66ff 06 0080"  # again: inc dword [8000h]
        "be307c b443 30c0 b280 cd13"  # mov si,packet; mov ah,43h (write); xor al,al; mov dl,80h; int 13h
        "be307c b443 30c0 b281 cd13 ebe3"  # the same with dl,81h; jmp again
    )
    packet = bytes.fromhex("1000 0100 0080 0000 0008000000000000")  # size, 1 sector, from 0000:8000, to sector 2048
    return code.ljust(0x30, b"\0") + packet.ljust(510 - 0x30, b"\0") + b"\x55\xaa"


@pytest.fixture
def counting_vm(lab: Lab, tmp_path: Path) -> Callable[..., SmallVM]:
    """Starts a VM whose guest writes a number to vda, then to vdb, for ever: at sector 2048, ever higher ones."""

    def start(shape: str = "qcow2", **more: Any) -> SmallVM:
        boot = tmp_path / "boot.raw"
        boot.write_bytes(_counting_guest().ljust(MiB, b"\0"))
        vm = lab.vm([f"{shape}:4", f"{shape}:4"], content=boot, start=False, **more)
        # SeaBIOS shows a guest only the disks that it may boot from.
        targets = [f"<target dev='{disk}' bus='virtio'/>" for disk in ("vda", "vdb")]
        orders = [(target, f"{target}<boot order='{order}'/>") for order, target in enumerate(targets, 1)]
        vm.change(("<boot dev='hd'/>", ""), *orders)
        vm.start()
        return vm

    return start


class AgentGuest(SmallVM):
    """A Linux that writes to an ext4 on vda, with QEMU's guest agent."""

    def agent(self, command: str, limit: int = 5, **arguments: object) -> object:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain, request, limit, 0))["return"]

    def status(self) -> object:
        """thawed, frozen, or None while the agent does not answer."""
        with contextlib.suppress(libvirt.libvirtError):
            return self.agent("guest-fsfreeze-status")
        return None

    def written(self) -> int:
        """How often the guest has written so far, by its console; in steps of ten."""
        return int(re.findall(r"wrote (\d+)", self.console())[-1])


# Not for the session: a guest that writes without a pause takes all of a core from whatever tests come after.
@pytest.fixture(scope="module")
def _agent_guest(
    libvirt_uri: str, qemu_tools: None, vm_prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentGuest]:
    disk = tmp_path_factory.mktemp("ext4") / "disk.raw"
    kernel.make_ext4(disk, 48 * MiB)
    vm = AgentGuest.create(
        f"{vm_prefix}agent",
        [DiskSpec(target="vda", size=48 * MiB, content=disk)],
        kernel=kernel.files(agent=True),
        memory_mib=192,
        devices=kernel.AGENT_CHANNEL,
    )
    try:
        vm.start()
        vm.wait_for_console("lab: wrote 10")
        wait_for(lambda: vm.status() == "thawed", "the agent answers", 60)
        yield vm
    finally:
        vm.remove()


@pytest.fixture
def agent_guest(_agent_guest: AgentGuest) -> Iterator[AgentGuest]:
    """A running guest with an agent, shared by tests; each has to leave it as it was: running, not frozen, no job."""
    yield _agent_guest
    for checkpoint in _agent_guest.domain.listAllCheckpoints(0):
        checkpoint.delete(0)
    assert (_agent_guest.status(), _agent_guest.job()) == ("thawed", 0)
    before = _agent_guest.written()
    wait_for(lambda: _agent_guest.written() > before, "the guest goes on", 60)


@pytest.fixture(name="wait_for")
def _wait_for() -> Callable[..., None]:
    return wait_for


@pytest.fixture
def needs_root() -> None:
    """For what only a privileged libvirt does: QEMU as another user, file systems of a given size."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def tmpfs(needs_root: None, lab: Lab) -> Iterator[Callable[[int], Path]]:
    """Mounts a small file system: its size in MiB -> its folder. QEMU sees it only if the VM starts afterwards."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = lab.folder / f"tmpfs{len(mounted)}"
        folder.mkdir()
        graft.mount_tmpfs(folder, size)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        graft.unmount(folder)


@pytest.fixture
def loop(needs_root: None, lab: Lab) -> Iterator[Path]:
    """A block device of 8 MiB."""
    with loop_device(lab.folder / "loop", bytes(8 * MiB)) as made:
        yield made


@pytest.fixture
def hypervisor(libvirt_uri: str, lab: Lab) -> Libvirt:
    return Libvirt(libvirt_uri, lab.folder / "scratch")


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
            vm=vm.identity,
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

    @staticmethod
    def taken(run: BackupRun, ctx: Context, prepared: Prepared) -> Taken:
        return Taken(run, ctx, prepared)

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

    @contextlib.contextmanager
    def left_alone(self, run: BackupRun) -> Iterator[Taken]:
        """A run whose process is killed, with its guard, while it holds the VM: no `postbackup`, its folder stays."""
        with self.context(run) as ctx:
            yield Taken(run, ctx, self.hypervisor.prebackup(run, ctx))
            guard = Guard.of(run.id)
            assert guard is not None
            os.kill(guard.process, signal.SIGKILL)
            for thread in threading.enumerate():
                if thread.name == f"guard-{run.id}":  # it does what the guard had to do
                    thread.join(60)

    def recover(self, vm: SmallVM) -> tuple[str, ...]:
        """What `vmkeep recover` asks for: what was put right."""
        folder = self.folder / new_id()
        folder.mkdir()
        with Context(folder) as ctx:
            self.hypervisor.recover(vm.identity, (), ctx)
            return ctx.put_right

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
def daemon(needs_root: None, libvirt_uri: str, qemu_tools: None, vm_folder: Path) -> Iterator[PrivateLibvirtd]:
    """A libvirtd that a test may kill."""
    with PrivateLibvirtd(vm_folder / "libvirt") as started:
        yield started


@pytest.fixture
def make_private(
    daemon: PrivateLibvirtd, vm_prefix: str, vm_folder: Path, tmp_path: Path
) -> Callable[..., tuple[SmallVM, Runs]]:
    """Makes a running VM of `daemon`, with two disks (16 MiB, qcow2) on that bus, and what takes its backups."""

    def make(bus: Literal["virtio", "scsi"] = "virtio") -> tuple[SmallVM, Runs]:
        targets = ("vda", "vdb") if bus == "virtio" else ("sda", "sdb")
        disks = [(DiskSpec(target=target, size=16 * MiB, bus=bus), vm_folder / f"{target}.qcow2") for target in targets]
        for disk, path in disks:
            qemu_img("create", "-q", "-f", "qcow2", path, disk.size)
        connection = libvirt.open(daemon.uri)
        text = domain_xml(
            name=f"{vm_prefix}private",
            folder=vm_folder,
            disks=disks,
            memory_mib=64,
            kernel=None,
            firmware=None,
            emulator=None,
            devices="",
        )
        made = SmallVM(connection, connection.defineXML(text), vm_folder)
        made.start()
        folder = tmp_path / "runs"
        folder.mkdir()
        return made, Runs(Libvirt(daemon.uri, vm_folder / "scratch"), folder)

    return make


@pytest.fixture
def private(make_private: Callable[..., tuple[SmallVM, Runs]]) -> tuple[SmallVM, Runs]:
    """A running VM of `daemon`, with vda and vdb (16 MiB, qcow2), and what takes its backups."""
    return make_private()


@pytest.fixture
def runs(hypervisor: Libvirt, tmp_path: Path) -> Runs:
    folder = tmp_path / "runs"
    folder.mkdir()
    return Runs(hypervisor, folder)


@pytest.fixture
def take(runs: Runs, tmp_path: Path) -> Callable[..., tuple[Taken, dict[str, Path]]]:
    """One backup, held open for `during`, then kept in a folder: (taken, its layer)."""

    def one(
        vm: SmallVM, parent: Taken | None = None, during: Callable[[], None] = lambda: None, **more: object
    ) -> tuple[Taken, dict[str, Path]]:
        run = runs.run(vm, parent, **more)
        with runs.take(run) as taken:
            during()
            return taken, runs.keep(taken, tmp_path / run.id)

    return one


@pytest.fixture
def every_qemu_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one counts as one that a backup job would kill, so that tests say the same on every host."""
    monkeypatch.setattr(choice, "survives_clients_of_iothreads", lambda _: False)


@pytest.fixture
def every_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """VMs that other tests share count as ones with an I/O thread, too."""
    monkeypatch.setattr(choice, "with_iothreads", lambda _, disks: dict.fromkeys(disks, "this test"))


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


@dataclass
class Chains:
    """The chains of one VM in datastores "a" and "b", taken by the session; keeps what the disks held at each point.

    `installation` is who takes them, "" as before there were any; `settings` are the VM's.
    """

    hypervisor: Libvirt
    folder: Path
    stores: dict[str, Datastore] = field(default_factory=dict)
    images: list[Image] = field(default_factory=list)
    truths: dict[str, dict[str, Path]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    installation: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            self.stores[name] = Datastore(name, MemoryDriver(), hypervisor=self.hypervisor)

    @property
    def kept(self) -> tuple[str, ...]:
        chains = [image for image in self.images if image.state == "open"]
        return tuple(increment.point for image in chains for increment in image.increments[-2:])

    def newest(self, store: str) -> Image | None:
        return next((image for image in reversed(self.images) if image.datastore == store), None)

    def plan(self, vm: SmallVM, store: str = "a", *, reset: bool = False) -> BackupRun:
        newest, settings = self.newest(store), self.settings
        run = plan(newest, vm=vm.identity, host="here", datastore=store, settings=settings, reset=reset)
        return dataclasses.replace(run, keep=self.kept, installation=self.installation)

    def context(self) -> Context:
        folder = self.folder / str(next(self.numbers))
        folder.mkdir(mode=0o700)
        return Context(folder)

    def backup(self, vm: SmallVM, store: str = "a", *, reset: bool = False, warned: bool = False) -> Recorded:
        """Take one, with the truth beside it; nothing of it is left, and nothing went wrong afterwards.

        Where it is to be `warned` something has to be told instead.
        """
        truth = vm.copy(self.folder / f"truth{next(self.numbers)}")
        run = self.plan(vm, store, reset=reset)
        with self.context() as ctx:
            recorded = run_backup(self.stores[store], run, ctx, record=self.record)
        self.truths[recorded.increment.point] = {disk.id: truth[disk.id] for disk in recorded.increment.disks}
        assert bool(recorded.warnings) is warned, recorded.warnings
        assert warned or not list(self.hypervisor.scratch.iterdir())
        return recorded

    def record(self, recorded: Recorded) -> None:
        run = recorded.run
        before: tuple[Increment, ...] = ()
        if run.type is Type.INCREMENT:
            before = next(image for image in self.images if image.uuid == run.image).increments
        self.images = [
            dataclasses.replace(image, state="closed") if image.datastore == run.datastore else image
            for image in self.images
            if image.uuid != run.image
        ]
        self.images.append(
            Image(
                uuid=run.image,
                number=len(self.images) + 1,
                vm=run.vm,
                datastore=run.datastore,
                state="open",
                increments=(*before, recorded.increment),
            )
        )

    def check(self) -> None:
        """Restore every increment of every image, and compare it with the truth of its point."""
        for image in self.images:
            for increment in image.increments:
                target = self.folder / f"restored{next(self.numbers)}"
                target.mkdir()
                with self.context() as ctx:
                    done = restore(
                        self.stores[image.datastore],
                        image,
                        increment.id,
                        ctx,
                        target=lambda disk, target=target: target / f"{disk.id}.qcow2",
                    )
                truth = self.truths[increment.point]
                assert {disk.id for disk in done.disks} == set(truth)
                for disk in done.disks:
                    assert same_bytes(truth[disk.id], disk.path), f"{image.datastore}/{increment.id}: {disk.id}"
                shutil.rmtree(target)


@pytest.fixture
def chains(hypervisor: Libvirt, tmp_path: Path) -> Chains:
    folder = tmp_path / "chains"
    folder.mkdir()
    return Chains(hypervisor, folder)
