"""Shapes of what a disk is attached to, and of what the guest sees of it."""

from __future__ import annotations

from tests.zoo.images import qcow2
from tests.zoo.shape import Shape

BUSES = (
    Shape(name="virtio", words="virtio, also with several queues", make=qcow2()),
    Shape(name="queues", words="virtio, also with several queues", make=qcow2(), driver="queues='2'"),
    Shape(name="scsi", words="SCSI (virtio-scsi), SATA, USB, IDE", make=qcow2(), bus="scsi"),
    Shape(name="sata", words="SCSI (virtio-scsi), SATA, USB, IDE", make=qcow2(), bus="sata"),
    Shape(
        name="usb",
        words="SCSI (virtio-scsi), SATA, USB, IDE",
        make=qcow2(),
        bus="usb",
        off=True,
        inside="<serial>STICK-1</serial>",
    ),
    Shape(
        name="sectors-4k",
        words="sectors of 4096 bytes, serial numbers, WWNs, products, geometry",
        make=qcow2(),
        inside="<blockio logical_block_size='4096' physical_block_size='4096'/><serial>S-4k</serial>",
    ),
    Shape(
        name="wwn",
        words="sectors of 4096 bytes, serial numbers, WWNs, products, geometry",
        make=qcow2(),
        bus="scsi",
        inside="<serial>S 1-2_3+x</serial><wwn>5000c50015ea71ac</wwn><vendor>ZOO</vendor><product>DISK 1</product>",
    ),
    Shape(
        name="throttled",
        words="throttled disks (`<iotune>`)",
        make=qcow2(),
        inside="<iotune><total_bytes_sec>20000000</total_bytes_sec></iotune>",
    ),
)

IDE = Shape(name="ide", words="SCSI (virtio-scsi), SATA, USB, IDE", make=qcow2(), bus="ide")
"""The q35 machine has none."""
