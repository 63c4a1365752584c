"""Overlays: the files in which a disk's changes collect under INCREMENT_MODE=SNAPSHOT, as the disks themselves tell.

An overlay is a qcow2 file beside the disk's own, ``<file>.backupcore-<point>-<disk>.qcow2``, with that file (the base)
or an older overlay below it. It holds what was written since the instant of its point, until the next overlay. So the
files of a disk, its *stack*, say which points they reach back to; nothing else records it, and a name counts only where
the file below is the one that it says.

One that is called ``….temporary.qcow2`` is there for a single run (`temporary`): no increment ever reads it, and
whoever finds it after its run merges it.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import HypervisorError
from backupcore_libvirt import qemu_img
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import SourceDisk, source_disks
from backupcore_libvirt.xml import Element, parse

__all__ = [
    "Overlay",
    "Stack",
    "any_overlay",
    "base_of",
    "is_overlay",
    "is_regular",
    "is_temporary",
    "opened",
    "overlay_path",
    "overlays_beside",
    "stacks",
]

_NAME = re.compile(
    r"(?P<base>/.+)\.backupcore-(?P<point>[0-9a-f]{32})-(?P<disk>[A-Za-z0-9]+)(?P<temporary>\.temporary)?\.qcow2",
    re.DOTALL,
)
_NAME_LIMIT = 255  # bytes of one component of a path, on every file system that holds images
SETTLED_LIMIT = 1.0
_MOST = 200  # files of one chain: what libvirt takes


@dataclass(frozen=True, slots=True)
class Overlay:
    """One overlay: its file, the point since which it collects, the disk it was made for, whether for one run only."""

    path: str
    point: str
    disk: str
    temporary: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """The files of one disk: `base`, of format `shape`, and our overlays on it, oldest first.

    `foreign` is a file above an overlay of ours that is not ours (somebody's snapshot), `unsafe` says why we
    must not read one of the files ourselves; or "".
    """

    disk: str
    base: str
    shape: str
    overlays: tuple[Overlay, ...]
    foreign: str = ""
    unsafe: str = ""

    @property
    def top(self) -> str:
        """The file that the VM writes to."""
        return self.overlays[-1].path if self.overlays else self.base

    @property
    def top_shape(self) -> str:
        """The format of that file."""
        return "qcow2" if self.overlays else self.shape

    def index(self, point: str) -> int | None:
        """The place of this disk's overlay of that point that stays between backups; None if it has none."""
        for index, overlay in enumerate(self.overlays):
            if overlay.point == point and overlay.disk == self.disk and not overlay.temporary:
                return index
        return None

    def temporary(self) -> list[int]:
        """The places of the overlays that were made for one run only, lowest first."""
        return [index for index, overlay in enumerate(self.overlays) if overlay.temporary]

    def file(self, index: int) -> tuple[str, str]:
        """(path, format) of overlay number `index`; of the base for -1."""
        return (self.overlays[index].path, "qcow2") if index >= 0 else (self.base, self.shape)


def overlay_path(base: str, point: str, disk: str, *, temporary: bool = False) -> str:
    """Where the overlay of a point goes. HypervisorError if that name is too long."""
    path = f"{base}.backupcore-{point}-{disk}{'.temporary' if temporary else ''}.qcow2"
    if len(os.fsencode(Path(path).name)) > _NAME_LIMIT:
        raise HypervisorError(
            f"disk {disk}: the name of an overlay beside {base} would be longer than {_NAME_LIMIT} bytes",
            "Give the disk's file a shorter name"
            + (": it needs an overlay for each backup." if temporary else ", or choose INCREMENT_MODE=CBT."),
        )
    return path


def is_overlay(path: str) -> bool:
    """Whether a file has a name that we give to overlays."""
    return _NAME.fullmatch(path) is not None


def is_temporary(path: str) -> bool:
    """Whether a file has the name of an overlay that is there for one run only."""
    name = _NAME.fullmatch(path)
    return name is not None and name["temporary"] is not None


def base_of(path: str) -> str:
    """The file that an overlay of this name lies on at the end; any other path itself."""
    name = _NAME.fullmatch(path)
    return name["base"] if name else path


def stacks(domain: Domain) -> dict[str, Stack]:
    """The stack of each disk of a VM that is a file, by ID, out of the images' own headers; also of disks left out.

    HypervisorError where a running VM has other files open than the headers say: somebody has changed them.
    """
    deadline = time.monotonic() + SETTLED_LIMIT
    while True:
        try:
            return _read(domain)
        except HypervisorError:
            # A commit that ends between two looks changes the definition, the headers and the files in turn.
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _read(domain: Domain) -> dict[str, Stack]:
    xml = domain.live_xml()
    elements = _elements(xml)
    found = {}
    for disk in source_disks(xml):
        if disk.kind == "file" and disk.path.startswith("/"):
            found[disk.id] = _stack(disk)
    if domain.is_active() and any_overlay(domain):
        files = opened(domain)
        for stack in found.values():
            _hold_against(domain.name, stack, _backing_paths(elements[stack.disk]), files)
    return found


def opened(domain: Domain) -> set[str]:
    """The files that the QEMU of a running VM itself has open."""
    return {str(node["file"]) for node in domain.query("query-named-block-nodes", flat=True)}


def _hold_against(vm: str, stack: Stack, listed: Sequence[str], files_open: Collection[str]) -> None:
    files = [stack.base, *(overlay.path for overlay in stack.overlays)]
    below = files[-2::-1]
    # libvirt killed in the middle of a call does not know what QEMU has done.
    astray = [path for path in overlays_beside(stack.base, stack.disk) if path in files_open and path not in files]
    unopened = [path for path in files if not any(path in name for name in files_open)] if stack.overlays else []
    if list(listed[: len(below)]) == below and not astray and not unopened:
        return
    raise HypervisorError(
        f"VM {vm}: it is not clear what disk {stack.disk} lies on: by the images {', '.join(reversed(files))}; below "
        f"it, by libvirt, {', '.join(listed) or 'nothing'}; QEMU has {', '.join(astray) or 'others'} open",
        "Were files changed by hand, or was libvirtd killed? Save the disk from within the guest before anything else.",
    )


def _stack(disk: SourceDisk) -> Stack:
    path, shape = disk.path, disk.format
    overlays: list[Overlay] = []
    elsewhere = False
    while shape == "qcow2" and (name := _NAME.fullmatch(path)):
        image = qemu_img.info(path, shape)
        below = image.backing
        if below is None or below.shape not in ("qcow2", "raw"):
            break
        above = _NAME.fullmatch(below.path)
        if below.path != name["base"] and (above is None or above["base"] != name["base"]):
            break
        overlays.append(Overlay(path, name["point"], name["disk"], temporary=name["temporary"] is not None))
        elsewhere = elsewhere or image.data_elsewhere
        path, shape = below.path, below.shape
        if len(overlays) > _MOST:
            raise HypervisorError(f"disk {disk.id}: more than {_MOST} files lie below {disk.path}")
    deeper, unsafe = _below(path, shape)
    if elsewhere:
        unsafe = "an overlay keeps its data in another file"
    foreign = path if any(is_overlay(file) for file in deeper) else ""
    return Stack(disk.id, path, shape, tuple(reversed(overlays)), foreign, unsafe)


def _below(path: str, shape: str) -> tuple[list[str], str]:
    """Every file below an image, by the headers; and why one of them must not be read, or "".

    QEMU would guess a format that no header tells, by contents that may have been a guest's; and a file that a header
    names may be closed to the VM's own QEMU, but not to us.
    """
    found: list[str] = []
    # Raw ends it: what a guest writes there must never be taken for a header.
    while shape == "qcow2" and len(found) <= _MOST and Path(path).exists():
        image = qemu_img.info(path, shape)
        if image.data_elsewhere:
            return found, f"{path} keeps its data in another file"
        if image.backing is None:
            break
        below = image.backing
        found.append(below.path)
        if below.shape not in ("qcow2", "raw") or not below.path.startswith("/"):
            return found, f"{path} does not say which format its backing file {below.path} has, or it is no local file"
        path, shape = below.path, below.shape
    return found, ""


def overlays_beside(base: str, disk: str) -> list[str]:
    """Every file that has the name of an overlay of this disk, used or not.

    Where QEMU's user can write, there may be a FIFO or a link of that name: none of ours.
    """
    file = Path(base)
    listed = file.parent.glob(f"{glob.escape(file.name)}.backupcore-*-{disk}.*qcow2")
    found = (str(path) for path in listed if not path.is_symlink() and path.is_file())
    return sorted(path for path in found if (name := _NAME.fullmatch(path)) and name["base"] == base)


def any_overlay(domain: Domain) -> bool:
    """Whether a VM runs on overlays of ours, or some lie beside its disks; by their names alone, so it is quick."""
    return any(
        is_overlay(disk.path) or overlays_beside(disk.path, disk.id)
        for disk in source_disks(domain.live_xml())
        if disk.kind == "file"
    )


def _elements(xml: str) -> Mapping[str, Element]:
    found = {}
    for element in parse(xml).iterfind("./devices/disk"):
        target = element.find("target")
        if target is not None:
            found[target.get("dev", "")] = element
    return found


def _backing_paths(disk: Element) -> list[str]:
    """The files below a disk's top one, as a running VM's definition lists them."""
    found = [source.get("file") or source.get("dev") or "" for source in disk.iter("source")]
    return found[1:]


def is_regular(path: str) -> bool:
    """Whether it is an ordinary file, through links."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return False
