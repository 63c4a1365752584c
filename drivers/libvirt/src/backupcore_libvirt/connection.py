"""libvirt, typed: no other module calls it.

libvirt-python publishes no types, so every `Any` of this package ends here. Each method is one call of libvirt; its
error comes out as a member of the taxonomy (`libvirt_errors`). Constants are those of libvirt's C headers; they are
part of its ABI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Self

import libvirt
import libvirt_qemu

from backupcore.errors import BackupError, HypervisorError
from backupcore_libvirt.libvirt_errors import calling, code_of

__all__ = [
    "ACTIVE_COMMIT",
    "AGENT_UNRESPONSIVE",
    "BACKUP",
    "CHECKPOINT_INCONSISTENT",
    "COMMIT",
    "IO_ERROR",
    "NOT_READY",
    "NO_CHECKPOINT",
    "NO_JOB",
    "OFF",
    "PAUSED",
    "PAUSED_BY_USER",
    "RUNNING",
    "SHUTTING_DOWN",
    "Connection",
    "Domain",
    "StoragePool",
]

RUNNING: int = libvirt.VIR_DOMAIN_RUNNING
PAUSED: int = libvirt.VIR_DOMAIN_PAUSED
SHUTTING_DOWN: int = libvirt.VIR_DOMAIN_SHUTDOWN
OFF = (int(libvirt.VIR_DOMAIN_SHUTOFF), int(libvirt.VIR_DOMAIN_NOSTATE))
IO_ERROR: int = libvirt.VIR_DOMAIN_PAUSED_IOERROR
"""The reason of a PAUSED VM that QEMU stopped since it could not write (a full disk, or a full scratch file)."""
PAUSED_BY_USER: int = libvirt.VIR_DOMAIN_PAUSED_USER
"""The reason of a PAUSED VM that somebody asked libvirt to pause."""
AGENT_UNRESPONSIVE: int = libvirt.VIR_ERR_AGENT_UNRESPONSIVE
BACKUP: int = libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
CHECKPOINT_INCONSISTENT: int = libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT
NO_CHECKPOINT: int = libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT
COMMIT: int = libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT
ACTIVE_COMMIT: int = libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT
NOT_READY: int = libvirt.VIR_ERR_BLOCK_COPY_ACTIVE
NO_JOB: int = libvirt.VIR_ERR_NO_DOMAIN_BACKUP
# VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN, which older bindings have no name for, and the first libvirt that
# knows it: any other refuses a flag that it does not know.
_PRESERVE_SHUTDOWN_DOMAIN = 2
_PRESERVES = (11, 10, 0)

# Without this, libvirt-python prints every error to stderr, also those that are handled.
libvirt.registerErrorHandler(lambda *_: None, None)


class Connection:
    """One connection to a libvirt daemon, a context manager. Calls of libvirt leave other threads running."""

    def __init__(self, uri: str) -> None:
        with calling(f"connect to {uri}"):
            self._conn: Any = libvirt.open(uri)
        self.uri = uri

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go; harmless if the daemon is gone."""
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(libvirt.libvirtError):  # the daemon is away, and with it the connection
                conn.close()

    def domain(self, uuid: str) -> Domain:
        """The VM with this UUID. NotFound."""
        with calling(f"VM {uuid}"):
            return Domain(self._conn.lookupByUUIDString(uuid))

    def domains(self) -> Sequence[Domain]:
        """Every VM, running or not."""
        with calling("list the VMs"):
            return [Domain(domain) for domain in self._conn.listAllDomains(0)]

    def define(self, xml: str) -> Domain:
        """Define a VM, or change one of the same name and UUID. What libvirt's schema does not know is refused."""
        with calling("define the VM"):
            return Domain(self._conn.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE))

    def start_paused(self, xml: str) -> Domain:
        """Start a VM that is not defined, with its processors stopped. It ends with this connection at the latest."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
        with calling("start a VM"):
            return Domain(self._conn.createXML(xml, flags | libvirt.VIR_DOMAIN_START_VALIDATE))

    def pools(self) -> list[str]:
        """The names of all storage pools, active or not."""
        with calling("list the storage pools"):
            return [str(pool.name()) for pool in self._conn.listAllStoragePools(0)]

    def pool(self, name: str) -> StoragePool:
        """The storage pool of that name."""
        with calling(f"storage pool {name}"):
            return StoragePool(self._conn.storagePoolLookupByName(name))

    def libvirt_version(self) -> tuple[int, int, int]:
        """The daemon's version."""
        with calling("libvirt's version"):
            return _version(self._conn.getLibVersion())

    def qemu_version(self) -> tuple[int, int, int]:
        """The version of the QEMU that new VMs get. HypervisorError if none is installed."""
        with calling("QEMU's version"):
            return _version(self._conn.getVersion())

    def capabilities(self) -> str:
        """The host's capabilities, XML."""
        with calling("the host's capabilities"):
            return str(self._conn.getCapabilities())

    def domain_capabilities(self, emulator: str, arch: str, machine: str, kind: str) -> str:
        """What libvirt can do with VMs of this kind, XML; libvirt caches it."""
        with calling("the capabilities for this kind of VM"):
            return str(self._conn.getDomainCapabilities(emulator or None, arch, machine or None, kind, 0))


class StoragePool:
    """One storage pool of a connection."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.name: str = pool.name()

    def _calling(self, what: str) -> Any:
        return calling(f"storage pool {self.name}: {what}")

    def xml(self) -> str:
        """Its definition."""
        with self._calling("definition"):
            return str(self._pool.XMLDesc(0))

    def is_active(self) -> bool:
        """Whether its volumes can be used."""
        with self._calling("state"):
            return bool(self._pool.isActive())

    def refresh(self) -> None:
        """Look anew which volumes there are."""
        with self._calling("refresh"):
            self._pool.refresh(0)

    def volumes(self) -> list[str]:
        """The names of its volumes, as far as libvirt has looked."""
        with self._calling("volumes"):
            return [str(name) for name in self._pool.listVolumes()]

    def create(self, xml: str) -> str:
        """Make a volume; its path. libvirt refuses a name that is taken."""
        with self._calling("make a volume"):
            return str(self._pool.createXML(xml, 0).path())

    def delete(self, volume: str) -> None:
        """Delete a volume."""
        with self._calling(f"delete volume {volume}"):
            self._pool.storageVolLookupByName(volume).delete(0)


class Domain:
    """One VM of a connection. Methods that change the guest say so; all others only look."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self.name: str = domain.name()
        self.uuid: str = domain.UUIDString()

    def _calling(self, what: str) -> Any:
        return calling(f"VM {self.name}: {what}")

    def state(self) -> tuple[int, int]:
        """(state, reason), the numbers of virDomainState and its reasons."""
        with self._calling("state"):
            state, reason = self._domain.state(0)
            return int(state), int(reason)

    def is_saved(self) -> bool:
        """Whether a saved memory image waits for the next start."""
        with self._calling("saved state"):
            return bool(self._domain.hasManagedSaveImage(0))

    def was_saved(self) -> bool:
        """Whether the VM is off since its memory was saved, also to a file of the user's (`virsh save`).

        A libvirtd that was started anew since does not know it any more.
        """
        return self.state() == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SAVED)

    def is_persistent(self) -> bool:
        """Whether the VM stays defined when it is off."""
        with self._calling("persistence"):
            return bool(self._domain.isPersistent())

    def live_xml(self) -> str:
        """The definition in use, without secrets."""
        with self._calling("definition"):
            return str(self._domain.XMLDesc(0))

    def inactive_xml(self) -> str:
        """The definition of the next start, without secrets (no VIR_DOMAIN_XML_SECURE)."""
        with self._calling("definition"):
            return str(self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

    def snapshots(self) -> list[str]:
        """The names of the snapshots that libvirt knows."""
        with self._calling("snapshots"):
            return [str(name) for name in self._domain.snapshotListNames(0)]

    def job_type(self) -> int:
        """0 if no job is running (virDomainJobType)."""
        with self._calling("job"):
            return int(self._domain.jobInfo()[0])

    def job_operation(self) -> int:
        """What the running job does (virDomainJobOperation); 0 where libvirt does not say."""
        with self._calling("job"):
            return int(self._domain.jobStats(0).get("operation", 0))

    def backup_xml(self) -> str:
        """The running backup job, XML. HypervisorError with VIR_ERR_NO_DOMAIN_BACKUP if there is none."""
        with self._calling("backup job"):
            return str(self._domain.backupGetXMLDesc(0))

    def begin_backup(self, backup: str, checkpoint: str | None) -> None:
        """Start the job, with the scratch files that are there already, and, in the same instant, the checkpoint.

        Where libvirt can, a VM whose guest shuts down meanwhile stays until the job has ended.
        """
        flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
        with self._calling("begin the backup"):
            if _version(self._domain.connect().getLibVersion()) >= _PRESERVES:
                flags |= _PRESERVE_SHUTDOWN_DOMAIN
            self._domain.backupBegin(backup, checkpoint, flags)

    def abort_job(self) -> None:
        """Ask the job to end. Only with no NBD client connected: an abort beside a half-open one hangs the guest."""
        with self._calling("end the backup job"):
            self._domain.abortJob()

    def number(self) -> int:
        """libvirt's number of the running VM: another one each time it is started; -1 if it is off."""
        with self._calling("number"):
            return int(self._domain.ID())

    def suspend(self) -> None:
        """Stop the guest's processors."""
        with self._calling("suspend"):
            self._domain.suspend()

    def destroy(self) -> None:
        """End it at once, as by its plug."""
        with self._calling("destroy"):
            self._domain.destroy()

    def agent(self, command: str, limit: int) -> Any:
        """What the guest's agent answers to a command within `limit` seconds (and up to 5 before it reads it).

        HypervisorError with VIR_ERR_AGENT_UNRESPONSIVE if it does not; the command may yet be carried out later.
        """
        with self._calling(f"guest agent, {command}"):
            answer = libvirt_qemu.qemuAgentCommand(self._domain, json.dumps({"execute": command}), limit, 0)
        return json.loads(answer)["return"]

    def resume(self) -> None:
        """Let the guest run on."""
        with self._calling("resume"):
            self._domain.resume()

    def volume(self, pool: str, volume: str) -> tuple[str, Literal["file", "block", "network"]]:
        """(path, kind) of a volume of a storage pool."""
        with self._calling(f"volume {volume} of the storage pool {pool}"):
            found = self._domain.connect().storagePoolLookupByName(pool).storageVolLookupByName(volume)
            number = int(found.info()[0])
            path = str(found.path())
        if number == libvirt.VIR_STORAGE_VOL_FILE:
            return path, "file"
        return path, "block" if number == libvirt.VIR_STORAGE_VOL_BLOCK else "network"

    def block_job(self, disk: str) -> bool:
        """Whether a block job (commit, copy, pull) works on the disk."""
        with self._calling(f"block job of {disk}"):
            return bool(self._domain.blockJobInfo(disk, 0))

    def block_job_progress(self, disk: str) -> tuple[int, int, int]:
        """(virDomainBlockJobType, bytes done, bytes in all) of the block job on the disk; zeros if there is none."""
        with self._calling(f"block job of {disk}"):
            found = self._domain.blockJobInfo(disk, 0)
            return (int(found["type"]), int(found["cur"]), int(found["end"])) if found else (0, 0, 0)

    def begin_commit(self, disk: str, base: str, top: str | None) -> None:
        """Begin to write `top` (None: the file that the VM writes to) and what lies between into `base`.

        libvirt removes the files that are spent then. With `top` None it ends only when `pivot` is called.
        """
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_DELETE
        if top is None:
            flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        with self._calling(f"commit disk {disk} into {base}"):
            self._domain.blockCommit(disk, base, top, 0, flags)

    def pivot(self, disk: str) -> None:
        """End a commit of the file that the VM writes to: from now on it writes to the base."""
        with self._calling(f"end the commit of disk {disk}"):
            self._domain.blockJobAbort(disk, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    def give_up_block_job(self, disk: str) -> None:
        """End a block job without its result; the disk stays as it is."""
        with self._calling(f"give up the block job of disk {disk}"):
            self._domain.blockJobAbort(disk, 0)

    def snapshot(self, xml: str) -> None:
        """Put a new file on disks, all at one instant or none; libvirt keeps no record of it.

        The files are there already; libvirt believes that they are empty, of the right size, and on the right file.
        """
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        )
        with self._calling("put overlays on the disks"):
            self._domain.snapshotCreateXML(xml, flags)

    def redefine_disk(self, xml: str) -> None:
        """Replace one disk, found by its target, in the definition of the next start."""
        with self._calling("change the stored definition of a disk"):
            self._domain.updateDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_CONFIG)

    def block_sizes(self, disk: str) -> tuple[int, int]:
        """(virtual size, bytes allocated) of a disk."""
        with self._calling(f"size of {disk}"):
            capacity, allocation, _ = self._domain.blockInfo(disk, 0)
            return int(capacity), int(allocation)

    def checkpoints(self) -> list[str]:
        """The names of the checkpoints that libvirt knows."""
        with self._calling("checkpoints"):
            return [str(checkpoint.getName()) for checkpoint in self._domain.listAllCheckpoints(0)]

    def checkpoint_xml(self, name: str, *, size: bool = False) -> str:
        """A checkpoint's XML; with `size`, each disk's bytes changed since (running VMs only)."""
        with self._calling(f"checkpoint {name}"):
            checkpoint = self._domain.checkpointLookupByName(name, 0)
            return str(checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE if size else 0))

    def create_checkpoint(self, xml: str) -> None:
        """Begin to track changes on the disks of a running VM, all at one instant or none."""
        with self._calling("make a checkpoint"):
            self._domain.checkpointCreateXML(xml, 0)

    def redefine_checkpoint(self, xml: str) -> None:
        """Have libvirt know a checkpoint whose bitmaps exist, which it looks at. Running VMs only."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
        with self._calling("redefine a checkpoint"):
            self._domain.checkpointCreateXML(xml, flags)

    def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> None:
        """Delete one checkpoint with its bitmaps, or only libvirt's record of it. Its children stay."""
        with self._calling(f"delete checkpoint {name}"):
            checkpoint = self._domain.checkpointLookupByName(name, 0)
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if metadata_only else 0)

    def query(self, command: str, **arguments: object) -> Any:
        """What QEMU's monitor answers to a command: queries, and the removal of bitmaps that libvirt cannot do."""
        request = json.dumps({"execute": command, "arguments": arguments})
        with self._calling(f"QEMU's {command}"):
            answer: Mapping[str, Any] = json.loads(libvirt_qemu.qemuMonitorCommand(self._domain, request, 0))
        if "return" not in answer:
            raise HypervisorError(f"VM {self.name}: QEMU refused {command}: {answer.get('error', {}).get('desc', '?')}")
        return answer["return"]

    def metadata(self, namespace: str) -> str | None:
        """The element of this namespace in the stored configuration's metadata; None if there is none."""
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if self.is_persistent() else libvirt.VIR_DOMAIN_AFFECT_LIVE
        try:
            with self._calling("metadata"):
                return str(self._domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, namespace, flags))
        except BackupError as error:
            if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return None
            raise

    def set_metadata(self, namespace: str, prefix: str, xml: str) -> None:
        """Write that element, wherever the VM has a definition: in the running one and in the stored one."""
        # Without flags libvirt writes only the running definition, and the change is lost at power-off.
        flags = 0
        if self.is_persistent():
            flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG
        if self.is_active():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        with self._calling("metadata"):
            self._domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, xml, prefix, namespace, flags)

    def is_active(self) -> bool:
        """Whether QEMU runs for it, also paused."""
        with self._calling("state"):
            return bool(self._domain.isActive())


def _version(number: int) -> tuple[int, int, int]:
    return number // 1_000_000, number // 1_000 % 1_000, number % 1_000
