"""VMs of several shapes: what may be together is one VM, since a VM costs more than its disks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tests.zoo.buses import BUSES, IDE
from tests.zoo.images import IMAGES
from tests.zoo.names import LONG_NAME, NAMES
from tests.zoo.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A VM. `controller` are attributes of its SCSI controllers' <driver>, `type` is QEMU's machine, `more` is further
    XML of its definition, `variables` the format of its firmware and of the variables.

    Who writes while an I/O thread serves a disk does not do so by QEMU's monitor: that crashes 7.2.
    """

    name: str
    shapes: tuple[Shape, ...]
    type: str = "q35"
    threads: int = 0
    controller: str = ""
    rename: Callable[[str], str] | None = None
    variables: Literal["raw", "qcow2"] = "raw"
    more: tuple[str, ...] = ()


def threaded(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The same with an I/O thread: those on virtio; the others have their controller's."""
    return tuple(
        replace(shape, driver=f"{shape.driver} iothread='1'") if shape.bus == "virtio" else shape for shape in shapes
    )


ALL = (*IMAGES, *BUSES, *NAMES)
_BY_NAME = {shape.name: shape for shape in (*ALL, IDE, LONG_NAME)}


def _of(names: str) -> tuple[Shape, ...]:
    return tuple(_BY_NAME[name] for name in names.split())


THREADED = "qcow2 raw extended-l2 zstd odd-sector below-json chain scsi sectors-4k name-quotes name-comma link"

MORE = (
    "<title>A &quot;zoo&quot; &amp; more</title>",
    "<description>Two\nlines</description>",
    "<metadata><other:thing xmlns:other='urn:other'><other:part>1</other:part></other:thing></metadata>",
    "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:env name='ZOO' value='1'/></q:commandline>",
)

MANY = Machine(name="many", shapes=ALL)
THREADS = Machine(name="threads", shapes=threaded(_of(THREADED)), threads=1, controller="iothread='1' queues='2'")
ODD_VM = Machine(
    name="odd-vm",
    shapes=_of("qcow2 ide raw"),
    type="pc",
    rename=lambda name: f'-{name} it\'s a "zoo", x=1;50% (a:b) ü',
    more=MORE,
)
LONG_VM = Machine(name="long-vm", shapes=(*_of("qcow2"), LONG_NAME), rename=lambda name: name + "n" * (200 - len(name)))
MACHINES = (MANY, THREADS, ODD_VM, LONG_VM)
EVERY = (
    "more than 40 disks of one VM, on all these buses",
    "I/O threads of virtio disks and SCSI controllers (QEMU before 8.2.3: a data file or `<slices>` is refused there)",
    "VM names with spaces, quotes, colons, leading dashes, other scripts, of 200 bytes; titles, foreign metadata, "
    "qemu:commandline",
)
"""What is a matter of the VM and not of its disks, in the README's words."""
