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
- metadata, except our own settings; the generation ID and, unless it is to be kept, the UUID: it is another VM

All that is dropped is named, see `docs/restored-definition.md`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal
from uuid import UUID
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from backupcore.errors import ConfigError, IntegrityError, UnsupportedOperation
from backupcore.hypervisor import Definition
from backupcore_libvirt.allowed import DEVICES, DISK, DOMAIN, INTERFACE, OS, Allowed
from backupcore_libvirt.left_out import by_effect
from backupcore_libvirt.redacted import REDACTED
from backupcore_libvirt.settings import NAMESPACE
from backupcore_libvirt.xml import parse

__all__ = ["restored_definition"]

_FIRMWARE = re.compile(
    r"/usr/share/(OVMF|ovmf|AAVMF|edk2|edk2-ovmf|edk2-armvirt|qemu|qemu-efi[a-z0-9-]*)/[A-Za-z0-9_/.-]+"
)
_BUSES = {"sd": "sata", "hd": "ide", "xvd": "xen", "vd": "virtio"}
_ALIAS = re.compile(r"ua-[A-Za-z0-9_-]{1,100}")  # of others libvirt takes no notice
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")


def restored_definition(
    stored: bytes,
    *,
    name: str,
    disks: Mapping[str, Path],
    nvram: Path | None,
    no_ip: bool,
    no_nic: bool,
    keep_uuid: bool = False,
    new_mac: bool = False,
    boot: Mapping[str, Path] | None = None,
    redact: bool = False,
) -> Definition:
    """The definition of a VM `name` on these restored disk files (by disk ID), and what was left out of it.

    `boot` are the restored files that it boots from: ``kernel``, ``initrd``, ``dtb``, as far as there are any.
    `no_ip` drops the MACs and IPs of its NICs, `new_mac` only the MACs, `no_nic` the NICs. `keep_uuid` keeps the UUID.
    `redact` drops what people may have written secrets into (`REDACTED`).
    IntegrityError if `stored` is no domain definition; UnsupportedOperation if it is not one of QEMU; ConfigError for a
    name no VM can have.
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
    left: list[str] = []
    result = Element("domain", type=root.get("type", ""))
    SubElement(result, "name").text = name
    if keep_uuid:
        SubElement(result, "uuid").text = _uuid(root)
    _carry_settings(root, result, left)
    for element in root:
        allowed = DOMAIN.get(element.tag)
        if redact and element.tag in REDACTED:
            left.append(element.tag)
        elif allowed is not None:
            _add(result, _carry(element, allowed, element.tag, left))
        elif element.tag not in ("name", "metadata", "os", "devices", *(("uuid",) if keep_uuid else ())):
            left.append(element.tag)
    system = _os(root, nvram, boot or {}, left)
    smbios = system.find("smbios")
    if smbios is not None and smbios.get("mode") == "sysinfo" and result.find("sysinfo") is None:
        system.remove(smbios)  # libvirt starts no VM that takes strings which are not there
        left.append("os/smbios")
    result.append(system)
    result.append(_devices(root, disks, left, no_ip=no_ip, no_nic=no_nic, new_mac=new_mac))
    indent(result)
    xml = tostring(result, encoding="unicode").encode() + b"\n"
    effects = by_effect(_counted(left))
    left_out = tuple(path for paths in effects.values() for path in paths)
    return Definition(xml=xml, left_out=left_out, effects=effects, nvram_format=_nvram_format(root))


def _counted(left: list[str]) -> list[str]:
    return [path if count == 1 else f"{path} ({count} times)" for path, count in Counter(left).items()]


def _add(to: Element, element: Element | None) -> None:
    if element is not None:
        to.append(element)


def _uuid(root: Element) -> str:
    try:
        return str(UUID((root.findtext("uuid") or "").strip()))
    except ValueError as error:
        raise IntegrityError("the stored definition has no UUID to keep") from error


def _carry(element: Element, allowed: Allowed, at: str, left: list[str]) -> Element | None:
    """The listed part of an element; None where a value rules it out.

    What is left out goes to `left`, as a path: `at` is the element's own.
    """
    for attribute, values in allowed.only.items():
        if element.get(attribute, "") not in values:
            left.append(at)
            return None
    text = (element.text or "").strip()
    if allowed.texts and text not in allowed.texts:
        left.append(at)
        return None
    below = [f"{at}/@{key}" for key in element.attrib if key not in allowed.attributes]
    copied = Element(element.tag, {key: element.attrib[key] for key in allowed.attributes if key in element.attrib})
    if allowed.text:
        copied.text = text
    elif text:
        below.append(f"{at}/text()")
    for child in element:
        path = f"{at}/{child.tag}"
        if child.tag in allowed.children:
            _add(copied, _carry(child, allowed.children[child.tag], path, below))
        else:
            below.append(path)
    if any(copied.find(need) is None for need in allowed.needs):
        left.append(at)
        return None
    left += below
    return copied


def _carry_settings(root: Element, result: Element, left: list[str]) -> None:
    ours = f"{{{NAMESPACE}}}backup"
    kept = Element(ours)
    for element in root.iterfind("./metadata/*"):
        if element.tag != ours:
            left.append(f"metadata/{element.tag}")
    for setting in root.iterfind(f"./metadata/{ours}/{{{NAMESPACE}}}setting"):
        SubElement(kept, setting.tag, name=setting.get("name", "")).text = (setting.text or "").strip()
    if len(kept):
        SubElement(result, "metadata").append(kept)


def _nvram_format(root: Element) -> Literal["raw", "qcow2"]:
    """The format of the variables' file: that of the firmware itself, if nothing is said."""
    told = (element.get("format") for path in ("os/nvram", "os/loader") if (element := root.find(path)) is not None)
    return "qcow2" if next(filter(None, told), "raw") == "qcow2" else "raw"


def _os(root: Element, nvram: Path | None, boot: Mapping[str, Path], left: list[str]) -> Element:
    stored = root.find("os")
    if stored is None or stored.find("type") is None:
        raise IntegrityError("the stored definition has no <os> with a <type>")
    dropped: list[str] = []
    result = _carry(stored, OS, "os", dropped)
    assert result is not None  # OS rules nothing out
    loader = stored.find("loader")
    if stored.get("firmware") == "efi" or (loader is not None and loader.get("type") == "pflash"):
        path = (loader.text or "").strip() if loader is not None else ""
        if loader is not None and _FIRMWARE.fullmatch(path) and ".." not in path:
            # The same build of the firmware: NVRAM fits one of its own size only.
            flags = {"readonly": "yes", "type": "pflash"}
            if loader.get("secure") in ("yes", "no"):
                flags["secure"] = loader.get("secure", "")
            if loader.get("format") == "qcow2":  # a libvirt before 9.2 knows no format here
                flags["format"] = "qcow2"
            SubElement(result, "loader", flags).text = path
            for firmware in result.findall("firmware"):
                result.remove(firmware)  # features for libvirt's own choice; with a path there is none
        else:
            result.set("firmware", "efi")
        if nvram is not None:
            shape = {"format": "qcow2"} if _nvram_format(root) == "qcow2" else {}
            SubElement(result, "nvram", shape).text = str(nvram.absolute())
    if "kernel" in boot:  # the others mean nothing without it
        for part in ("kernel", "initrd", "dtb"):
            if part in boot:
                SubElement(result, part).text = str(boot[part].absolute())
        if stored.findtext("cmdline"):
            SubElement(result, "cmdline").text = stored.findtext("cmdline")
    made_anew = {f"os/{child.tag}" for child in result} | ({"os/@firmware"} if result.get("firmware") else set())
    left += [path for path in dropped if path not in made_anew]
    return result


def _devices(
    root: Element, disks: Mapping[str, Path], left: list[str], *, no_ip: bool, no_nic: bool, new_mac: bool
) -> Element:
    result = Element("devices")
    missing = set(disks)
    for device in root.iterfind("./devices/*"):
        if device.tag == "disk":
            target = device.find("target")
            disk = target.get("dev", "") if target is not None else ""
            if disk in missing and device.get("device", "disk") == "disk":
                missing.remove(disk)
                result.append(_disk(device, disks[disk], left))
            else:
                left.append(f"devices/disk[{disk}]")
        elif device.tag == "interface":
            if no_nic:
                left.append("devices/interface")
            elif (interface := _carry(device, INTERFACE, "devices/interface", left)) is not None:
                _without(interface, ("mac", "ip", "route") if no_ip else ("mac",) if new_mac else (), left)
                result.append(interface)
        elif device.tag not in DEVICES:
            left.append(f"devices/{device.tag}")
        elif (copied := _carry(device, DEVICES[device.tag], f"devices/{device.tag}", left)) is not None:
            if device.tag == "graphics":
                copied.set("autoport", "yes")  # the stored port may be taken, by the original VM for one
            result.append(copied)
    for disk in sorted(missing):
        # It was attached to the running VM only, and the stored definition is that of the next start.
        result.append(_unknown_disk(disk, disks[disk]))
        left.append(f"devices/disk[{disk}]/*")
    return result


def _on(path: Path) -> Element:
    return Element("disk", type="block" if path.is_block_device() else "file", device="disk")


def _source(path: Path) -> dict[str, str]:
    return {"dev" if path.is_block_device() else "file": str(path.absolute())}


def _format(path: Path) -> str:
    return "raw" if path.is_block_device() or path.suffix == ".raw" else "qcow2"


def _unknown_disk(disk: str, path: Path) -> Element:
    """A disk of which nothing is known but its target: its name tells the kind of bus."""
    bus = next((bus for prefix, bus in _BUSES.items() if disk.startswith(prefix)), "virtio")
    result = _on(path)
    SubElement(result, "driver", name="qemu", type=_format(path))
    SubElement(result, "source", _source(path))
    SubElement(result, "target", dev=disk, bus=bus)
    return result


def _disk(stored: Element, path: Path, left: list[str]) -> Element:
    result = _on(path)
    driver = stored.find("driver")
    options = {"name": "qemu", "type": _format(path)}
    for option in ("discard", "detect_zeroes", "queues", "queue_size"):
        if driver is not None and option in driver.attrib:
            options[option] = driver.attrib[option]
    SubElement(result, "driver", options)
    SubElement(result, "source", _source(path))
    dropped: list[str] = []
    carried = _carry(stored, DISK, "devices/disk", dropped)
    assert carried is not None  # DISK rules nothing out
    alias = carried.find("alias")
    if alias is not None and not _ALIAS.fullmatch(alias.get("name", "")):
        carried.remove(alias)
    result.attrib.update(carried.attrib)
    result.extend(carried)
    made_anew = [f"devices/disk/{part}" for part in ("@type", "@device", "source", "driver")]
    left += [part for part in dropped if part not in made_anew]
    if driver is not None:
        left += [f"devices/disk/driver/@{key}" for key in driver.attrib if key not in options]
        left += [f"devices/disk/driver/{child.tag}" for child in driver]
    return result


def _without(interface: Element, tags: Collection[str], left: list[str]) -> None:
    """Remove what identifies a NIC; with its IPs also what a filter knows of them."""
    for child in list(interface):
        if child.tag in tags:
            interface.remove(child)
            left.append(f"devices/interface/{child.tag}")
    if "ip" not in tags:
        return
    for filterref in interface.iterfind("filterref"):
        for parameter in filterref.findall("parameter"):
            filterref.remove(parameter)
            left.append("devices/interface/filterref/parameter")
