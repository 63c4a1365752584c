"""The VM that is backed up: a live one without an operating system, its disk filled as a real one would be."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Sample, run
from lab.domain_xml import DiskSpec
from lab.vm import VM

__all__ = ["Place", "filled"]

MIB = 1 << 20


class Place:
    """A running VM with a disk of `size` bytes, a folder for what is made, configurations for any datastore."""

    def __init__(self, uri: str, vm: VM, folder: Path, size: int) -> None:
        self.uri = uri
        self.vm = vm
        self.folder = folder
        self.size = size
        self.password = folder / "password"
        self.password.touch(mode=0o600)
        self.password.write_text(secrets.token_urlsafe() + "\n")

    def ready(self, path: Path) -> Sample:
        """The disk as a qcow2 file, written by qemu-img: what any other tool starts from."""
        # The VM runs, so its QEMU holds the lock; it writes nothing meanwhile.
        return run("qemu-img", "convert", "-U", "-O", "qcow2", self.vm.disk("vda"), path)

    def configuration(self, name: str, datastore: str) -> Path:
        """A configuration with a state of its own and this one datastore (TOML lines)."""
        path = self.folder / f"{name}.toml"
        path.write_text(
            f'[host]\nuri = "{self.uri}"\nstate = "{self.folder}/state-{name}"\n'
            f'scratch = "{self.vm.folder.parent}/scratch"\n\n[datastores.store]\n{datastore}\n'
        )
        return path


@contextmanager
def filled(uri: str, folder: Path, vm_folder: Path, *, size: int, data: int, name: str) -> Iterator[Place]:
    """A running VM whose disk of `size` bytes holds `data` bytes: half random, a quarter text, a quarter repeated."""
    content = folder / "content.raw"
    _fill(content, data)
    with VM.create(name, [DiskSpec(target="vda", size=size, content=content)], folder=vm_folder) as vm:
        content.unlink()
        vm.start()
        yield Place(uri, vm, folder, size)


def _fill(path: Path, data: int) -> None:
    made = random.Random(1)
    words = [made.randbytes(made.randrange(2, 9)).hex() for _ in range(4000)]
    once = made.randbytes(MIB)
    with path.open("wb") as file:
        for number in range(data // MIB):
            if number % 4 in (0, 1):
                file.write(made.randbytes(MIB))
            elif number % 4 == 2:
                text = " ".join(made.choices(words, k=MIB // 8)).encode()
                file.write((text * 2)[:MIB])
            else:
                file.write(once)
