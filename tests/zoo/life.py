"""The life of a VM of the table: backed up, written to, restored, replaced; compared with QEMU's own copies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import libvirt

from lab.host import Host
from lab.vm import VM
from tests.zoo.machines import Machine
from tests.zoo.shape import Made, Shape, convert, differing, run, write

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PREFIX = {"virtio": "vd", "ide": "hd"}


def targets(shapes: Sequence[Shape]) -> list[str]:
    """The ID of each shape's disk: vda, …, vdz, vdaa on virtio, sda on SCSI, SATA and USB, hda on IDE."""
    counts: dict[str, int] = {}
    found = []
    for shape in shapes:
        prefix = PREFIX.get(shape.bus, "sd")
        number = counts.get(prefix, 0)
        counts[prefix] = number + 1
        letters = LETTERS[number] if number < 26 else f"a{LETTERS[number - 26]}"
        found.append(f"{prefix}{letters}")
    return found


@dataclass
class Zoo:
    """A VM of the table with its disks, and what they held at each backup."""

    vm: VM
    machine: Machine
    made: dict[str, Made] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    truths: list[dict[str, Path]] = field(default_factory=list)
    writes: int = 0

    def build(self) -> None:
        """Make the disks, and define the VM with them."""
        text = self.vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        root = ElementTree.fromstring(text)
        devices = root.find("devices")
        machine = root.find("os/type")
        assert devices is not None
        assert machine is not None
        machine.set("machine", self.machine.type)
        for kind in ("controller", "watchdog"):  # libvirt adds what the machine needs
            for device in devices.findall(kind):
                devices.remove(device)
        devices.append(ElementTree.fromstring("<controller type='usb' model='qemu-xhci'/>"))
        driver = f"<driver {self.machine.controller}/>" if self.machine.controller else ""
        devices.append(ElementTree.fromstring(f"<controller type='scsi' model='virtio-scsi'>{driver}</controller>"))
        for target, shape in zip(targets(self.machine.shapes), self.machine.shapes, strict=True):
            made = shape.make(self.vm.folder, target)
            self.made[target], self.shapes[target] = made, shape
            devices.append(ElementTree.fromstring(shape.xml(made, target)))
        self._owned()
        if self.machine.variables == "qcow2":
            self._firmware_in_qcow2(root)
        for more in self.machine.more:
            root.append(ElementTree.fromstring(more))
        xml = ElementTree.tostring(root, encoding="unicode")
        # The schema knows fewer names of files than libvirt itself takes. Without it, what is not known is ignored.
        flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE if self.machine.variables != "raw" else 0
        self.vm.domain = self.vm.connection.defineXMLFlags(xml, flags)
        if self.machine.rename is not None:
            self.vm.domain.rename(self.machine.rename(self.vm.name))

    def _firmware_in_qcow2(self, root: Element) -> None:
        for part in ("loader", "nvram"):
            element = root.find(f"os/{part}")
            assert element is not None
            source = Path(element.text if part == "loader" else element.attrib.pop("template"))
            element.text = str(self.vm.folder / f"{part}.qcow2")
            element.set("format", "qcow2")
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, element.text)

    def _owned(self) -> None:
        """QEMU's user must reach what libvirt does not know of."""
        if os.geteuid():
            return
        owner = self.vm.folder.stat()
        for path in self.vm.folder.rglob("*"):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)

    def write(self) -> None:
        """Something on each disk: bytes, zeros, and a part of a sector's cluster."""
        self.writes += 1
        number = self.writes
        commands = (
            f"write -P {0x40 + number} {number * 256}k 64k",
            f"write -z {number * 256 + 1024}k 64k",
            f"write -P {0x80 + number} {(number * 4 + 2048) * 1024} 4k",
        )
        for target, made in self.made.items():
            if not self.vm.active:
                write(made.options, *commands)
            elif not self.shapes[target].off:
                self.vm.io(target, *commands)

    def note(self, folder: Path) -> dict[str, Path]:
        """Copies of all disks, by QEMU's own tools, with the VM at rest."""
        folder.mkdir(parents=True)
        running = self.vm.active and self.vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        if running:
            self.vm.domain.suspend()
        try:
            return {target: convert(made.options, folder / f"{target}.raw") for target, made in self.made.items()}
        finally:
            if running:
                self.vm.domain.resume()

    def turn(self, state: str) -> None:
        """On or off."""
        if (state == "on") is not self.vm.active:
            self.vm.start() if state == "on" else self.vm.destroy()


@dataclass
class Life:
    """The backups of a VM of the table, by the command."""

    host: Host
    zoo: Zoo

    def ask(self, command: str, *arguments: str, **more: Any) -> Any:
        """A command that must succeed without a warning."""
        return self.host.ask(command, *arguments, **more)

    def backup(self, state: str) -> Any:
        """Write, note what the disks hold, back up; all disks are in it, and taken as the table says."""
        zoo, first = self.zoo, not self.zoo.truths
        if not first:
            if state == "off" or zoo.machine.threads:
                zoo.turn("off")
            zoo.write()
        zoo.turn(state)
        before = zoo.vm.domain.ID()
        zoo.truths.append(zoo.note(self.host.folder / "truth" / str(len(zoo.truths))))
        taken = self.ask("backup", "--", zoo.vm.name)
        assert taken["type"] == ("FULL" if first else "INCREMENT"), taken["reason"]
        assert taken["warnings"] == []
        assert {disk["id"] for disk in taken["disks"]} == set(zoo.made)
        if not first:
            wrong = [
                f"{disk['id']} ({zoo.shapes[disk['id']].name}): whole: {disk['reason']}"
                for disk in taken["disks"]
                if zoo.shapes[disk["id"]].whole not in (None, disk["whole"])
            ]
            assert not wrong, "\n".join(wrong)
        assert self.host.left() == []
        assert zoo.vm.domain.ID() == before, "its QEMU has not died"
        return taken

    def same(self, paths: dict[str, Path], truth: dict[str, Path]) -> None:
        """That restored disks, of any format, hold what QEMU read; sizes too."""
        assert set(paths) == set(truth)
        wrong = []
        for target, path in paths.items():
            if said := differing(path, truth[target]):
                wrong.append(f"{target} ({self.zoo.shapes[target].name}): {said}")
        assert not wrong, "\n".join(wrong)

    def restore(self, increment: int, truth: dict[str, Path], *more: str) -> Any:
        """To new files, whose bytes are compared."""
        to = self.host.folder / f"restored-{len(list(self.host.folder.iterdir()))}"
        made = self.ask("restore", "1", "--increment", str(increment), "--to", str(to), *more)
        self.same({disk["id"]: Path(disk["path"]) for disk in made["disks"]}, truth)
        return made

    def refused_in_place(self) -> list[str]:
        """Disks that cannot be replaced are refused by name, with nothing touched; the others."""
        before = {path: path.stat().st_ino for path in self.zoo.vm.folder.rglob("*") if path.is_file()}
        for target, shape in self.zoo.shapes.items():
            if not shape.alone:
                continue
            done = self.host.run("restore", "1", "--in-place", "--disk", target)
            assert done.code == 9, done.err
            assert f"disk {target} {shape.alone}" in done.err, done.err
            assert "--to" in done.err
        assert {path: path.stat().st_ino for path in self.zoo.vm.folder.rglob("*") if path.is_file()} == before
        return [target for target, shape in self.zoo.shapes.items() if not shape.alone]

    def in_place(self, increment: int, truth: dict[str, Path]) -> None:
        """All disks that can be, in the place of the VM's own; it starts with them."""
        self.zoo.turn("off")
        chosen = self.refused_in_place()
        options = [part for target in chosen for part in ("--disk", target)] if len(chosen) < len(truth) else []
        done = self.ask("restore", "1", "--increment", str(increment), "--in-place", *options)
        now = {disk["id"]: Path(disk["path"]) for disk in done["disks"]}
        assert set(now) == set(chosen)
        for target, path in now.items():
            assert path.open("rb").read(4).startswith(b"QFI") is (self.zoo.made[target].format == "qcow2")
        self.same(now, {target: truth[target] for target in chosen})
        self.zoo.turn("on")
        self.zoo.turn("off")


def kept(xml: str) -> dict[str, list[str]]:
    """What the guest sees of its disks, by ID: it must find them as they were."""

    def text(element: Element | None) -> str:
        if element is None:
            return ""
        return f"{element.tag} {sorted(element.attrib.items())} {(element.text or '').strip()}"

    return {
        disk.find("target").get("dev"): [  # type: ignore[union-attr]  # libvirt's own XML has it
            text(disk.find(part)) for part in ("target", "blockio", "geometry", "serial", "wwn", "vendor", "product")
        ]
        for disk in ElementTree.fromstring(xml).iterfind("devices/disk")
    }
