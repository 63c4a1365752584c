"""Volumes of storage pools that a restore makes, and removes again if it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backupcore.errors import BackupError
from backupcore.hypervisor import Pool
from backupcore.model import Disk
from vmkeep.naming import Names
from vmkeep.workplace import Workplace

__all__ = ["Volumes", "made", "show"]

log = logging.getLogger("vmkeep.volumes")


class Volumes:
    """The volumes of one restore, in a pool whose volumes are devices."""

    def __init__(self, place: Workplace, pool: Pool, names: Names) -> None:
        self._place = place
        self._pool = pool
        self._names = names
        self._made: list[str] = []

    def add(self, disk: Disk) -> Path:
        """Make the volume of a disk; its device."""
        name = self._names.volume(disk.id)
        device = self._place.hypervisor.add_volume(self._pool, name, disk.virtual_size)
        self._made.append(name)
        return device

    def keep(self) -> None:
        """They stay: the restore went well."""
        self._made.clear()

    def remove(self) -> None:
        """Remove those that were made. What hinders it is logged: the error that led here is what the user needs."""
        for name in self._made:
            try:
                self._place.hypervisor.remove_volume(self._pool, name)
            except BackupError as error:
                log.warning("volume %s of storage pool %s stays: %s", name, self._pool.name, error)


@contextmanager
def made(place: Workplace, pool: Pool, names: Names) -> Iterator[Volumes]:
    """For the block: volumes to restore to. Those that nobody said `keep` of are removed at its end."""
    volumes = Volumes(place, pool, names)
    try:
        yield volumes
    finally:
        volumes.remove()


def show(place: Workplace, pool: Pool) -> None:
    """Have the hypervisor list the new files of a pool. They are there in any case, so a failure is a warning."""
    try:
        place.hypervisor.refresh(pool)
    except BackupError as error:
        log.warning("storage pool %s does not list the new volumes yet: %s", pool.name, error)
