"""`vmkeep check` proves by trying that this host's QEMU, confined as it is, can be backed up live.

A VM without an operating system is made for it: never defined, never running (paused from its start), and destroyed by
libvirt should this process end. A backup of its one small disk begins, is read, and ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from uuid import uuid4
from xml.etree.ElementTree import Element, SubElement, tostring

from backupcore.disk.nbd import Address
from backupcore.errors import BackupError, HypervisorError, NotFound, from_os_error
from backupcore.hypervisor import Finding
from backupcore.model import new_id
from backupcore_libvirt.backup_job import backup_xml, end
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.owner import confinement, qemu_owner
from backupcore_libvirt.place.confinement import described
from backupcore_libvirt.place.job_socket import job_socket
from backupcore_libvirt.place.refusal import refused
from backupcore_libvirt.premade.image import make_empty
from backupcore_libvirt.scratch import Owner
from backupcore_libvirt.xml import parse

__all__ = ["trial"]

_SUBJECT = "live backup"
_CONTENTS = b"\x5a" * 65536
_WITHOUT = "'vmkeep check --no-vm' leaves this out."


def trial(uri: str, scratch: Path, owner: Owner) -> Finding:
    """Try it, and say how it went. `owner` is the user that VMs run as. Nothing is left, whatever happens."""
    began = time.monotonic()
    there = scratch.exists()
    folder = RunFolder(scratch, new_id())
    try:
        lock = folder.make(owner, "")  # of no VM: should we be killed, the next run of any VM clears it away
        try:
            # A connection of its own: the VM ends with it.
            with Connection(uri) as connection:
                how = _try(connection, folder, owner)
        finally:
            folder.remove()
            os.close(lock)
            if not there:
                with suppress(OSError):  # somebody uses it by now
                    scratch.rmdir()
    except BackupError as error:
        hint = f"{error.hint} {_WITHOUT}" if error.hint else _WITHOUT
        return Finding(subject=_SUBJECT, ok=False, detail=error.message, hint=hint)
    seconds = time.monotonic() - began
    return Finding(subject=_SUBJECT, ok=True, detail=f"tried on a VM made for it, {how} ({seconds:.1f} s)")


def _try(connection: Connection, folder: RunFolder, owner: Owner) -> str:
    """What was tried, for a line of text."""
    models = confinement(connection)
    disk = folder.path / "trial.raw"
    _make_disk(disk, owner)
    uuid = str(uuid4())
    name = f"vmkeep-check-{uuid[:8]}"
    try:
        domain = connection.start_paused(_definition(name, uuid, disk, _kind(connection)))
        try:
            return _back_up(domain, folder, qemu_owner(domain.live_xml(), connection), models)
        finally:
            with suppress(NotFound):  # it has ended by itself, and libvirt forgets such a VM
                domain.destroy()
    finally:
        _remove_traces(name, uuid)


def _back_up(domain: Domain, folder: RunFolder, owner: Owner, models: Collection[str]) -> str:
    socket = job_socket(domain, folder)
    make_empty(folder.disk("vda"), len(_CONTENTS), owner)
    try:
        domain.begin_backup(backup_xml(["vda"], folder, socket.path, {}), None)
    except BackupError as error:
        raise refused(error, folder, socket.path, models) from error
    try:
        with Address(str(socket.path), "vda", socket.peer).connect() as client:
            read = client.read(0, client.size)
    finally:
        end(domain, folder)
    if read != _CONTENTS:
        raise HypervisorError("what was read of a VM made for it is not what its disk holds", "Please report this.")
    unknown = "" if socket.peer else ", whose process libvirt's records do not name"
    place = folder.scratch if socket.path == folder.socket else f"the VM's own folder in {socket.path.parent.parent}"
    return f"with {described(models)}: a scratch file in {folder.scratch}, QEMU's socket in {place}{unknown}"


def _make_disk(path: Path, owner: Owner) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(_CONTENTS)
            if os.geteuid() == 0:
                os.fchown(handle, owner.uid, owner.gid)
    except OSError as error:
        raise from_os_error(error, str(path)) from error


def _remove_traces(name: str, uuid: str) -> None:
    """Remove what libvirt keeps of a VM that is gone, its log and its profile: nobody will look for this one's."""
    logs = Path("/var/log/libvirt/qemu")
    if os.geteuid() != 0:
        logs = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "libvirt/qemu/log")
    profile = Path("/etc/apparmor.d/libvirt", f"libvirt-{uuid}")
    for trace in (logs / f"{name}.log", profile, profile.with_name(f"{profile.name}.files")):
        with suppress(OSError):
            trace.unlink()


def _kind(connection: Connection) -> str:
    """KVM where this host's VMs have it: SELinux has other rules for VMs that are emulated."""
    capabilities = parse(connection.capabilities())
    arch = capabilities.findtext("./host/cpu/arch", "")
    offered = {found.get("type") for found in capabilities.iterfind(f"./guest/arch[@name='{arch}']/domain")}
    return "kvm" if "kvm" in offered else "qemu"


def _definition(name: str, uuid: str, disk: Path, kind: str) -> str:
    root = Element("domain", type=kind)
    SubElement(root, "name").text = name
    SubElement(root, "uuid").text = uuid
    SubElement(root, "memory", unit="MiB").text = "32"
    SubElement(SubElement(root, "os"), "type").text = "hvm"
    devices = SubElement(root, "devices")
    element = SubElement(devices, "disk", type="file", device="disk")
    SubElement(element, "driver", name="qemu", type="raw")
    SubElement(element, "source", file=str(disk))
    SubElement(element, "target", dev="vda", bus="virtio")
    SubElement(devices, "controller", type="usb", model="none")
    SubElement(devices, "memballoon", model="none")
    return tostring(root, encoding="unicode")
