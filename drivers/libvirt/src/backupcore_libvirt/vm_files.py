"""What a VM consists of besides its disks and its definition: small files that libvirt's backup does not hold.

Firmware variables, the state of an emulated TPM, and the kernel, initrd and device tree of a VM that boots from files
of the host. They are read beside the disks, so not of quite the same instant.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from backupcore.model import BytesArtifact, LeftOut
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.image_size import by_header, keeps_data_elsewhere, lies_on_another
from backupcore_libvirt.qemu_img import to_raw
from backupcore_libvirt.regular_file import Strange, open_file
from backupcore_libvirt.xml import Element, parse

__all__ = ["VMFile", "nvram_file", "read", "tpm_file", "vm_files"]

LIMIT = 128 << 20
"""Bytes of one file; the core holds artifacts that are no disks in memory."""
TRIES = 20
_MADE_AT_A_START = {"nvram": "its firmware's variables, as boot entries,", "tpm": "the keys that its TPM holds"}


@dataclass(frozen=True, slots=True)
class VMFile:
    """One file to keep, as the artifact of that name: ``nvram``, ``tpm``, ``kernel``, ``initrd``, ``dtb``.

    Of one that is an image of `format` qcow2 (``nvram``) what that holds is kept.
    """

    artifact: str
    path: Path
    format: str = "raw"


def vm_files(domain: Domain, uri: str) -> tuple[tuple[VMFile, ...], tuple[LeftOut, ...]]:
    """The files that a backup keeps, and those that it cannot, each with the reason."""
    live = parse(domain.live_xml())
    # The kernel that the definition of the next start names, as the backup keeps that definition.
    named = [_nvram(live), _tpm(live, domain.uuid, uri), *_boot(parse(domain.inactive_xml()))]
    found = [_looked_at(one, domain) if isinstance(one, VMFile) else one for one in named]
    files = tuple(one for one in found if isinstance(one, VMFile))
    return files, tuple(one for one in found if isinstance(one, LeftOut))


def nvram_file(xml: str) -> VMFile | LeftOut | None:
    """The file of the firmware's variables, or why it cannot be kept; None where there is none."""
    return _nvram(parse(xml))


def tpm_file(xml: str, uuid: str, uri: str) -> VMFile | LeftOut | None:
    """The file of the TPM's state, or why it cannot be kept; None where there is none."""
    return _tpm(parse(xml), uuid, uri)


def _nvram(root: Element) -> VMFile | LeftOut | None:
    nvram = root.find("./os/nvram")
    if nvram is None:
        return None
    source = nvram.find("source")
    name = (nvram.text or "").strip() or (source.get("file", "") if source is not None else "")
    if not name:
        return LeftOut(id="nvram", reason="the firmware's variables (NVRAM) do not lie in a file", missed=True)
    loader = root.find("./os/loader")
    shape = nvram.get("format") or (loader.get("format") if loader is not None else None) or "raw"
    if shape not in ("raw", "qcow2"):
        reason = f"NVRAM {name} has the format {shape}; raw and qcow2 are supported"
        return LeftOut(id="nvram", reason=reason, missed=True)
    return VMFile("nvram", Path(name), shape)


def _tpm(root: Element, uuid: str, uri: str) -> VMFile | LeftOut | None:
    tpm = root.find("./devices/tpm/backend")
    if tpm is None:
        return None
    if tpm.get("type") != "emulator":
        return LeftOut(id="tpm", reason=f"a TPM whose state is not a file of this host ({tpm.get('type')})")
    if tpm.find("source") is not None:
        return LeftOut(id="tpm", reason="a TPM whose state lies in a place of its own (<source>)")
    one, two = "tpm1.2/tpm-00.permall", "tpm2/tpm2-00.permall"
    if urlsplit(uri).path == "/session":
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt/qemu/swtpm"
    else:
        base = Path("/var/lib/libvirt/swtpm")
    return VMFile("tpm", base / uuid / (one if tpm.get("version") == "1.2" else two))


def _boot(root: Element) -> Iterator[VMFile]:
    for name in ("kernel", "initrd", "dtb"):
        path = root.findtext(f"./os/{name}", "").strip()
        if path:
            yield VMFile(name, Path(path))


def _looked_at(file: VMFile, domain: Domain) -> VMFile | LeftOut:
    """The file, or why it cannot be kept. What is away hinders no backup: the disks are worth more than that."""
    try:
        with os.fdopen(open_file(file.path), "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
        if file.format == "qcow2":
            size = max(size, by_header(str(file.path), "qcow2") or 0)
    except Strange as error:
        return LeftOut(id=file.artifact, reason=f"{file.path} {error}", missed=True)
    except FileNotFoundError:
        reason = f"{file.path} is missing"
        if file.artifact in _MADE_AT_A_START:
            what = _MADE_AT_A_START[file.artifact]
            reason += (
                f": {what} will be lost when the VM is powered off"
                if domain.is_active()
                else f": {what} are made anew at the next start (it is no loss if the VM has never been started)"
            )
        return LeftOut(id=file.artifact, reason=reason, missed=True)
    except OSError as error:
        return LeftOut(id=file.artifact, reason=f"{file.path} cannot be read: {error.strerror}", missed=True)
    if file.format == "qcow2" and (lies_on_another(str(file.path)) or keeps_data_elsewhere(str(file.path))):
        return LeftOut(id=file.artifact, reason=f"{file.path} lies on another file", missed=True)
    if size > LIMIT:
        reason = f"{file.path} has {size >> 20} MiB; files of up to {LIMIT >> 20} MiB are kept"
        return LeftOut(id=file.artifact, reason=reason, missed=True)
    return file


def read(file: VMFile, pause: Callable[[float], object] = time.sleep) -> BytesArtifact | LeftOut:
    """Its contents, read twice until equal: the guest, or the host, may write to it; or why there are none."""
    before: bytes | None = None
    try:
        before = _read(file)
        for _ in range(TRIES):
            pause(0.02)
            after = _read(file)
            if after == before and after is not None:
                break
            before = after
        else:
            why = "is missing" if before is None else "kept changing while it was read"
            return LeftOut(id=file.artifact, reason=f"{file.path} {why}", missed=True)
    except Strange as error:
        return LeftOut(id=file.artifact, reason=f"{file.path} {error}", missed=True)
    except OSError as error:
        return LeftOut(id=file.artifact, reason=f"{file.path} cannot be read: {error.strerror}", missed=True)
    assert before is not None  # equal to `after`
    if len(before) > LIMIT:
        return LeftOut(id=file.artifact, reason=f"{file.path} has grown beyond {LIMIT >> 20} MiB", missed=True)
    return BytesArtifact(file.artifact, before)


def _read(file: VMFile) -> bytes | None:
    try:
        return _held(file)
    except FileNotFoundError:
        return None  # for a moment, where it is replaced


def _held(file: VMFile) -> bytes:
    with os.fdopen(open_file(file.path), "rb") as opened:
        data = opened.read(LIMIT + 1)
    if file.format == "raw" or len(data) > LIMIT:
        return data
    # Of a copy, so that no header that is written meanwhile leads anywhere else.
    with tempfile.TemporaryDirectory(prefix="vmkeep-nvram-") as folder:
        copy, held = Path(folder) / "copy", Path(folder) / "nvram"
        copy.write_bytes(data)
        if lies_on_another(str(copy)) or keeps_data_elsewhere(str(copy)):
            raise Strange("lies on another file")
        to_raw(str(copy), file.format, str(held))
        with held.open("rb") as raw:
            return raw.read(LIMIT + 1)
