"""The elements and attributes of a stored definition that a restored one takes over. What is not listed is dropped.

Nothing here may name a file, a program, a socket or a device of the host, whatever its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["DEVICES", "DISK", "DOMAIN", "INTERFACE", "OS", "Allowed"]


@dataclass(frozen=True)
class Allowed:
    """What may be taken over from one element.

    `only` maps an attribute to its permitted values ("" is one that is absent), `texts` are the permitted texts, and
    `needs` the children without which it means nothing; an element that fails one of them is dropped as a whole.
    """

    attributes: tuple[str, ...] = ()
    text: bool = False
    children: Mapping[str, Allowed] = field(default_factory=dict)
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def _of(attributes: str = "", **children: Allowed) -> Allowed:
    return Allowed(attributes=tuple(attributes.split()), children=children)


def _text(attributes: str = "", *, texts: tuple[str, ...] = ()) -> Allowed:
    return Allowed(attributes=tuple(attributes.split()), text=True, texts=texts)


# Of other kinds (ccw, spapr-vio, isa) only a part would be carried over: libvirt assigns those anew.
_ADDRESS = replace(
    _of("type domain bus slot function multifunction controller target unit port"),
    only={"type": ("pci", "drive", "usb", "virtio-serial")},
)
_STATE = _of("state")
_ENTRIES = _of(entry=_text("name"))

DOMAIN: Mapping[str, Allowed] = {
    "title": _text(),
    "description": _text(),
    "memory": _text("unit"),
    "currentMemory": _text("unit"),
    "vcpu": _text("placement current"),
    "cpu": _of(
        "mode match check migratable",
        model=_text("fallback vendor_id"),
        vendor=_text(),
        topology=_of("sockets dies clusters modules cores threads"),
        feature=_of("policy name"),
        cache=_of("level mode"),
        maxphysaddr=_of("mode bits limit"),
        numa=_of(cell=_of("id cpus memory unit")),
    ),
    "features": _of(
        acpi=_of(),
        apic=_of("eoi"),
        pae=_of(),
        viridian=_of(),
        hap=_STATE,
        pmu=_STATE,
        vmport=_STATE,
        smm=_of("state", tseg=_text("unit")),
        ioapic=_of("driver"),
        gic=_of("version"),
        pvspinlock=_STATE,
        kvm=Allowed(children={"hidden": _STATE, "hint-dedicated": _STATE, "poll-control": _STATE}),
        hyperv=_of(
            "mode",
            relaxed=_STATE,
            vapic=_STATE,
            spinlocks=_of("state retries"),
            vpindex=_STATE,
            runtime=_STATE,
            synic=_STATE,
            stimer=_of("state", direct=_STATE),
            reset=_STATE,
            vendor_id=_of("state value"),
            frequencies=_STATE,
            reenlightenment=_STATE,
            tlbflush=_STATE,
            ipi=_STATE,
            evmcs=_STATE,
            avic=_STATE,
        ),
    ),
    "clock": _of("offset timezone adjustment basis start", timer=_of("name tickpolicy present track mode frequency")),
    "on_poweroff": _text(texts=("destroy", "restart", "preserve", "rename-restart")),
    "on_reboot": _text(texts=("destroy", "restart", "preserve", "rename-restart")),
    # coredump-destroy and coredump-restart write the guest's memory to the host.
    "on_crash": _text(texts=("destroy", "restart", "preserve", "rename-restart")),
    "pm": Allowed(children={"suspend-to-mem": _of("enabled"), "suspend-to-disk": _of("enabled")}),
    "sysinfo": Allowed(
        attributes=("type",),
        only={"type": ("smbios",)},  # fwcfg reads files
        children={
            "bios": _ENTRIES,
            "system": _ENTRIES,
            "baseBoard": _ENTRIES,
            "chassis": _ENTRIES,
            "oemStrings": _of(entry=_text()),
        },
    ),
}
"""Children of ``<domain>``; ``<os>`` and ``<devices>`` have tables of their own."""

OS = _of(
    type=_text("arch machine"),
    boot=_of("dev"),
    bootmenu=_of("enable timeout"),
    smbios=_of("mode"),
    bios=_of("useserial rebootTimeout"),
    firmware=_of(feature=_of("enabled name")),
)
"""``<os>``. Its loader and NVRAM are files, see `definition`."""

DISK = _of(
    "model",
    target=_of("dev bus tray removable rotation_rate"),
    # A guest that finds sectors of another size finds no partitions.
    blockio=_of("logical_block_size physical_block_size discard_granularity"),
    geometry=_of("cyls heads secs trans"),
    serial=_text(),
    wwn=_text(),
    vendor=_text(),
    product=_text(),
    boot=_of("order"),
    # A SCSI disk without a serial number shows it to the guest, which may mount by it (/dev/disk/by-id).
    alias=_of("name"),
    address=_ADDRESS,
)
"""A ``<disk>`` that was restored. Its source and driver are made anew."""

INTERFACE = Allowed(
    attributes=("type",),
    only={"type": ("network", "bridge", "user", "direct")},
    children={
        "mac": _of("address"),
        "source": _of("network portgroup bridge dev mode"),
        "model": _of("type"),
        "link": _of("state"),
        "mtu": _of("size"),
        "driver": _of("queues"),
        "vlan": _of("trunk", tag=_of("id nativeMode")),
        "virtualport": Allowed(attributes=("type",), only={"type": ("openvswitch",)}),
        "filterref": _of("filter", parameter=_of("name value")),
        "ip": _of("address family prefix peer"),
        "route": _of("family address prefix netmask gateway metric"),
        "boot": _of("order"),
        "address": _ADDRESS,
    },
)

_SERIAL_TARGET = _of("type port", model=_of("name"))

DEVICES: Mapping[str, Allowed] = {
    "controller": _of(
        "type index model ports vectors",
        model=_of("name"),
        target=_of("chassis chassisNr port busNr index hotplug"),
        master=_of("startport"),
        driver=_of("queues"),
        address=_ADDRESS,
    ),
    "input": Allowed(
        attributes=("type", "bus", "model"),
        only={"type": ("mouse", "keyboard", "tablet")},
        children={"address": _ADDRESS},
    ),
    "graphics": Allowed(attributes=("type", "autoport", "keymap"), only={"type": ("vnc", "spice")}),
    "video": _of(
        model=_of("type ram vram vram64 vgamem heads primary", resolution=_of("x y")),
        address=_ADDRESS,
    ),
    "sound": _of("model", codec=_of("type"), address=_ADDRESS),
    "audio": Allowed(attributes=("id", "type"), only={"type": ("none", "spice")}),
    "serial": Allowed(
        attributes=("type",), only={"type": ("pty",)}, children={"target": _SERIAL_TARGET, "address": _ADDRESS}
    ),
    "console": Allowed(
        attributes=("type",), only={"type": ("pty",)}, children={"target": _SERIAL_TARGET, "address": _ADDRESS}
    ),
    # Of a unix channel libvirt chooses the path; the stored one is not taken over.
    "channel": Allowed(
        attributes=("type",),
        only={"type": ("unix", "spicevmc", "pty")},
        children={"target": Allowed(attributes=("type", "name"), only={"type": ("virtio",)}), "address": _ADDRESS},
        needs=("target",),
    ),
    "redirdev": Allowed(attributes=("bus", "type"), only={"type": ("spicevmc",)}, children={"address": _ADDRESS}),
    "hub": _of("type", address=_ADDRESS),
    "watchdog": Allowed(
        attributes=("model", "action"),
        only={"action": ("", "reset", "shutdown", "poweroff", "pause", "none", "inject-nmi")},  # not dump
        children={"address": _ADDRESS},
    ),
    "memballoon": _of("model autodeflate freePageReporting", stats=_of("period"), address=_ADDRESS),
    "rng": Allowed(
        attributes=("model",),
        children={
            "rate": _of("period bytes"),
            "backend": Allowed(
                attributes=("model",),
                text=True,
                only={"model": ("random", "builtin")},
                texts=("", "/dev/urandom", "/dev/random"),
            ),
            "address": _ADDRESS,
        },
        needs=("backend",),
    ),
    "tpm": Allowed(
        attributes=("model",),
        children={
            "backend": Allowed(attributes=("type", "version"), only={"type": ("emulator",)}),
            "address": _ADDRESS,
        },
        needs=("backend",),
    ),
    "panic": _of("model", address=_ADDRESS),
    "iommu": _of("model", driver=_of("intremap caching_mode eim iotlb aw_bits"), address=_ADDRESS),
}
"""Children of ``<devices>``, but for disks and interfaces."""
