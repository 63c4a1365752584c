"""The whole way: a guest's disks, a full and increments, and the core's own restore."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

from backupcore.chain import plan
from backupcore.disk.qcow2 import CLUSTER
from backupcore.model import Disk, Image, Type
from backupcore.restore import restore
from backupcore.session import Recorded, run_backup
from backupcore.testing.bench import MIB, Bench, Failed
from backupcore.testing.guest import MemoryGuest, MemoryHypervisor
from backupcore.testing.qcow2 import plain


def take(bench: Bench, hypervisor: MemoryHypervisor, guest: MemoryGuest, image: Image | None) -> Image:
    """One backup of `guest` by the core's session; the image as a catalog would hold it then."""
    run = plan(image, vm=guest.vm, host="kit-a", datastore="kit", settings={})
    with bench.context() as ctx:
        done: list[Recorded] = []
        run_backup(bench.target.open(hypervisor=hypervisor), run, ctx, record=done.append)
    increment = done[0].increment
    bench.made.append(increment.source)
    if image is None or increment.type is Type.FULL:
        run = done[0].run
        image = Image(uuid=run.image, number=1, vm=guest.vm, datastore="kit", state="open", increments=())
    return replace(image, increments=(*image.increments, increment))


def read_back(bench: Bench, image: Image, number: int) -> dict[str, bytes]:
    """The disks of one increment, restored by the core and read from their qcow2 files."""
    folder = bench.place()
    with bench.context() as ctx:

        def target(disk: Disk) -> Path:
            return folder / f"{disk.id}.qcow2"

        restored = restore(bench.target.open(), image, number, ctx, target=target)
    return {disk.id: plain(disk.path) for disk in restored.disks}


def chain(bench: Bench) -> None:
    """A full and two increments of a VM, taken by the core, restore to what its disks held each time."""
    random = Random(5)  # noqa: S311 - no secret
    guest = MemoryGuest(bench.vm(), {"vda": bytearray(3 * MIB + 512), "vdb": bytearray(random.randbytes(MIB))})
    hypervisor = MemoryHypervisor([guest])
    guest.write("vda", MIB, random.randbytes(MIB))
    image, truth = None, []
    for step in range(3):
        image = take(bench, hypervisor, guest, image)
        truth.append({name: bytes(data) for name, data in guest.disks.items()})
        guest.write("vda", step * 5 * CLUSTER + 100, random.randbytes(2 * CLUSTER))
        guest.write("vdb", step * CLUSTER, bytes(CLUSTER))
    assert image
    if [one.type for one in image.increments] != [Type.FULL, Type.INCREMENT, Type.INCREMENT]:
        raise Failed(f"an increment became a full: {image.increments[-1].reason}")
    for number in (0, 2):
        if read_back(bench, image, number) != truth[number]:
            raise Failed(f"increment {number} restores to other bytes than the guest's disks held")
