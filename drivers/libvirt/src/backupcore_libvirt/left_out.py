"""What a restored definition leaves out: why, what that does to the guest, and what to do about it.

The one table: `effect_of` sorts by it what was left out, and docs/restored-definition.md is made of it, by

    python -m backupcore_libvirt.left_out > docs/restored-definition.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from backupcore.hypervisor import EFFECTS, Effect

__all__ = ["SECTIONS", "by_effect", "effect_of", "page", "plain"]

_BOOT, _DEVICE, _COSMETIC = EFFECTS


@dataclass(frozen=True, slots=True)
class Row:
    """Paths of a stored definition that are left out, for one reason and with one effect."""

    paths: tuple[str, ...]
    why: str
    instead: str
    effect: Effect = _COSMETIC


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page."""

    title: str
    rows: tuple[Row, ...]


def _row(paths: str, why: str, instead: str, effect: Effect = _COSMETIC) -> Row:
    return Row(tuple(paths.split()), why, instead, effect)


SECTIONS = (
    Section(
        "Identity: a restored VM is another VM",
        (
            _row(
                "uuid",
                "two VMs cannot have one; its backups go by it",
                "`--define --keep-uuid`, where the first VM is gone",
            ),
            _row("genid", "it tells the guest that it is a copy, so it must change", "set `<genid/>`"),
            _row(
                "devices/interface/mac",
                "with `--define` or `--no-ip`: two NICs with one MAC disturb each other. A guest that knows its NIC by "
                "the MAC does not set up the new one",
                "`--define --keep-mac`",
                _DEVICE,
            ),
            _row(
                "devices/interface/ip devices/interface/route devices/interface/filterref/parameter",
                "with `--no-ip` only",
                "leave out `--no-ip`",
            ),
            _row(
                "devices/interface",
                "with `--no-nic`, and of kinds that name host devices, sockets or scripts",
                "add a NIC",
                _DEVICE,
            ),
            _row(
                "metadata/*",
                "what other programs noted of the first VM; our own settings are taken over, and no chain's state is "
                "among them",
                "copy it by hand",
            ),
        ),
    ),
    Section(
        "What belongs to the host that it was on",
        (
            _row(
                "devices/interface/alias",
                "names that libvirt gives, or that scripts of that host use",
                "set them again",
            ),
            _row(
                "devices/serial/address",
                "addresses of kinds that are assigned anew (all but PCI, drive, USB, virtio-serial)",
                "not needed",
            ),
            _row(
                "devices/graphics/@port devices/graphics/@listen devices/graphics/listen",
                "the port may be taken, by the first VM for one; listening is on the loopback",
                "set them again",
            ),
            _row(
                "devices/interface/target devices/interface/@managed",
                "names of the host's network devices",
                "not needed",
            ),
            _row(
                "vcpu/@cpuset cputune numatune iothreads memoryBacking resource devices/disk/iotune",
                "pinning, tuning, huge pages and placement fit one host",
                "set them again where they fit",
            ),
            _row("seclabel", "users and labels of that host", "libvirt labels VMs by itself"),
            _row("devices/emulator", "a program of the host; libvirt chooses its QEMU", "set it again"),
            _row("bootloader", "a program of the host that finds the guest's kernel", "set it again", _BOOT),
            _row(
                "os/loader os/nvram",
                "unless the firmware is in a distribution's folder; others become `firmware='efi'`; the restored NVRAM "
                "is used",
                "set them again",
                _BOOT,
            ),
        ),
    ),
    Section(
        "Files, devices and programs of the host",
        (
            _row(
                "devices/disk",
                "disks that are not in the backup: CD-ROMs, shared ones, those left out",
                "attach them again",
                _DEVICE,
            ),
            _row(
                "devices/disk/*",
                "of a disk that was attached to the running VM only: all but its target, and its bus by that",
                "set it again",
                _DEVICE,
            ),
            _row(
                "devices/disk/backingStore devices/disk/encryption devices/disk/auth",
                "a restored disk is one plain file",
                "not needed; encrypt it anew",
            ),
            _row(
                "devices/disk/readonly devices/disk/shareable devices/disk/transient",
                "of the old disk",
                "set them again",
            ),
            _row(
                "devices/disk/driver/@cache devices/disk/driver/@io devices/disk/driver/@iothread",
                "they fit a storage",
                "set them again",
            ),
            _row(
                "os/kernel os/initrd os/cmdline os/dtb",
                "files of the host, unless they were restored as well",
                "set them again",
                _BOOT,
            ),
            _row("os/acpi", "a file of the host; a guest's licence may hang on that table", "set it again", _DEVICE),
            _row(
                "devices/hostdev devices/filesystem devices/shmem devices/lease devices/smartcard devices/memory "
                "devices/vsock",
                "devices, folders and memory of the host",
                "attach them again",
                _DEVICE,
            ),
            _row(
                "devices/serial devices/console devices/channel devices/redirdev",
                "of kinds other than PTY, guest agent and SPICE: they name files and sockets",
                "set them again",
                _DEVICE,
            ),
            _row(
                "devices/channel/source devices/serial/source devices/serial/log",
                "paths of sockets and logs; libvirt chooses its own",
                "set them again",
            ),
            _row(
                "devices/interface/script devices/interface/backend",
                "programs and files that run or open as root",
                "set them again",
            ),
            _row(
                "devices/rng devices/tpm devices/input devices/audio",
                "of kinds that open devices or files",
                "add one that does not",
                _DEVICE,
            ),
            _row(
                "devices/tpm/backend/encryption",
                "a secret of that host; without it the state of the TPM that was kept cannot be opened",
                "define the secret there (`virsh secret-define`) and name it again",
                _DEVICE,
            ),
            _row("devices/rng/backend/@type", "it tells how a device is opened", "not needed"),
            _row("devices/graphics/@passwd devices/graphics/gl", "a secret; a device of the host", "set them again"),
            _row("devices/watchdog", "where it dumps the guest's memory to a file", "choose another action", _DEVICE),
            _row("on_crash", "where it dumps the guest's memory to a file", "choose another action"),
            _row(
                "sysinfo os/smbios",
                "where the strings are read from files, and with `--redact`; both or none, or libvirt does not start "
                "the VM",
                "set them again",
            ),
            _row("title description", "with `--redact` only", "leave out `--redact`"),
            _row("qemu:commandline", "arguments and environment of QEMU", "add them again", _DEVICE),
        ),
    ),
)

_EFFECTS: Mapping[str, Effect] = {
    path: row.effect for section in SECTIONS for row in section.rows for path in row.paths
}
_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"


def plain(path: str) -> str:
    """A path as the table has it: without the count, the name of a disk, and the namespace."""
    path = path.partition(" (")[0].replace(_QEMU, "qemu:")
    return re.sub(r"\{.*", "*", re.sub(r"\[[^\]]*\]", "", path))


def effect_of(path: str) -> Effect:
    """What it does to the guest that this path of the stored definition was left out.

    Of what the table does not know: a part of the boot, a whole device, or something of the machine itself is taken for
    the worse.
    """
    name = plain(path)
    if name in _EFFECTS:
        return _EFFECTS[name]
    if name.startswith("os/") or name == "launchSecurity":
        return _BOOT
    first, _, rest = name.partition("/")
    if first in ("features", "cpu") or not rest or (first == "devices" and "/" not in rest):
        return _DEVICE
    return _COSMETIC


def by_effect(paths: Iterable[str]) -> dict[Effect, tuple[str, ...]]:
    """These paths by what their loss does to the guest, gravest first; all three effects are there."""
    found: dict[Effect, list[str]] = {effect: [] for effect in EFFECTS}
    for path in paths:
        found[effect_of(path)].append(path)
    return {effect: tuple(listed) for effect, listed in found.items()}


_HEAD = """\
# What a restored definition loses

<!-- Made by: python -m backupcore_libvirt.left_out > docs/restored-definition.md -->

A backup holds the VM's definition as it was. `vmkeep restore` makes a new one of it: with `--define` the VM is
defined at once, otherwise the file is there to be looked through. Whoever can write to a datastore can write a
definition, and a definition decides which files and devices of the host a guest gets. So only what is listed (in
`backupcore_libvirt.allowed`) is taken over; the rest is left out, and **named**: on the terminal after "left out of
the definition", in `--json` under `left_out`, as a path in the stored XML.

What is named is sorted by what its loss does to the guest, in `--json` under `left_out_effects`:

- **will not boot**: what the guest is started by is gone, or another. Put it back before the first start.
- **loses a device**: the guest starts without something that it had.
- **cosmetic**: the guest does not notice, or only that it is another VM.

What belongs to the bytes of the disks is kept: sizes of blocks, geometry, discard granularity, serial numbers, WWNs,
bus, "removable", rotation rate, queues, and the alias that somebody gave to the device.

The tables list what is left out of a VM that has everything. Elements that they do not show are left out just the
same, and named just the same, if this version does not know them.
"""

_TAIL = """\
## Secrets: `--redact`

The definition that a backup stores (`vm.xml`) is libvirt's own, without passwords of graphics and keys. What people
write elsewhere in a definition it holds as it is: arguments and environment of QEMU (`qemu:arg`, `qemu:env`), the
title and the description, other programs' metadata, and the strings of SMBIOS (`sysinfo`). Where there are secrets
among them:

- `vmkeep vm updateconf VM --redact YES`: the backups of this VM store "(redacted)" instead. So nobody who reads the
  datastore sees them, and no restore brings them back. The backups that are there already keep what they hold.
- `vmkeep restore ID --redact`: a restored definition, which may be given to others, gets no title, no description and
  no strings of SMBIOS. (Arguments of QEMU and metadata it never gets.)

The command line of a kernel that is booted from the host (`os/cmdline`) stays in both: without it nothing boots.

## After `--define`

The VM is defined, not started. Look it through with `virsh dumpxml`, and mind what a copy beside the first one shares
with it: the guest's own IP addresses, host name, keys and licences lie on its disks, not in the definition.
"""


def page() -> str:
    """The text of docs/restored-definition.md."""
    lines = [_HEAD]
    for section in SECTIONS:
        lines += [
            f"## {section.title}\n",
            "| left out | effect | why | to have it all the same |",
            "|---|---|---|---|",
            *(
                f"| {', '.join(f'`{path}`' for path in row.paths)} | {row.effect} | {row.why} | {row.instead} |"
                for row in section.rows
            ),
            "",
        ]
    return "\n".join([*lines, _TAIL])


if __name__ == "__main__":
    sys.stdout.write(page())
