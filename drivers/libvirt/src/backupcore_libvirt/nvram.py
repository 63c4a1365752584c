"""The variables of a VM's UEFI firmware. libvirt's backup does not hold them: they are a file, not a disk."""

from __future__ import annotations

import time
from pathlib import Path

from backupcore.errors import BackupError, HypervisorError, UnsupportedOperation, from_os_error
from backupcore_libvirt.xml import parse

__all__ = ["nvram_file", "read_nvram"]

_LIMIT = 64 << 20
_TRIES = 20


def nvram_file(vm: str, xml: str) -> Path | None:
    """The file with the VM's firmware variables, None if it has none. It must be readable; UnsupportedOperation where
    the variables lie elsewhere than in a file.
    """
    nvram = parse(xml).find("./os/nvram")
    if nvram is None:
        return None
    source = nvram.find("source")
    name = (nvram.text or "").strip() or (source.get("file", "") if source is not None else "")
    if not name:
        raise UnsupportedOperation(f"VM {vm}: its firmware's variables (NVRAM) do not lie in a file")
    path = Path(name)
    _read(vm, path)
    return path


def read_nvram(vm: str, path: Path) -> bytes:
    """Its contents, read twice until equal: the guest may write to it. HypervisorError, AccessDenied."""
    before = _read(vm, path)
    for _ in range(_TRIES):
        time.sleep(0.02)
        after = _read(vm, path)
        if after == before:
            return after
        before = after
    raise HypervisorError(f"VM {vm}: NVRAM {path} keeps changing while it is read", "Run it again.")


def _read(vm: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        raise _translate(error, vm) from error
    if len(data) > _LIMIT:
        raise UnsupportedOperation(f"VM {vm}: NVRAM {path} is longer than {_LIMIT} bytes")
    return data


def _translate(error: OSError, vm: str) -> BackupError:
    if isinstance(error, FileNotFoundError):
        return HypervisorError(f"VM {vm}: its NVRAM {error.filename} is missing", "It is made when the VM starts.")
    return from_os_error(error, f"VM {vm}: NVRAM")
