"""Putting restored disks in the place of a powered-off VM's own: may it be done, and what must the new file be like?

Nothing here changes a VM or its disks.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from backupcore.errors import Busy, HypervisorError, IntegrityError, NotFound, UnsupportedOperation, from_os_error
from backupcore.hypervisor import DiskFile
from backupcore.typed import typed
from backupcore_libvirt.connection import OFF, Connection, Domain
from backupcore_libvirt.disks import SourceDisk, source_disks
from backupcore_libvirt.image_size import keeps_data_elsewhere
from backupcore_libvirt.overlay.stack import any_overlay
from backupcore_libvirt.qcow2_header import header_of
from backupcore_libvirt.regular_file import Strange, open_file
from backupcore_libvirt.states import State, require_here
from backupcore_libvirt.used_files import used_files
from backupcore_libvirt.vm_files import VMFile, nvram_file, tpm_file
from backupcore_libvirt.xml import parse

__all__ = ["fit", "require_replaceable"]

_COPIED = ("security.selinux", "system.posix_acl_access")


def require_replaceable(
    connection: Connection, domain: Domain, disks: Sequence[str], *, nvram: bool = False
) -> dict[str, DiskFile]:
    """The file of each of `disks`, if all of them may be replaced; see `backupcore.hypervisor.Hypervisor`."""
    _require_off(domain)
    if names := domain.snapshots():
        raise UnsupportedOperation(
            f"VM {domain.name} has snapshots ({', '.join(names):.200}), which belong to the disks that it has now",
            f"Delete them: {typed('virsh snapshot-delete', domain.name)} SNAPSHOT; or restore to new files with --to.",
        )
    if any_overlay(domain):
        raise UnsupportedOperation(
            f"VM {domain.name} has overlays of ours, which lie on the disks that it has now",
            f"Bring it back to plain disks, then run it again: {typed('vmkeep vm forget', domain.name)}",
        )
    definition = domain.inactive_xml()
    known = {disk.id: disk for disk in source_disks(definition)}
    found = {}
    for name in disks:
        disk = known.get(name)
        if disk is None:
            raise NotFound(
                f"VM {domain.name} has no disk {name} now",
                f"It has: {', '.join(known)}. Choose with --disk, or use --to.",
            )
        if disk.left_out:
            raise UnsupportedOperation(f"VM {domain.name}: disk {name} is {disk.left_out}", "Restore it with --to.")
        if disk.kind != "file":
            raise _no_file(domain, disk)
        if disk.encrypted:
            raise UnsupportedOperation(f"VM {domain.name}: disk {name} is encrypted", "Restore it with --to.")
        found[name] = DiskFile(
            path=_regular(domain, name, Path(disk.path)), format=disk.format, needed=not disk.source.optional
        )
        _require_whole(domain, disk)
    for element in parse(definition).iterfind("./devices/disk"):
        target = element.find("target")
        if element.find("./backingStore/source") is not None and target is not None and target.get("dev") in found:
            # QEMU would lay the restored disk over that file, which shows wherever the disk holds nothing.
            raise UnsupportedOperation(
                f"VM {domain.name}: the definition itself names a backing file of disk {target.get('dev')}",
                f"Restore to new files with --to; or remove <backingStore>: {typed('virsh edit', domain.name)}",
            )
    beside = (nvram_file(definition), tpm_file(definition, domain.uuid, connection.uri)) if nvram else ()
    for one in beside:
        # A TPM that has never been used has no folder either.
        if isinstance(one, VMFile) and one.path.parent.is_dir():
            _require_unlinked(domain, one)
            shape = "qcow2" if one.format == "qcow2" else ""
            found[one.artifact] = DiskFile(path=_regular(domain, one.artifact, one.path), format=shape, needed=False)
    _require_gate(domain, found)
    _require_ours(connection, domain, found)
    for name, file in found.items():
        _require_closed(domain, name, file)
    return found


def _require_unlinked(domain: Domain, file: VMFile) -> None:
    """That a file in a folder which QEMU's user, or swtpm's, may write to is no link of theirs: we may be root, and
    would exchange what it leads to.
    """
    try:
        os.close(open_file(file.path))
    except FileNotFoundError:
        pass  # it comes back
    except Strange as error:
        raise UnsupportedOperation(f"VM {domain.name}: {file.path} ({file.artifact}) {error}", "Use --to.") from error
    except OSError as error:
        raise from_os_error(error, f"VM {domain.name}: {file.path}") from error


def _require_gate(domain: Domain, found: dict[str, DiskFile]) -> None:
    """That there is a disk without which the VM does not start: it is away while several files are exchanged."""
    if len(found) > 1 and not any(file.needed for file in found.values()):
        raise UnsupportedOperation(
            f"VM {domain.name} starts without any of these disks (startupPolicy='optional'), so it could run on old "
            "and new ones mixed after a restore that was cut off",
            f"Remove startupPolicy from one of them ({typed('virsh edit', domain.name)}), or restore one at a time.",
        )


def _no_file(domain: Domain, disk: SourceDisk) -> UnsupportedOperation:
    """There is no room beside a device in which its old contents could be kept."""
    if disk.kind == "block" and disk.format == "raw":
        hint = (
            "Choose the others with --disk. To give up what it holds now: "
            f"{typed('vmkeep restore ID --disk', disk.id, '--device', disk.path)} --overwrite"
        )
    else:
        hint = "Restore it with --to, then write it there: qemu-img convert -O FORMAT FILE TARGET"
    return UnsupportedOperation(
        f"VM {domain.name}: disk {disk.id} is a {disk.kind} disk ({disk.path}), beside which its old contents cannot "
        "be kept; only files are replaced in place",
        hint,
    )


def _require_whole(domain: Domain, disk: SourceDisk) -> None:
    """That the disk is its file and nothing else: a new file in its place would be another disk."""
    why = ""
    if disk.source.part is not None:
        why = f"is only a part of {disk.path} (<slices>), and that file would be replaced as a whole"
    elif disk.source.data_file or (disk.format == "qcow2" and keeps_data_elsewhere(disk.path)):
        why = f"keeps its data in another file than {disk.path}, which would be left over"
    elif disk.format == "qcow2" and (strange := _strange(disk.path)):
        why = f"{strange}, and the restored one would be a plain image"
    elif disk.source.unknown:
        why = f"is more than its file {disk.path} (the definition has {', '.join(disk.source.unknown)})"
    if why:
        raise UnsupportedOperation(
            f"VM {domain.name}: disk {disk.id} {why}",
            "Restore it to a new file with --to, and the others with --disk; then write it there with the VM off "
            "(qemu-img convert -n), or let the definition name the new file.",
        )


def _strange(path: str) -> str:
    """What a plain image in its place would lose; damage is what a restore is there for."""
    try:
        header = header_of(path)
    except OSError:
        return ""  # one that is missing or cannot be read may be what is to be put right
    if header is None or header.damaged:
        return ""
    if header.strange or not header.snapshots:
        return header.strange
    count = f"{header.snapshots} snapshot{'s' if header.snapshots > 1 else ''}"
    return f"holds {count} in its image that libvirt does not know ({typed('qemu-img snapshot -l', path)})"


def _require_off(domain: Domain) -> None:
    if domain.state()[0] not in OFF:
        raise Busy(
            f"VM {domain.name} is {State.of(domain)}; its disks cannot be replaced",
            f"Power it off: {typed('virsh shutdown', domain.name)}. Or restore to new files with --to.",
        )
    require_here(domain)
    if domain.is_saved():
        raise Busy(
            f"VM {domain.name} has a saved memory image, which belongs to the disks that it has now",
            f"Start and power off the VM, or give up its saved state: {typed('virsh managedsave-remove', domain.name)}",
        )


def _regular(domain: Domain, disk: str, path: Path) -> Path:
    """The file without symbolic links. One that is missing is as well: that may be what is to be put right."""
    try:
        real = path.resolve()
        if real.exists() and not stat.S_ISREG(real.stat().st_mode):
            raise UnsupportedOperation(f"VM {domain.name}: disk {disk} ({path}) is no regular file", "Use --to.")
    except OSError as error:
        raise from_os_error(error, f"VM {domain.name}: disk {disk}") from error
    return real


def _require_ours(connection: Connection, domain: Domain, files: dict[str, DiskFile]) -> None:
    """No other VM may use one of these files, as its disk or below it: it would find other contents there."""
    by_path = {file.path: disk for disk, file in files.items()}
    for other in connection.domains():
        if other.uuid == domain.uuid:
            continue
        try:
            shared = next((path for path in used_files(other) if path in by_path), None)
        except NotFound:
            continue  # it was undefined meanwhile
        if shared is not None:
            raise UnsupportedOperation(
                f"VM {domain.name}: disk {by_path[shared]} ({shared}) is also used by VM {other.name}",
                "Restore to new files with --to.",
            )


def _require_closed(domain: Domain, disk: str, file: DiskFile) -> None:
    if not file.path.exists() or not file.format:
        return
    # Without -U QEMU asks for its locks, which another QEMU that writes there holds, on whichever host it runs.
    done = _run(["qemu-img", "info", "-f", file.format, "--", str(file.path)])
    if done.returncode and "lock" in done.stderr:
        raise Busy(
            f"VM {domain.name}: disk {disk} ({file.path}) is in use by another program: {done.stderr.strip():.300}",
            "End that program, then run it again.",
        )
    # A disk that cannot be read otherwise may be what is to be restored.


def fit(written: Path, old: DiskFile) -> None:
    """Make the qcow2 file `written`, or one that is no disk, what takes the place of `old`."""
    if old.format:
        _ask(["qemu-img", "check", "-q", "-f", "qcow2", "--", str(written)], written)
    if old.format == "raw":
        raw = written.with_name(f"{written.name}.raw")
        try:
            _ask(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "--", str(written), str(raw)], written)
            _ask(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "--", str(written), str(raw)], written)
            raw.rename(written)
        finally:
            raw.unlink(missing_ok=True)
    try:
        _like(written, old.path)
    except OSError as error:
        raise from_os_error(error, f"preparing {written}") from error


def _like(written: Path, old: Path) -> None:
    """Owner, mode, SELinux label and ACL of the old file; on the disk when this returns."""
    handle = os.open(written, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if old.exists():
            found = old.stat()
            if (found.st_uid, found.st_gid) != (os.fstat(handle).st_uid, os.fstat(handle).st_gid):
                os.fchown(handle, found.st_uid, found.st_gid)
            os.fchmod(handle, stat.S_IMODE(found.st_mode))
            for name in set(_COPIED).intersection(os.listxattr(old)):
                os.setxattr(handle, name, os.getxattr(old, name))
        os.fsync(handle)
    finally:
        os.close(handle)


def _ask(command: list[str], what: Path) -> None:
    done = _run(command)
    if done.returncode == 0:
        return
    said = (done.stderr or done.stdout).strip()
    if "No space left" in said:
        raise from_os_error(OSError(28, "No space left on device", str(what)), f"{command[0]} {command[1]}")
    raise IntegrityError(f"{command[0]} {command[1]} of the restored {what}: {said:.500}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise HypervisorError(f"{command[0]}: {error.strerror}", "Install qemu-utils.") from error
