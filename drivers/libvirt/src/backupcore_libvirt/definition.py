"""A restored VM's definition, made from the ``vm.xml`` of a backup.

A stored definition is untrusted: whoever can write to the datastore can write it, and a definition decides which files
of the host QEMU opens and which program runs. So nothing is copied but the elements and attributes that
`backupcore_libvirt.allowed` lists, and every path in the result is one of ours: the restored disks and NVRAM.

What is dropped, among all that is not listed there:

- disks that were not restored, and with them CD-ROMs, floppies, network and passed-through disks; of the others source,
  backing store, encryption, authentication, transient and read-only flags, cache and I/O modes
- the emulator's path (libvirt picks its own); kernel, initrd and device tree (unless they were restored: then these are
  named) and with the kernel its command line; ACPI tables, firmware by path
  (except from the distributions' folders of UEFI firmware; others turn into ``firmware='efi'``), NVRAM templates
- namespaces of libvirt that pass arguments or environment to QEMU, and every foreign namespace
- host devices, shared memory, file systems of the host, leases, smart cards, character devices other than PTYs, guest
  agent channels and SPICE; the paths of sockets and logs; audio back ends that write files; actions that dump the
  guest's memory; randomness from anything but the kernel
- graphics: passwords, ports, listening addresses (libvirt's default is the loopback)
- NICs that are not on a network, a bridge, a host interface or in user mode; scripts, host device names
- security labels, cgroup placement, CPU and NUMA pinning, huge pages, I/O threads, tuning: they belong to a host
- metadata, except our own settings; the UUID and the generation ID: a restored VM is another VM
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from backupcore.errors import ConfigError, IntegrityError, UnsupportedOperation
from backupcore_libvirt.allowed import DEVICES, DISK, DOMAIN, INTERFACE, OS, Allowed
from backupcore_libvirt.settings import NAMESPACE
from backupcore_libvirt.xml import parse

__all__ = ["restored_definition"]

_FIRMWARE = re.compile(
    r"/usr/share/(OVMF|ovmf|AAVMF|edk2|edk2-ovmf|edk2-armvirt|qemu|qemu-efi[a-z0-9-]*)/[A-Za-z0-9_/.-]+"
)
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")


def restored_definition(
    stored: bytes,
    *,
    name: str,
    disks: Mapping[str, Path],
    nvram: Path | None,
    no_ip: bool,
    no_nic: bool,
    boot: Mapping[str, Path] | None = None,
) -> bytes:
    """The definition of a VM `name` on these restored disk files (by disk ID), as UTF-8.

    `boot` are the restored files that it boots from: ``kernel``, ``initrd``, ``dtb``, as far as there are any.
    `no_ip` drops the MACs and IPs of its NICs, `no_nic` the NICs. IntegrityError if `stored` is no domain definition or
    lacks one of the disks; UnsupportedOperation if it is not one of QEMU; ConfigError for a name no VM can have.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r:.250} cannot be the name of a VM")
    try:
        root = parse(stored)
    except ValueError as error:
        raise IntegrityError(f"the stored definition cannot be used: {error}") from error
    if root.tag != "domain":
        raise IntegrityError(f"the stored definition is no domain definition: its root is {root.tag!r:.100}")
    if root.get("type") not in ("kvm", "qemu"):
        raise UnsupportedOperation(f"the stored definition is for {root.get('type')!r:.50}; only KVM and QEMU VMs work")
    result = Element("domain", type=root.get("type", ""))
    SubElement(result, "name").text = name
    _carry_settings(root, result)
    for element in root:
        allowed = DOMAIN.get(element.tag)
        if allowed is not None and (copied := _carry(element, allowed)) is not None:
            result.append(copied)
    result.append(_os(root, nvram, boot or {}))
    result.append(_devices(root, disks, no_ip=no_ip, no_nic=no_nic))
    indent(result)
    return tostring(result, encoding="unicode").encode() + b"\n"


def _carry(element: Element, allowed: Allowed) -> Element | None:
    """The listed part of an element; None where a value rules it out."""
    for attribute, values in allowed.only.items():
        if element.get(attribute, "") not in values:
            return None
    if allowed.texts and (element.text or "").strip() not in allowed.texts:
        return None
    copied = Element(element.tag, {key: element.attrib[key] for key in allowed.attributes if key in element.attrib})
    if allowed.text:
        copied.text = (element.text or "").strip()
    for child in element:
        below = allowed.children.get(child.tag)
        if below is not None and (carried := _carry(child, below)) is not None:
            copied.append(carried)
    return None if any(copied.find(need) is None for need in allowed.needs) else copied


def _carry_settings(root: Element, result: Element) -> None:
    kept = Element(f"{{{NAMESPACE}}}backup")
    for setting in root.iterfind(f"./metadata/{{{NAMESPACE}}}backup/{{{NAMESPACE}}}setting"):
        SubElement(kept, setting.tag, name=setting.get("name", "")).text = (setting.text or "").strip()
    if len(kept):
        SubElement(result, "metadata").append(kept)


def _os(root: Element, nvram: Path | None, boot: Mapping[str, Path]) -> Element:
    stored = root.find("os")
    if stored is None or stored.find("type") is None:
        raise IntegrityError("the stored definition has no <os> with a <type>")
    result = _carry(stored, OS)
    assert result is not None  # OS rules nothing out
    loader = stored.find("loader")
    if stored.get("firmware") == "efi" or (loader is not None and loader.get("type") == "pflash"):
        path = (loader.text or "").strip() if loader is not None else ""
        if loader is not None and _FIRMWARE.fullmatch(path) and ".." not in path:
            # The same build of the firmware: NVRAM fits one of its own size only.
            flags = {"readonly": "yes", "type": "pflash"}
            if loader.get("secure") in ("yes", "no"):
                flags["secure"] = loader.get("secure", "")
            SubElement(result, "loader", flags).text = path
            for firmware in result.findall("firmware"):
                result.remove(firmware)  # features for libvirt's own choice; with a path there is none
        else:
            result.set("firmware", "efi")
        if nvram is not None:
            SubElement(result, "nvram").text = str(nvram.absolute())
    if "kernel" in boot:  # the others mean nothing without it
        for part in ("kernel", "initrd", "dtb"):
            if part in boot:
                SubElement(result, part).text = str(boot[part].absolute())
        if stored.findtext("cmdline"):
            SubElement(result, "cmdline").text = stored.findtext("cmdline")
    return result


def _devices(root: Element, disks: Mapping[str, Path], *, no_ip: bool, no_nic: bool) -> Element:
    result = Element("devices")
    missing = set(disks)
    for device in root.iterfind("./devices/*"):
        if device.tag == "disk":
            target = device.find("target")
            disk = target.get("dev", "") if target is not None else ""
            if disk in missing and device.get("device", "disk") == "disk":
                missing.remove(disk)
                result.append(_disk(device, disks[disk]))
        elif device.tag == "interface":
            if not no_nic and (interface := _carry(device, INTERFACE)) is not None:
                result.append(_without_addresses(interface) if no_ip else interface)
        elif device.tag in DEVICES and (copied := _carry(device, DEVICES[device.tag])) is not None:
            if device.tag == "graphics":
                copied.set("autoport", "yes")  # the stored port may be taken, by the original VM for one
            result.append(copied)
    if missing:
        raise IntegrityError(f"the stored definition has no disk {', '.join(sorted(missing))}")
    return result


def _disk(stored: Element, path: Path) -> Element:
    result = Element("disk", type="file", device="disk")
    driver = stored.find("driver")
    options = {"name": "qemu", "type": "raw" if path.suffix == ".raw" else "qcow2"}
    for option in ("discard", "detect_zeroes"):
        if driver is not None and option in driver.attrib:
            options[option] = driver.attrib[option]
    SubElement(result, "driver", options)
    SubElement(result, "source", file=str(path.absolute()))
    carried = _carry(stored, DISK)
    assert carried is not None  # DISK rules nothing out
    result.extend(carried)
    return result


def _without_addresses(interface: Element) -> Element:
    for child in list(interface):
        if child.tag in ("mac", "ip", "route"):
            interface.remove(child)
    for filterref in interface.iterfind("filterref"):
        for parameter in filterref.findall("parameter"):
            filterref.remove(parameter)
    return interface
