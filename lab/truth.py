"""A site plugin that keeps an independent truth beside each backup: copies of the disks made by QEMU's own tools.

The VM stands still from before the backup's instant until its disks are copied, so both show the same bytes. For the
demo and for tests; a configuration names it as ``plugins = ["lab.truth:Truth"]``. The copies go to the folder that
$LAB_TRUTH names: POINT/vda.raw and so on.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt

from backupcore.hookspecs import hookimpl
from lab import libvirtd
from lab.vm import VM

if TYPE_CHECKING:
    from backupcore.model import BackupRun, Prepared

FOLDER = "LAB_TRUTH"


class Truth:
    """Wraps `prebackup`: suspend, take the backup's instant, copy, resume."""

    @hookimpl(wrapper=True)
    def prebackup(self, run: BackupRun) -> Generator[None, list[Prepared], list[Prepared]]:
        connection = libvirt.open(libvirtd.uri())
        try:
            vm = VM(connection, connection.lookupByUUIDString(run.vm.uuid), Path())
            with vm.suspended():
                prepared = yield
                vm.copy_disks(Path(os.environ[FOLDER]) / run.point)
            return prepared
        finally:
            connection.close()
