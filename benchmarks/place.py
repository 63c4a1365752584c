"""Where the benchmarks work: live VMs without an operating system, their disks filled as real ones would be."""

from __future__ import annotations

import os
import random
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from benchmarks.figures import MIB
from benchmarks.measure import Sample, run
from lab.domain_xml import DiskSpec, Kernel
from lab.vm import VM

__all__ = ["Place"]


class Place:
    """Folders, VMs and configurations for one run of the benchmarks.

    `data` bytes are on a disk of twice that size. `folder` is the row's own, removed after it; `vms` is the folder of
    QEMU's user. VMs that rows only read are made once (`filled`, `twin`) and stay until `close`.
    """

    def __init__(self, uri: str, base: Path, vms: Path, data: int) -> None:
        self.uri = uri
        self.vms = vms
        self.data = data
        self.size = 2 * data
        self.folder = base
        self.password = base / "password"
        self.password.touch(mode=0o600)
        self.password.write_text(secrets.token_urlsafe() + "\n")
        self._base = base
        self._made = 0
        self._stack = ExitStack()

    def close(self) -> None:
        """Remove the VMs that were made once."""
        self._stack.close()

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Within the block `folder` is the row's own."""
        self.folder = self._base / name
        self.folder.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = self._base

    @cached_property
    def filled(self) -> VM:
        """A running VM whose disk vda holds `data` bytes in `size`: half random, a quarter text, a quarter repeated."""
        return self._stack.enter_context(self.live())

    @cached_property
    def twin(self) -> VM:
        """A VM like `filled` for virtnbdbackup, which refuses a VM that has checkpoints of others."""
        return self._stack.enter_context(self.live())

    @contextmanager
    def live(
        self,
        disks: Sequence[DiskSpec] | None = None,
        *,
        kernel: Kernel | None = None,
        memory_mib: int = 64,
        iothreads: int = 0,
    ) -> Iterator[VM]:
        """A running VM of its own, by default one like `filled`; removed at the end of the block."""
        wanted = disks or [DiskSpec(target="vda", size=self.size, content=self.content(self.data))]
        self._made += 1
        name = f"bench-{os.getpid()}-{self._made}"
        with VM.create(name, wanted, folder=self.vms, kernel=kernel, memory_mib=memory_mib, iothreads=iothreads) as vm:
            vm.start()
            yield vm

    def content(self, size: int, seed: int = 1) -> Path:
        """A raw file with that many bytes of data, made once; half of them are random and go by `seed`."""
        path = self._base / f"content-{size}-{seed}.raw"
        if not path.exists():
            _fill(path, size, seed)
        return path

    def ready(self, vm: VM, path: Path, target: str = "vda") -> Sample:
        """A disk as a qcow2 file, written by qemu-img: what any other tool starts from."""
        # The VM runs, so its QEMU holds the lock; it writes nothing meanwhile.
        sample = run("qemu-img", "convert", "-U", "-O", "qcow2", vm.disk(target), path)
        return replace(sample, read=sample.inward)  # it reads the disk itself, and nothing else to speak of

    def configuration(self, name: str, datastore: str, defaults: str = "") -> Path:
        """A configuration with a state of its own and this one datastore (TOML lines)."""
        path = self.folder / f"{name}.toml"
        path.write_text(
            f'[host]\nuri = "{self.uri}"\nstate = "{self.state(name)}"\nscratch = "{self.vms}/scratch"\n\n'
            f"[defaults]\n{defaults}\n\n[datastores.store]\n{datastore}\n"
        )
        return path

    def state(self, name: str) -> Path:
        """The state folder of the configuration of that name."""
        return self.folder / f"state-{name}"


def _fill(path: Path, size: int, seed: int) -> None:
    made = random.Random(seed)
    words = [made.randbytes(made.randrange(2, 9)).hex() for _ in range(4000)]
    once = made.randbytes(MIB)
    with path.open("wb") as file:
        for number in range(size // MIB):
            if number % 4 in (0, 1):
                file.write(made.randbytes(MIB))
            elif number % 4 == 2:
                text = " ".join(made.choices(words, k=MIB // 8)).encode()
                file.write((text * 2)[:MIB])
            else:
                file.write(once)
