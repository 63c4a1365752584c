"""What the table of shapes is made of: a `Shape` is one way in which a VM can have a disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

MIB = 1 << 20
SIZE = 3 * MIB


@dataclass(frozen=True, kw_only=True)
class Made:
    """A disk that was made: its <source>, its format, and the options with which QEMU's programs open it."""

    source: str
    options: str
    format: str = "qcow2"
    kind: str = "file"


Make = Callable[[Path, str], Made]
"""Makes a disk in a folder, for the VM's disk of that ID."""


def quoted(value: object) -> str:
    """An XML attribute: a newline in it stays one."""
    return quoteattr(os.fspath(value) if isinstance(value, Path) else str(value), {"\n": "&#10;"})


def escaped(path: Path) -> str:
    """A path within QEMU's image options."""
    return str(path).replace(",", ",,")


def run(*command: object) -> str:
    """One of QEMU's programs, which must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def made_of(path: Path, shape: str = "qcow2") -> Made:
    """A disk that is a plain file."""
    driver = "host_device" if path.is_block_device() else "file"
    return Made(
        source=f"<source file={quoted(path)}/>",
        options=f"driver={shape},file.driver={driver},file.filename={escaped(path)}",
        format=shape,
    )


def create(path: Path, *options: str, shape: str = "qcow2", size: int = SIZE) -> Path:
    """An empty image; QEMU's programs take no path for an option or a protocol that is a whole one."""
    run("qemu-img", "create", "-q", "-f", shape, *(part for one in options for part in ("-o", one)), path, size)
    return path


def write(options: str, *commands: str) -> None:
    """qemu-io commands on a disk that no VM has open."""
    run("qemu-io", *(part for command in commands for part in ("-c", command)), "--image-opts", options)


def convert(options: str, target: Path, *more: str) -> Path:
    """What QEMU's own tools read of a disk, as a raw file; -U, since a VM that stands still may have it open."""
    run("qemu-img", "convert", "-U", "--image-opts", options, "-O", "raw", *more, target)
    return target


def differing(path: Path, truth: Path) -> str:
    """What differs between two images by qemu-img, their sizes too; "" if nothing does."""
    command = ["qemu-img", "compare", str(path), str(truth)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.stdout == "Images are identical.\n" else f"{done.stdout}{done.stderr}".strip()


def plain(folder: Path, target: str) -> Made:
    """An ordinary qcow2 file."""
    return made_of(create(folder / f"{target}.qcow2"))


def raw(folder: Path, target: str) -> Made:
    """An ordinary raw file."""
    return made_of(create(folder / f"{target}.raw", shape="raw"), "raw")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One way in which a VM can have a disk.

    `words` are the README's; shapes of the same words are one row there. `whole`: an increment takes it whole, or may
    do so (None). `alone` is what a restore in place says where it refuses; "" where it works. `driver` are
    attributes, `inside` is further XML. `off`: QEMU's monitor cannot write to it.
    """

    name: str
    words: str
    make: Make = plain
    bus: str = "virtio"
    driver: str = ""
    inside: str = ""
    whole: bool | None = False
    alone: str = ""
    off: bool = False

    def xml(self, made: Made, target: str) -> str:
        """The <disk>. libvirt keeps an alias of the user's if it starts with ua-; the monitor finds it by that."""
        return (
            f"<disk type='{made.kind}' device='disk'><driver name='qemu' type='{made.format}' discard='unmap' "
            f"{self.driver}/>{made.source}<target dev='{target}' bus='{self.bus}'/>{self.inside}"
            f"<alias name='ua-{target}'/></disk>"
        )
