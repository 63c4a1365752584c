"""A live backup whose datastore has stopped to answer, and what else may happen to it: when is the guest free?

The guest writes all the while. Whatever happens, it has to run again, with no backup job and nobody connected to it,
within seconds, and without the datastore.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupcore import guard as asking
from backupcore.errors import BackupError, Cancelled
from lab import blocking_fs, quick_repository
from lab.boot_sector import WRITTEN, boot_sector
from lab.domain_xml import DiskSpec
from lab.host import PASSWORD, RUNNING, Host, stopped, wait_until
from lab.s3_server import ACCESS_KEY, SECRET_KEY, SeaweedFS
from lab.vm import VM

MIB = 1 << 20
STEP = "backupcore.datastore:Datastore.backup call"
"""The guest is held, and nothing is stored yet."""
DISK = 32
DRIVERS = ("restic", "rsync", "s3")


@dataclass
class Target:
    """Where a datastore lies, which can stop to answer: `options` are the driver's."""

    options: dict[str, str]
    extra: str
    block: Callable[[], None]
    unblock: Callable[[], None]


@contextmanager
def target(driver: str, folder: Path) -> Iterator[Target]:
    """A target of a driver: for S3 a server that can be stopped, for the others a file system that can block."""
    with ExitStack() as stack:
        if driver == "s3":
            server = stack.enter_context(SeaweedFS(folder))
            _make_bucket(server)
            options = {
                "bucket": "vms",
                "endpoint_url": server.url,
                "credentials_file": str(server.credentials(folder / "credentials")),
            }
            yield Target(
                options,
                "path_style = true",
                lambda: server.process.send_signal(signal.SIGSTOP),
                lambda: server.process.send_signal(signal.SIGCONT),
            )
            return
        hanging = stack.enter_context(blocking_fs.blocking(folder))
        if driver == "rsync":
            (hanging.path / "store").mkdir()
            options = {"target": str(hanging.path / "store")}
        else:
            options = {"repository": str(quick_repository.make(hanging.path / "repository", PASSWORD))}
        yield Target(options, "", hanging.block, hanging.unblock)


def _make_bucket(server: SeaweedFS) -> None:
    import boto3  # noqa: PLC0415 - half a second, for S3 alone
    from botocore.config import Config  # noqa: PLC0415 - as above

    client: Any = boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket="vms")


def writing_vm(make: Callable[..., VM], folder: Path) -> VM:
    """A running VM whose guest writes for ever, and only what its disk holds already: what a backup shows is known.

    Except a MiB that was written since its start, by which a disk is told from the image that it was made of.
    """
    boot = folder / "boot.raw"
    boot.write_bytes(boot_sector((DISK - 4) * MIB // 512).ljust((DISK - 1) * MIB, bytes([WRITTEN])))
    vm = make([DiskSpec(target="vda", size=DISK * MIB, content=boot)], label="trouble")
    wait_until(lambda: int(vm.domain.blockStats("vda")[3]) > MIB, "the guest to write", 240)
    vm.io("vda", f"write -P 0x42 {DISK - 3}M 1M")
    return vm


@dataclass
class Trouble:
    """One backup in trouble: its process, the folder of its run, and the guard's process."""

    host: Host
    process: subprocess.Popen[str]
    folder: Path
    guard: int
    seconds: float = 0.0

    @classmethod
    def begin(cls, host: Host, where: Target, *arguments: str, child: str = "", **more: str) -> Trouble:
        """Start a backup, hold the guest, and have its target stop to answer right before the first byte is stored.

        `child` is a step at which its guard ends, see `lab.kill_at`.
        """
        process = host.start("backup", host.vm.name, *arguments, at=STEP, stop=True, child=child, **more)
        wait_until(lambda: stopped(process.pid), "the guest to be held")
        (folder,) = (host.state / "runs").glob("[0-9a-f]*")
        made = cls(host, process, folder, guard_of(process.pid))
        where.block()
        return made

    def go_on(self) -> None:
        """Have it write into the target, as far as that goes."""
        self.process.send_signal(signal.SIGCONT)

    def time(self, cause: Callable[[], object] = lambda: None, limit: float = 60.0) -> None:
        """Do something, and wait until the guest is free; `seconds` is how long that took in all."""
        started = time.monotonic()
        cause()
        wait_until(lambda: free(self.host), "the guest to be free", limit)
        self.seconds = time.monotonic() - started

    def give_up(self, error: BackupError | None = None) -> asking.Released:
        """Ask the guard to give the run up."""
        return asking.give_up(self.folder, error or Cancelled("cancelled"), 60)

    def stop_guard(self) -> None:
        """SIGSTOP."""
        os.kill(self.guard, signal.SIGSTOP)

    def cancel(self) -> None:
        """The same, where the guard may not live to answer."""
        with suppress(BackupError):
            self.give_up()

    def end(self, where: Target) -> None:
        """Have the target answer again, and the process go on and end."""
        where.unblock()
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)


def free(host: Host) -> bool:
    """Whether the guest runs, with no job, and nobody is connected to a socket of a run."""
    if host.vm.domain.jobInfo()[0] or host.vm.domain.state()[0] != RUNNING:
        return False
    return not connections(host)


def connections(host: Host) -> list[str]:
    """The ends of connections to sockets of runs, as /proc/net/unix has them."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    # QEMU's folder of this VM: libvirt takes 20 characters of the name. Other tests have VMs of their own.
    own = f"-{host.vm.name[:20]}/backupcore-"
    return [line for line in lines if str(host.scratch) in line or own in line]


def guard_of(owner: int) -> int:
    """The process that guards the run of an owner: one of its children."""
    return next(pid for pid in children(owner) if b"release.start" in Path(f"/proc/{pid}/cmdline").read_bytes())


def children(process: int) -> list[int]:
    """The numbers of its children."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # that thread has ended
            found += [int(pid) for pid in path.read_text().split()]
    return found


def scratch_is_at_its_reserve(host: Host) -> bool:
    """Whether a run has to be given up for it, by the rule of `backupcore_libvirt.scratch`."""
    usage = shutil.disk_usage(host.scratch)
    return usage.free <= min(usage.total // 10, 256 * MIB)


def kill(process: int) -> None:
    """kill -9."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
