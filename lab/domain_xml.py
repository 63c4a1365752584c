"""The XML of the lab's VMs: q35, software emulation, no network, nothing that slows the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

DiskFormat = Literal["qcow2", "raw"]
Bus = Literal["virtio", "sata", "scsi"]


@dataclass(frozen=True, kw_only=True)
class DiskSpec:
    """A disk to make.

    `size` is in bytes. `content` is a raw image that the disk starts as; without it the disk is empty. `compat` is the
    qcow2 version: 0.10 holds no bitmaps. `driver` are further attributes of libvirt's <driver>, such as
    ``error_policy='report'``. With `device` it lies on that block device, which has this size or a larger one.
    """

    target: str
    size: int
    format: DiskFormat = "qcow2"
    bus: Bus = "virtio"
    content: Path | None = None
    compat: Literal["0.10", "1.1"] = "1.1"
    driver: str = ""
    device: Path | None = None


@dataclass(frozen=True)
class Kernel:
    """A Linux to boot: kernel, initramfs and the kernel's command line."""

    image: Path
    initramfs: Path
    arguments: str = "console=ttyS0 quiet mitigations=off nokaslr no_timer_check tsc=unstable panic=-1"


@dataclass(frozen=True)
class Firmware:
    """UEFI firmware: the code, read by every VM, and the template of a VM's own variables."""

    code: Path
    variables: Path


def domain_xml(
    *,
    name: str,
    folder: Path,
    disks: Sequence[tuple[DiskSpec, Path]],
    memory_mib: int,
    kernel: Kernel | None,
    firmware: Firmware | None,
    emulator: Path | None,
    devices: str,
    iothreads: int = 0,
    scsi: str = "",
) -> str:
    """The definition of one VM; its console is written to `folder`/console.log, its variables to `folder`/nvram.fd.

    `scsi` are attributes of the SCSI controller's <driver>.
    """
    boot = ""
    if kernel is not None:
        boot = (
            f"<kernel>{escape(str(kernel.image))}</kernel><initrd>{escape(str(kernel.initramfs))}</initrd>"
            f"<cmdline>{escape(kernel.arguments)}</cmdline>"
        )
    if firmware is not None:
        boot += (
            f"<loader readonly='yes' type='pflash'>{escape(str(firmware.code))}</loader>"
            f"<nvram template={quoteattr(str(firmware.variables))}>{escape(str(folder / 'nvram.fd'))}</nvram>"
        )
    program = f"<emulator>{escape(str(emulator))}</emulator>" if emulator is not None else ""
    return f"""<domain type='qemu'>
  <name>{escape(name)}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <iothreads>{iothreads}</iothreads>
  <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    {program}
    {"".join(_disk_xml(disk, path) for disk, path in disks)}
    <serial type='file'><source path={quoteattr(str(folder / "console.log"))}/></serial>
    <controller type='usb' model='none'/>
    <controller type='scsi' model='virtio-scsi'>{f"<driver {scsi}/>" if scsi else ""}</controller>
    <memballoon model='none'/>
    {devices}
  </devices>
</domain>"""


def _disk_xml(disk: DiskSpec, path: Path) -> str:
    # libvirt keeps an alias of the user's only if it starts with ua-; QEMU's monitor finds the device by it.
    kind, place = ("file", "file") if disk.device is None else ("block", "dev")
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='{disk.format}' discard='unmap' {disk.driver}/>"
        f"<source {place}={quoteattr(str(path))}/><target dev='{disk.target}' bus='{disk.bus}'/>"
        f"<alias name='ua-{disk.target}'/></disk>"
    )
