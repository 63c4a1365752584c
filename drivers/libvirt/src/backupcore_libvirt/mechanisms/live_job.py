"""libvirt's backup job, in pull mode: how a VM that runs is held unless something speaks against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from backupcore.disk.nbd import Address
from backupcore.errors import BackupError, IncrementImpossible
from backupcore_libvirt.backup_job import backup_xml, bitmap_name
from backupcore_libvirt.checkpoint import checkpoint_xml, make_known
from backupcore_libvirt.connection import CHECKPOINT_INCONSISTENT, NO_CHECKPOINT
from backupcore_libvirt.libvirt_errors import code_of
from backupcore_libvirt.mechanisms.mechanism import ByBitmaps
from backupcore_libvirt.owner import confinement
from backupcore_libvirt.place.job_socket import JobSocket
from backupcore_libvirt.place.refusal import refused
from backupcore_libvirt.premade.image import make_empty
from backupcore_libvirt.reading.export import Export, called
from backupcore_libvirt.release.guard import Guard

__all__ = ["LiveJob"]


@dataclass(frozen=True, slots=True)
class LiveJob(ByBitmaps):
    """The backup job of one run. QEMU copies what the guest overwrites to scratch meanwhile."""

    socket: JobSocket

    def ready(self, guard: Guard) -> None:
        """Have libvirt know the checkpoint that an increment builds on, and make the scratch files and the marks."""
        if self.look.stopped:
            self.folder.note_stopped()
        guard.hold("scratch", "life" if self.look.stopped else "state")
        if self.look.since:
            make_known(self.domain, self.look.since, self.look.all_disks)
        for disk in self.look.disks:
            make_empty(self.folder.disk(disk.id), self.look.nodes[disk.id].virtual_size, self.look.owner)
        self.mark()

    def begin(self) -> datetime:
        """Begin the job and the checkpoint, in one call."""
        job = backup_xml([disk.id for disk in self.look.disks], self.folder, self.socket.path, self.look.bitmaps)
        points = checkpoint_xml(self.checkpoint, self.look.all_disks, self.look.tracked)
        date = datetime.now(UTC)
        try:
            self.domain.begin_backup(job, points)
        except BackupError as error:
            raise self._refused(error) from error
        return date

    def serve(self, guard: Guard) -> Mapping[str, Export]:
        """They are on the socket of the job, and live until that ends."""
        bitmaps = self.look.bitmaps
        return {
            disk.id: Export(
                Address(
                    str(self.socket.path),
                    disk.id,
                    self.socket.peer,
                    guard.admission,
                    called(self.domain.name, disk.id),
                ),
                bitmap_name(disk.id) if disk.id in bitmaps else None,
                marked=disk.id in self.bearing,
            )
            for disk in self.look.disks
        }

    def _refused(self, error: BackupError) -> BackupError:
        if self.run.parent is not None and code_of(error) in (CHECKPOINT_INCONSISTENT, NO_CHECKPOINT):
            # libvirt says so before it starts anything.
            return IncrementImpossible(error.message)
        return refused(error, self.folder, self.socket.path, confinement(self.connection))
