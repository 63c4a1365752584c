"""Which disks of a running VM are served by an I/O thread instead of QEMU's main loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from backupcore.errors import HypervisorError
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.xml import Element, parse

__all__ = ["named_by", "with_iothreads"]


def with_iothreads(domain: Domain, disks: Collection[str]) -> Mapping[str, str]:
    """Those of `disks`, by ID, that an I/O thread serves or may serve, each with what says so.

    Asked are the running definition and QEMU itself, since a command line of the user's can give a device a thread that
    the definition does not know.
    """
    xml = domain.live_xml()
    found = dict(named_by(xml, disks))
    if domain.query("query-iothreads"):
        for disk, device in _devices(xml, disks):
            if disk not in found and _has_thread(domain, device):
                found[disk] = "QEMU's command line"
    return found


def named_by(xml: str, disks: Collection[str]) -> Mapping[str, str]:
    """Those to which a definition gives one: their own, threads of their queues, or their SCSI controller's."""
    return {disk: "its definition" for disk, device in _devices(xml, disks) if _named(device)}


def _devices(xml: str, disks: Collection[str]) -> Iterator[tuple[str, Element]]:
    """Each disk's ID with the device that may have a thread: the disk itself, or the SCSI controller that it is on."""
    definition = parse(xml)
    controllers = {
        element.get("index", ""): element
        for element in definition.iterfind("./devices/controller")
        if element.get("type") == "scsi"
    }
    for element in definition.iterfind("./devices/disk"):
        target, address = element.find("target"), element.find("address")
        disk, bus = (target.get("dev", ""), target.get("bus", "")) if target is not None else ("", "")
        if disk not in disks:
            continue
        if bus == "virtio":
            yield disk, element
        elif bus == "scsi" and address is not None and address.get("controller") in controllers:
            yield disk, controllers[address.get("controller", "")]


def _named(device: Element) -> bool:
    driver = device.find("driver")
    return driver is not None and (driver.get("iothread") is not None or driver.find("iothreads") is not None)


def _has_thread(domain: Domain, device: Element) -> bool:
    """Whether QEMU's device has an I/O thread; also where it does not tell."""
    alias = device.find("alias")
    if alias is None:
        return True
    if not device.get("model", "virtio").startswith("virtio"):
        return False  # a SCSI controller of another kind: QEMU's main loop serves it
    try:
        thread = domain.query("qom-get", path=f"/machine/peripheral/{alias.get('name', '')}", property="iothread")
    except HypervisorError:
        return True
    return bool(thread)
