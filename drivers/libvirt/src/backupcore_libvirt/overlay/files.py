"""What every run by overlays needs: the snapshot that puts new files on disks, and the run's folder to work in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from xml.etree.ElementTree import Element, SubElement, tostring

from backupcore_libvirt.connection import Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.scratch import Owner

__all__ = ["snapshot_xml", "working"]


def snapshot_xml(every: Sequence[str], new: Mapping[str, str]) -> str:
    """The ``<domainsnapshot>`` that puts the files of `new` on these disks; `every` are the IDs of all of the VM."""
    root = Element("domainsnapshot")
    listed = SubElement(root, "disks")
    for disk in every:
        if disk not in new:
            SubElement(listed, "disk", name=disk, snapshot="no")
            continue
        element = SubElement(listed, "disk", name=disk, snapshot="external", type="file")
        SubElement(element, "driver", type="qcow2")
        SubElement(element, "source", file=new[disk])
    return tostring(root, encoding="unicode")


@contextmanager
def working(folder: RunFolder, domain: Domain) -> Iterator[None]:
    """With the run's folder, which may not be there yet, or not any more: then it goes again afterwards."""
    lock = None if folder.path.exists() else folder.make(Owner(os.geteuid(), os.getegid()), domain.uuid)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # else the next run removes it
                folder.remove()
            os.close(lock)
