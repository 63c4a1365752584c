"""Virtual machines for tests and the demo: made, written to, compared, and always removed.

    with VM.create("demo", disks=[DiskSpec(target="vda", size=64 << 20)]) as vm:
        vm.start()
        vm.io("vda", "write -P 0x55 1M 1M")
        truth = vm.copy_truth(folder)

A VM without a kernel has no operating system: it starts in about half a second, and only `io` writes to its disks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from xml.etree import ElementTree

import libvirt
import libvirt_qemu

from lab import kvm, libvirtd
from lab.domain_xml import DiskSpec, Firmware, Kernel, domain_xml
from lab.patience import patient

_DONE = re.compile(r"^(?:wrote|read|discard) (\d+)/(\d+) bytes at offset \d+$", re.MULTILINE)
_IO_SECONDS = 30
_JOB_SECONDS = 60
_UNDEFINE_ALL = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


class VM:
    """One libvirt domain with its own folder; use it in a `with` block, or call `remove`."""

    def __init__(self, connection: libvirt.virConnect, domain: libvirt.virDomain, folder: Path) -> None:
        self.connection = connection
        self.domain = domain
        self.folder = folder

    @classmethod
    def create(
        cls,
        name: str,
        disks: Sequence[DiskSpec],
        *,
        folder: Path | None = None,
        kernel: Kernel | None = None,
        firmware: Firmware | None = None,
        memory_mib: int = 64,
        devices: str = "",
        iothreads: int = 0,
        scsi: str = "",
    ) -> VM:
        """Make the disks and define the VM; it is not started.

        Its files lie in a folder of its name below `folder` (by default the lab's folder for VMs), which QEMU's user
        has to reach. `devices` is further XML for <devices>, `iothreads` how many I/O threads there are, and `scsi` are
        attributes of the SCSI controller's <driver>, such as ``iothread='1'``. Raises libvirt.libvirtError where the
        name is taken.
        """
        connection = libvirt.open(libvirtd.ensure())
        base = folder or libvirtd.folder_for_vms()
        own = base / name
        own.mkdir(mode=0o700)
        try:
            if os.geteuid() == 0:
                os.chown(own, base.stat().st_uid, base.stat().st_gid)
            # Copies that QEMU's user can reach; libvirt also changes the owner of what it is given.
            if firmware is not None:
                firmware = Firmware(_copied(firmware.code, own), firmware.variables)
            if kernel is not None:
                kernel = Kernel(_copied(kernel.image, own), _copied(kernel.initramfs, own), kernel.arguments)
            made = [(disk, _make_disk(disk, own)) for disk in disks]
            xml = domain_xml(
                name=name,
                folder=own,
                disks=made,
                memory_mib=memory_mib,
                kernel=kernel,
                firmware=firmware,
                emulator=_emulator(base),
                devices=devices,
                iothreads=iothreads,
                scsi=scsi,
            )
            return cls(connection, connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE), own)
        except BaseException:
            shutil.rmtree(own)
            connection.close()
            raise

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def name(self) -> str:
        return str(self.domain.name())

    @property
    def uuid(self) -> str:
        return str(self.domain.UUIDString())

    @property
    def active(self) -> bool:
        """Whether QEMU runs, paused or not."""
        return bool(self.domain.isActive())

    def start(self) -> None:
        self.domain.create()

    def destroy(self) -> None:
        """Switch the VM off, as by its plug. QEMU ends in an orderly way, so its bitmaps are written."""
        if self.active:
            self.domain.destroy()

    def remove(self) -> None:
        """Remove the VM with all that libvirt keeps of it, and its folder. Harmless where some of it has gone."""
        try:
            domain = self.connection.lookupByUUIDString(self.uuid)
            if domain.isActive():
                domain.destroy()
            if domain.isPersistent():
                domain.undefineFlags(_UNDEFINE_ALL)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
        shutil.rmtree(self.folder, ignore_errors=True)
        self.connection.close()

    def disk(self, target: str) -> Path:
        """The file or device that holds a disk now: its newest layer, where snapshots were taken."""
        root = ElementTree.fromstring(self.domain.XMLDesc())
        for disk in root.iterfind("devices/disk"):
            found, source = disk.find("target"), disk.find("source")
            if found is not None and source is not None and found.get("dev") == target:
                if pool := source.get("pool"):
                    volumes = self.connection.storagePoolLookupByName(pool)
                    return Path(volumes.storageVolLookupByName(source.get("volume", "")).path())
                return Path(source.get("file") or source.get("dev") or "")
        raise KeyError(f"{self.name} has no disk {target}")

    def targets(self) -> list[str]:
        """The target names of all disks, in the order of the definition."""
        root = ElementTree.fromstring(self.domain.XMLDesc())
        return [found.get("dev", "") for found in root.iterfind("devices/disk[@device='disk']/target")]

    def io(self, target: str, *commands: str) -> None:
        """Run qemu-io commands through the guest's own device, so that dirty bitmaps see the writes.

        For example ``write -P 0x55 1M 64M``, ``write -z 0 64k``, ``write -z -u 0 64k``, ``discard 0 1M``,
        ``read -P 0x55 1M 64M``. Raises OSError where one does not do all that it says, or where a pattern differs.
        """
        device = f"/machine/peripheral/ua-{target}"
        if self._bus(target) == "virtio":
            device += "/virtio-backend"  # a virtio disk on PCI is two devices; the inner one has the disk
        with self._in_the_main_loop():
            for command in commands:
                before = self._log_size()
                answer = self._monitor(f'qemu-io -d {device} "{command}"')
                if answer.strip():
                    raise OSError(f"{self.name}, {target}: qemu-io {command}: {answer.strip()}")
                if command.split()[0] not in ("flush", "f"):  # which is silent when it succeeds
                    self._expect_done(target, command, before)

    @contextmanager
    def _in_the_main_loop(self) -> Iterator[None]:
        """With virtio disks served by QEMU's main loop: the monitor's qemu-io on a disk of an I/O thread crashes 7.2.

        While a guest stands still no I/O thread has such a disk. That of a SCSI controller keeps its disks: write to
        them while the VM is off.
        """
        threads = ElementTree.fromstring(self.domain.XMLDesc()).findtext("iothreads", "0")
        if threads == "0" or self.domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            yield
            return
        with self.suspended():
            yield

    def flush(self, target: str) -> None:
        """Have QEMU write what it caches of a disk (for qcow2: its tables) to the file."""
        self.io(target, "flush")

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the VM stand still. QEMU flushes its disks when it stops, so the files hold what the guest sees."""
        # QEMU 7.2 crashes where it is stopped in the moment in which a commit ends.
        deadline = time.monotonic() + patient(_JOB_SECONDS)
        while any(self._commits(target) for target in self.targets()) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.domain.suspend()
        try:
            yield
        finally:
            self.domain.resume()

    def copy_disks(self, folder: Path) -> dict[str, Path]:
        """Copy every disk to a raw file in `folder` with qemu-img; by target name. The VM must be suspended or off."""
        folder.mkdir(parents=True, exist_ok=True)
        copies = {}
        for target in self.targets():
            copies[target] = folder / f"{target}.raw"
            # -U: QEMU holds its lock on the file; it stands still, so nothing moves below the copy.
            _run("qemu-img", "convert", "-U", "-O", "raw", str(self.disk(target)), str(copies[target]))
        return copies

    def copy_truth(self, folder: Path) -> dict[str, Path]:
        """Copy all disks at one instant: suspend, copy with QEMU's own tools, resume."""
        with self.suspended():
            return self.copy_disks(folder)

    def console(self) -> str:
        """What the guest has written to its serial console since the start."""
        try:
            return (self.folder / "console.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def wait_for_console(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Wait until the console shows a match of the regular expression.

        Raises TimeoutError, with the last lines of the console, after `seconds` or when the VM has ended.
        """
        deadline = time.monotonic() + patient(seconds)
        while (match := re.search(pattern, self.console())) is None:
            if time.monotonic() > deadline or not self.active:
                last = "\n".join(self.console().splitlines()[-15:])
                raise TimeoutError(f"{self.name}: no {pattern!r} on the console within {seconds} s:\n{last}")
            time.sleep(0.05)
        return match

    def _commits(self, target: str) -> bool:
        """Whether a commit into a file below works on a disk."""
        found = self.domain.blockJobInfo(target, 0)
        return bool(found) and found["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT

    def _bus(self, target: str) -> str:
        root = ElementTree.fromstring(self.domain.XMLDesc())
        found = root.find(f"devices/disk/target[@dev='{target}']")
        if found is None:
            raise KeyError(f"{self.name} has no disk {target}")
        return found.get("bus", "")

    def _monitor(self, command: str) -> str:
        return str(
            libvirt_qemu.qemuMonitorCommand(self.domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        )

    def _expect_done(self, target: str, command: str, before: int) -> None:
        """Read the outcome where QEMU puts it: its standard output, which libvirt collects in the VM's log.

        The monitor itself answers nothing, whether a command succeeded, failed or does not exist (QEMU 7.2).
        """
        deadline = time.monotonic() + patient(_IO_SECONDS)
        text = ""
        # Of a success there are two lines; the second must not be taken for the beginning of the next answer.
        while not text.endswith("\n") or ("bytes at offset" in text and "ops" not in text):
            if time.monotonic() > deadline:
                raise OSError(f"{self.name}, {target}: qemu-io {command}: no word of its end in {_IO_SECONDS} s")
            with self._log().open(errors="replace") as log:
                log.seek(before)
                # The lines that libvirt itself adds begin with a date.
                text = "".join(line for line in log if not re.match(r"\d{4}-\d\d-\d\d[ T]", line))
            time.sleep(0 if "ops" in text else 0.002)
        done = _DONE.search(text)
        if done is None or done[1] != done[2] or "failed" in text:
            raise OSError(f"{self.name}, {target}: qemu-io {command}: {text.strip()}")

    def _log(self) -> Path:
        if os.geteuid() == 0:
            return Path("/var/log/libvirt/qemu") / f"{self.name}.log"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "libvirt/qemu/log" / f"{self.name}.log"

    def _log_size(self) -> int:
        return self._log().stat().st_size


def same(first: Path, second: Path) -> bool:
    """Whether two images, of any format, hold the same bytes (a longer one may end in zeroes).

    Raises OSError where one of them cannot be read.
    """
    outcome = subprocess.run(
        ["qemu-img", "compare", "-U", str(first), str(second)], capture_output=True, text=True, check=False
    )
    if outcome.returncode > 1:
        raise OSError(f"qemu-img compare {first} {second}: {outcome.stderr.strip()}")
    return outcome.returncode == 0


def _make_disk(disk: DiskSpec, folder: Path) -> Path:
    path = disk.device or folder / f"{disk.target}.{disk.format}"
    if disk.device is not None and disk.format == "raw":
        return path
    options = ["-o", f"compat={disk.compat}"] if disk.format == "qcow2" else []
    if disk.content is None:
        _run("qemu-img", "create", "-q", "-f", disk.format, *options, str(path), str(disk.size))
    else:
        _run("qemu-img", "convert", "-f", "raw", "-O", disk.format, *options, str(disk.content), str(path))
        _run("qemu-img", "resize", "-q", "-f", disk.format, str(path), str(disk.size))
    return path


def _copied(file: Path, folder: Path) -> Path:
    return Path(shutil.copy(file, folder / file.name))


def _emulator(folder: Path) -> Path | None:
    """A QEMU other than libvirt's choice, on the machines that `lab.kvm` describes."""
    if os.geteuid() != 0 or libvirtd.started_here() or not kvm.closed_to("libvirt-qemu"):
        return None
    return kvm.emulator_without_kvm(folder)


def _run(*command: str) -> None:
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise OSError(f"{' '.join(command)}: {outcome.stderr.strip()}")
