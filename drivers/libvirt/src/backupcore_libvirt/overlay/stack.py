"""Overlays: the files in which a disk's changes collect under INCREMENT_MODE=SNAPSHOT, as the disks themselves tell.

An overlay is a qcow2 file beside the disk's own, ``<file>.backupcore-<point>-<disk>.<installation>.qcow2``, with that
file (the base) or an older overlay below it. It holds what was written since the instant of its point, until the next
overlay. So the files of a disk, its *stack*, say which points they reach back to; nothing else records it, and a name
counts only where the file below is the one that it says.

``<installation>`` are the first letters of the ID of whose run has made it: nobody else merges or removes it. Names of
older versions do not say it: these are anybody's.

One that is called ``….temporary.qcow2`` is there for a single run (`temporary`): no increment ever reads it, and
whoever finds it after its run merges it. That of a block device lies in scratch (`folder`), and its name holds the
device's path: ``…/overlays/<UUID of the VM>/%2Fdev%2Fvg0%2Fweb1.backupcore-<point>-vda.temporary.qcow2``.
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
from urllib.parse import quote, unquote_to_bytes

from backupcore.errors import HypervisorError
from backupcore_libvirt import qemu_img
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import SourceDisk, located, source_disks
from backupcore_libvirt.image_size import lies_on_another, stands_alone
from backupcore_libvirt.xml import Element, parse

__all__ = [
    "Overlay",
    "Stack",
    "any_overlay",
    "base_of",
    "disk_of",
    "files_below",
    "is_others",
    "is_overlay",
    "is_regular",
    "is_temporary",
    "is_whole",
    "lower_files",
    "opened",
    "overlay_path",
    "overlays_beside",
    "point_of",
    "source_path",
    "stacks",
]

_NAME = re.compile(
    r"(?P<base>/.+)\.backupcore-(?P<point>[0-9a-f]{32})-(?P<disk>[A-Za-z0-9]+)(\.(?P<installation>[0-9a-f]{8}))?"
    r"(?P<temporary>\.temporary)?\.qcow2",
    re.DOTALL,
)
_OF_DEVICE = re.compile(r"/(?:.+/)?overlays/[0-9a-f-]{36}/(?P<device>%2F[^/]+)", re.DOTALL)
_SHORT = 8  # letters of an installation's ID
_NAME_LIMIT = 255  # bytes of one component of a path, on every file system that holds images
SETTLED_LIMIT = 1.0
_MOST = 200  # files of one chain: what libvirt takes


@dataclass(frozen=True, slots=True)
class Overlay:
    """One overlay: its file, the point since which it collects, the disk it was made for, whether for one run only.

    `installation` are the first letters of the ID of whose it is, "" for anybody's.
    """

    path: str
    point: str
    disk: str
    temporary: bool = False
    installation: str = ""

    def is_of(self, installation: str) -> bool:
        """Whether the installation of this ID may merge it."""
        return self.installation in ("", installation[:_SHORT])


@dataclass(frozen=True, slots=True)
class Stack:
    """The files of one disk: `base`, a file or device of format `shape`, and our overlays on it, oldest first.

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

    @property
    def on_device(self) -> bool:
        """Whether the disk is a block device, beside which no overlay can lie."""
        return Path(self.base).is_block_device()

    def index(self, point: str) -> int | None:
        """The place of this disk's overlay of that point that stays between backups; None if it has none."""
        for index, overlay in enumerate(self.overlays):
            if overlay.point == point and overlay.disk == self.disk and not overlay.temporary:
                return index
        return None

    def temporary(self, installation: str) -> list[int]:
        """The places of this installation's overlays that were made for one run only, lowest first."""
        return [
            index for index, overlay in enumerate(self.overlays) if overlay.temporary and overlay.is_of(installation)
        ]

    def of_others(self, installation: str) -> list[int]:
        """The places of the overlays that this installation leaves alone, lowest first."""
        return [index for index, overlay in enumerate(self.overlays) if not overlay.is_of(installation)]

    def file(self, index: int) -> tuple[str, str]:
        """(path, format) of overlay number `index`; of the base for -1."""
        return (self.overlays[index].path, "qcow2") if index >= 0 else (self.base, self.shape)


def overlay_path(
    base: str,
    point: str,
    disk: str,
    *,
    installation: str = "",
    temporary: bool = False,
    folder: Path | None = None,
) -> str:
    """Where the overlay of a point goes: beside the file, or into `folder` where that is a device.

    Where there is no room for the installation in its name it is anybody's.

    HypervisorError if that name is too long.
    """
    start = base if folder is None else str(folder / quote(os.fsencode(base), safe=""))
    rest = f"{'.temporary' if temporary else ''}.qcow2"
    path = f"{start}.backupcore-{point}-{disk}{rest}"
    named = f"{start}.backupcore-{point}-{disk}.{installation[:_SHORT]}{rest}"
    if installation and len(os.fsencode(Path(named).name)) <= _NAME_LIMIT:
        return named
    if len(os.fsencode(Path(path).name)) > _NAME_LIMIT:
        raise HypervisorError(
            f"disk {disk}: the name of an overlay of {base} would be longer than {_NAME_LIMIT} bytes",
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
    """The file or device that an overlay of this name lies on at the end; any other path itself."""
    name = _NAME.fullmatch(path)
    if name is None:
        return path
    device = _OF_DEVICE.fullmatch(name["base"])
    return os.fsdecode(unquote_to_bytes(device["device"])) if device else name["base"]


def disk_of(path: str) -> str:
    """The disk that an overlay of this name was made for; "" for any other path."""
    name = _NAME.fullmatch(path)
    return name["disk"] if name else ""


def is_others(path: str, installation: str) -> bool:
    """Whether a file has the name of an overlay of another installation than this one."""
    name = _NAME.fullmatch(path)
    return name is not None and (name["installation"] or "") not in ("", installation[:_SHORT])


def point_of(path: str) -> str:
    """The point of an overlay of this name that stays between backups; "" for any other path."""
    name = _NAME.fullmatch(path)
    return name["point"] if name and not name["temporary"] else ""


def stacks(domain: Domain) -> dict[str, Stack]:
    """The stack of each disk of a VM that is a file or a device, by ID, out of the images' own headers; also of disks
    left out.

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
    disks = [located(domain, disk) for disk in source_disks(xml)]
    found = {
        disk.id: _stack(disk)
        for disk in disks
        # What is a part of a file is no image by itself, and no overlay of ours ever lies on it.
        if disk.kind in ("file", "block") and disk.path.startswith("/") and disk.source.part is None
    }
    # Beside a device there is nothing that would tell of an overlay.
    if domain.is_active() and (any_overlay(domain) or any(disk.kind == "block" for disk in disks)):
        files = opened(domain)
        for stack in found.values():
            _hold_against(domain.name, stack, lower_files(domain, elements[stack.disk]), files)
    return found


def opened(domain: Domain) -> set[str]:
    """The files that the QEMU of a running VM itself has open."""
    return {str(node["file"]) for node in domain.query("query-named-block-nodes", flat=True)}


def _hold_against(vm: str, stack: Stack, listed: Sequence[str | None], files_open: Collection[str]) -> None:
    files = [stack.base, *(overlay.path for overlay in stack.overlays)]
    below = files[-2::-1]
    # libvirt killed in the middle of a call does not know what QEMU has done.
    astray = [
        path
        for path in sorted(files_open)
        if base_of(path) == stack.base != path and disk_of(path) == stack.disk and path not in files
    ]
    unopened = [path for path in files if not any(path in name for name in files_open)] if stack.overlays else []
    told = len(listed) >= len(below) and all(path in (None, file) for path, file in zip(listed, below, strict=False))
    if told and not astray and not unopened:
        return
    raise HypervisorError(
        f"VM {vm}: it is not clear what disk {stack.disk} lies on: by the images {', '.join(reversed(files))}; below "
        f"it, by libvirt, {', '.join(path or 'a volume' for path in listed) or 'nothing'}; QEMU has "
        f"{', '.join(astray) or 'others'} open",
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
        if not _lies_on(path, below.path):
            break
        temporary = name["temporary"] is not None
        overlays.append(Overlay(path, name["point"], name["disk"], temporary, name["installation"] or ""))
        elsewhere = elsewhere or image.data_elsewhere
        path, shape = below.path, below.shape
        if len(overlays) > _MOST:
            raise HypervisorError(f"disk {disk.id}: more than {_MOST} files lie below {disk.path}")
    deeper, unsafe = _below(path, shape)
    if elsewhere:
        unsafe = "an overlay keeps its data in another file"
    foreign = path if any(is_overlay(file) for file in deeper) else ""
    return Stack(disk.id, path, shape, tuple(reversed(overlays)), foreign, unsafe)


def _lies_on(overlay: str, below: str) -> bool:
    """Whether what lies below an overlay is what its name says: its base, or another overlay of that."""
    return base_of(overlay) in (below, base_of(below))


def _below(path: str, shape: str) -> tuple[list[str], str]:
    """Every file below an image, by the headers; and why one of them must not be read, or "".

    QEMU would guess a format that no header tells, by contents that may have been a guest's; and a file that a header
    names may be closed to the VM's own QEMU, but not to us.
    """
    found: list[str] = []
    # Raw ends it: what a guest writes there must never be taken for a header.
    while shape == "qcow2" and len(found) <= _MOST and Path(path).exists():
        if stands_alone(path):
            break
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


def files_below(path: str, shape: str) -> list[str]:
    """Every file below an image, by the headers; no program is run where there is none."""
    return _below(path, shape)[0] if shape == "qcow2" and lies_on_another(path) else []


def is_whole(path: str) -> bool:
    """Whether an overlay that a VM uses is all of its disk by now: somebody has pulled what lay below into it
    (`virsh blockpull`), so there is nothing to merge it into.
    """
    below = qemu_img.info(path, "qcow2").backing
    return below is None or not _lies_on(path, below.path)


def overlays_beside(base: str, disk: str) -> list[str]:
    """Every file beside `base` that has the name of an overlay of this disk, used or not.

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
        for disk in (located(domain, one) for one in source_disks(domain.live_xml()))
        if disk.kind == "file"
    )


def _elements(xml: str) -> Mapping[str, Element]:
    found = {}
    for element in parse(xml).iterfind("./devices/disk"):
        target = element.find("target")
        if target is not None:
            found[target.get("dev", "")] = element
    return found


def lower_files(domain: Domain, disk: Element) -> list[str | None]:
    """What lies below a disk's top file, as a definition lists it; None for a volume of a pool that does not tell."""
    return [source_path(domain, source) for source in disk.iter("source")][1:]


def source_path(domain: Domain, source: Element) -> str | None:
    """The file or device of a <source>, "" if it is neither; None for a volume of a pool that does not tell."""
    if pool := source.get("pool"):
        try:
            return domain.volume(pool, source.get("volume", ""))[0]
        except HypervisorError:
            return None
    return source.get("file") or source.get("dev") or ""


def is_regular(path: str) -> bool:
    """Whether it is an ordinary file, through links."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return False
