"""Which files of the host a VM uses, also below its disks: who changes or removes one of these, changes that VM's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from backupcore.errors import HypervisorError
from backupcore.thread import aside
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.overlay.stack import source_path
from backupcore_libvirt.qcow2_header import files_of
from backupcore_libvirt.vm_files import VMFile, nvram_file
from backupcore_libvirt.xml import parse

__all__ = ["used_files"]

LIMIT = 10.0


def used_files(domain: Domain) -> Iterator[Path]:
    """The files and devices of a VM's disks, those below them and their data files, and the variables of its firmware.

    Without symbolic links; by its definitions, now and at its next start, and by the headers of the images, so an image
    that was made on top of another VM's disk tells of that. NotFound if the VM has gone; HypervisorError where a file
    system does not answer.
    """
    for xml in (domain.live_xml(), domain.inactive_xml()) if domain.is_persistent() else (domain.live_xml(),):
        variables = nvram_file(xml)
        if isinstance(variables, VMFile):
            yield from _below(str(variables.path), "raw")
        for disk in parse(xml).iterfind("./devices/disk"):
            driver = disk.find("driver")
            shape = driver.get("type", "raw") if driver is not None else "raw"
            # Those of a running VM's whole chain stand in its definition, an inactive one names the top only.
            for source in disk.iterfind(".//source"):
                if name := source_path(domain, source):
                    yield from _below(name, shape)
                    shape = "raw"  # of the others it is the top that tells what lies below


def _below(name: str, shape: str) -> list[Path]:
    """An image and what lies below it. It may lie on a server that is gone, which must not hold up another VM's run."""
    found: list[Path] = []
    looking = aside(lambda: found.extend([Path(file).resolve() for file in files_of(name, shape)]), "headers")
    if looking is not None:
        looking.join(LIMIT)
    if not found:
        raise HypervisorError(
            f"what {name} lies on cannot be told: its file system has not answered within {LIMIT:.0f} s",
            "See why (df on its folder); then run it again.",
        )
    return found
