"""`qemu-nbd` on the disks of a VM that is off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from backupcore_libvirt.image_lock import knows_locks
from backupcore_libvirt.marks import add_stopped
from backupcore_libvirt.mechanisms.mechanism import ByBitmaps
from backupcore_libvirt.qcow2_header import files_of
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.reading.export import Export, called
from backupcore_libvirt.release.guard import Guard
from backupcore_libvirt.stopped import add_bitmaps

__all__ = ["OffNbd"]


@dataclass(frozen=True, slots=True)
class OffNbd(ByBitmaps):
    """The servers of one run: one per disk. They live until the end of the run's context, or `end_stray`.

    From before the first server on QEMU's lock keeps the VM off, and others from writing, so all disks show one
    instant. Where one lies on a block device, or on a file system without locks, the run is given up if the VM
    starts, or somebody else opens such a device for writing.
    """

    def ready(self, guard: Guard) -> None:
        """Watch for a start of the VM, where no lock prevents it."""
        guard.hold(*([] if all(knows_locks(Path(file)) for file in self._files()) else ["start"]))

    def begin(self) -> datetime:
        """Begin to track changes.

        The bitmaps come before the servers, since a served image cannot be written to; what is written in between is in
        the export and again in the next increment.
        """
        tracked = [disk for disk in self.look.disks if disk.id in self.look.tracked]
        images = {disk.id: (disk, self.look.nodes[disk.id].virtual_size) for disk in tracked}
        self.bearing.update(add_stopped(images, self.marks, self.ctx.folder))
        add_bitmaps(tracked, self.checkpoint)
        return datetime.now(UTC)

    def serve(self, guard: Guard) -> Mapping[str, Export]:
        """Start the servers. Busy where the VM has been started meanwhile."""
        # qemu-nbd itself keeps nobody from writing to a raw file that it reads, nor to what lies below an image.
        files = self._files()
        guard.keep_closed(files, unwritten=[file for file in files if Path(file).is_block_device()])
        exports = {}
        for disk in self.look.disks:
            self.ctx.check()
            bitmap = self.look.bitmaps.get(disk.id)
            # Only so is it told here whether the parent's mark still has its bit.
            mark = self.look.mark_of(disk.id) if bitmap else None
            socket = self.folder.socket_of(disk.id)
            bitmaps = [name for name in (bitmap, mark) if name]
            server = QemuNbd(socket, disk.path, disk.format, part=disk.source.part, bitmaps=bitmaps)
            self.ctx.stack.enter_context(server)
            address = replace(server.address, disk=called(self.domain.name, disk.id))
            exports[disk.id] = Export(address, bitmap, mark=mark, marked=disk.id in self.bearing)
        return exports

    def _files(self) -> list[str]:
        """All that is read."""
        return list(
            dict.fromkeys(
                file
                for disk in self.look.disks
                for file in files_of(disk.path, disk.format, disk.source.part.offset if disk.source.part else 0)
            )
        )
